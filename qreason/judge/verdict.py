"""A judge's verdict as a number: does a response say what the reference says?

By default the judge is the policy's own base with the adapter off: no second model, one forward pass a verdict.
Whoever answers (LocalModel, Endpoint), the question and what a verdict is worth are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Protocol

from qreason.data.prompts import CHOICES, VERDICTS, render_choice, render_judge
from qreason.recipe.sections import Model
from qreason.rewards.judged import JudgeSettings
from qreason.types import Generator, Messages

Pairs = Sequence[tuple[str, str]]
"""(reference, response)"""


class Answerer(Protocol):
    """Whoever answers a judge's questions; questions of a group share their beginning."""

    def ask(self, groups: Sequence[Sequence[Messages]], values: Mapping[str, float]) -> list[list[float | None]]:
        """The expected value of each answer, `values` saying what an answer is worth; None where none was given."""
        ...


class LocalModel:
    """The bare base of a generator; with `adapter`, that judge adapter on it. One forward pass over many questions."""

    def __init__(self, generator: Generator, adapter: Path | None = None) -> None:
        self.generator, self.adapter = generator, adapter

    def ask(self, groups: Sequence[Sequence[Messages]], values: Mapping[str, float]) -> list[list[float | None]]:
        """The expected value of each answer."""
        return [list(group) for group in self.generator.expect(groups, values, adapter=self.adapter)]


class Judge:
    """(reference, response) pairs -> 0..1 each, or None; each pair is judged once as long as the judge lives."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self.verdicts: dict[tuple[str, str], float] = {}
        self.asked = self.unanswered = 0

    def __call__(self, pairs: Pairs) -> list[float | None]:
        groups: dict[str, dict[str, None]] = {}
        for reference, response in pairs:
            if (reference, response) not in self.verdicts:
                groups.setdefault(reference, {})[response] = None
        questions = [[render_judge(reference, response) for response in group] for reference, group in groups.items()]
        answers = self.ask(questions, VERDICTS)
        for (reference, group), values in zip(groups.items(), answers, strict=True):
            for response, value in zip(group, values, strict=True):
                if value is not None:  # what was not answered is asked again another time
                    self.verdicts[reference, response] = value
        return [self.verdicts.get(pair) for pair in pairs]

    def ask(self, groups: Sequence[Sequence[Messages]], values: Mapping[str, float]) -> list[list[float | None]]:
        answers = self.answerer.ask(groups, values) if groups else []
        self.asked += sum(map(len, answers))
        self.unanswered += sum(value is None for group in answers for value in group)
        return answers


class GroupwiseJudge(Judge):
    """Ranks the responses to a reference against each other: the share of comparisons that a response wins.

    Each two are compared in both orders, so that a preference for a position cancels out; a response without others is
    judged alone. The absolute verdicts of small judges are weak, their comparisons less so. n(n-1) questions a group.
    """

    def __call__(self, pairs: Pairs) -> list[float | None]:
        groups: dict[str, dict[str, None]] = {}
        for reference, response in pairs:
            groups.setdefault(reference, {})[response] = None
        alone = [(reference, *group) for reference, group in groups.items() if len(group) == 1]
        verdicts = dict(zip(alone, super().__call__(alone), strict=True))  # type: ignore[arg-type]
        ranked = {reference: list(permutations(group, 2)) for reference, group in groups.items() if len(group) > 1}
        questions = [[render_choice(reference, *two) for two in order] for reference, order in ranked.items()]
        for (reference, order), wins in zip(ranked.items(), self.ask(questions, CHOICES), strict=True):
            won = dict(zip(order, wins, strict=True))
            for response in groups[reference]:
                others = [other for other in groups[reference] if other != response]
                shares = [won[response, other] for other in others] + [lost(won[other, response]) for other in others]
                verdicts[reference, response] = average(shares)
        return [verdicts[pair] for pair in pairs]


def lost(share: float | None) -> float | None:
    return None if share is None else 1 - share


def average(shares: Sequence[float | None]) -> float | None:
    """The mean; None as soon as one of them is None."""
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if len(known) == len(shares) else None


def open_judge(settings: JudgeSettings, generator: Callable[[], Generator]) -> Judge:
    """The judge of a recipe; `generator` gives the policy's base, and is called only if the judge stands on it."""
    kind = GroupwiseJudge if settings.mode == "groupwise" else Judge
    return kind(open_answerer(settings, generator))


def open_answerer(settings: JudgeSettings, generator: Callable[[], Generator]) -> Answerer:
    if settings.endpoint:
        from qreason.judge.endpoint import Endpoint

        return Endpoint(settings)
    if settings.base:
        from qreason.inference.generate import open_generator

        model = Model(base=settings.base, quantization=settings.quantization)
        return LocalModel(open_generator(model, offload=settings.offload))
    return LocalModel(generator(), Path(settings.adapter) if settings.adapter else None)
