"""Scoring replies that were made elsewhere: `qreason score`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qreason.data.examples import read_accepted
from qreason.data.formats import read_jsonl
from qreason.errors import DataError
from qreason.run.session import Session
from qreason.types import Example, Reply


def score_replies(run: Session, file: Path) -> list[dict[str, Any]]:
    """`id`, `parts` and `total` of every row of a JSONL with id, prompt, reply and reference, in order."""
    replies, examples = [], []
    for place, row in read_jsonl(file):
        for key in ("reply", "reference"):
            if not isinstance(row.get(key), str):
                raise DataError(f"{place}: '{key}' is missing or not text; a row has id, prompt, reply and reference")
        replies.append(Reply(row["reply"]))
        examples.append(
            Example(
                id=str(row.get("id", place)),
                prompt=str(row.get("prompt", "")),
                reference=row["reference"],
                accepted=read_accepted(row, run.recipe.data.fields, place),
                tests=row.get("tests"),
                source=place,
            )
        )
    if not replies:
        raise DataError(f"{file}: no rows; give one reply a line")
    scores = run.rewards.scorer(replies, examples, Path.cwd())
    return [
        {"id": example.id, "parts": score.parts, "total": score.total}
        for example, score in zip(examples, scores, strict=True)
    ]
