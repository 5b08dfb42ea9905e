"""Data files and Hub data sets -> examples, with file and line in every error.

The usual column names are recognized automatically (COLUMNS, first match wins); `data.fields` names others. Chats and
instructions have forms of their own (chats.py). A reference with `####` is split as in GSM8K: reasoning before it, the
final answer after.
"""

from __future__ import annotations

import hashlib
import os.path
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import isfinite
from pathlib import Path
from string import ascii_uppercase
from typing import Any, TypeGuard

from qreason.data.chats import CHATS, Chat, bare_columns, form_of, is_chat, read_chat
from qreason.data.formats import read_rows
from qreason.data.prompts import asks_for_reasoning, demonstrate
from qreason.errors import DataError
from qreason.recipe.sections import Data, is_hub_id
from qreason.rewards.tags import TAGS, follows_format
from qreason.types import Example

COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("id",),
    "prompt": ("issue", "prompt", "question"),
    "reference": ("resolution", "reference", "answer", "response"),
    "reasoning": ("steps", "reasoning"),
    "accepted": ("accepted",),
    "category": ("category",),
    "split": ("split",),
    "tests": ("tests", "test"),
}
"""Field of an example -> the columns it may come from."""
MARKER = "####"
MOST_NAMED = 6
"""Columns that a message names."""
FIRST = 100
"""Rows that say which system prompt fits."""


def read_examples(source: str | Path, data: Data | None = None, use: str = "heldout") -> list[Example]:
    """All examples of a source; `use` is `sft`, `sampled`, `prompts`, `heldout` or `plain`.

    Rows of `sft` and `sampled` without reasoning are plain, and all where the system prompt does not ask for it.
    Raises DataError with `file:line` for the first row that cannot be used.
    """
    data = data or Data()
    bare = not asks_for_reasoning(data)
    examples: list[Example] = []
    locations: dict[str, str] = {}
    for location, row in read_rows(source, data, use):
        if not is_selected(row, data, location):
            continue
        if data.choices:
            row = add_choices(row, data, data.choices, location)
        example = to_example(row, data.fields, location)
        plain = use == "plain" or (example.reasoning is None and (bare or use in ("sft", "sampled")))
        system = data.system if example.system is None and use != "plain" else example.system
        if plain or system != example.system:
            example = replace(example, plain=plain, system=system)
        if example.id in locations:
            raise DataError(f"{location}: id '{example.id}' was used at {locations[example.id]}; ids must be unique")
        locations[example.id] = location
        examples.append(example)
    if not examples:
        what = f"no rows with {' and '.join(data.where)} as in data.where" if data.where else "no rows"
        raise DataError(f"{source}: {what}; a data file needs at least one")
    if data.heldout_share and data.heldout in (str(source), os.path.realpath(source)):
        return hold_out(examples, data.heldout_share, use == "heldout", str(source))
    return examples


def hold_out(examples: Sequence[Example], share: float, held_out: bool, source: str) -> list[Example]:
    """The held-out rows, or the others: chats that begin alike are on the same side, whatever other rows there are."""
    starts = [example.history[0][1] if example.history else example.prompt for example in examples]
    places = {start: int(hashlib.sha256(start.encode()).hexdigest()[:12], 16) / 16**12 for start in starts}
    if len(places) < 2:
        raise DataError(f"{source}: all rows begin alike, so none can be held out; leave data.heldout_share out")
    order = sorted(places.values())
    edge = min(max(share, order[0]), order[-2])  # at least one on each side
    return [one for one, start in zip(examples, starts, strict=True) if (places[start] <= edge) == held_out]


def choose_prompt(data: Data, *, hub: bool = True) -> Data:
    """The data with the shipped system prompt that fits their first rows, where neither prompt nor system is given.

    `helpdesk` for rows with an `issue`, `choice` for choices, `none` where nothing that is taught has reasoning,
    otherwise `general`. Without `hub`, the Hub is not asked.
    """
    use = next((use for use in ("sft", "prompts", "heldout") if data.sources.get(use)), None)
    if use is None or data.prompt or data.system or (is_hub_id(data.sources[use]) and not hub):
        return data
    if data.choices:
        return data.model_copy(update={"prompt": "choice"})
    rows = read_rows(data.sources[use], data, use)
    first = list(islice(((place, row) for place, row in rows if is_selected(row, data, place)), FIRST))
    if any("issue" in row for _, row in first):
        return data.model_copy(update={"prompt": "helpdesk"})
    own = any(not form_of(row, data.fields) for _, row in first)
    if (own and use != "sft") or any(to_example(row, data.fields, place).reasoning for place, row in first):
        return data.model_copy(update={"prompt": "general"})
    return data.model_copy(update={"prompt": "none"})


def describe(examples: Sequence[Example]) -> str:
    """The rows of a source in words: how many, of what form, with how much reasoning."""
    count, turns = len(examples), sum(len(example.history) // 2 + 1 for example in examples)
    forms = sorted({example.form for example in examples if example.form})
    chats = len(forms) == 1 and forms[0] in CHATS.values()
    parts = [f"{count} {'chat' if chats else 'row'}{'s' if count > 1 else ''}"]
    parts[0] += f" ({', '.join(forms)})" if forms else ""
    if turns > count or chats:
        mean = f"{turns / count:.1f}".removesuffix(".0")
        parts.append(f"{mean} turn{'s' if mean != '1' else ''} on average")
    reasoned = sum(example.reasoning is not None for example in examples)
    parts.append({0: "no reasoning", count: "all with reasoning"}.get(reasoned, f"{reasoned} with reasoning"))
    return ", ".join(parts)


def is_selected(row: Mapping[str, Any], data: Data, location: str) -> bool:
    """Whether data.where selects a row; DataError for a missing column."""
    for column in data.where:
        if column not in row:
            raise DataError(f"{location}: no column '{column}', which data.where asks for")
    return all(("" if row[column] is None else str(row[column])) in values for column, values in data.where.items())


def to_example(row: Mapping[str, Any], fields: Mapping[Any, str], location: str) -> Example:
    """One row -> Example; DataError names the column that is missing or of the wrong type."""
    chat = read_chat(row, fields, location)
    row, texts = chat.row, read_texts(chat, fields, location)
    reference, reasoning, column = texts["reference"] or "", texts["reasoning"], find_column(row, "reference", fields)
    if MARKER in reference and not chat.form:  # elsewhere it is a heading
        working, _, reference = (part.strip() for part in reference.rpartition(MARKER))
        reasoning = reasoning or working
    if not chat.form:
        reasoning, reference = bare_columns(reasoning, reference)
    if not reference:
        raise DataError(f"{location}: '{column}' has no answer after {MARKER} or in its tags; remove the row")
    file, _, line = location.rpartition(":")
    example = Example(
        id=texts["id"] or f"{Path(file).stem}-{line}",
        prompt=texts["prompt"] or "",
        reference=reference,
        accepted=read_accepted(row, fields, location),
        reasoning=reasoning if (reasoning or "").strip() else None,
        category=texts["category"],
        split=texts["split"],
        tests=texts["tests"],
        system=chat.system,
        history=tuple((turn.role, turn.content) for turn in chat.history),
        unlearned=tuple(place for place, turn in enumerate(chat.history) if not turn.learned),
        form=chat.form,
        source=location,
    )
    if example.reasoning and not follows_format(demonstrate(example)):
        raise DataError(f"{location}: {' or '.join(TAGS)} inside its reasoning or its answer; leave the tags out there")
    return example


def read_texts(chat: Chat, fields: Mapping[Any, str], location: str) -> dict[str, str | None]:
    """The texts of a row by field; DataError where a needed one is missing, or one is no text."""
    row = chat.row
    texts: dict[str, str | None] = {}
    for key in ("prompt", "reference", "reasoning", "id", "category", "split", "tests"):
        column = find_column(row, key, fields)
        value = row[column] if column else None
        required = key in ("prompt", "reference")
        if required and column is None:
            wanted = fields.get(key) or " or ".join(f"'{name}'" for name in COLUMNS[key])
            raise DataError(f"{location}: no {key}: the row has no column {wanted}; {missing_cure(row)}")
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, float) and isfinite(value):
            value = str(value)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{location}: '{column}' is {type(value).__name__}, not text")
        if required and not (value or "").strip():
            raise DataError(f"{location}: '{column}' is empty; fill it or remove the row")
        texts[key] = value
    return texts


def missing_cure(row: Mapping[str, Any]) -> str:
    """What helps a row without a prompt or a reference: a chat is no column that data.fields could name."""
    written = {name.strip().lower(): name for name in row}  # as in the file, where they stand behind the small ones
    if chat := next((name for name in written.values() if is_chat(row[name])), None):
        return f"its column '{chat}' holds a chat: rename it to 'messages'"
    usual = {name for names in COLUMNS.values() for name in names}
    texts = [repr(name) for small, name in written.items() if is_text(row[name]) and small not in usual]
    return f"add it, or name yours in data.fields ({' or '.join(texts[:MOST_NAMED])})" if texts else "add it, as text"


def find_column(row: Mapping[str, Any], key: str, fields: Mapping[Any, str]) -> str | None:
    names = (fields[key],) if key in fields else COLUMNS[key]
    return next((name for name in names if name in row), None)


def read_accepted(row: Mapping[str, Any], fields: Mapping[Any, str], location: str) -> tuple[str, ...]:
    column = find_column(row, "accepted", fields)
    value = row[column] if column else None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DataError(f"{location}: '{column}' must be a list of texts")
    return tuple(value)


def add_choices(row: Mapping[str, Any], data: Data, choices: str | Sequence[str], location: str) -> dict[str, Any]:
    """A multiple-choice row with its choices added to the question, and the letter of the right one as `reference`.

    `choices` is the column with the list of choices, the reference column then names the right one (by its index from
    0, its letter or its text); or several columns, the first one right, which are shuffled with the question as seed.
    Raises DataError for a row without them.
    """
    if form := form_of(row, data.fields):
        raise DataError(
            f"{location}: a row of the form {form} has no choices for data.choices; give the question in a column "
            "'question' and the right choice in 'answer', or leave data.choices out"
        )
    prompt, reference = (find_column(row, key, data.fields) for key in ("prompt", "reference"))
    if prompt is None or not is_text(row[prompt]):
        return dict(row)  # to_example names what is missing
    if isinstance(choices, str):
        texts: Any = row.get(choices)
        if not is_choices(texts) or reference is None:
            raise DataError(
                f"{location}: '{choices}' must be a list of choices, 2 to {len(ascii_uppercase)} texts or numbers, "
                "beside a column with the right one"
            )
        right = find_choice(row[reference], list(texts))
        if right is None:
            raise DataError(f"{location}: '{reference}' names none of the {len(texts)} choices: {row[reference]!r}")
    else:
        if missing := [name for name in choices if not is_text(row.get(name))]:
            raise DataError(f"{location}: no column '{missing[0]}' with a choice; name those there are in data.choices")
        order = list(range(len(choices)))
        random.Random(str(row[prompt])).shuffle(order)
        texts, right = [str(row[choices[position]]).strip() for position in order], order.index(0)
    listed = "\n".join(f"{letter}) {text}" for letter, text in zip(ascii_uppercase, texts, strict=False))
    letter = ascii_uppercase[right]
    accepted = [f"{letter})", f"({letter})", f"{letter}) {texts[right]}"]
    return {**row, prompt: f"{row[prompt]}\n\n{listed}", reference or "reference": letter, "accepted": accepted}


def is_text(value: Any) -> bool:
    """Whether there is a text in a cell, or a number."""
    return isinstance(value, (str, int, float)) and bool(str(value).strip())


def is_choices(texts: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a cell holds choices, of which each gets a letter."""
    listed = isinstance(texts, Sequence) and not isinstance(texts, str) and 2 <= len(texts) <= len(ascii_uppercase)
    return listed and all(map(is_text, texts))


def find_choice(answer: Any, texts: Sequence[str]) -> int | None:
    """The index of the right choice, given as an index, a letter or the text."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(texts) else None
    if answer in texts:
        return texts.index(answer)
    letters = ascii_uppercase[: len(texts)]
    return letters.index(answer) if isinstance(answer, str) and len(answer) == 1 and answer in letters else None


def check_lengths(lengths: Sequence[int], examples: Sequence[Example], room: int, why: str) -> None:
    """DataError for the first example whose tokens do not fit into `room` tokens."""
    for tokens, example in zip(lengths, examples, strict=True):
        if tokens > room:
            raise DataError(f"{example.source}: {tokens} tokens, but {why} leaves {room}; shorten or remove the row")
