"""A recipe's data as a trainer sees them: rendered prompts, token lengths, what the loss covers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from rich.console import Group
from rich.text import Text

from qreason.data.examples import describe, read_examples
from qreason.data.prompts import lesson, render, system_prompt, teach, unlearned
from qreason.data.turns import reply_spans
from qreason.errors import visible
from qreason.model.load import load_tokenizer
from qreason.recipe.schema import Recipe
from qreason.types import Example

TRAINED = ("sft", "plain")
"""Sources whose replies the loss covers."""


def preview_source(recipe: Recipe, use: str, rows: int) -> Group:
    """The first rows of a source as text (green: covered by the loss), and the token counts of all rows."""
    tokenizer = load_tokenizer(recipe.model.base, thinking=recipe.model.thinking)
    examples = read_examples(getattr(recipe.data, use), recipe.data, use)
    rendered = [render_parts(tokenizer, example, recipe, use) for example in examples]
    counts = [
        sorted(sum(map(len, tokenizer(parts[side::2], add_special_tokens=False)["input_ids"])) for parts in rendered)
        for side in range(2 if use in TRAINED else 1)
    ]
    lines = [Text(f"{use}: {len(examples)} rows of {getattr(recipe.data, use)}", style="bold")]
    lines += [Text(describe(examples)), Text(f"prompt tokens {spread(counts[0])}")]
    if use in TRAINED:
        lines.append(Text(f"reply tokens, covered by the loss {spread(counts[1])}"))
    styles = ("", "green")
    shown = [map(visible, parts) for parts in rendered[:rows]]
    lines += [Text.assemble(*((part, styles[at % 2]) for at, part in enumerate(parts))) for parts in shown]
    return Group(*lines, Text(""))


def render_parts(tokenizer: Any, example: Example, recipe: Recipe, use: str) -> list[str]:
    """A row as the model reads it, in turns: what the loss leaves out, what it covers, and so on."""
    shown, system = replace(example, reasoning=None) if use == "plain" else example, system_prompt(recipe.data)
    if use not in TRAINED:
        return [tokenizer.apply_chat_template(render(example, system), tokenize=False, add_generation_prompt=True)]
    if example.history and not any(step.sft and step.sft.turns == "last" for step in recipe.steps):
        text, spans = reply_spans(tokenizer, lesson(shown, system), example.source, unlearned(example))
        edges = [0, *(edge for span in spans for edge in span)]
        return [text[start:end] for start, end in pairwise(edges)]
    messages, reply = teach(shown, system)
    prompt: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole: str = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": reply}], tokenize=False)
    return [prompt, whole.removeprefix(prompt)]


def spread(counts: list[int]) -> str:
    """Minimum, median and maximum of sorted counts."""
    return f"min {counts[0]}, median {counts[len(counts) // 2]}, max {counts[-1]}"
