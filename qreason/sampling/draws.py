"""The draws of a sample step: stored as they arrive, resumed after an interruption, kept or rejected by rules."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qreason.errors import RunFolderError
from qreason.machine.files import cut_to_lines, read_json, read_jsonl, write_json, write_jsonl
from qreason.machine.records import Draw, Header
from qreason.recipe.settings import Sample
from qreason.rewards.language import language_share
from qreason.rewards.scoring import reply_row
from qreason.rewards.tags import WHOLE, is_strict
from qreason.types import Example, Reply, Score

DRAWS = "draws.jsonl"
"""All draws of a sample step, kept or not."""
SAMPLED = "sampled.jsonl"
"""The kept draws as SFT data."""
SHARDS = "shards"
"""The folder with the draws of each shard, until they are joined."""


Row = dict[str, Any]
"""A row of draws.jsonl."""


@dataclass(frozen=True)
class Drawn:
    """The `number`th reply to an example, and its cost; tokens are 0 if the server did not count them."""

    example: Example
    number: int
    reply: Reply
    prompt_tokens: int
    completion_tokens: int


class Journal:
    """draws.jsonl: one row per draw, appended as they arrive. Its settings are in draws.json."""

    def __init__(self, folder: Path, made_with: Mapping[str, Any]) -> None:
        """Open or start the journal of a folder. Raises RunFolderError if its draws were made with other settings."""
        self.file = folder / DRAWS
        header, again = folder / "draws.json", f"restore it from a copy, or remove {folder} to draw anew"
        folder.mkdir(parents=True, exist_ok=True)
        if header.exists():
            earlier = read_json(header, Header, again)
            if changed := [key for key in made_with if made_with[key] != earlier.get(key)]:
                raise RunFolderError(
                    f"{folder}: its draws were made with other settings ({', '.join(changed)}); set those again to go "
                    "on, or remove the folder to draw anew"
                )
        write_json(header, made_with)
        self.rows: list[Row] = []
        if self.file.exists():
            cut_to_lines(self.file)
            self.rows = read_jsonl(self.file, Draw, again)
        self.clock = time.perf_counter()

    @property
    def done(self) -> set[tuple[str, int]]:
        """(id, number) of each draw."""
        return {(row["id"], row["number"]) for row in self.rows}

    def join(self, other: Journal) -> None:
        """Append the draws of another journal that are not here yet."""
        done = self.done
        rows = [row for row in other.rows if (row["id"], row["number"]) not in done]
        write_jsonl(self.file, rows, append=True)
        self.rows += rows

    def add(self, draws: Sequence[Drawn], scores: Sequence[Score]) -> list[Row]:
        """Append draws, with the wall time per draw since the last call."""
        now = time.perf_counter()
        seconds, self.clock = (now - self.clock) / len(draws), now
        rows = [
            reply_row(drawn.reply, drawn.example, score)
            | {
                "number": drawn.number,
                "finished": drawn.reply.finished,
                "prompt_tokens": drawn.prompt_tokens,
                "completion_tokens": drawn.completion_tokens,
                "seconds": round(seconds, 4),
            }
            for drawn, score in zip(draws, scores, strict=True)
        ]
        write_jsonl(self.file, rows, append=True)
        self.rows += rows
        return rows


class Sieve:
    """Keeps draws by form, length, language and rewards, without duplicates, and at most `per_prompt` per prompt."""

    def __init__(self, settings: Sample) -> None:
        self.settings = settings
        self.seen: set[tuple[str, str]] = set()
        self.kept: Counter[str] = Counter()

    def reason(self, row: Row) -> str | None:
        """Why a draw is rejected; None if it is kept, which then counts against later ones."""
        if why := self.flaw(row):
            return why
        text = (" ".join(row["prompt"].lower().split()), " ".join(row["reply"].lower().split()))
        if text in self.seen:
            return "duplicate"
        if self.settings.per_prompt and self.kept[row["id"]] >= self.settings.per_prompt:
            return f"more than {self.settings.per_prompt} a prompt"
        self.seen.add(text)
        self.kept[row["id"]] += 1
        return None

    def flaw(self, row: Row) -> str | None:
        """Why a draw is rejected regardless of the others, or None."""
        settings, text = self.settings, row["reply"]
        words = len(text.split())
        if not words:
            return "empty"
        if not row["finished"] and text.lstrip().startswith("<think>"):
            return "cut off inside <think>: raise sampling.max_completion_length"
        if not row["finished"]:
            return "cut off at max_completion_length"
        if not is_strict(text):
            return "not in the form <reasoning>…</reasoning><answer>…</answer>"
        if words < settings.least_words:
            return f"shorter than {settings.least_words} words"
        if settings.most_words and words > settings.most_words:
            return f"longer than {settings.most_words} words"
        share = language_share(text, settings.language) if settings.language else None
        if share is not None and share < settings.language_share:
            return f"less than {settings.language_share:g} in language {settings.language}"
        for name, least in settings.keep.items():
            value = row["total"] if name == "total" else row["parts"][name]
            if value is None:
                return f"{name} gave no verdict"
            if value < least:
                return f"{name} below {least:g}"
        return None


def to_sft_row(row: Row) -> Row:
    """A kept draw as a row of SFT data: the reasoning and answer of the reply."""
    match = WHOLE.fullmatch(row["reply"])
    assert match
    reasoning, answer = (part.strip() for part in match.groups())
    return {"id": f"{row['id']}-{row['number']}", "prompt": row["prompt"], "reasoning": reasoning, "reference": answer}
