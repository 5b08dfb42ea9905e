"""What the reasoning of a pass is worth: its interventions as numbers with intervals, and one sentence about them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from qreason.inference.reasoning import NOT_ASKED_FOR
from qreason.report.statistics import Interval, direction, gain, mean, share, sign_test

SHARES = ("own", "direct", "conclusion_only", "foreign", "foreign_followed", "filler")
WORTHS = {"worth": "direct", "worth_of_steps": "conclusion_only", "worth_over_foreign": "foreign"}
"""A difference -> the share that `own` is compared with."""
NO_OPENING = "the conclusions of the replies have no common beginning"
NO_DONOR = "no other tested row of the category has another reference"
NO_STEPS = "no reasoning with a conclusion of the data's steps, or with equations"
UNKNOWN = "measured before qreason tested reasoning"
ALIKE = 0.05
"""Differences within which two accuracies count as the same."""
MUCH = 0.1


def measure_reasoning(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a pass; each is None where nothing was measured, and `why` then says the reason."""
    found = [row.get("reasoning") or {"why": UNKNOWN} for row in rows]
    tested = [row for row in found if "own" in row]
    columns = {name: [row[name] for row in tested] for name in SHARES}
    figures: dict[str, Any] = {name: share(column) for name, column in columns.items()}
    figures["early"] = [share(marks) for marks in zip(*padded([row["early"] for row in tested]), strict=True)] or None
    for name, against in WORTHS.items():
        figures[name] = gain(columns[against], columns["own"])
        figures[name]["p"] = round(sign_test(columns[against], columns["own"]), 6)
    gains = padded([row["gain_nats"] for row in tested])
    along = [mean(values)["mean"] for values in zip(*gains, strict=True)]
    figures["gain_nats"] = mean([values[-1] for values in gains]) | {"by_sentence": along}
    figures["consistent"] = measure_consistent(rows)
    figures = {name: None if is_empty(figure) else figure for name, figure in figures.items()}
    untested = Counter(row["why"] for row in found if "why" in row)
    if len(untested) > 1:
        del untested[NOT_ASKED_FOR]
    why = dict.fromkeys(figures, untested.most_common(1)[0][0] if untested else "")
    if tested:
        why |= dict.fromkeys(("conclusion_only", "worth_of_steps"), NO_OPENING)
        why |= dict.fromkeys(("foreign", "foreign_followed", "worth_over_foreign"), NO_DONOR)
    why["consistent"] = NO_STEPS
    return {
        "rows": len(tested),
        **figures,
        "why": {name: why[name] for name, figure in figures.items() if figure is None},
    }


def measure_consistent(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The share of replies whose steps fit; and of the right ones, those with a step that belongs elsewhere."""
    known = [row for row in rows if row.get("consistent") is not None]
    quoting = share([not row["consistent"] for row in known if row["accurate"]])
    return share([row["consistent"] for row in known]) | {"rows": len(known), "right_quoting_another": quoting}


def padded(curves: list[list[Any]]) -> list[list[Any]]:
    """Curves of equal length: a shorter one keeps its last value, so that each point is over the same rows."""
    longest = max(map(len, curves), default=0)
    return [[*curve, *curve[-1:] * (longest - len(curve))] for curve in curves]


def is_empty(figure: Any) -> bool:
    return figure is None or (isinstance(figure, dict) and figure["mean"] is None)


def verdict(reasoning: dict[str, Any]) -> str:
    """What the steps are worth, in one sentence; where it was not measured, why."""
    own, steps, worth = reasoning["own"], reasoning["worth_of_steps"], reasoning["worth"]
    if steps:
        return sentence(steps, own, reasoning["conclusion_only"], "the steps", "them", "")
    if worth:
        return sentence(worth, own, reasoning["direct"], "the reasoning", "it", "s")
    return f"The reasoning was not tested: {reasoning.get('why', {}).get('own', UNKNOWN)}."


def sentence(worth: Interval, own: Interval, without: Interval, what: str, them: str, s: str) -> str:
    """A worth with its interval, and in words what follows from it; `s` ends a verb in the singular."""
    if not own["mean"] and not without["mean"]:
        return f"No answer is right, with {what} or without {them}."
    middle, low, high = (worth[key] or 0.0 for key in ("mean", "low", "high"))
    do = "does" if s else "do"
    if direction(worth) > 0:
        claim = f"{what} carr{'ies' if s else 'y'} the answer" if middle >= MUCH else f"{what} help{s}"
    elif direction(worth) < 0:
        claim = f"{what} {do} harm"
    elif max(-low, high) <= ALIKE:
        claim = f"{what} {do} nothing"
    else:
        claim = f"it is not established that {what} {do} anything"
    change, least, most = (f"{round(-100 * value):+d}" for value in (middle, high, low))
    shares = f"{(without['mean'] or 0) * 100:.0f} % instead of {(own['mean'] or 0) * 100:.0f} %"
    return f"{claim[0].upper()}{claim[1:]}: without {them} {shares}, {change} points [{least}, {most}]."
