"""The reward that asks a preference model: a sequence classifier with one output."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict

from qreason.types import Example, Reply, Reward

PreferenceModel = Callable[[Sequence[tuple[str, str]]], list[float | None]]
"""(prompt, reply) pairs -> one number each, higher is preferred."""


class PreferenceSettings(BaseModel):
    """Which preference model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """A sequence classification model with one label, or an adapter of one: a folder or a Hub id."""


def preferred(model: PreferenceModel) -> Reward:
    """0..1: how much the preference model likes the reply to the prompt (the sigmoid of its output).

    Bradley-Terry: the difference of two outputs is the log-odds that the first reply is preferred.
    """

    def reward(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
        return model([(example.prompt, reply.text) for reply, example in zip(replies, examples, strict=True)])

    return reward
