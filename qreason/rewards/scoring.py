"""Scoring replies with all rewards of a recipe; a failure names the reply that caused it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qreason.errors import QReasonError, TrainingError, kind_and_line
from qreason.machine.files import write_json
from qreason.machine.foreign import place_of
from qreason.rewards.marks import read_marks
from qreason.types import Example, Reply, Reward, Score


@dataclass(frozen=True)
class Restricted:
    """A reward for either the plain or the other rows only; None for the rest, whose total leaves it out."""

    reward: Reward
    plain: bool

    def __call__(self, replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
        values: list[float | None] = [None] * len(replies)
        own = [index for index, example in enumerate(examples) if example.plain == self.plain]
        found = self.reward([replies[index] for index in own], [examples[index] for index in own]) if own else []
        for index, value in zip(own, found, strict=True):
            values[index] = value
        return values


def applies(reward: Reward, example: Example) -> bool:
    """Whether a reward applies to an example's row."""
    return not isinstance(reward, Restricted) or reward.plain == example.plain


class Scorer:
    """Scores replies with a recipe's rewards."""

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        self.rewards, self.weights = rewards, weights

    def __call__(self, replies: Sequence[Reply], examples: Sequence[Example], folder: Path) -> list[Score]:
        """Raises TrainingError where a reward raises, and writes the reply to failed_reply.json in the folder."""
        try:
            return combine(self.rewards, self.weights, replies, examples)
        except Raised as raised:
            for reply, example in zip(replies, examples, strict=True):
                self.score_one(raised.name, reply, example, folder)
            raise TrainingError(f"{raised} on {len(replies)} replies together; no adapter was written") from raised

    def score_one(self, name: str, reply: Reply, example: Example, folder: Path) -> None:
        try:
            ask(name, self.rewards[name], [reply], [example])
        except Raised as raised:
            failed = {"id": example.id, "prompt": example.prompt, "reply": reply.text, "reference": example.reference}
            write_json(folder / "failed_reply.json", {"reward": name, "error": raised.error, **failed})
            raise TrainingError(
                f"{raised} on a reply to {example.id}; "
                f"the reply is in {folder / 'failed_reply.json'}, no adapter was written"
            ) from raised


class Raised(Exception):  # noqa: N818
    """A reward that raised an error."""

    def __init__(self, name: str, error: BaseException) -> None:
        self.name, self.error = name, kind_and_line(error)
        super().__init__(f"reward '{name}' raised {self.error} ({place_of(error)})")


def ask(name: str, reward: Reward, replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
    """What a reward gives, checked: the one place where rewards are called. Raises Raised, or TrainingError."""
    try:
        found = reward(replies, examples)
    except QReasonError:
        raise
    except (Exception, SystemExit) as error:
        raise Raised(name, error) from error
    return read_marks(name, found, examples)


def reply_row(reply: Reply, example: Example, score: Score) -> dict[str, Any]:
    """A scored reply as stored on disk."""
    return {
        "id": example.id,
        "prompt": example.prompt,
        "reply": reply.text,
        "reference": example.reference,
        "parts": score.parts,
        "total": score.total,
    }


def combine(
    rewards: Mapping[str, Reward], weights: Mapping[str, float], replies: Sequence[Reply], examples: Sequence[Example]
) -> list[Score]:
    """Score replies against their examples: every part, and the weighted sum of the parts.

    The total is None if a part that applies to the row is None, because a reply that could not be judged is not a bad
    reply, and if no part applies.
    """
    columns = {name: ask(name, reward, replies, examples) for name, reward in rewards.items()}
    scores = []
    for row, example in enumerate(examples):
        parts = {name: column[row] for name, column in columns.items()}
        own = {name: part for name, part in parts.items() if applies(rewards[name], example)}
        scores.append(Score(total(own, weights) if own else None, parts))
    return scores


def total(parts: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """The weighted sum of the parts; None if one of them is None."""
    result = 0.0
    for name, part in parts.items():
        if part is None:
            return None
        result += weights[name] * part
    return result
