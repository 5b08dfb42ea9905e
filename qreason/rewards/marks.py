"""What a reward returns, checked where it comes in: one finite number per reply, or None where it could not judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from typing import Any

from qreason.errors import TrainingError
from qreason.machine.foreign import TimedOut, within
from qreason.types import Example, Reply


@dataclass(frozen=True)
class Own:
    """A reward of one's own: a call that takes longer than `seconds` ends with a TrainingError."""

    name: str
    function: Callable[..., Any]
    seconds: float

    def __call__(self, replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
        def work() -> list[float | None]:
            return read_marks(self.name, self.function(replies, examples), examples)

        try:
            marks: list[float | None] = within(self.seconds, work)
        except TimedOut as error:
            raise TrainingError(
                f"reward '{self.name}' {error}, with {len(replies)} replies. Raise its call_timeout in the recipe, or "
                "give its own requests a time limit"
            ) from None
        return marks


def read_marks(name: str, found: Any, examples: Sequence[Example]) -> list[float | None]:
    """What a reward returned, as a list: of a tensor, an array or a generator, too. TrainingError for anything else."""
    if hasattr(found, "tolist"):
        found = found.tolist()
    if isinstance(found, (str, bytes, Mapping, Set)) or not isinstance(found, Iterable):
        raise refusal(name, type(found).__name__ if found is not None else "nothing (None)", examples)
    values = list(islice(found, len(examples) + 1))
    if len(values) != len(examples):
        count = f"more than {len(examples)}" if len(values) > len(examples) else str(len(values))
        raise refusal(name, f"{count} values", examples)
    marks = [value if value is None else read_number(value) for value in values]
    for value, mark, example in zip(values, marks, examples, strict=True):
        if mark is not None and not math.isfinite(mark):
            what = f"a {type(value).__name__}" if math.isnan(mark) and not is_number(value) else str(mark)
            raise refusal(name, f"{what} for the reply to {example.id}", examples)
    return marks


def read_number(value: Any) -> float:
    """A number, or a tensor or array with one, as a float; not finite for anything else."""
    if not isinstance(value, Real) and hasattr(value, "item"):
        try:
            value = value.item()
        except (ValueError, RuntimeError):  # more than one number
            return math.nan
    try:
        return float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        return math.inf


def is_number(value: Any) -> bool:
    return isinstance(value, Real) or hasattr(value, "item")


def refusal(name: str, what: str, examples: Sequence[Example]) -> TrainingError:
    return TrainingError(
        f"reward '{name}' returned {what}; a reward returns a list with one finite number for each of the "
        f"{len(examples)} replies, or None for one that it cannot judge"
    )
