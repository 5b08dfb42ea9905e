"""Rule-based rewards that compare the answer of a reply with the reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rapidfuzz.distance import LCSseq

from qreason.rewards.numbers import count_words, last_number, numbers, unify
from qreason.rewards.numbers import read_number as read_bare
from qreason.rewards.numbers import words as split_words
from qreason.rewards.steps import plain
from qreason.rewards.tags import answer_of
from qreason.types import Example, Reply

OUTER = " ,;:!?'\"`*“”„‟«»‹›「」『』、。؟،؛।¡¿…"


def normalize(text: str) -> str:
    """No case, single spaces, no outer quotes or punctuation: equal texts count as the same answer."""
    text = re.sub(r"\s+", " ", unify(text).casefold())
    return text.lstrip(OUTER).rstrip(OUTER + ".")  # not a leading point: .5


def read_number(text: str) -> float | None:
    """The number an answer consists of, with at most a currency sign, a percent sign or one unit word; else None."""
    return read_bare(normalize(text))


def correct(answer: str, references: Sequence[str]) -> float:
    if normalize(answer) and normalize(answer) in {normalize(reference) for reference in references}:
        return 2.0
    expected = [read_number(reference) for reference in references]
    found = last_number(answer)
    return 1.5 if found is not None and found in expected else 0.0


def is_mentioned(references: Sequence[str], text: str) -> bool:
    """Whether a text has one of the references anywhere, word for word; of a number, as a whole number."""
    words = f" {plain(text)} "
    found = {value for value, _ in numbers(text)}
    expected = [(read_number(reference), plain(reference)) for reference in references]
    return any(f" {wording} " in words if value is None else value in found for value, wording in expected if wording)


def ends_with(references: Sequence[str], text: str) -> bool:
    """Whether the last number of a text is that of a reference; without a number in them, whether it mentions one."""
    expected = {value for reference in references if (value := read_number(reference)) is not None}
    if not expected:
        return is_mentioned(references, text)
    found = last_number(text)
    return found is not None and found in expected


def correctness(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
    """2.0 for an accepted answer in its normalized wording, 1.5 for the right number, else 0.0.

    The number counts only if the reference is a number (with at most a unit): a shared port number does not make two
    sentences equal.
    """
    return [
        correct(answer_of(reply, example), example.references) for reply, example in zip(replies, examples, strict=True)
    ]


def rouge_words(text: str) -> list[str]:
    """The tokens that ROUGE compares: those of the rouge_score package, and the words of all other scripts."""
    return [part for word in split_words(text) for part in word.split("_") if part]


def best(measure: Callable[[str, str], float], reply: Reply, example: Example) -> float:
    """The highest measure(reference, answer) over the accepted wordings; 0 without an answer."""
    answer = answer_of(reply, example)
    return max(measure(reference, answer) for reference in example.references) if answer else 0.0


def rouge_l(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
    """F1 of the longest common subsequence of words (ROUGE-L, Lin 2004), best over the accepted wordings."""

    def f1(reference: str, answer: str) -> float:
        expected, found = rouge_words(reference), rouge_words(answer)
        common = LCSseq.similarity(expected, found)
        precision, recall = common / max(1, len(found)), common / max(1, len(expected))
        return 2 * precision * recall / (precision + recall) if common else 0.0

    return [best(f1, reply, example) for reply, example in zip(replies, examples, strict=True)]


def length_similarity(reference: str, answer: str) -> float:
    expected, found = count_words(reference), count_words(answer)
    return max(0.0, 1.0 - abs(found - expected) / expected) if expected else 0.0


def length(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
    """1 for an answer with as many words as the reference, falling to 0 at none or twice as many."""
    return [best(length_similarity, reply, example) for reply, example in zip(replies, examples, strict=True)]
