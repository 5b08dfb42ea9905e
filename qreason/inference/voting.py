"""Many answers to one question: the majority's (self-consistency, Wang et al. 2023), and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qreason.rewards.tags import read_answer
from qreason.rewards.text import normalize, read_number
from qreason.types import Reply


def ballot(text: str) -> str:
    """What an answer counts as: equal numbers are one answer, and texts that differ only in form; empty: no vote."""
    number = read_number(text)
    return normalize(text) if number is None else f"{number:.12g}"


def vote(replies: Sequence[Reply]) -> int | None:
    """The place of the first reply that gave the most frequent answer; None where no reply has an answer.

    Of answers with equally many votes, the one that was given first wins: the same replies give the same winner.
    """
    ballots = [ballot(read_answer(reply.text)) for reply in replies]
    given = [text for text in ballots if text]
    return ballots.index(max(given, key=given.count)) if given else None


def votes_for(replies: Sequence[Reply], place: int) -> int:
    """How many replies gave the answer of the reply at a place."""
    ballots = [ballot(read_answer(reply.text)) for reply in replies]
    return ballots.count(ballots[place])


def pass_at(n: int, right: int, k: int) -> float:
    """The probability that one of k replies is right, estimated without bias from n of which `right` are.

    1 - C(n - right, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, equation 1). Raises ValueError for k > n.
    """
    if k > n:
        raise ValueError(f"pass@{k} needs {k} samples, there are {n}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
