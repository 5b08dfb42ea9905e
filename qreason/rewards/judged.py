"""The reward that asks a judge model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qreason.rewards.tags import read_answer
from qreason.types import Example, Reply, Reward


def judged(judge: Callable[[Sequence[tuple[str, str]]], list[float]]) -> Reward:
    """0..1: how sure the judge is that the answer says what the reference says. No answer earns 0, unasked."""

    def reward(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
        answers = [read_answer(reply.text) for reply in replies]
        asked = [index for index, answer in enumerate(answers) if answer]
        verdicts = judge([(examples[index].reference, answers[index]) for index in asked])
        marks: list[float | None] = [0.0] * len(replies)
        for index, verdict in zip(asked, verdicts, strict=True):
            marks[index] = verdict
        return marks

    return reward
