"""A judge's verdict as a number: does a response say what the reference says?

By default the judge is the policy's own base with the adapter off: no second model, one forward pass per batch.
Questions and the values of answers are the same for every answerer (LocalModel, RemoteModel).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from typing import Protocol

from qreason.data.prompts import CHOICES, VERDICTS, render_choice, render_judge
from qreason.judge.rules import decide
from qreason.recipe.sections import Model
from qreason.rewards.judged import JudgeSettings
from qreason.sampling.endpoint import Endpoint, NoAnswerError
from qreason.types import Generator, Messages

Pairs = Sequence[tuple[str, str]]
"""(reference, response)"""
NEW_TOKENS = 16
"""Length limit of a server's answer, until one is cut off inside its thoughts."""


class Answerer(Protocol):
    """Answers a judge's questions; questions of a group start alike."""

    def ask(self, groups: Sequence[Sequence[Messages]], values: Mapping[str, float]) -> list[list[float | None]]:
        """The expected value of each answer, by `values`; None for no answer."""


class LocalModel:
    """The bare base of a generator, or with `adapter` that judge adapter on it; `fast` as in Generator.expect."""

    def __init__(self, generator: Generator, adapter: Path | None = None, *, fast: bool = False) -> None:
        self.generator, self.adapter, self.fast = generator, adapter, fast

    def ask(self, groups: Sequence[Sequence[Messages]], values: Mapping[str, float]) -> list[list[float | None]]:
        answers = self.generator.expect(groups, values, adapter=self.adapter, fast=self.fast)
        return [list(group) for group in answers]


class RemoteModel:
    """A server that speaks OpenAI's chat completions, asked in parallel; unexpected answers are no verdict."""

    def __init__(self, settings: JudgeSettings, say: Callable[[str], None]) -> None:
        self.settings, self.say = settings, say
        self.limit, self.told = min(NEW_TOKENS, settings.max_tokens), False
        address, model = settings.endpoint or "", settings.model or ""
        self.server = Endpoint(address, model, settings.api_key, timeout=settings.timeout, retries=settings.retries)

    def ask(self, groups: Sequence[Sequence[Messages]], values: Mapping[str, float]) -> list[list[float | None]]:
        """Raises ModelError where asking again would not help."""
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            answers = iter(list(pool.map(self.complete, (messages for group in groups for messages in group))))
        return [[read_verdict(next(answers), values) for _ in group] for group in groups]

    def complete(self, messages: Messages) -> str:
        """The answer as text; empty if there was none. The first one cut off inside its thoughts raises the limit."""
        limit, most = self.limit, self.settings.max_tokens
        try:
            answer = self.server.complete(messages, max_tokens=limit, temperature=0)
            if answer.cut_in_thoughts and limit < most:
                self.limit = most
                answer = self.server.complete(messages, max_tokens=most, temperature=0)
        except NoAnswerError:
            return ""
        if answer.cut_in_thoughts and not self.told:
            self.told = True
            self.say(
                f"judge {self.settings.model}: a reply was cut off inside <think> at {most} tokens, which gives no "
                "verdict; raise max_tokens of the judge"
            )
        return answer.text


def read_verdict(text: str, values: Mapping[str, float]) -> float | None:
    """The value of an answer's first word after its thoughts; None for any other word."""
    word = re.match(r"\W*(\w+)", text.rpartition("</think>")[2])
    return values.get(word[1]) if word else None


class Judge:
    """(reference, response) pairs -> 0..1 each, or None; verdicts are cached as long as the judge lives."""

    def __init__(self, answerer: Answerer, settings: JudgeSettings | None = None) -> None:
        self.answerer, self.settings = answerer, settings or JudgeSettings()
        self.verdicts: dict[tuple[str, str], float] = {}
        self.asked = self.unanswered = 0

    def __call__(self, pairs: Pairs) -> list[float | None]:
        groups: dict[str, dict[str, None]] = {}
        for reference, response in pairs:
            if (reference, response) in self.verdicts:
                continue
            if self.settings.strict and (verdict := decide(reference, response)) is not None:
                self.verdicts[reference, response] = verdict
            else:
                groups.setdefault(reference, {})[response] = None
        questions = [[render_judge(reference, response) for response in group] for reference, group in groups.items()]
        answers = self.ask(questions, VERDICTS)
        for (reference, group), values in zip(groups.items(), answers, strict=True):
            for response, value in zip(group, values, strict=True):
                if value is not None:  # unanswered questions are asked again next time
                    self.verdicts[reference, response] = value
        return [self.verdicts.get(pair) for pair in pairs]

    def ask(self, groups: Sequence[Sequence[Messages]], values: Mapping[str, float]) -> list[list[float | None]]:
        answers = self.answerer.ask(groups, values) if groups else []
        self.asked += sum(map(len, answers))
        self.unanswered += sum(value is None for group in answers for value in group)
        return answers


class GroupwiseJudge(Judge):
    """Ranks the responses to a reference against each other: the share of comparisons that a response wins.

    Each pair of responses is compared in both orders, to cancel position bias; a single response is judged alone. The
    comparisons of small judges are better than their absolute verdicts. n(n-1) questions per group.
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
                first = [share for other in others if (share := won[response, other]) is not None]
                second = [1 - share for other in others if (share := won[other, response]) is not None]
                shares = first + second
                verdicts[reference, response] = sum(shares) / len(shares) if len(shares) == 2 * len(others) else None
        return [verdicts[pair] for pair in pairs]


def open_judge(
    settings: JudgeSettings, generator: Callable[[], Generator], say: Callable[[str], None] = lambda line: None
) -> Judge:
    """The judge of a recipe; `generator` opens the policy's base, and is called only if the judge uses it."""
    kind = GroupwiseJudge if settings.mode == "groupwise" else Judge
    return kind(open_answerer(settings, generator, say), settings)


def open_answerer(settings: JudgeSettings, generator: Callable[[], Generator], say: Callable[[str], None]) -> Answerer:
    if settings.endpoint:
        return RemoteModel(settings, say)
    if settings.base:
        from qreason.inference.generate import open_generator

        model = Model(base=settings.base, quantization=settings.quantization)
        return LocalModel(open_generator(model, offload=settings.offload), fast=settings.strict)
    return LocalModel(generator(), Path(settings.adapter) if settings.adapter else None, fast=settings.strict)
