"""Questions answered by the model of a generator: one forward pass over many of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qreason.types import Generator, Messages


class LocalModel:
    """The generator's base, its policy adapter off; with `adapter`, that judge adapter on."""

    def __init__(self, generator: Generator, adapter: Path | None = None) -> None:
        self.generator, self.adapter = generator, adapter

    def ask(self, groups: Sequence[Sequence[Messages]], values: Mapping[str, float]) -> list[list[float | None]]:
        """The expected value of each answer."""
        return [list(group) for group in self.generator.expect(groups, values, adapter=self.adapter)]
