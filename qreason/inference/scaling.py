"""Inference-time scaling: what more tokens per row buy, from the samples that are there."""

from __future__ import annotations

from collections.abc import Sequence

from qreason.inference.ranking import best
from qreason.inference.voting import pass_at, vote
from qreason.recipe.settings import Evaluate
from qreason.types import Reply

Scaling = dict[str, dict[str, float]]
"""Method (`pass@4`, `cons@16`, …) -> `value`, the share right, and `tokens`, the completion tokens drawn for it."""


def scale(settings: Evaluate, replies: Sequence[Reply], right: Sequence[bool], marks: Sequence[float]) -> Scaling:
    """One row: its samples, which of them are right, and how the ranking marks them (empty without best_of).

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
        row[f"cons@{k}"] = {"value": mean([majority(replies[s], right[s]) for s in groups(n, k)]), "tokens": k * tokens}
    for k in sorted(set(settings.best_of)):
        chosen = [right[s][best(marks[s])] for s in groups(n, k)]
        row[f"best-of-{k}"] = {"value": mean(chosen), "tokens": k * tokens}
    return row


def groups(n: int, k: int) -> list[slice]:
    """As many groups of k as n samples give; what is left over is not used."""
    return [slice(start, start + k) for start in range(0, n - k + 1, k)]


def majority(replies: Sequence[Reply], right: Sequence[bool]) -> bool:
    """Whether the majority's answer is right; no answer at all is not."""
    place = vote(replies)
    return place is not None and right[place]


def mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
