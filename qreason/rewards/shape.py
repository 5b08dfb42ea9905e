"""Rewards for the shape of a reply: its length, repetition and steps."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence

from pydantic import PositiveInt

from qreason.rewards.tags import TAG, answer_of, read_reasoning
from qreason.rewards.text import correct
from qreason.types import Example, Reply

STEP_END = re.compile(r"\n|(?<=[.!?])(?<!\.\w\.)\s|\s(?=(?:first|second|third|then|next|finally|step \d+)[,:]\s)", re.I)
"""Ends of lines and sentences (but not after "e.g."), and announcements of a step within a sentence."""
STEP_NUMBER = re.compile(r"\W*(?:(?:step\s+)?\d+)?\W*", re.I)


def count_tokens(reply: Reply) -> int:
    """Tokens of a reply; words if its tokens are unknown."""
    return len(reply.token_ids) or len(reply.text.split())


def soft_overlong(
    replies: Sequence[Reply],
    examples: Sequence[Example],
    *,
    max_completion_length: PositiveInt = 256,
    cache: PositiveInt = 64,
) -> list[float | None]:
    """-1..0: 0 up to `cache` tokens before the limit, falling linearly to -1 at it (DAPO, arXiv 2503.14476, eq. 13)."""
    excess = [count_tokens(reply) - (max_completion_length - cache) for reply in replies]
    return [-min(1.0, tokens / cache) if tokens > 0 else 0.0 for tokens in excess]


def cosine_length(
    replies: Sequence[Reply],
    examples: Sequence[Example],
    *,
    max_completion_length: PositiveInt = 256,
    right_short: float = 2.0,
    right_long: float = 1.0,
    wrong_short: float = -1.0,
    wrong_long: float = 0.0,
    overlong: float = -1.0,
) -> list[float | None]:
    """-1..2: a right answer earns more the shorter the reply, a wrong one the longer (Yeo et al., arXiv 2502.03373).

    Half a cosine from the short value at 0 tokens to the long one at the limit; replies at or beyond the limit earn
    `overlong`. The paper has -10 for `wrong_short` and `overlong`, which would dominate a sum with rewards of 0..2.
    """

    def earned(reply: Reply, example: Example) -> float:
        tokens = count_tokens(reply)
        if tokens >= max_completion_length:
            return overlong
        right = correct(answer_of(reply, example), example.references) > 0
        short, long = (right_short, right_long) if right else (wrong_short, wrong_long)
        return long + (short - long) * (1 + math.cos(math.pi * tokens / max_completion_length)) / 2

    return [earned(reply, example) for reply, example in zip(replies, examples, strict=True)]


def repeated_share(text: str, n: int) -> float:
    words = [word for token in TAG.sub(" ", text).lower().split() if (word := token.strip(string.punctuation))]
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repetition(replies: Sequence[Reply], examples: Sequence[Example], *, n: PositiveInt = 3) -> list[float | None]:
    """-1..0: minus the share of word n-grams that repeat an earlier one, without case, outer punctuation and tags.

    0 for fewer than n words. The n-gram penalty of arXiv 2502.03373, but per reply instead of per token; n is 40 there,
    for replies of thousands of tokens.
    """
    return [0.0 - repeated_share(reply.text, n) for reply in replies]


def count_steps(reasoning: str) -> int:
    """Different lines, sentences and announced parts of at least two words, without their numbering."""
    parts = {STEP_NUMBER.sub("", part, count=1) for part in STEP_END.split(reasoning.lower())}
    return sum(len(words) > 1 for words in {tuple(re.findall(r"\w+", part)) for part in parts})


def step_count(replies: Sequence[Reply], examples: Sequence[Example], *, least: PositiveInt = 3) -> list[float | None]:
    """0..1: steps between the reasoning tags as a share of `least`, at most 1 (as open-r1's reasoning steps).

    A step is a line, sentence, list item or announced part ("Step 2:", "then,") of two words or more; repeated ones
    count once. For languages with spaces between words. 0 unless the reply has exactly one pair of reasoning tags.
    """
    return [min(1.0, count_steps(read_reasoning(reply.text)) / least) for reply in replies]
