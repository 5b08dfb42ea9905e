"""llama.cpp in separate processes: quantizing, teacher-forced logits, and its server over HTTP."""

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
from typing import Any, Self

import httpx

from qreason.errors import ExportError, MissingExtra
from qreason.machine.progress import progress_bar
from qreason.types import Messages, Reply

PACKAGES = ("gguf", "cyllama", "xllamacpp")
SLOTS = 8
"""Replies that the server makes in parallel."""
GREEDY = {"temperature": 0, "repeat_penalty": 1.0, "samplers": ["temperature"], "cache_prompt": False}
"""All are sent, because the server's defaults may come from the file."""


def need_engine() -> None:
    """MissingExtra where a package of the extra `gguf` is not installed."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise MissingExtra(f"{', '.join(missing)} is missing: pip install 'qreason[gguf]'")


class Worker:
    """A process with one task on one model, as a context manager that ends the process."""

    def __init__(self, task: str, model: Path, **details: Any) -> None:
        self.task = {"task": task, "model": str(model), "threads": os.cpu_count() or 1, **details}

    def __enter__(self) -> Self:
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        command, pipe = [sys.executable, "-m", "qreason.export.worker"], subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, encoding="utf-8")
        assert self.process.stdin
        self.process.stdin.write(json.dumps(self.task) + "\n")
        self.process.stdin.flush()
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def failed(self) -> ExportError:
        """The engine's last message, as one line."""
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        errors = [line for line in lines if "rror" in line or "failed" in line] or lines
        last = errors[-1] if errors else ""
        code = self.process.poll()
        return ExportError(f"{self.task['model']}: llama.cpp ended with {code} in '{self.task['task']}' ({last[:200]})")

    def run(self, on_line: Callable[[int], None]) -> None:
        """Wait until the process ends; ExportError if it fails."""
        assert self.process.stdout
        for _ in self.process.stdout:
            on_line(1)
        if self.process.wait():
            raise self.failed()


def quantize(model: Path, out: Path, kind: str) -> None:
    """A float GGUF file -> one of a K-quant type (`q4_k_m`), by llama.cpp's own quantizer."""
    with progress_bar(f"quantize {kind}") as bar, Worker("quantize", model, out=str(out), kind=kind) as worker:
        worker.run(bar.advance)


def logits(model: Path, replies: Sequence[Reply], folder: Path) -> list[Path]:
    """Teacher-forced logits before each token of the replies: a .npy per reply, (tokens, vocabulary) float32."""
    folder.mkdir(parents=True, exist_ok=True)
    sequences = [
        {"ids": [*reply.prompt_ids, *reply.token_ids[:-1]], "start": len(reply.prompt_ids) - 1} for reply in replies
    ]
    bar = progress_bar(f"{folder.name} logits", total=len(replies))
    with bar as shown, Worker("logits", model, sequences=sequences, out=str(folder)) as worker:
        worker.run(shown.advance)
    return [folder / f"{number}.npy" for number in range(len(replies))]


@dataclass(frozen=True)
class Completion:
    """A greedy reply of llama.cpp: token ids, the stop token included, and whether it stopped by itself."""

    tokens: list[int]
    stopped: bool
    logprobs: list[dict[int, float]]
    """The most probable tokens at each position, where requested: id -> log-probability."""


def logprobs_by_place(answer: dict[str, Any]) -> list[dict[int, float]]:
    """The most probable tokens at each token of a completion; none where the server leaves them out.

    It does so for a token whose bytes begin a character that the next token does not go on with.
    """
    left, places = list(answer.get("completion_probabilities", [])), []
    for token in answer["tokens"]:
        entry = left.pop(0) if left and left[0]["id"] == token else {"top_logprobs": []}
        places.append({one["id"]: one["logprob"] for one in entry["top_logprobs"]})
    return places


class Server(Worker):
    """llama-server on a GGUF file; `lora` is a GGUF adapter on it."""

    def __init__(self, model: Path, context: int, lora: Path | None = None) -> None:
        super().__init__("serve", model, context=context, slots=SLOTS, lora=str(lora) if lora else None)

    def __enter__(self) -> Self:
        super().__enter__()
        assert self.process.stdout
        if not (address := self.process.stdout.readline().strip()):
            self.process.wait()
            error = self.failed()
            super().__exit__()
            raise error
        self.client = httpx.Client(base_url=address, timeout=600, trust_env=False)
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()
        super().__exit__(*exception)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        try:
            answer = self.client.post(path, json=body)
            answer.raise_for_status()
        except httpx.TransportError:
            raise self.failed() from None
        except httpx.HTTPStatusError as error:
            reason = error.response.text[:200]
            raise ExportError(f"{self.task['model']}: llama-server refused {path}: {reason}") from None
        found: dict[str, Any] = answer.json()
        return found

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a rendered prompt, as the server reads it: special tokens known, a BOS if the file has one."""
        ids: list[int] = self.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        return ids

    def render(self, messages: Messages) -> str:
        """Messages through the file's chat template, up to the start of the reply."""
        return str(self.post("/apply-template", messages=messages)["prompt"])

    def complete(self, prompt: Sequence[int], limit: int, top: int = 0, **options: Any) -> Completion:
        """The greedy reply to token ids, at most `limit` tokens."""
        body = {**GREEDY, "prompt": list(prompt), "n_predict": limit, "n_probs": top, "return_tokens": True, **options}
        found = self.post("/completion", **body)
        return Completion(found["tokens"], found["stop_type"] == "eos", logprobs_by_place(found))

    def replies(self, prompts: Sequence[Sequence[int]], limit: int, what: str) -> list[list[int]]:
        """Token ids of the greedy replies to many prompts, SLOTS at a time, in order."""

        def reply(prompt: Sequence[int]) -> list[int]:
            tokens = self.complete(prompt, limit).tokens
            bar.advance(1)
            return tokens

        with progress_bar(what, total=len(prompts)) as bar, ThreadPoolExecutor(SLOTS) as pool:
            return list(pool.map(reply, prompts))
