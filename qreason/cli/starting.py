"""A recipe for someone's own data: what is found in a file, written down with comments."""

from __future__ import annotations

import os.path
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qreason.data.examples import choose_prompt, describe, read_examples
from qreason.data.formats import encoding_of, separator_of
from qreason.errors import InputError
from qreason.machine.files import write_text
from qreason.recipe.sections import Data, is_hub_id
from qreason.types import Example

HELDOUT = 0.1
"""The share of rows that are held out."""
EVALUATED = 100
"""Held-out rows that are measured, at most."""
WHY = {
    "helpdesk": "the rows have issues",
    "general": "the rows have reasoning; or your own text with `system:` in its place",
    "none": "no reasoning in the rows, so none is asked for; or your own text with `system:` in its place",
}
"""Shipped system prompt -> why it was chosen."""
TEXT = """\
# {title}
#   qreason run {file}
# Written by `qreason init --from`. Change what you like; `qreason validate` and `qreason plan` check it.
name: {name}
model:
  base: {model}{tiny}
  lora: {{r: 16, alpha: 32}}
data:
  sft: {source}
  heldout: {source}
{options}\
  heldout_share: {share}  # {held_out} of {rows} rows, by a hash of how they begin; training never reads them
  prompt: {prompt}  # {why}
# What replies are measured by after each stage; docs/rewards.md has all.
rewards: {rewards}
sampling: {{max_completion_length: {tokens}}}
steps:
  - evaluate: {{rows: {evaluated}}}
  - sft: {{num_train_epochs: {epochs}, per_device_train_batch_size: 8, learning_rate: 2e-4}}
  - evaluate: {{rows: {evaluated}}}
{grpo}\
  - merge
"""
GRPO = """\
  # Reinforcement learning on the same prompts; data.prompts names them.
  # - grpo: {max_steps: 100, per_device_train_batch_size: 32, num_generations: 8}
"""


@dataclass(frozen=True)
class Found:
    """What is known of a source."""

    data: Data
    training: list[Example]
    heldout: list[Example]

    @property
    def reasoned(self) -> bool:
        return any(example.reasoning for example in self.training)


def write_recipe(source: str, model: str, to: Path, *, force: bool) -> Path:
    """Write `NAME.yaml` for a data file or a Hub data set into a folder; its path.

    Raises DataError where the rows cannot be used, InputError where the recipe already exists.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).stem).strip("-._") or "mine"
    file = to / f"{name}.yaml"
    if file.exists() and not force:
        raise InputError(f"{file} already exists; choose another folder with --to, or replace it with --force")
    found = look(source)
    to.mkdir(parents=True, exist_ok=True)
    write_text(file, recipe_text(found, name, source_for(source, to), model, file))
    return file


def look(source: str) -> Found:
    """Read a source as its recipe will."""
    on_hub = is_hub_id(source) and not os.path.isfile(source)
    where = source if on_hub else os.path.realpath(source)
    options = {"splits": {"heldout": "train"}} if on_hub else sniff(Path(source))
    data = choose_prompt(Data.model_validate({"sft": where, "heldout": where, **options}))
    data = data.model_copy(update={"heldout_share": HELDOUT})
    return Found(data, read_examples(where, data, "sft"), read_examples(where, data, "heldout"))


def sniff(file: Path) -> dict[str, Any]:
    """The data options that a text file needs: encoding and separator, where they are not the usual ones."""
    kind = file.suffix.lower()
    if kind == ".parquet" or not file.is_file():
        return {}
    raw = file.read_bytes()
    encoding = encoding_of(raw)
    options: dict[str, Any] = {} if encoding == "utf-8" else {"encoding": encoding}
    header = raw.decode(encoding, errors="replace").lstrip("\r\n").partition("\n")[0]
    if kind == ".csv" and (mark := separator_of(header, ",")) != ",":
        options["separator"] = mark
    return options


def source_for(source: str, to: Path) -> str:
    """How a recipe in a folder names a source: a file by its path from there."""
    if not os.path.isfile(source):
        return source
    try:
        return os.path.relpath(source, to)
    except ValueError:  # on another drive of Windows
        return os.path.abspath(source)


def recipe_text(found: Found, name: str, source: str, model: str, file: Path) -> str:
    """The recipe with its comments."""
    import yaml

    def written(value: Any) -> str:
        return (
            yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000)
            .removesuffix("\n...\n")
            .strip()
        )

    data, rows = found.data, [*found.training, *found.heldout]
    options = {key: getattr(data, key) for key in ("encoding", "separator", "splits") if key in data.model_fields_set}
    words = max(len(f"{row.reasoning or ''} {row.reference}".split()) for row in rows)
    rewards = {"correctness": 0.1, "format": 0.1, "rouge_l": 0.4, "length": 0.4}
    if data.prompt == "none":
        rewards = {"correctness": 0.1, "rouge_l": 0.5, "length": 0.4}
    return TEXT.format(
        title=f"SFT on {Path(source).name}: {describe(rows)}",
        file=file,
        name=name,
        model=written(model),
        tiny="  # 5 million parameters, for a first try; --set model.base=… takes a Hub id"
        if model == "qreason/tiny"
        else "",
        source=written(source),
        options="".join(f"  {key}: {written(value)}\n" for key, value in options.items()),
        share=HELDOUT,
        held_out=len(found.heldout),
        rows=len(rows),
        prompt=data.prompt,
        why=WHY[str(data.prompt)],
        rewards=written(rewards),
        tokens=min(512, max(32, -(-words * 3 // 32) * 32)),
        evaluated=min(EVALUATED, len(found.heldout)),
        epochs=1 if len(found.training) > 2000 else 3,
        grpo=GRPO if found.reasoned else "",
    )
