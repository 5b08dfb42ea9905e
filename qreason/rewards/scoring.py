"""Scoring the replies of a run: all rewards at once, and on failure the reply that caused it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qreason.errors import QReasonError, TrainingError
from qreason.machine.files import write_json
from qreason.rewards.registry import combine
from qreason.types import Example, Reply, Reward, Score


class Scorer:
    """Scores replies with a recipe's rewards; says which reply a failing reward failed on."""

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        self.rewards, self.weights = rewards, weights

    def __call__(self, replies: Sequence[Reply], examples: Sequence[Example], folder: Path) -> list[Score]:
        """Raises TrainingError where a reward raises, and keeps the reply in failed_reply.json of the folder."""
        try:
            return combine(self.rewards, self.weights, replies, examples)
        except QReasonError:
            raise
        except Exception:
            for name, reward in self.rewards.items():
                for reply, example in zip(replies, examples, strict=True):
                    self.score_one(name, reward, reply, example, folder)
            raise

    def score_one(self, name: str, reward: Reward, reply: Reply, example: Example, folder: Path) -> None:
        try:
            reward([reply], [example])
        except Exception as error:
            failed = {"id": example.id, "prompt": example.prompt, "reply": reply.text, "reference": example.reference}
            write_json(folder / "failed_reply.json", {"reward": name, "error": repr(error), **failed})
            raise TrainingError(
                f"reward '{name}' raised {error!r} on a reply to {example.id}; "
                f"the reply is in {folder / 'failed_reply.json'}, no adapter was written"
            ) from error


def reply_row(reply: Reply, example: Example, score: Score) -> dict[str, Any]:
    """A scored reply as it is kept on disk."""
    return {
        "id": example.id,
        "prompt": example.prompt,
        "reply": reply.text,
        "reference": example.reference,
        "parts": score.parts,
        "total": score.total,
    }
