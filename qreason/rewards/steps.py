"""The steps of a reasoning: its sentences, and whether they fit what it concludes.

The last sentence of a reasoning is its conclusion, the ones before it are steps. A step is one or more clues and a
finding (`it was updated last week, but the test page prints, so it is not the driver`), or a finding alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from qreason.rewards.numbers import unify, words
from qreason.types import Example

SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
SO, BUT = ", so ", ", but "


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text; a point within a number or a name ends none."""
    return [part.strip() for part in SENTENCE.split(text) if part.strip()]


@lru_cache(8192)
def plain(text: str) -> str:
    """A text as its lower-case words, one space apart: what two wordings must share to count as the same."""
    return " ".join(words(text))


def split_step(sentence: str) -> tuple[list[str], str]:
    """(clues, finding) of a step, all plain; no clue where the step is a finding alone."""
    told, joined, finding = sentence.rpartition(SO)
    return ([plain(clue) for clue in told.split(BUT)] if joined else []), plain(finding)


class ReferenceSteps:
    """What the reference reasonings of the data say belongs together: conclusion -> findings, clue -> findings."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self.findings: dict[str, set[str]] = {}
        self.shown: dict[str, set[str]] = {}
        for example in examples:
            *steps, conclusion = sentences(example.reasoning or "") or [""]
            for clues, finding in map(split_step, steps):
                self.findings.setdefault(plain(conclusion), set()).add(finding)
                self.shown.setdefault(" ".join(clues), set()).add(finding)

    def fit(self, reasoning: str, prompt: str) -> list[bool] | None:
        """Whether each step belongs to the conclusion, and its clue stands in the prompt and shows what it finds.

        What a clue shows is known for those of the references. None where there is no step, or where no reference has
        this conclusion.
        """
        *steps, conclusion = sentences(reasoning) or [""]
        findings = self.findings.get(plain(conclusion))
        if not steps or findings is None:
            return None
        asked = f" {plain(prompt)} "
        return [
            finding in findings
            and all(f" {clue} " in asked for clue in clues)
            and (not clues or finding in self.shown.get(" ".join(clues), findings))
            for clues, finding in map(split_step, steps)
        ]


NUMBER = r"(-?(?<!\d)\d++(?:\.\d++)?+)"
"""Begins at its first digit and is read once: a reply of thousands of digits takes no longer than another."""
EQUATION = re.compile(rf"{NUMBER}\s*+([-+*/x])\s*+{NUMBER}\s*+=\s*+{NUMBER}")


def equations_fit(reasoning: str, answer: str) -> list[bool] | None:
    """Whether each equation of two numbers is right, and the last result is the answer; None without an equation."""
    found = EQUATION.findall(unify(reasoning).replace(",", ""))
    if not found:
        return None
    marks = [abs(compute(float(a), sign, float(b)) - float(c)) < 1e-6 for a, sign, b, c in found]
    last = re.findall(r"-?\d+(?:\.\d+)?", unify(answer).replace(",", ""))
    return [*marks, bool(last) and float(last[-1]) == float(found[-1][3])]


def compute(a: float, sign: str, b: float) -> float:
    return {"+": a + b, "-": a - b, "*": a * b, "x": a * b, "/": a / b if b else float("inf")}[sign]
