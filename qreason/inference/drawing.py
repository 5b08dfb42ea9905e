"""Drawing the next tokens, and choosing the rows and prompts to continue with."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qreason.types import Sampling

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn: the parameters, the random source, and the tokens that end a row."""

    sampling: Sampling
    source: torch.Generator | None
    stops: Set[int]
    on_tokens: Callable[[list[list[int]]], None] | None = None
    """Gets the token ids of all rows so far, each time some were read."""


def draw(logits: torch.Tensor, sampling: Sampling, source: torch.Generator | None) -> torch.Tensor:
    """The next token of each row, (rows,), from logits (rows, vocabulary)."""
    import torch

    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / sampling.temperature, -1)
    if 0 < sampling.top_k < probabilities.shape[-1]:
        least = probabilities.topk(sampling.top_k).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        cut = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.masked_fill(cut.scatter(-1, order, cut), 0)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    # Inverse transform sampling: the first token whose cumulative probability exceeds a uniform number.
    cumulative = probabilities.cumsum(-1)
    uniform = torch.rand(len(logits), 1, generator=source, device=logits.device) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, uniform, right=True).squeeze(1)
    return tokens.clamp(max=logits.shape[-1] - 1)


def staying(alive: Sequence[bool]) -> list[int]:
    """The rows that continue: the last ones take the places of those that ended."""
    left = sum(alive)
    later = (row for row in range(left, len(alive)) if alive[row])
    return [row if alive[row] else next(later) for row in range(left)]


def take(left: list[tuple[int, int]], most: int) -> tuple[list[int], int, list[tuple[int, int]]]:
    """The next prompts, the number of replies to each, and the remaining work; at most `most` replies at a time."""
    index, replies = left[0]
    if replies > most:
        return [index], most, [(index, replies - most), *left[1:]]
    alike = next((i for i, (_, other) in enumerate(left) if other != replies), len(left))
    count = min(alike, most // replies)
    return [index for index, _ in left[:count]], replies, left[count:]


def up_to(tokens: list[int], stops: Set[int]) -> list[int]:
    """Tokens up to and including the first stop token; the rest is padding."""
    end = next((position for position, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]
