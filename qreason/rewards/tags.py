"""The protocol `<reasoning>…</reasoning><answer>…</answer>`: reading it and rewarding it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qreason.types import Example, Reply

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
TAG = re.compile("|".join(map(re.escape, TAGS)))


def read_answer(text: str) -> str:
    """What stands between the last `<answer>` and the `</answer>` after it; empty when there is no such pair."""
    _, opened, rest = text.rpartition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return answer.strip() if opened and closed else ""


def follows_format(text: str) -> bool:
    """Whether each tag stands there once, in order: what the format rate counts."""
    return tuple(TAG.findall(text)) == TAGS


def format_tags(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
    """0.2 for each of the four tags that is present, case-sensitive; at most 0.8."""
    return [round(0.2 * len(set(TAG.findall(reply.text))), 1) for reply in replies]
