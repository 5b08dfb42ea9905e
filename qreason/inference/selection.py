"""Which of many replies to choose: by majority or by a ranking; and what more samples per row gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from qreason.errors import InputError, nearest
from qreason.recipe.settings import Evaluate
from qreason.rewards.scoring import Scorer
from qreason.rewards.tags import read_answer
from qreason.rewards.text import normalize, read_number
from qreason.types import Example, Generator, Reply

Ranking = Callable[[Sequence[Reply], Sequence[Example]], list[float]]
"""Replies and their examples -> a score each, higher is better; minus infinity for a reply that could not be judged."""
Scaling = dict[str, dict[str, float]]
"""Method (`pass@4`, `cons@16`, …) -> `value`, the share right, and `tokens`, the completion tokens drawn for it."""


def open_ranking(by: str, generator: Generator, scorer: Scorer, folder: Path) -> Ranking:
    """The ranking by `likelihood`, by `total` or by one of the scorer's rewards."""
    if by == "likelihood":
        return lambda replies, examples: generator.likelihoods(replies)

    def or_lowest(score: float | None) -> float:
        return float("-inf") if score is None else score

    if by == "total":
        return lambda replies, examples: [or_lowest(score.total) for score in scorer(replies, examples, folder)]
    one = Scorer({by: scorer.rewards[by]}, {by: 1.0})
    return lambda replies, examples: [or_lowest(score.parts[by]) for score in one(replies, examples, folder)]


def check_ranking(by: str, scorer: Scorer) -> None:
    """InputError for an unknown ranking."""
    known = ["likelihood", "total", *scorer.rewards]
    if by not in known:
        raise InputError(f"unknown ranking '{by}'{nearest(by, known)}; known are {', '.join(known)}")


def best(scores: Sequence[float]) -> int:
    """The index of the highest score; the first of equal ones."""
    return max(range(len(scores)), key=lambda index: scores[index])


def ballot(text: str) -> str:
    """The normalized answer that is counted in a vote; equal numbers are one answer, an empty text is no vote."""
    number = read_number(text)
    return normalize(text) if number is None else f"{number:.12g}"


def vote(replies: Sequence[Reply]) -> int | None:
    """The index of the first reply with the most frequent answer (self-consistency, Wang et al. 2023).

    Of equally frequent answers, the one given first wins. None if no reply has an answer.
    """
    ballots = [ballot(read_answer(reply.text)) for reply in replies]
    given = [text for text in ballots if text]
    return ballots.index(max(given, key=given.count)) if given else None


def votes_for(replies: Sequence[Reply], index: int) -> int:
    """How many replies gave the same answer as the reply at an index."""
    ballots = [ballot(read_answer(reply.text)) for reply in replies]
    return ballots.count(ballots[index])


def pass_at(n: int, right: int, k: int) -> float:
    """The unbiased estimate, from n replies of which `right` are right, of the probability that one of k is right.

    1 - C(n - right, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, equation 1). Raises ValueError for k > n.
    """
    if k > n:
        raise ValueError(f"pass@{k} needs {k} samples, there are {n}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def scale(settings: Evaluate, replies: Sequence[Reply], right: Sequence[bool], scores: Sequence[float]) -> Scaling:
    """The figures of one row, from its samples, which of them are right, and their ranking (empty without best_of).

    pass@k is the unbiased estimate from all samples. cons@k and best-of-n are means over as many groups of k as the
    samples give, in the order in which they were drawn.
    """
    n = len(replies)
    tokens = sum(len(reply.token_ids) for reply in replies) / n
    row: Scaling = {}
    if settings.pass_at or settings.cons_at or settings.best_of or settings.beam:
        row["pass@1"] = {"value": pass_at(n, sum(right), 1), "tokens": tokens}
    for k in sorted(set(settings.pass_at) - {1}):
        row[f"pass@{k}"] = {"value": pass_at(n, sum(right), k), "tokens": k * tokens}
    for k in sorted(set(settings.cons_at)):
        votes = [(group, vote(replies[group])) for group in groups(n, k)]
        agreed = [index is not None and right[group][index] for group, index in votes]
        row[f"cons@{k}"] = {"value": sum(agreed) / len(agreed), "tokens": k * tokens}
    for k in sorted(set(settings.best_of)):
        chosen = [right[group][best(scores[group])] for group in groups(n, k)]
        row[f"best-of-{k}"] = {"value": sum(chosen) / len(chosen), "tokens": k * tokens}
    return row


def groups(n: int, k: int) -> list[slice]:
    """As many groups of k as n samples give; the remainder is not used."""
    return [slice(start, start + k) for start in range(0, n - k + 1, k)]
