"""The rewards for reasoning that does the work: steps that fit what they conclude, and the gain in nats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict, Field

from qreason.errors import DataError
from qreason.rewards.steps import ReferenceSteps, equations_fit
from qreason.rewards.tags import follows_format, read_answer, read_reasoning
from qreason.rewards.text import read_number
from qreason.types import Example, Reply, Reward

Gain = Callable[[Sequence[Reply], Sequence[Example]], list[float | None]]
"""How much the reasoning of each reply helps to predict the reference, in nats; None where it has none."""


class StepsSettings(BaseModel):
    """None: the steps of the data are the references."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GainSettings(BaseModel):
    """How the gain becomes a number of 0..1."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    scale: float = Field(2.0, gt=0)
    """The gain in nats that earns 0.63."""


def check_references(references: ReferenceSteps, examples: Sequence[Example]) -> None:
    """DataError where no step of any reply could be compared with anything; `examples` are the rows of the data."""
    if not any(can_fit(references, example) for example in examples):
        raise DataError(
            "rewards.consistent_steps: no row of data.sft or data.prompts has reasoning with steps and a conclusion, "
            "and no reference is a number, so there is nothing that steps could fit; give data.sft rows with reasoning "
            "of two sentences or more (data.fields.reasoning names their column), or leave the reward out"
        )


def can_fit(references: ReferenceSteps, example: Example) -> bool:
    """Whether there is something that the steps of a reply to this row could fit."""
    return bool(references.findings) or read_number(example.reference) is not None


def step_marks(references: ReferenceSteps, reply: Reply, example: Example) -> list[bool] | None:
    """Whether each equation of a reply is right where the reference is a number, else whether each step fits.

    None where the reasoning has no step or equation, or concludes what no reference reasoning concludes.
    """
    reasoning = read_reasoning(reply.text)
    number = read_number(example.reference) is not None
    marks = equations_fit(reasoning, read_answer(reply.text)) if number else None
    return references.fit(reasoning, example.prompt) if marks is None else marks


def is_consistent(references: ReferenceSteps, reply: Reply, example: Example) -> bool | None:
    """Whether all steps of a well-formed reply fit; None where that cannot be said."""
    marks = step_marks(references, reply, example) if follows_format(reply.text) else None
    return None if marks is None else all(marks)


def steps_reward(references: ReferenceSteps) -> Reward:
    """0..1: the share of the steps that fit: they belong to the conclusion, and their clue stands in the prompt.

    A reply that cannot be checked (no tags, no step, an unknown conclusion) earns 0, so that none evades the reward;
    None for rows without anything to compare with.
    """

    def mark(reply: Reply, example: Example) -> float | None:
        if not can_fit(references, example):
            return None
        marks = step_marks(references, reply, example) or [False]
        return sum(marks) / len(marks)

    return lambda replies, examples: [mark(*row) for row in zip(replies, examples, strict=True)]


def bounded(nats: float | None, scale: float) -> float:
    """What a gain in nats earns: 0..1, 0 where there is none."""
    return 1.0 - math.exp(-max(0.0, nats or 0.0) / scale)


def gain_reward(settings: GainSettings, gain: Gain) -> Reward:
    """0..1: 1 - exp(-gain / scale), 0 for reasoning that does not help (in the line of VeriFree, arXiv 2505.21493).

    A reply without reasoning in its tags earns 0, so that none evades the reward, and so does one with a tag twice or
    out of order: RL alone learnt to put several answers between them. None for rows without a reference. Bounded
    because the gain of a wrong conclusion has no limit and would decide the advantage of its whole group.
    """

    def reward(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
        rows = zip(gain(replies, examples), replies, examples, strict=True)
        return [
            bounded(nats if follows_format(reply.text) else None, settings.scale) if example.reference else None
            for nats, reply, example in rows
        ]

    return reward
