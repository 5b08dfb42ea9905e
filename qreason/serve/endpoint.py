"""An OpenAI-compatible endpoint: llama.cpp's own server on the exported file of a run, in this process."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qreason.data.prompts import system_prompt
from qreason.errors import ExportError, InputError, RunFolderError, nearest
from qreason.export.engine import need_engine
from qreason.export.exporter import REPORT
from qreason.export.ollama import LONGEST_CONTEXT
from qreason.machine.files import hash_files, read_json
from qreason.machine.records import Exported
from qreason.recipe.schema import Recipe
from qreason.run.folder import RunFolder

ADAPTER = "adapter"
"""The entry of an export that is no whole model."""
SLOTS = 4
"""Replies that are made in parallel; more requests wait."""


@dataclass(frozen=True)
class Served:
    """A GGUF file, the stage it is of, which is the model's name, and whether its export was verified."""

    file: Path
    stage: str
    verified: bool


def find_export(run: RunFolder, kind: str | None = None) -> Served:
    """The newest export's file of a type, or its recommended one; RunFolderError for one that is missing or changed."""
    steps = [run.path / done["folder"] for done in run.manifest["steps"] if done["stage"] == "export"]
    folders = [folder for folder in (run.path / "export", *steps) if (folder / REPORT).is_file()]
    cure = f"`qreason export {run.path}` makes the files"
    if not folders:
        raise RunFolderError(f"{run.path}: nothing is exported yet; {cure}")
    report = max((folder / REPORT for folder in folders), key=lambda file: file.stat().st_mtime)
    found: dict[str, Any] = read_json(report, Exported, cure)
    files = {name: entry for name, entry in found["files"].items() if name != ADAPTER}
    if not files or (kind and kind not in files):
        known = f"there are {', '.join(files)}" if files else "no file passed its checks"
        asked = f" of type '{kind}'{nearest(kind, files)}" if kind else ""
        raise RunFolderError(f"{report}: no file{asked}; {known}; {cure}")
    recommended = found.get("recommended")
    entry = files[kind or (recommended if recommended in files else next(iter(files)))]
    file = report.parent / entry["file"]
    if not file.is_file() or hash_files([file]) != entry["sha256"]:
        raise RunFolderError(f"{file}: not the file that was exported; {cure}")
    return Served(file, stage_of(run, found["made_of"].get(ADAPTER, "")), bool(found.get("verified")))


def stage_of(run: RunFolder, digest: str) -> str:
    """The stage whose adapter has this hash; the recipe's name where none has."""
    for name in reversed(run.adapters):
        folder = run.path / name / ADAPTER
        if folder.is_dir() and hash_files(sorted(file for file in folder.iterdir() if file.is_file())) == digest:
            return name
    return run.recipe.name


def open_endpoint(served: Served, recipe: Recipe, *, host: str, port: int, token: str) -> Any:
    """Start the server; it answers until this process ends. Its `listening_address` is the URL without /v1.

    InputError for an address that cannot be listened at, MissingExtra without the extra `gguf`.
    """
    need_engine()
    listen(host, port).close()
    import gguf
    import xllamacpp

    header = gguf.GGUFReader(served.file)
    template = str(header.get_field("tokenizer.chat_template").contents())
    architecture = header.get_field("general.architecture").contents()
    context = min(int(header.get_field(f"{architecture}.context_length").contents()), LONGEST_CONTEXT)
    params, draw = xllamacpp.CommonParams(), recipe.sampling
    params.model.path, params.model_alias = str(served.file), {served.stage}
    params.hostnames, params.port, params.api_keys = [host], port, [token]
    params.n_parallel, params.n_ctx, params.n_predict = SLOTS, SLOTS * context, draw.max_completion_length
    params.sampling.temp, params.sampling.top_p = draw.temperature, draw.top_p
    params.sampling.top_k, params.sampling.min_p = draw.top_k, draw.min_p
    params.sampling.penalty_repeat = 1.0
    params.chat_template = with_system(template, system_prompt(recipe.data))
    params.use_jinja, params.ui, params.warmup, params.fit_params = True, False, False, False
    params.no_extra_bufts, params.verbosity = True, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise ExportError(f"{served.file}: llama.cpp cannot serve it ({error})") from None


def with_system(template: str, system: str) -> str:
    """A chat template that puts a system prompt before messages without one."""
    if not system:
        return template
    message = f"{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}"
    return (
        "{%- if messages and messages[0]['role'] != 'system' %}"
        f"{{%- set messages = [{message}] + messages %}}{{%- endif %}}{template}"
    )


def listen(host: str, port: int) -> socket.socket:
    """Listen at an address; InputError where its port is taken, or the host is not an address of this machine."""
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise InputError(
            f"{host}:{port}: {getattr(error, 'strerror', None) or error}; take another one with --port (0: a free one)"
        ) from None
