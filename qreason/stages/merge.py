"""Merge: adapters folded into their base, as a plain transformers folder that predicts like the trained model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qreason.data.prompts import render, system_prompt
from qreason.errors import ModelError, RunFolderError, TrainingError
from qreason.inference.generate import open_generator
from qreason.machine.files import DRAFT, write_json
from qreason.machine.progress import Bar, progress_bar
from qreason.machine.rows import free_memory
from qreason.model import merging
from qreason.model.load import read_base_config, stored_quantization
from qreason.recipe.sections import Model
from qreason.recipe.settings import Merge
from qreason.rewards.text import correctness
from qreason.run.lock import alone, is_empty
from qreason.run.session import Artifact, Session
from qreason.types import Example, Generator, Reply

COMPARED_REPLIES = 8
MOST_DIVERGENCE = 1e-4
"""Nats per token that the stored model may differ from the trained one before a merge is refused."""
MOST_DIVERGENCE_BFLOAT16 = 1e-2
"""The same for a model that was trained and run in bfloat16, whose rounding alone is more than 1e-4."""
WITHOUT_DATA = ("My printer is offline.", "The disk of the database server is full.", "I cannot log in to my mail.")
"""Prompts for a run without data, such as one with an adapter from the Hub."""


def stage(settings: Merge, run: Session) -> Artifact:
    """Fold adapters into the base in float32, store it, and compare it with the trained model."""
    find_adapters(run, settings)
    folder = run.clear_stage_folder()
    return fold_into(folder, settings, run) if run.backend.name == "plain" else fold_apart(folder, settings, run)


def fold_apart(folder: Path, settings: Merge, run: Session) -> Artifact:
    """The same in another process: Unsloth has replaced the models' code in this one, for the GPU alone."""
    run.release()
    command = [sys.executable, "-m", "qreason", "merge", str(run.folder), "--out", str(folder), "--json"]
    for key, value in settings.model_dump(exclude_defaults=True).items():
        if key == "adapters":
            command += [part for adapter in value for part in ("--adapter", adapter)]
        else:
            text = ",".join(map(str, value)) if key == "weights" else str(value)
            command += [f"--{key.replace('_', '-')}", text]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", env=environment, check=False)
    if done.returncode:
        kind = RunFolderError if done.returncode == RunFolderError.exit_code else TrainingError
        raise kind(f"{folder}: the merge failed; the line above says why")
    return Artifact(folder / "model", summary(json.loads(done.stdout)))


def merge_again(run: Session, settings: Merge, folder: Path | None = None) -> Artifact:
    """Merge a run folder once more, into `merged-…` of it or the folder given; without Unsloth, nothing overwritten."""
    plain = run.recipe.model.model_copy(update={"backend": "plain"})
    run.recipe = run.recipe.model_copy(update={"model": plain})
    name = "-".join(
        ["merged", settings.dtype]
        + [settings.base] * (settings.base != "trained")
        + [Path(adapter.removesuffix("/adapter")).name for adapter in settings.adapters]
        + [settings.blend or ""] * bool(settings.blend)
    )
    own, folder = folder is None, folder or run.folder / name
    if (folder / "merge.json").exists() or (not own and folder.exists() and (folder.is_file() or not is_empty(folder))):
        raise RunFolderError(f"{folder} already exists; remove it, or choose another folder with --out")
    find_adapters(run, settings)
    there = folder.exists() and not own
    with alone(folder):
        for left in [path for path in folder.iterdir() if own and path.is_dir()]:  # of a merge that was cut off
            shutil.rmtree(left)
        try:
            return fold_into(folder, settings, run)
        except BaseException:
            if not there:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def find_adapters(run: Session, settings: Merge) -> list[Path]:
    """The adapters a merge folds: those it names, by stage or folder, or the newest of the run."""
    if not settings.adapters:
        if (newest := run.disk.adapter()) is None:
            raise RunFolderError(f"{run.folder}: nothing to merge yet; run sft or grpo first")
        return [newest]
    found = []
    for name in settings.adapters:
        given = Path(name).expanduser()
        places = (run.folder / name / "adapter", given / "adapter", given)
        folder = next((place for place in places if (place / "adapter_config.json").is_file()), None)
        if folder is None:
            raise ModelError(f"{name}: no adapter there; name a stage of {run.folder}, or the folder of an adapter")
        found.append(folder)
    return found


def fold_into(folder: Path, settings: Merge, run: Session) -> Artifact:
    """`model/` and `merge.json` in a folder; no model where the stored one differs from the trained one."""
    adapters = find_adapters(run, settings)
    base = run.recipe.model.base
    four_bit = run.recipe.model.quantization != "none" and not stored_quantization(read_base_config(base))
    if settings.base == "original" and not four_bit:
        raise RunFolderError(f"{run.folder}: the base is trained as it is stored, there is no other; leave out --base")
    parameters = run.resident.model.num_parameters()
    for adapter in adapters:
        merging.check_adapter(adapter, run.disk.manifest["base"])
    bases = ("trained", "original") if four_bit else ("trained",)
    merging.check_room(folder, parameters, settings.dtype, copies=len(bases))
    with progress_bar("merge", total=3 + 5 * len(bases)) as bar:
        merger = Merger(run, settings, adapters, bar)
        figures = {}
        for kind in bases:
            draft = folder / f"{kind}.{DRAFT}"
            shutil.rmtree(draft, ignore_errors=True)  # of a merge that was cut off
            try:
                figures[kind] = merger.onto(kind, draft)
                if kind == settings.base:
                    draft.rename(folder / "model")
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    report = {
        **settings.model_dump(exclude={"rows", "max_shard_size", "adapters"}),
        "adapters": [str(path.relative_to(run.folder) if run.folder in path.parents else path) for path in adapters],
        "rows": len(merger.rows) if merger.right is not None else 0,
        "right": merger.right,
        "compared_tokens": sum(map(len, merger.predictions)),
        "bases": figures,
    }
    write_json(folder / "merge.json", report)
    return Artifact(folder / "model", summary(report))


class Merger:
    """Holds the trained model's greedy replies, how many are right, and its predictions; compares merges with them."""

    def __init__(self, run: Session, settings: Merge, adapters: Sequence[Path], bar: Bar) -> None:
        self.run, self.settings, self.adapters, self.bar = run, settings, adapters, bar
        self.tokenizer, self.hardware = run.resident.tokenizer, run.resident.hardware
        use = next((use for use in ("heldout", "sft", "prompts") if getattr(run.recipe.data, use)), None)
        rows = run.examples(use) if use else [Example(str(i), text, "") for i, text in enumerate(WITHOUT_DATA)]
        self.rows = rows[: settings.rows if use == "heldout" else COMPARED_REPLIES]
        run.load_adapter()
        replies = greedy(run.generator, self.rows, run)
        bar.advance(2)
        self.right = count_right(self.rows, replies) if use == "heldout" else None
        self.replies = replies[:COMPARED_REPLIES]
        with run.resident.inference() as model:
            self.predictions = merging.log_probabilities(model, self.replies)
        bar.advance(1)

    def onto(self, base: str, draft: Path) -> dict[str, Any]:
        """Store one base with the adapters folded in, read it back, and compare.

        `kl`: from the trained model as it ran. `rounding`: from the same base with the same adapters, unfolded.
        """
        settings, model = self.settings, self.run.recipe.model
        copied = merging.float32_copy(self.run.resident) if base == "trained" else merging.float32_original(model)
        self.run.release()  # the stored model takes its place: a small GPU cannot hold two
        copied = merging.to_gpu(copied, self.hardware)
        adapted = merging.put_on(copied, self.adapters, settings, self.run.recipe.seed)
        unfolded = merging.log_probabilities(adapted, self.replies)
        self.bar.advance(1)
        merging.store(merging.fold(adapted), self.tokenizer, draft, settings, model.base)
        del adapted, copied
        self.bar.advance(2)
        stored = merging.to_gpu(merging.float32_original(Model(base=str(draft))), self.hardware)
        predictions = merging.log_probabilities(stored, self.replies)
        del stored
        free_memory()
        self.bar.advance(1)
        figures = {
            "kl": merging.divergence(self.predictions, predictions),
            "rounding": merging.divergence(unfolded, predictions),
            "right": None,
        }
        if base == settings.base:
            same = base == "trained" and self.adapters == [self.run.disk.adapter()]
            check_divergence(figures, settings, self.hardware.dtype if same else None)
        if self.right is not None:
            merged = open_generator(Model(base=str(draft)))
            figures["right"] = count_right(self.rows, greedy(merged, self.rows, self.run))
        self.bar.advance(1)
        return figures


def greedy(generator: Generator, rows: Sequence[Example], run: Session) -> list[Reply]:
    prompts = [render(example, system_prompt(run.recipe.data)) for example in rows]
    replies = generator.generate(prompts, n=1, sampling=run.recipe.sampling.sampling(greedy=True))
    return [drawn[0] for drawn in replies]


def count_right(rows: Sequence[Example], replies: Sequence[Reply]) -> int:
    return sum(bool(mark) for mark in correctness(replies, rows))


def check_divergence(figures: dict[str, Any], settings: Merge, arithmetic: str | None) -> None:
    """TrainingError where the stored model is not the one that was trained.

    `arithmetic` is the number format the trained model ran in, None where another base or other adapters are merged.
    """
    bars = {"rounding": MOST_DIVERGENCE}
    if arithmetic is not None:
        bars["kl"] = MOST_DIVERGENCE_BFLOAT16 if arithmetic == "bfloat16" else MOST_DIVERGENCE
    for name, most in bars.items():
        if not figures[name] <= most:
            raise TrainingError(
                f"the merged model is not the trained one: KL {figures[name]:.1e} nats per token, at most {most:.0e} "
                f"is allowed; nothing was kept. {settings.dtype} may be too coarse for these weights: try float32"
            )


def summary(report: dict[str, Any]) -> str:
    """One line: on which base, how far from the trained model, how many held-out rows are right."""
    parts = []
    for base, figures in sorted(report["bases"].items(), key=lambda pair: pair[0] != report["base"]):
        what = {"trained": "the base as trained", "original": "the original base"}[base]
        right = "" if figures["right"] is None else f", {figures['right']} of {report['rows']} rows right"
        parts.append(f"on {what}{' (not kept)' * (base != report['base'])}: KL {figures['kl']:.1e}{right}")
    trained = "" if report["right"] is None else f"; trained model {report['right']}"
    return f"{report['dtype']} {'; '.join(parts)}{trained}"
