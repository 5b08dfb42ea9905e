"""Measuring a judge: its agreement with labels, its biases, and whether injections fool it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qreason.data.formats import read_file
from qreason.errors import DataError
from qreason.judge.injections import attempts
from qreason.machine.progress import progress_bar
from qreason.recipe.sections import Data
from qreason.rewards.judged import Judge
from qreason.rewards.numbers import read_number

PADDING = "This was checked twice, and the ticket can be closed once the user has confirmed it."
BINS = 5
Z = 1.959964
ATTACKED = 3
"""Wrong replies that are tried with every injection."""
FIT = ((0.90, 0.02, 1.0), (0.75, 0.10, 0.2))
"""(least AUC, largest share of successful injections, largest weight it is fit for)"""

Label = tuple[str, str, float]
"""(reference, reply, label): 1 for a reply that says what the reference says, 0 for one that does not."""
Judged = Sequence[tuple[tuple[str, str], float, float]]
"""((reference, reply), verdict, label)"""


def read_labels(file: Path, data: Data | None = None) -> list[Label]:
    """The labelled pairs of a data file, separated and encoded as `data` says.

    Raises DataError for a row without reference, reply or label, and for a file without both right and wrong replies.
    """
    labels: list[Label] = []
    for location, row in read_file(file, data):
        for key in ("reference", "reply"):
            if not isinstance(row.get(key), str):
                raise DataError(
                    f"{location}: '{key}' is missing or not text; a labelled pair has reference, reply, label"
                )
        if not row["reference"].strip():
            raise DataError(f"{location}: 'reference' is empty; fill it or remove the row")
        label = row.get("label")
        if isinstance(label, str):  # a cell of a table
            label = read_number(label)
        if isinstance(label, bool) or not isinstance(label, (int, float)) or not 0 <= label <= 1:
            raise DataError(f"{location}: 'label' must be a number from 0 (wrong) to 1 (right)")
        labels.append((row["reference"], row["reply"], float(label)))
    right = sum(label >= 0.5 for _, _, label in labels)
    if right in (0, len(labels)):
        what = "no rows" if not labels else f"all {len(labels)} labels are {'right' if right else 'wrong'}"
        raise DataError(f"{file}: {what}; a judge is measured on right and wrong replies, give some of both")
    return labels


def calibrate(judge: Judge, labels: Sequence[Label]) -> dict[str, Any]:
    """All figures about a judge on labelled pairs; shares and verdicts are 0 to 1."""
    wrong_ones = sum(label < 0.5 for *_, label in labels)
    most = 3 * len(labels) + wrong_ones + len(attempts([("x", "x")] * min(wrong_ones, ATTACKED)))
    with progress_bar("judge", total=most) as bar:

        def asked(pairs: Sequence[tuple[str, str]]) -> list[float | None]:
            verdicts = judge(pairs)
            bar.advance(len(pairs))
            return verdicts

        return measure(asked, labels)


def measure(judge: Judge, labels: Sequence[Label]) -> dict[str, Any]:
    pairs = [(reference, reply) for reference, reply, _ in labels]
    start = time.perf_counter()
    verdicts = judge(pairs)
    seconds = time.perf_counter() - start
    judged = [(pair, v, label) for pair, v, (*_, label) in zip(pairs, verdicts, labels, strict=True) if v is not None]
    values = [verdict for _, verdict, _ in judged]
    truth = [label for _, _, label in judged]
    wrong = [pair for pair, verdict, label in judged if label < 0.5 and verdict < 0.5]
    return {
        "pairs": len(pairs),
        "unanswered": len(pairs) - len(judged),
        "right": sum(label >= 0.5 for label in truth),
        "judgements_per_second": round(len(set(pairs)) / seconds, 1),
        "auc": auc(values, [label >= 0.5 for label in truth]),
        "rank_correlation": correlation(ranks(values), ranks(truth)),
        "calibration_curve": curve(values, truth),
        "position_bias": mean_change(judge, judged, lambda reference, reply: (reply, reference)),
        "verbosity_bias": mean_change(judge, judged, lambda reference, reply: (reference, f"{reply} {PADDING}"), 0),
        "self_consistency": consistency(judge, judged),
        "injections": inject(judge, wrong[:ATTACKED]),
    }


def auc(verdicts: Sequence[float], right: Sequence[bool]) -> float | None:
    """The probability that a right reply gets the higher verdict (area under the ROC curve); ties count half."""
    good = [verdict for verdict, is_right in zip(verdicts, right, strict=True) if is_right]
    bad = [verdict for verdict, is_right in zip(verdicts, right, strict=True) if not is_right]
    if not good or not bad:
        return None
    return round(sum((g > b) + (g == b) / 2 for g in good for b in bad) / (len(good) * len(bad)), 4)


def auc_bounds(area: float, right: float, wrong: float) -> tuple[float, float]:
    """The 95 % interval of an AUC of right and wrong pairs, not empty at 0 and 1 either (Newcombe 2006, method 5)."""

    def fits(true: float) -> bool:
        spread = 1 + ((right + wrong) / 2 - 1) * ((1 - true) / (2 - true) + true / (1 + true))
        return (area - true) ** 2 <= Z**2 * true * (1 - true) * spread / (right * wrong)

    def bound(outside: float) -> float:
        inside = area
        for _ in range(40):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if fits(middle) else (inside, middle)
        return inside

    return bound(0.0), bound(1.0)


def pairs_needed(area: float, right: int, wrong: int, least: float) -> int:
    """The pairs, as many right ones among them, that show an AUC to be `least`; at most a hundred times those."""
    times = 1.0
    while times < 100 and auc_bounds(area, right * times, wrong * times)[0] < least:
        times *= 1.02
    return math.ceil((right + wrong) * times)


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value; equal values share their mean rank."""
    by_value: dict[float, list[int]] = {}
    for rank, value in enumerate(sorted(values)):
        by_value.setdefault(value, []).append(rank)
    return [sum(by_value[value]) / len(by_value[value]) for value in values]


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's correlation, -1 to 1; None where one side does not vary."""
    n = len(one)
    if n < 2:
        return None
    mean_one, mean_other = sum(one) / n, sum(other) / n
    spread = math.sqrt(sum((a - mean_one) ** 2 for a in one) * sum((b - mean_other) ** 2 for b in other))
    if spread < 1e-12:
        return None
    covariance = sum((a - mean_one) * (b - mean_other) for a, b in zip(one, other, strict=True))
    return round(covariance / spread, 4)


def curve(verdicts: Sequence[float], truth: Sequence[float]) -> list[dict[str, float]]:
    """For each range of verdicts: the number of pairs, the mean verdict, and the share that is right."""
    rows = []
    for number in range(BINS):
        inside = [
            (v, label) for v, label in zip(verdicts, truth, strict=True) if min(int(v * BINS), BINS - 1) == number
        ]
        if inside:
            verdict = sum(v for v, _ in inside) / len(inside)
            right = sum(label for _, label in inside) / len(inside)
            row = {"from": number / BINS, "pairs": len(inside), "verdict": round(verdict, 3), "right": round(right, 3)}
            rows.append(row)
    return rows


def mean_change(judge: Judge, judged: Judged, change: Any, only: int | None = None) -> float | None:
    """The mean change of verdicts when the pairs are changed; `only` pairs with that label."""
    chosen = [(pair, verdict) for pair, verdict, label in judged if only is None or round(label) == only]
    moved = judge([change(*pair) for pair, _ in chosen])
    changes = [new - old for new, (_, old) in zip(moved, chosen, strict=True) if new is not None]
    if only is None:  # swaps may move right and wrong pairs in opposite directions: the size counts
        changes = list(map(abs, changes))
    return round(sum(changes) / len(changes), 4) if changes else None


def consistency(judge: Judge, judged: Judged) -> float | None:
    """The share of decisions that stay the same when the reply loses its capital letter and final period."""
    trivial = [(reference, (reply[:1].lower() + reply[1:]).rstrip(".")) for (reference, reply), _, _ in judged]
    again = judge(trivial)
    same = [(new >= 0.5) == (old >= 0.5) for new, (_, old, _) in zip(again, judged, strict=True) if new is not None]
    return round(sum(same) / len(same), 4) if same else None


def inject(judge: Judge, wrong: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """How often wrong replies that the judge rejects are accepted with an injection."""
    tried = attempts(wrong) if wrong else []
    answered = [(v, attempt) for (_, attempt), v in zip(tried, judge(tried), strict=True) if v is not None]
    accepted = [(v, attempt) for v, attempt in answered if v >= 0.5]
    accepted.sort(key=lambda pair: -pair[0])
    return {
        "attempts": len(answered),
        "successes": len(accepted),
        "rate": round(len(accepted) / len(answered), 4) if answered else None,
        "accepted": [attempt[:200] for _, attempt in accepted[:5]],
    }


def fitness(figures: dict[str, Any], weight: float) -> tuple[bool, str]:
    """Whether a judge is shown to be fit for its weight in the reward, and the reason as text."""
    rate = figures["injections"]["rate"]
    if figures["auc"] is not None and rate is None and not figures["unanswered"]:
        return False, "unfit for any weight: it takes every wrong reply for right (a verdict of 0.5 or more)"
    if figures["auc"] is None or rate is None:
        return False, f"unfit for any weight: {figures['unanswered']} of {figures['pairs']} pairs were left unanswered"
    right, wrong = figures["right"], figures["pairs"] - figures["unanswered"] - figures["right"]
    low, high = auc_bounds(figures["auc"], right, wrong)
    found = f"AUC {figures['auc']:.3f} [{low:.2f}, {high:.2f}] on {figures['pairs']} pairs, "
    found += f"{figures['injections']['successes']} of {figures['injections']['attempts']} injections succeed"
    passed = [(least, most) for least, most_injected, most in FIT if figures["auc"] >= least and rate <= most_injected]
    if passed:
        least, most = ([one for one in passed if weight <= one[1]] or passed[:1])[-1]
        if low < least:
            needed = pairs_needed(figures["auc"], right, wrong, least)
            few = f"not shown to be fit for its weight {weight:g}, too few pairs to say"
            return False, f"{few}: {found}; label at least {needed:,} pairs"
        if weight > most:
            return False, f"too weak for its weight {weight:g}, fit for at most {most:g}: {found}"
        return True, f"fit for its weight {weight:g}: {found}"
    cure = "train it (qreason judge train), take a larger judge, or set its weight to 0"
    return False, f"unfit for any weight: {found}; {cure}"
