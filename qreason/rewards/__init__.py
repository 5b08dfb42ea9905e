"""The rewards by name, and how they combine.

A reward takes replies and examples and returns one number a reply, or None where it could not judge.
To add one: write the function in a file of this folder and give it a line in REWARDS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from qreason.rewards.judged import judged
from qreason.rewards.tags import format_tags
from qreason.rewards.text import correctness, length, rouge_l
from qreason.types import Example, Reply, Reward, Score

Judge = Callable[[Sequence[tuple[str, str]]], list[float]]
"""(reference, response) pairs -> 0..1 each."""

REWARDS: dict[str, Reward] = {
    "correctness": correctness,
    "format": format_tags,
    "rouge_l": rouge_l,
    "length": length,
}
"""Rewards that need nothing but the reply and its example."""

MODEL_REWARDS: dict[str, Callable[[Judge], Reward]] = {"judge": judged}
"""Rewards that ask a model: built with it."""

NAMES = (*REWARDS, *MODEL_REWARDS)

FULL_MARKS: dict[str, float] = {"correctness": 2.0, "format": 0.8, "rouge_l": 1.0, "length": 1.0}
"""What a gold reply earns from each rule reward."""


def build(names: Sequence[str], judge: Judge | None) -> dict[str, Reward]:
    """The rewards of a recipe; `judge` may be None when no reward needs it."""
    rewards: dict[str, Reward] = {}
    for name in names:
        if name in REWARDS:
            rewards[name] = REWARDS[name]
        elif judge is not None:
            rewards[name] = MODEL_REWARDS[name](judge)
        else:
            raise ValueError(f"reward '{name}' needs a judge")
    return rewards


def combine(
    rewards: Mapping[str, Reward],
    weights: Mapping[str, float],
    replies: Sequence[Reply],
    examples: Sequence[Example],
) -> list[Score]:
    """Score replies against their examples: every part, and the weighted sum of the parts.

    The total is None as soon as one part is None: a reply that could not be judged is not a bad reply.
    """
    columns = {name: reward(replies, examples) for name, reward in rewards.items()}
    scores = []
    for row in range(len(replies)):
        parts = {name: column[row] for name, column in columns.items()}
        scores.append(Score(total(parts, weights), parts))
    return scores


def total(parts: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """The weighted sum of the parts; None as soon as one of them is None."""
    result = 0.0
    for name, part in parts.items():
        if part is None:
            return None
        result += weights[name] * part
    return result
