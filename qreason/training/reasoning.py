"""What the reasoning of GRPO's rollouts is worth: whether its steps fit, and the gain in nats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qreason.inference.gain import ReasoningGain
from qreason.rewards.reasoned import is_consistent
from qreason.rewards.steps import ReferenceSteps
from qreason.types import Example, Reply

EVERY, SAMPLE = 5, 8
"""Where no reward measures the gain: every so many steps, of so many replies."""


@dataclass(frozen=True)
class Reasoned:
    """The reasoning of a rollout; None where it was not measured or cannot be."""

    consistent: bool | None = None
    gain_nats: float | None = None


class ReasoningWatch:
    """Measures the reasoning of each step's rollouts, after they are scored."""

    def __init__(self, references: ReferenceSteps, gain: ReasoningGain, *, rewarded: bool) -> None:
        """`rewarded`: a reward has just measured the gain of every rollout."""
        self.references, self.gain, self.rewarded = references, gain, rewarded

    def look(self, step: int, replies: Sequence[Reply], examples: Sequence[Example]) -> list[Reasoned]:
        rows = list(zip(replies, examples, strict=True))
        if not self.rewarded:
            apart = max(1, len(rows) // SAMPLE)  # of different prompts, as far as there are so many
            sample = [row for row in rows[::apart][:SAMPLE] if not row[1].plain] if step % EVERY == 1 else []
            self.gain([reply for reply, _ in sample], [example for _, example in sample])
        return [
            Reasoned(
                None if example.plain else is_consistent(self.references, reply, example), self.gain.of(reply, example)
            )
            for reply, example in rows
        ]


def reasoning_metrics(rollouts: Sequence[Reasoned]) -> Iterator[tuple[str, float]]:
    """(name, value) of the metrics of a step; none where nothing was measured."""
    consistent = [one.consistent for one in rollouts if one.consistent is not None]
    gains = [one.gain_nats for one in rollouts if one.gain_nats is not None]
    if consistent:
        yield "reasoning/consistent", sum(consistent) / len(consistent)
    if gains:
        yield "reasoning/gain_nats", sum(gains) / len(gains)
