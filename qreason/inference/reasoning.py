"""What the reasoning of replies does for their answers, by intervention (Lanham et al. 2023, arXiv 2307.13702).

A reply is made to begin with another reasoning than its own: cut short, foreign, or filler. The model completes it, and
the answer is judged as any other. The beginning is encoded as one text, so that its tokens are those of a reply.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qreason.machine.progress import Bar
from qreason.rewards.steps import sentences
from qreason.rewards.tags import follows_format, read_answer
from qreason.types import Example, Generator, Messages, Reply, Sampling

Rule = Callable[[Sequence[Reply], Sequence[Example]], list[bool | None]]
"""Whether the answer of each reply is right for its example; None where that cannot be judged."""
Figures = dict[str, Any]
"""The results of one row (docs/contracts.md), or `why` it has none."""

POINTS = 8
"""The most places in a reasoning at which the answer is forced."""
OPENING_WORDS, OPENING_SHARE = 3, 0.8
"""The most words of the beginning that conclusions share, and the share of the replies that must have it."""
FILLER = " ..."

ASKS_FOR_NONE = "the prompt asks for no reasoning"
NOT_ASKED_FOR = "not asked for (reasoning)"
NO_REASONING = "no reasoning between its tags"
NOT_JUDGED = "the answer cannot be judged"
NOT_ENCODED = "the tokenizer does not give the text of a reply back"

REPLY = re.compile(r"<reasoning>(.*)</reasoning>(.*)<answer>(\s*).*?(\s*)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Reasoned:
    """A greedy reply whose reasoning is tested."""

    row: int
    """Its place among the held-out rows."""
    example: Example
    prompt_ids: list[int]
    reasoning: str
    between: str
    """The white space between reasoning and answer."""
    padding: tuple[str, str]
    """The white space at both ends of the answer."""

    def beginning(self, reasoning: str) -> str:
        """A reply up to the beginning of its answer, with this reasoning."""
        return f"<reasoning>{reasoning}</reasoning>{self.between}<answer>"

    def opening(self, words: str) -> str:
        """A reply whose reasoning begins with these words."""
        indent = self.reasoning[: len(self.reasoning) - len(self.reasoning.lstrip())]
        return f"<reasoning>{indent}{words}"

    @property
    def gold(self) -> str:
        """The reference as the rest of a reply."""
        before, after = self.padding
        return f"{before}{self.example.reference}{after}</answer>"


@dataclass(frozen=True)
class Forced:
    """The beginning of a reply that the model completes."""

    reply: Reasoned
    name: str
    """Of the intervention."""
    text: str
    donor: Reasoned | None = None
    """The reply whose reasoning it has."""


def intervene(
    generator: Generator,
    prompts: Sequence[Messages],
    examples: Sequence[Example],
    replies: Sequence[Reply],
    own: Sequence[bool | None],
    *,
    rule: Rule,
    sampling: Sampling,
    bar: Bar,
) -> list[Figures]:
    """For each row, what its greedy reply answers with its own and with other reasonings, and the gain in nats.

    `own` says which of the replies are right. A row that cannot be tested has only `why`.
    """
    prompt_ids = generator.prompt_ids(prompts, sampling) if prompts else []
    figures: list[Figures] = []
    tested: list[Reasoned] = []
    for row, (example, reply, mark) in enumerate(zip(examples, replies, own, strict=True)):
        reasoned = read_reply(generator, row, example, prompt_ids[row], reply, mark)
        figures.append({"why": reasoned} if isinstance(reasoned, str) else {"own": mark})
        tested += [] if isinstance(reasoned, str) else [reasoned]
    if tested:
        budget = min(len(prompts), sampling.max_num_seqs) * max(map(len, prompt_ids))
        answer = max(len(generator.tokens(read_answer(replies[reply.row].text) + "</answer>")) for reply in tested)
        Intervention(generator, sampling, bar, budget, 2 * answer).run(tested, rule, figures)
    return figures


def read_reply(
    generator: Generator, row: int, example: Example, prompt_ids: list[int], reply: Reply, own: bool | None
) -> Reasoned | str:
    """A reply in its parts, or why its reasoning cannot be tested."""
    if example.plain:
        return ASKS_FOR_NONE
    match = REPLY.search(reply.text)
    if match is None or not follows_format(reply.text) or not match[1].strip():
        return NO_REASONING
    if own is None:
        return NOT_JUDGED
    between = match[2] if not match[2].strip() else "\n"  # text there would be reasoning that nothing takes away
    reasoned = Reasoned(row, example, prompt_ids, match[1], between, (match[3], match[4]))
    text = reasoned.beginning(reasoned.reasoning) + reasoned.gold
    return reasoned if generator.text(generator.tokens(text)) == text else NOT_ENCODED


@dataclass(frozen=True)
class Intervention:
    """The interventions on replies, within the memory that reading their prompts takes."""

    generator: Generator
    sampling: Sampling
    bar: Bar
    budget: int
    """Tokens that are read at a time: as many as the greedy pass reads."""
    answer: int
    """The most tokens of an answer: twice the longest one, so that no reasoning moves into it."""

    def run(self, tested: Sequence[Reasoned], rule: Rule, figures: list[Figures]) -> None:
        """Add the figures of the tested replies to those of their rows."""
        forced = list(forced_beginnings(self.generator, tested))
        early = [one for one in forced if one.name == "early"]
        self.bar.grow(len(forced) + len(early))
        self.bar.note("its reasoning, by intervention")
        replies = self.complete(forced)
        marks = rule(replies, [one.reply.example for one in forced])
        followed = iter(
            rule(
                [reply for reply, one in zip(replies, forced, strict=True) if one.donor],
                [one.donor.example for one in forced if one.donor],
            )
        )
        names = ("direct", "early", "conclusion_only", "foreign", "foreign_followed", "filler", "gain_nats")
        for reply in tested:
            figures[reply.row] |= dict.fromkeys(names) | {"early": []}
        for one, mark in zip(forced, marks, strict=True):
            found = figures[one.reply.row]
            if one.name == "early":
                found["early"].append(mark)
            else:
                found[one.name] = mark
            if one.donor:
                found["foreign_followed"] = next(followed)
        for reply, (gains, known) in zip(tested, self.gains(early), strict=True):
            figures[reply.row] |= {
                "direct": figures[reply.row]["early"][0],
                "gain_nats": gains,
                "reference_nats": known,
            }

    def complete(self, forced: Sequence[Forced]) -> list[Reply]:
        """The whole replies, completed greedily."""
        beginnings = [[*one.reply.prompt_ids, *self.generator.tokens(one.text)] for one in forced]
        replies = [Reply("")] * len(forced)
        whole = [index for index, one in enumerate(forced) if one.name == "conclusion_only"]
        answers = [index for index, one in enumerate(forced) if one.name != "conclusion_only"]
        for indices, room in ((answers, self.answer), (whole, self.sampling.max_completion_length)):
            sampling = replace(self.sampling, max_completion_length=min(room, self.sampling.max_completion_length))
            for batch in self.batches(indices, beginnings):
                ways = self.generator.extend(
                    [beginnings[index] for index in batch], n=1, sampling=sampling, stop_at=frozenset()
                )
                for index, (tokens,) in zip(batch, ways, strict=True):
                    start = beginnings[index][len(forced[index].reply.prompt_ids) :]
                    replies[index] = Reply(self.generator.text([*start, *tokens]), (*start, *tokens))
                self.bar.advance(len(batch))
        return replies

    def gains(self, early: Sequence[Forced]) -> list[tuple[list[float], float]]:
        """Of each reply, log p(reference | reasoning up to here) - log p(reference | none), in nats, along its points;
        and log p(reference | its whole reasoning) per token.

        The answer's closing tag belongs to the reference.
        """
        gold = [tuple(self.generator.tokens(one.reply.gold)) for one in early]
        asked = [
            Reply("", tokens, (*one.reply.prompt_ids, *self.generator.tokens(one.text)))
            for one, tokens in zip(early, gold, strict=True)
        ]
        nats = [0.0] * len(early)
        for batch in self.batches(range(len(asked)), [[*reply.prompt_ids, *reply.token_ids] for reply in asked]):
            means = self.generator.likelihoods([asked[index] for index in batch])
            for index, mean in zip(batch, means, strict=True):
                nats[index] = mean * len(gold[index])
            self.bar.advance(len(batch))
        along: dict[int, list[float]] = {}
        counts: dict[int, int] = {}
        for one, value, tokens in zip(early, nats, gold, strict=True):
            along.setdefault(one.reply.row, []).append(value)
            counts[one.reply.row] = len(tokens)
        return [
            ([round(value - first, 4) for value in rest], round(rest[-1] / counts[row], 4))
            for row, (first, *rest) in along.items()
        ]

    def batches(self, indices: Sequence[int], rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """The indices of rows, longest rows first, in batches that are padded to at most `budget` tokens."""
        left = sorted(indices, key=lambda index: -len(rows[index]))
        while left:
            count = max(1, self.budget // len(rows[left[0]]))
            yield left[:count]
            left = left[count:]


def forced_beginnings(generator: Generator, tested: Sequence[Reasoned]) -> Iterator[Forced]:
    """All beginnings that the model is to complete; those called `early` of a reply in the order of its sentences."""
    words = common_opening([sentences(reply.reasoning)[-1] for reply in tested])
    for place, reply in enumerate(tested):
        for reasoning in prefixes(reply.reasoning):
            yield Forced(reply, "early", reply.beginning(reasoning))
        if words:
            yield Forced(reply, "conclusion_only", reply.opening(words))
        if donor := find_donor(reply, [*tested[place + 1 :], *tested[:place]]):
            yield Forced(reply, "foreign", reply.beginning(donor.reasoning), donor)
        yield Forced(reply, "filler", reply.beginning(filler(generator, reply.reasoning)))


def prefixes(reasoning: str) -> list[str]:
    """A reasoning after 0, 1, … all of its sentences; a long one after some of them, evenly."""
    ends = [0]
    for sentence in sentences(reasoning):
        ends.append(reasoning.index(sentence, ends[-1]) + len(sentence))
    ends[-1] = len(reasoning)
    last = min(len(ends), POINTS) - 1
    return [reasoning[: ends[round(point * (len(ends) - 1) / last)]] for point in range(last + 1)]


def common_opening(conclusions: Sequence[str]) -> str | None:
    """The longest beginning that conclusions share, such as `Cause:`; None if they share none, or are all the same."""
    if len(set(conclusions)) < 2:
        return None
    for length in range(OPENING_WORDS, 0, -1):
        starts = Counter(" ".join(text.split()[:length]) for text in conclusions)
        start, count = starts.most_common(1)[0]
        if count >= OPENING_SHARE * len(conclusions):
            return start
    return None


def find_donor(reply: Reasoned, others: Sequence[Reasoned]) -> Reasoned | None:
    """The first other reply to a row of the same category with another reference."""
    own = reply.example
    for other in others:
        if other.example.category == own.category and not {*other.example.references} & {*own.references}:
            return other
    return None


def filler(generator: Generator, reasoning: str) -> str:
    """Dots of about as many tokens as a reasoning."""
    unit = len(generator.tokens(FILLER * POINTS)) / POINTS
    return FILLER * max(1, round(len(generator.tokens(reasoning)) / unit))
