"""The protocol `<reasoning>…</reasoning><answer>…</answer>`: reading it and rewarding it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qreason.types import Example, Reply

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
TAG = re.compile("|".join(map(re.escape, TAGS)))
REASONING = re.compile(r"<reasoning>(.*)</reasoning>", re.DOTALL)
WHOLE = re.compile(r"\s*<reasoning>(.*)</reasoning>\s*<answer>(.*)</answer>\s*", re.DOTALL)


def read_answer(text: str) -> str:
    """The text between `<answer>` and `</answer>`; empty unless the reply has exactly one such pair.

    A reply with a second answer counts as unanswered: otherwise GRPO unlearns to stop, because text after the first
    answer costs nothing.
    """
    _, *opened = text.split("<answer>")
    if len(opened) != 1 or opened[0].count("</answer>") != 1:
        return ""
    return opened[0].partition("</answer>")[0].strip()


def answer_of(reply: Reply, example: Example) -> str:
    """The answer of a reply: the text between its tags; of a plain row's reply without tags, all of it."""
    if example.plain and not TAG.search(reply.text):
        return reply.text.strip()
    return read_answer(reply.text)


def read_reasoning(text: str) -> str:
    """The text between `<reasoning>` and `</reasoning>`; empty unless the reply has exactly one such pair."""
    match = REASONING.search(text)
    return match[1] if match and text.count("<reasoning>") == text.count("</reasoning>") == 1 else ""


def follows_format(text: str) -> bool:
    """Whether each tag occurs once, in order: what the format rate counts."""
    return tuple(TAG.findall(text)) == TAGS


def format_tags(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
    """0.2 for each of the four tags that is present, case-sensitive; at most 0.8."""
    return [round(0.2 * len(set(TAG.findall(reply.text))), 1) for reply in replies]


def tag_count(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
    """0..1: 0.25 for each of the four tags that occurs exactly once, in any order (as open-r1's tag count)."""
    return [0.25 * sum(reply.text.count(tag) == 1 for tag in TAGS) for reply in replies]


def is_strict(text: str) -> bool:
    match = WHOLE.fullmatch(text)
    return match is not None and follows_format(text) and all(part.strip() for part in match.groups())


def format_strict(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
    """1 for reasoning and answer in their tags, each once, in order, neither empty, nothing outside; else 0."""
    return [float(is_strict(reply.text)) for reply in replies]
