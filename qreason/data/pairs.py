"""Preference pairs: from a file, or the best and the worst draw per prompt of a sample step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qreason.data.formats import read_rows
from qreason.errors import DataError
from qreason.recipe.sections import Data
from qreason.types import Pair

COLUMNS = ("prompt", "chosen", "rejected")


def read_pairs(source: str, data: Data) -> list[Pair]:
    """The pairs of a data file or a Hub data set with `prompt`, `chosen` and `rejected`.

    Raises DataError with `file:line` for the first row that is not a pair, or whose replies are equal.
    """
    pairs = [to_pair(row, location) for location, row in read_rows(source, data, "pairs")]
    if not pairs:
        raise DataError(f"{source}: no rows; one pair per line, with prompt, chosen and rejected")
    return pairs


def to_pair(row: dict[str, Any], location: str) -> Pair:
    for column in COLUMNS:
        if column not in row:
            raise DataError(f"{location}: no column '{column}'; a pair has {', '.join(COLUMNS)}")
        if not isinstance(row[column], str):
            raise DataError(f"{location}: '{column}' is {type(row[column]).__name__}, not text")
        if not row[column].strip():
            raise DataError(f"{location}: '{column}' is empty; fill it or remove the row")
    if " ".join(row["chosen"].split()) == " ".join(row["rejected"].split()):
        raise DataError(f"{location}: chosen and rejected are the same reply, so neither is preferred; remove the row")
    about = row.get("about")
    return Pair(row["prompt"], row["chosen"], row["rejected"], None if about is None else str(about), location)


def rank_draws(file: Path, rows: Sequence[dict[str, Any]]) -> list[Pair]:
    """Per prompt, the draw with the highest total preferred to the one with the lowest, if they differ."""
    groups: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for line, row in enumerate(rows, 1):
        if row["total"] is not None and row["reply"].strip():
            groups.setdefault(row["id"], []).append((line, row))
    pairs = []
    for group in groups.values():
        line, best = max(group, key=lambda one: one[1]["total"])
        worst = min(group, key=lambda one: one[1]["total"])[1]
        if best["total"] > worst["total"] and best["reply"].split() != worst["reply"].split():
            pairs.append(Pair(best["prompt"], best["reply"], worst["reply"], source=f"{file}:{line}"))
    if not pairs:
        raise DataError(
            f"{file}: no prompt has replies that earned different totals, so none is better than another; draw more "
            "per prompt (sample.n), at a higher temperature"
        )
    return pairs


def filter_by_topic(pairs: Sequence[Pair], about: str | None) -> list[Pair]:
    """The pairs with this `about`, or all for None. Raises DataError if there are none."""
    chosen = [pair for pair in pairs if about in (None, pair.about)]
    if not chosen:
        known = sorted({str(pair.about) for pair in pairs if pair.about is not None})
        file = pairs[0].source.rpartition(":")[0]
        raise DataError(f"{file}: no pair is about '{about}'; there are {', '.join(known) or 'none'}")
    return chosen


def hold_out(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, held-out pairs); all pairs of a prompt are on the same side.

    Raises DataError if one side would be empty.
    """
    prompts = sorted({pair.prompt for pair in pairs})
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: max(1, round(share * len(prompts)))])
    training = [pair for pair in pairs if pair.prompt not in held_out]
    if not training:
        file = pairs[0].source.rpartition(":")[0]
        raise DataError(f"{file}: {len(prompts)} prompts, a part of them held out; give pairs to more prompts")
    return training, [pair for pair in pairs if pair.prompt in held_out]
