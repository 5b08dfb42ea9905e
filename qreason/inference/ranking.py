"""Which of many replies is best: by the model's own likelihood, by a reward, or by the weighted sum of the rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qreason.errors import InputError, nearest
from qreason.rewards.scoring import Scorer
from qreason.types import Example, Generator, Reply

Ranking = Callable[[Sequence[Reply], Sequence[Example]], list[float]]
"""Replies and their examples -> how good each is; minus infinity where that could not be judged."""


def open_ranking(by: str, generator: Generator, scorer: Scorer, folder: Path) -> Ranking:
    """`likelihood`, `total` or the name of one of the scorer's rewards -> the ranking."""
    if by == "likelihood":
        return lambda replies, examples: generator.likelihoods(replies)
    if by == "total":
        return lambda replies, examples: [judged(score.total) for score in scorer(replies, examples, folder)]
    one = Scorer({by: scorer.rewards[by]}, {by: 1.0})
    return lambda replies, examples: [judged(score.parts[by]) for score in one(replies, examples, folder)]


def check_ranking(by: str, scorer: Scorer) -> None:
    """InputError for an unknown ranking."""
    known = ["likelihood", "total", *scorer.rewards]
    if by not in known:
        raise InputError(f"nothing ranks replies by '{by}'{nearest(by, known)}; there are {', '.join(known)}")


def judged(mark: float | None) -> float:
    return float("-inf") if mark is None else mark


def best(marks: Sequence[float]) -> int:
    """The place of the highest mark; the first of equal ones."""
    return max(range(len(marks)), key=lambda place: marks[place])
