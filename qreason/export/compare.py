"""How far apart two models are on the same tokens: from logits in files, one reply at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, Any]


@dataclass(frozen=True)
class Distance:
    """`kl` in nats per token, `kl_max` of the worst token, `top1`: share of tokens with the same most probable one."""

    kl: float
    kl_max: float
    top1: float
    logit_difference: float
    """The largest one of all tokens and of the whole vocabulary."""
    largest_logit: float
    tokens: int


def log_softmax(logits: Array) -> Array:
    """In float64: small differences would drown in float32."""
    import numpy

    shifted: Array = logits.astype(numpy.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= numpy.log(numpy.exp(shifted).sum(-1, keepdims=True))
    return shifted


def distance(one: Sequence[Path], other: Sequence[Path]) -> Distance:
    """KL(one || other) and its company, over the logits of the same replies in .npy files."""
    import numpy

    divergences, same, difference, largest = [], 0, 0.0, 0.0
    for first, second in zip(one, other, strict=True):
        a, b = numpy.load(first), numpy.load(second)
        if a.shape != b.shape:
            raise ValueError(f"logits of different shapes: {a.shape} and {b.shape}")
        p, q = log_softmax(a), log_softmax(b)
        divergences.append((numpy.exp(p) * (p - q)).sum(-1))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        difference = max(difference, float(numpy.abs(a - b).max()))
        largest = max(largest, float(numpy.abs(a).max()))
    every = numpy.concatenate(divergences)
    return Distance(float(every.mean()), float(every.max()), same / len(every), difference, largest, len(every))


def top2_margin(logits: Path, token: int) -> float:
    """How far the most probable token is ahead of the second, in logits."""
    import numpy

    first, second = numpy.sort(numpy.load(logits, mmap_mode="r")[token])[:-3:-1]
    return float(first - second)
