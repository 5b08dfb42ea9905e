"""What a generator has made so far, kept in a file: work that is cut off goes on as if it had not been."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qreason.errors import RunFolderError
from qreason.machine.files import read_value, write_jsonl
from qreason.machine.records import Kept
from qreason.machine.rows import Rows

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
MIRRORED = 300.0
"""Seconds between two copies to the mirror."""


class Journal:
    """A line per batch, in the order of the work: what it was asked, what it made, and the random source after it.

    The same work asks the same again. Where it asks something else, that line and those after it are dropped.
    """

    def __init__(self, file: Path, model: str, mirror: Callable[[], None] | None = None) -> None:
        """`model` identifies the weights; `mirror` is called now and then."""
        self.file, self.model, self.mirror = file, model, mirror
        self.kept = deque(read_kept(file))
        self.found = len(self.kept)
        self.seconds = 0.0
        """What the batches took that were read and not made."""
        self.clock = self.mirrored = time.monotonic()

    def attempt(
        self, rows: Rows, work: Callable[[], list[T]], count: int, asked: Any, source: torch.Generator | None
    ) -> list[T] | None:
        """What was kept of this work, or what it makes now, as `rows.attempt` does."""
        key = digest(repr((self.model, asked)))
        if self.kept:
            start, line = self.kept[0]
            if line["most"] < rows.most:  # memory ran out before this batch
                rows.most = line["most"]
                return None
            if line["key"] == key:
                return self.recall(source)
            self.kept.clear()
            os.truncate(self.file, start)
        made = rows.attempt(work, count)
        if made is not None:
            self.add(key, rows.most, made, source)
        return made

    def recall(self, source: torch.Generator | None) -> list[Any]:
        import torch

        _, line = self.kept.popleft()
        self.seconds += line["seconds"]
        self.clock = time.monotonic()
        if source is not None and line["random"] is not None:
            source.set_state(torch.frombuffer(bytearray.fromhex(line["random"]), dtype=torch.uint8))
        return line["made"]

    def add(self, key: str, most: int, made: list[Any], source: torch.Generator | None) -> None:
        now = time.monotonic()
        line = {
            "key": key,
            "most": most,
            "seconds": round(now - self.clock, 3),
            "random": None if source is None else bytes(source.get_state().tolist()).hex(),
            "made": made,
        }
        write_jsonl(self.file, [{**line, "sum": digest(line)}], append=True)
        self.clock = now
        if self.mirror and now - self.mirrored > MIRRORED:
            self.mirror()
            self.mirrored = time.monotonic()


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def read_kept(file: Path) -> list[tuple[int, Kept]]:
    """(start in bytes, line) for each line of a journal, up to one that is damaged: there the file then ends."""
    kept: list[tuple[int, Kept]] = []
    start = 0
    if not file.exists():
        return kept
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            entry = read_value(file, line.decode("utf-8"), Kept, "")
        except (RunFolderError, UnicodeDecodeError):
            break
        if entry.pop("sum") != digest(entry):
            break
        kept.append((start, entry))
        start += len(line) + 1
    os.truncate(file, start)
    return kept
