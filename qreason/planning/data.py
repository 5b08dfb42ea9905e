"""What the rows of a recipe, taken together, say before a run: rows in training too, columns that are nowhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qreason.recipe.schema import Recipe
from qreason.types import Example


def learned_by_heart(recipe: Recipe, examples: Mapping[str, Sequence[Example]]) -> list[str]:
    """How many of the held-out rows ask what a step trains on, for each source that it reads."""
    read = {use for step in recipe.steps for use in step.settings.reads()}
    asked = {(row.history, row.prompt.strip()): row for row in examples.get("heldout", [])} if "heldout" in read else {}
    notes = []
    for use in sorted(read & examples.keys() - {"heldout"}):
        taught = {(row.history, row.prompt.strip()) for row in examples[use]} & asked.keys()
        if taught:
            count = sum((row.history, row.prompt.strip()) in taught for row in examples["heldout"])
            first = next(row.source for question, row in asked.items() if question in taught)
            notes.append(
                f"{count} of {len(examples['heldout'])} held-out rows ask what data.{use} asks too (as {first}), so "
                "their accuracy shows what was learned by heart: keep them out of training, or part one file in two "
                "with data.heldout_share"
            )
    return notes


def fields_without_column(recipe: Recipe, examples: Mapping[str, Sequence[Example]]) -> list[str]:
    """The columns of data.fields that no row has: those that a row must have are errors when it is read."""
    if not examples or examples.keys() != recipe.data.sources.keys():  # some are on the Hub, or could not be read
        return []
    rows = [row for rows in examples.values() for row in rows]
    return [
        f"data.fields.{key}: no row has a text in a column '{column}'; correct the name, or leave it out"
        for key, column in recipe.data.fields.items()
        if key not in ("id", "prompt", "reference") and not any(getattr(row, key) for row in rows)
    ]
