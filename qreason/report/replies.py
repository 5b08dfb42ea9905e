"""Which replies a page shows: held-out rows with the replies of all passes, and a few groups of training."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from qreason.machine.files import RESTORE, read_value
from qreason.report.records import Rollout

MOST_ROWS = 400
MOST_BYTES = 1_500_000
"""Of the replies of held-out rows, escaped."""
MOST_TEXT = 4000
"""Characters of one text."""
PER_REPLY = 400
"""Bytes of the page's own around a reply."""
GROUPS = 12
"""Groups of training that are shown per stage."""


def clip(text: str) -> str:
    left = len(text) - MOST_TEXT
    return text if left <= 0 else f"{text[:MOST_TEXT]} […{left:,} more characters]"


def split_answer(text: str) -> tuple[str, str]:
    """The reply up to its answer, and from its first `<answer>` on; nothing is left out."""
    before, tag, after = text.partition("<answer>")
    return (before, tag + after) if tag else ("", before)


def side(after: str, row: dict[str, Any]) -> dict[str, Any]:
    reasoning, answer = split_answer(clip(row["reply"]))
    return {"after": after, "right": row["accurate"], "reasoning": reasoning, "answer": answer} | {
        key: row[key] for key in ("parts", "total")
    }


def side_by_side(names: Sequence[str], passes: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Held-out rows with a reply per pass, in their order; a random sample where all would make the page too large."""
    rows = list(zip(*passes, strict=True))
    places = random.Random(0).sample(range(len(rows)), len(rows))
    chosen: list[tuple[int, dict[str, Any]]] = []
    size = 0
    for place in places[:MOST_ROWS]:
        shown = show_row(names, rows[place])
        size += len(escape(str(shown)).encode()) + PER_REPLY * len(names)
        if size > MOST_BYTES and chosen:
            break
        chosen.append((place, shown))
    return [shown for _, shown in sorted(chosen, key=lambda one: one[0])]


def show_row(names: Sequence[str], together: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = together[0]
    return {
        "id": first["id"],
        "split": first["split"] or "",
        "prompt": clip(first["prompt"]),
        "reference": clip(first["reference"]),
        "marks": "".join({True: "1", False: "0", None: "-"}[row["accurate"]] for row in together),
        "sides": [side(name, row) for name, row in zip(names, together, strict=True)],
    }


def read_rollouts(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a GRPO step's replies.jsonl, one at a time: the file may be larger than memory."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield read_value(f"{file}:{number}", line, Rollout, RESTORE)


def sample_rollouts(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The best and the worst paid reply to one prompt at steps over the whole stage, and how many replies there are."""
    groups, count = [], 0
    for step, rows in groupby(read_rollouts(file), key=lambda row: row["step"]):
        first, *others = rows
        count += 1 + len(others)
        group = [row for row in [first, *others] if row["id"] == first["id"] and row["total"] is not None]
        if group:
            ends = [max(group, key=total), min(group, key=total)]
            groups.append({"step": step, "prompt": first["prompt"], "replies": ends[: len(group)]})
    shown = min(GROUPS, len(groups))
    picked = [groups[round(place * (len(groups) - 1) / max(1, shown - 1))] for place in range(shown)]
    return [
        group
        | {"prompt": clip(group["prompt"])}
        | {
            "replies": [
                dict(zip(("reasoning", "answer"), split_answer(clip(row["reply"])), strict=True))
                | {"total": row["total"], "parts": row["parts"]}
                for row in group["replies"]
            ]
        }
        for group in picked
    ], count


def total(row: dict[str, Any]) -> float:
    return float(row["total"])
