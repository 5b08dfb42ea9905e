"""A rollout as the watchdog reads it, its traits, and how their means change between windows of rollouts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qreason.rewards.tags import TAG
from qreason.training.reasoning import Reasoned
from qreason.types import Example, Reply, Score


@dataclass(frozen=True)
class Rollout:
    words: int
    finished: bool
    phrases: frozenset[str]
    expected: frozenset[str]
    """Phrases of the references."""
    parts: dict[str, float]
    text: str
    group: str
    consistent: float | None = None
    """Whether all steps of the reasoning fit, as 1 or 0."""
    gain_nats: float | None = None


Trait = Callable[[Rollout], float]


def read_rollout(reply: Reply, example: Example, score: Score, reasoned: Reasoned) -> Rollout:
    return Rollout(
        words=len(reply.text.split()),
        finished=reply.finished,
        phrases=phrases(TAG.sub(" ", reply.text)),
        expected=frozenset(phrase for text in example.references for phrase in phrases(text)),
        parts={name: part for name, part in score.parts.items() if part is not None},
        text=reply.text,
        group=example.id,
        consistent=None if reasoned.consistent is None else float(reasoned.consistent),
        gain_nats=reasoned.gain_nats,
    )


KEPT = ("text", "finished", "parts", "group", "consistent", "gain_nats")
"""What the rest of a rollout is read from, with its example."""


def write_rollout(rollout: Rollout) -> dict[str, Any]:
    return {name: getattr(rollout, name) for name in KEPT}


def restore_rollout(row: Mapping[str, Any], example: Example) -> Rollout:
    """The rollout that write_rollout gave as JSON values."""
    consistent = None if row["consistent"] is None else bool(row["consistent"])
    reply, reasoned = Reply(row["text"], finished=row["finished"]), Reasoned(consistent, row["gain_nats"])
    return read_rollout(reply, example, Score(None, row["parts"]), reasoned)


def rollouts_with(name: Literal["consistent", "gain_nats"], rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts for which a measure of the reasoning is known."""
    return [rollout for rollout in rollouts if getattr(rollout, name) is not None]


def consistency(rollout: Rollout) -> float:
    return rollout.consistent or 0.0


def gain(rollout: Rollout) -> float:
    return rollout.gain_nats or 0.0


def phrases(text: str) -> frozenset[str]:
    """The words of a text, and all three consecutive ones."""
    words = re.findall(r"\w+", text.lower())
    return frozenset([*words, *(" ".join(words[i : i + 3]) for i in range(len(words) - 2))])


def document_shares(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Phrase -> share of the rollouts that have it."""
    counts = Counter(phrase for rollout in rollouts for phrase in rollout.phrases)
    return {phrase: count / len(rollouts) for phrase, count in counts.items()}


def has_phrase(phrase: str, rollout: Rollout) -> float:
    return float(phrase in rollout.phrases)


def count_words(rollout: Rollout) -> float:
    return float(rollout.words)


def total(weights: Mapping[str, float], rollout: Rollout) -> float:
    """The weighted sum of a rollout's parts, one that could not be judged counted as 0."""
    return sum(weight * rollout.parts.get(name, 0.0) for name, weight in weights.items())


def by_group(rollouts: Sequence[Rollout], trait: Trait) -> list[list[float]]:
    groups: dict[str, list[float]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(trait(rollout))
    return list(groups.values())


def group_means(rollouts: Sequence[Rollout], trait: Trait) -> list[float]:
    """The mean of each group of completions: those to one prompt are no independent evidence."""
    return [mean(values) for values in by_group(rollouts, trait)]


def centred(rollouts: Sequence[Rollout], trait: Trait) -> list[float]:
    """A trait less its mean over the replies to the same prompt, in the order of the groups."""
    return [value - middle for values in by_group(rollouts, trait) for middle in [mean(values)] for value in values]


def part_means(rollouts: Sequence[Rollout], name: str) -> list[float]:
    return group_means([r for r in rollouts if name in r.parts], lambda r: r.parts[name])


def average(rollouts: Sequence[Rollout], name: str) -> float:
    return mean([rollout.parts[name] for rollout in rollouts if name in rollout.parts])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def change(early: Sequence[float], late: Sequence[float]) -> float:
    """The difference of two means in standard errors (Welch's t)."""
    if len(early) < 2 or len(late) < 2:
        return 0.0
    return (mean(late) - mean(early)) / math.sqrt(squared_error(early) + squared_error(late) + 1e-12)


def squared_error(values: Sequence[float]) -> float:
    """The squared standard error of a mean."""
    middle = mean(values)
    return sum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values)


def slope(traits: Sequence[float], marks: Sequence[float]) -> float:
    """How much the mark rises with one standard deviation of the trait."""
    middle, mark = mean(traits), mean(marks)
    spread = math.sqrt(mean([(t - middle) ** 2 for t in traits]))
    return mean([(t - middle) * (m - mark) for t, m in zip(traits, marks, strict=True)]) / spread if spread else 0.0
