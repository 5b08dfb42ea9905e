"""Intervals at 95 %: Wilson for shares, bootstrap over rows for means, paired bootstrap for gains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Interval = dict[str, float | None]
"""`mean`, `low`, `high`; all None where there is nothing to average."""
NOTHING: Interval = {"mean": None, "low": None, "high": None}
RESAMPLES = 10_000
DRAWN_AT_ONCE = 10_000_000
"""Values that a bootstrap holds in memory."""
Z = 1.959964
LEVEL = 0.05
"""The p below which a gain is established."""


def share(hits: Sequence[bool | None]) -> Interval:
    """A share with its Wilson score interval (Wilson 1927); rows without a value are left out."""
    known = [hit for hit in hits if hit is not None]
    n = len(known)
    if n == 0:
        return dict(NOTHING)
    p = sum(known) / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return interval(p, max(0.0, centre - half), min(1.0, centre + half))


def mean(values: Sequence[float | None]) -> Interval:
    """A mean over rows with its percentile bootstrap interval; rows without a value are left out."""
    import numpy

    known = numpy.array([value for value in values if value is not None], dtype=float)
    if len(known) == 0:
        return dict(NOTHING)
    source = numpy.random.default_rng(0)
    size = max(1, DRAWN_AT_ONCE // len(known))
    drawn = (
        known[source.integers(0, len(known), (min(size, RESAMPLES - done), len(known)))].mean(1)
        for done in range(0, RESAMPLES, size)
    )
    means = numpy.concatenate(list(drawn))
    low, high = numpy.percentile(means, [2.5, 97.5])
    return interval(float(known.mean()), float(low), float(high))


def rate(values: Sequence[float | None], least: float = 0.0) -> Interval:
    """The mean over rows of values from `least` to 1, with its interval.

    Where all are equal, a bootstrap has no width, however few they are. Then other values are as frequent at most as by
    Wilson's interval for none in n, and as far away as they can be.
    """
    known = {float(value) for value in values if value is not None}
    if len(known) != 1:
        return mean(values)
    (value,) = known
    others = Z**2 / (sum(one is not None for one in values) + Z**2)
    return interval(value, value - others * (value - least), value + others * (1.0 - value))


def gain(before: Sequence[float | None], after: Sequence[float | None]) -> Interval:
    """The mean difference of paired rows with its bootstrap interval; `direction` says whether it is established.

    Where all rows of shares changed alike, or none did, as by `rate`: few rows do not show that all would.
    """
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    shares = all(0 <= value <= 1 for pair in pairs for value in pair)
    differences = [float(a - b) for b, a in pairs]
    return rate(differences, -1.0) if shares else mean(differences)


def direction(gained: Mapping[str, float | None]) -> int:
    """1 or -1 for an established rise or fall, else 0: the interval excludes 0, and so does the sign test, where made.

    With few rows a bootstrap of the differences is too narrow: three rows that rose of four never give a mean of 0.
    """
    if (gained.get("p") or 0.0) >= LEVEL:
        return 0
    return int((gained["low"] or 0.0) > 0) - int((gained["high"] or 0.0) < 0)


def sign_test(before: Sequence[float | None], after: Sequence[float | None]) -> float:
    """Two-sided p of the exact sign test on paired rows (McNemar's exact test where rows are right or wrong)."""
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    up = sum(a > b for b, a in pairs)
    down = sum(a < b for b, a in pairs)
    n = up + down
    tail, ways = 0, 1
    for k in range(min(up, down) + 1):
        tail, ways = tail + ways, ways * (n - k) // (k + 1)
    return min(1.0, tail / 2 ** (n - 1)) if n else 1.0


def interval(middle: float, low: float, high: float) -> Interval:
    return {"mean": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}
