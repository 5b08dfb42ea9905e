"""Shards: one share of a long work, made apart on any machine; without a shard, the same command joins them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from qreason.errors import InputError
from qreason.machine.files import read_jsonl

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Number `number` (from 1) of `of` shards."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def name(self) -> str:
        """In names of files and folders: `2-of-3`."""
        return f"{self.number}-of-{self.of}"

    def share(self, parts: Sequence[T]) -> Sequence[T]:
        """Every `of`th of the parts."""
        return parts[self.number - 1 :: self.of]

    def all(self) -> list[Shard]:
        """This one and the others, in order."""
        return [Shard(number, self.of) for number in range(1, self.of + 1)]


def parse_shard(text: str) -> Shard:
    """`2/3`; InputError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--shard {text}: give i/n with i from 1 to n, such as 2/3")
    return Shard(int(match[1]), int(match[2]))


def find_shards(out: Path) -> list[Path]:
    """OUT.i-of-n, in order; none where no shard was measured. InputError where some are missing."""
    found = [(path, re.fullmatch(r"(\d+)-of-(\d+)", path.name[len(out.name) + 1 :])) for path in out.parent.iterdir()]
    counts = {int(match[2]) for path, match in found if match and path.name.startswith(f"{out.name}.")}
    if not counts:
        return []
    if len(counts) > 1:
        raise InputError(
            f"{out}: there are shards of {' and of '.join(map(str, sorted(counts)))}; remove the older ones"
        )
    shards = Shard(1, counts.pop()).all()
    parts = {shard: out.with_name(f"{out.name}.{shard.name}") for shard in shards}
    if missing := [str(shard) for shard, part in parts.items() if not part.exists()]:
        raise InputError(f"{out}: not measured yet: --shard {', --shard '.join(missing)}")
    return list(parts.values())


def join_shards(parts: Sequence[Path], made_with: dict[str, Any]) -> tuple[list[dict[str, Any]], float]:
    """The rows of all shards in the order of the task, and the seconds they took together."""
    cure = "remove it, and measure this shard again"
    read = [read_jsonl(part, cure=cure) for part in parts]
    seconds = 0.0
    for part, rows in zip(parts, read, strict=True):
        header = rows[0] if rows else {}
        if not isinstance(taken := header.get("seconds"), (int, float)):
            raise InputError(f"{part}: not a shard of an evaluation; {cure}")
        seconds += taken
        if changed := [key for key in made_with if header.get(key) != made_with[key]]:
            raise InputError(f"{part}: made with another {' and '.join(changed)}; remove it, and measure it again")
    shares = [rows for _, *rows in read]
    return [row for turn in zip_longest(*shares) for row in turn if row is not None], seconds
