"""What a run achieved, in one sentence, and what to know beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qreason.report.reasoning import verdict
from qreason.report.statistics import direction


def headline(report: dict[str, Any]) -> str:
    """The accuracy and its paired change with the interval, and whether the reasoning does work."""
    last = report["passes"][-1]
    worth = verdict(last["reasoning"])
    return f"{change(report)}; {worth[0].lower()}{worth[1:]}"


def change(report: dict[str, Any]) -> str:
    first, last = report["passes"][0], report["passes"][-1]
    over = f"of {report['rows'] - last['unjudged']:,} held-out rows"
    if last["accuracy"]["mean"] is None or first["accuracy"]["mean"] is None:
        return "No reply could be judged right or wrong"
    now = f"{last['accuracy']['mean'] * 100:.1f} %"
    if not report["gains"]:
        low, high = (f"{last['accuracy'][end] * 100:.0f}" for end in ("low", "high"))
        return f"Accuracy is {now} [{low}–{high}] {over}"
    gained = report["gains"][-1]["accuracy"]  # the first pass against the last
    was = f"{first['accuracy']['mean'] * 100:.1f}"
    middle, low, high = (f"{gained[key] * 100:+.1f}" for key in ("mean", "low", "high"))
    by = f"{middle} points [{low}, {high}]"
    if way := direction(gained):
        verb = "rose" if way > 0 else "fell"
        return f"Accuracy {verb} from {was} % to {now} {over}, {by}"
    return f"It is not established that accuracy changed: {was} % and {now} {over}, {by}"


def remarks(report: dict[str, Any]) -> Iterator[str]:
    """What the figures of the first sentence leave out."""
    first = report["passes"][0]
    found, strict = first["answer_anywhere"], first["accuracy"]
    if len(report["passes"]) > 1 and found["mean"] is not None and found["low"] > (strict["high"] or 0):
        yield (
            f"Part of this change is format: {found['mean'] * 100:.1f} % [{found['low'] * 100:.0f}–"
            f"{found['high'] * 100:.0f}] of the replies of {first['after']} contain an accepted wording, inside the "
            "answer tags or not. This is the fair baseline for a model that was never taught the tags."
        )
    if unjudged := max(one["unjudged"] for one in report["passes"]):
        yield f"Up to {unjudged:,} rows of a pass could not be judged; accuracy and pass@1 leave them out."
