"""A recipe's data as a trainer sees them: rendered prompts, token lengths, what the loss covers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.console import Group
from rich.text import Text

from qreason.data.examples import read_examples
from qreason.data.prompts import SYSTEM_PROMPTS, render, teach
from qreason.model.load import load_tokenizer
from qreason.recipe.schema import Recipe
from qreason.types import Example

TRAINED = ("sft", "plain")
"""Sources whose replies the loss covers."""


def preview_source(recipe: Recipe, use: str, rows: int) -> Group:
    """The first rows of a source as text (green: covered by the loss), and the token counts of all rows."""
    tokenizer = load_tokenizer(recipe.model.base)
    examples = read_examples(getattr(recipe.data, use), recipe.data, use)
    rendered = [render_parts(tokenizer, example, recipe, use) for example in examples]
    counts = [
        sorted(len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"])
        for texts in zip(*rendered, strict=True)
    ]
    lines = [Text(f"{use}: {len(examples)} rows of {getattr(recipe.data, use)}", style="bold")]
    lines.append(Text(f"prompt tokens {spread(counts[0])}"))
    if use in TRAINED:
        lines.append(Text(f"reply tokens, covered by the loss {spread(counts[1])}"))
    lines += [Text.assemble(prompt, (reply, "green")) for prompt, reply in rendered[:rows]]
    return Group(*lines, Text(""))


def render_parts(tokenizer: Any, example: Example, recipe: Recipe, use: str) -> tuple[str, str]:
    """(the prompt as the model reads it, the reply that the loss covers)"""
    shown = replace(example, reasoning=None) if use == "plain" else example
    messages, reply = teach(shown, SYSTEM_PROMPTS[recipe.data.prompt])
    if use not in TRAINED:
        messages, reply = render(example, SYSTEM_PROMPTS[recipe.data.prompt]), ""
    prompt: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not reply:
        return prompt, ""
    whole: str = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": reply}], tokenize=False)
    return prompt, whole.removeprefix(prompt)


def spread(counts: list[int]) -> str:
    """Minimum, median and maximum of sorted counts."""
    return f"min {counts[0]}, median {counts[len(counts) // 2]}, max {counts[-1]}"
