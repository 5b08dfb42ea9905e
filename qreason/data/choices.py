"""Multiple-choice rows: the choices join the question, the right one becomes a letter."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from qreason.errors import DataError


def ask_choices(
    row: Mapping[str, Any], choices: str | Sequence[str], prompt: str | None, reference: str | None, place: str
) -> dict[str, Any]:
    """A row with its choices written under the question, and the right letter as `reference`.

    `choices` is the column with the list of them, and `reference` then the column with the right one (its place from
    0, its letter or its text); or it is several columns, the first one right, which are shuffled by the question.
    Raises DataError for a row without them.
    """
    if prompt is None:
        return dict(row)  # the caller names the missing column
    if isinstance(choices, str):
        texts = row.get(choices)
        if not isinstance(texts, Sequence) or isinstance(texts, str) or len(texts) < 2 or reference is None:
            raise DataError(f"{place}: '{choices}' must be a list of choices, beside a column with the right one")
        right = find_choice(row[reference], list(texts))
        if right is None:
            raise DataError(f"{place}: '{reference}' names none of the {len(texts)} choices: {row[reference]!r}")
    else:
        if missing := [name for name in choices if not isinstance(row.get(name), str)]:
            raise DataError(f"{place}: no column '{missing[0]}' with a choice; name those there are in data.choices")
        order = list(range(len(choices)))
        random.Random(str(row[prompt])).shuffle(order)
        texts, right = [row[choices[position]].strip() for position in order], order.index(0)
    listed = "\n".join(f"{letter}) {text}" for letter, text in zip(ascii_uppercase, texts, strict=False))
    letter = ascii_uppercase[right]
    accepted = [f"{letter})", f"({letter})", f"{letter}) {texts[right]}"]
    answer = reference if reference else "reference"
    return {**row, prompt: f"{row[prompt]}\n\n{listed}", answer: letter, "accepted": accepted}


def find_choice(answer: Any, texts: Sequence[str]) -> int | None:
    """The place of the right choice, given as a place, a letter or the text."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(texts) else None
    if answer in texts:
        return texts.index(answer)
    letters = ascii_uppercase[: len(texts)]
    return letters.index(answer) if isinstance(answer, str) and len(answer) == 1 and answer in letters else None
