"""llama.cpp, each use in a process of its own: quantizing, teacher-forced logits, and its server over HTTP."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from qreason.errors import ExportError, MissingExtra
from qreason.types import Messages

PACKAGES = ("gguf", "cyllama", "xllamacpp")
SLOTS = 8
"""Replies the server makes side by side."""
REPLIES = 20
TOKENS = 50
"""How many replies are compared token by token, and how much of each."""
GREEDY = {"temperature": 0, "repeat_penalty": 1.0, "samplers": ["temperature"], "cache_prompt": False}
"""Each of them said: the server's defaults may come from the file."""


def need_engine() -> None:
    """MissingExtra where a package of the extra `gguf` is not installed."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise MissingExtra(f"{', '.join(missing)} is missing: pip install 'qreason[gguf]'")


@dataclass(frozen=True)
class Exchange:
    """Token ids of a prompt and its reply; the reply begins at `start`."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Completion:
    """A greedy reply of the engine: token ids (the stop token included), and whether it stopped by itself."""

    tokens: list[int]
    text: str
    stopped: bool
    logprobs: list[dict[int, float]]
    """Of each token the most probable ones, where they were asked for: id -> log-probability."""


def logits_bytes(vocabulary: int) -> int:
    """What the compared logits of one model take on disk."""
    return REPLIES * TOKENS * vocabulary * 4


def start_worker(task: dict[str, Any], errors: Any) -> subprocess.Popen[str]:
    threads = os.cpu_count() or 1
    worker = subprocess.Popen(
        [sys.executable, "-m", "qreason.export.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        encoding="utf-8",
    )
    assert worker.stdin
    worker.stdin.write(json.dumps({"threads": threads, **task}) + "\n")
    worker.stdin.flush()
    return worker


def failed(task: dict[str, Any], errors: Any, code: int | None) -> ExportError:
    """What the engine said last, as one line."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if "rror" in line or "failed" in line), lines[-1] if lines else "")
    return ExportError(f"{task['model']}: llama.cpp ended with {code} in '{task['task']}' ({said[:200]})")


def run_worker(task: dict[str, Any], on_line: Callable[[], None] = lambda: None) -> None:
    """Run a task to its end; ExportError with the engine's last words if it fails."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        worker = start_worker(task, errors)
        assert worker.stdin
        assert worker.stdout
        try:
            worker.stdin.close()
            for _ in worker.stdout:
                on_line()
            code = worker.wait()
        finally:
            worker.kill()
            worker.wait()
            worker.stdout.close()
        if code:
            raise failed(task, errors, code)


def quantize(model: Path, out: Path, kind: str) -> None:
    """A float GGUF file -> one of a K-quant type (`q4_k_m`), by llama.cpp's own quantizer."""
    run_worker({"task": "quantize", "model": str(model), "out": str(out), "kind": kind})


def logits(
    model: Path, exchanges: Sequence[Exchange], folder: Path, on_line: Callable[[], None] = lambda: None
) -> list[Path]:
    """Teacher-forced logits before each token of the replies: a .npy a reply, (tokens, vocabulary) float32."""
    folder.mkdir(parents=True, exist_ok=True)
    sequences = [{"ids": exchange.ids[:-1], "start": exchange.start - 1} for exchange in exchanges]
    run_worker({"task": "logits", "model": str(model), "sequences": sequences, "out": str(folder)}, on_line)
    return [folder / f"{number}.npy" for number in range(len(exchanges))]


class Server:
    """llama-server on a GGUF file, as a context; `lora` is a GGUF adapter on it."""

    def __init__(self, model: Path, context: int, lora: Path | None = None) -> None:
        self.task = {
            "task": "serve",
            "model": str(model),
            "context": context,
            "slots": SLOTS,
            "lora": str(lora) if lora else None,
        }

    def __enter__(self) -> Self:
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.worker = start_worker(self.task, self.errors)
        assert self.worker.stdout
        address = self.worker.stdout.readline().strip()
        if not address:
            self.worker.kill()
            raise failed(self.task, self.errors, self.worker.wait())
        self.client = httpx.Client(base_url=address, timeout=600, trust_env=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self.worker.kill()
        self.worker.communicate()
        self.errors.close()

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        try:
            answer = self.client.post(path, json=body)
            answer.raise_for_status()
        except httpx.TransportError:
            raise failed(self.task, self.errors, self.worker.poll()) from None
        except httpx.HTTPStatusError as error:
            raise ExportError(
                f"{self.task['model']}: llama-server refused {path}: {error.response.text[:200]}"
            ) from None
        found: dict[str, Any] = answer.json()
        return found

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a rendered prompt, as the server reads it: special tokens known, a BOS if the file says so."""
        ids: list[int] = self.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        return ids

    def render(self, messages: Messages) -> str:
        """The file's own chat template on messages, up to where the assistant begins."""
        return str(self.post("/apply-template", messages=messages)["prompt"])

    def complete(self, prompt: list[int], limit: int, top: int = 0, **options: Any) -> Completion:
        """The greedy reply to token ids, at most `limit` tokens."""
        body = {**GREEDY, "prompt": prompt, "n_predict": limit, "n_probs": top, "return_tokens": True, **options}
        found = self.post("/completion", **body)
        logprobs = [
            {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}
            for token in found.get("completion_probabilities", [])
        ]
        return Completion(found["tokens"], found["content"], found["stop_type"] == "eos", logprobs)

    def replies(
        self, prompts: Sequence[list[int]], limit: int, on_reply: Callable[[], None] = lambda: None
    ) -> list[Completion]:
        """Greedy replies to many prompts, SLOTS at a time, in order."""

        def reply(prompt: list[int]) -> Completion:
            completion = self.complete(prompt, limit)
            on_reply()
            return completion

        with ThreadPoolExecutor(SLOTS) as pool:
            return list(pool.map(reply, prompts))
