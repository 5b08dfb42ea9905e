"""The reward that asks a preference model: a sequence classifier with one output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from qreason.rewards.tags import TAG, read_answer
from qreason.types import Example, Reply, Reward

PreferenceModel = Callable[[Sequence[tuple[str, str]]], list[float | None]]
"""(prompt, reply) pairs -> one number each, higher is preferred."""


class PreferenceSettings(BaseModel):
    """Which preference model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """A sequence classification model with one label, or an adapter of one: a folder, a Hub id, or in a grpo step an
    earlier preference step of the run by its folder, as `02-preference`."""
    reads: Literal["reply", "answer"] = "reply"
    """The whole reply, or what stands between the answer tags alone (a reply without tags is all answer)."""


def preference_reward(settings: PreferenceSettings, model: PreferenceModel) -> Reward:
    """0..1: how much the preference model likes the reply to the prompt (the sigmoid of its output).

    Bradley-Terry: the difference of two outputs is the log-odds that the first reply is preferred.
    """

    def reward(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
        texts = [reply.text for reply in replies]
        if settings.reads == "answer":
            texts = [read_answer(text) if TAG.search(text) else text for text in texts]
        return model([(example.prompt, text) for text, example in zip(texts, examples, strict=True)])

    return reward
