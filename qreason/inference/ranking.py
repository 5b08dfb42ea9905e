"""Which of many replies is best: by the model's own likelihood, by a reward, or by the weighted sum of the rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from qreason.errors import InputError, nearest
from qreason.inference.generate import pad_left
from qreason.machine.rows import Rows
from qreason.model.resident import Resident
from qreason.rewards.scoring import Scorer
from qreason.types import Example, Reply

Ranking = Callable[[Sequence[Reply], Sequence[Example]], list[float]]
"""Replies and their examples -> how good each is; minus infinity where that could not be judged."""

ROWS = 64
"""Replies that are read side by side."""
LOGITS = 2**25
"""Logits that are held at a time, 128 MiB in float32."""


def open_ranking(by: str, resident: Resident, scorer: Scorer, folder: Path) -> Ranking:
    """`likelihood`, `total` or the name of one of the scorer's rewards -> the ranking."""
    if by == "likelihood":
        return lambda replies, examples: likelihoods(resident, replies)
    if by == "total":
        return lambda replies, examples: [judged(score.total) for score in scorer(replies, examples, folder)]
    one = Scorer({by: scorer.rewards[by]}, {by: 1.0})
    return lambda replies, examples: [judged(score.parts[by]) for score in one(replies, examples, folder)]


def check_ranking(by: str, scorer: Scorer) -> None:
    """InputError for a ranking that is none."""
    known = ["likelihood", "total", *scorer.rewards]
    if by not in known:
        raise InputError(f"nothing ranks replies by '{by}'{nearest(by, known)}; there are {', '.join(known)}")


def judged(mark: float | None) -> float:
    return float("-inf") if mark is None else mark


def best(marks: Sequence[float]) -> int:
    """The place of the highest mark; the first of equal ones."""
    return max(range(len(marks)), key=lambda place: marks[place])


def likelihoods(resident: Resident, replies: Sequence[Reply]) -> list[float]:
    """The mean log-probability of a reply's tokens under the model, nats a token; minus infinity for none."""
    marks = [float("-inf")] * len(replies)
    left = sorted(
        (place for place in range(len(replies)) if replies[place].token_ids),
        key=lambda place: len(replies[place].token_ids),
    )
    rows = Rows(ROWS, "replies to rank", resident.say)
    vocabulary = resident.model.config.get_text_config().vocab_size
    while left:
        longest = len(replies[left[-1]].token_ids)
        batch = left[-max(1, min(rows.most, LOGITS // (longest * vocabulary))) :]
        found = rows.attempt(partial(mean_log_probabilities, resident, [replies[p] for p in batch]), len(batch))
        if found is None:
            continue
        left = left[: -len(batch)]
        for place, mark in zip(batch, found, strict=True):
            marks[place] = mark
    return marks


def mean_log_probabilities(resident: Resident, replies: Sequence[Reply]) -> list[float]:
    """The same for replies of at least a token that are read side by side."""
    import torch

    ids = [[*reply.prompt_ids, *reply.token_ids] for reply in replies]
    lengths = [len(reply.token_ids) for reply in replies]
    inputs = pad_left(resident.tokenizer, ids, resident.device)
    with resident.inference() as model:
        logits = model(**inputs, logits_to_keep=max(lengths) + 1).logits[:, :-1].float()
    told = inputs["input_ids"][:, -max(lengths) :].unsqueeze(-1)
    chosen = torch.log_softmax(logits, -1).gather(-1, told).squeeze(-1)
    return [float(row[-length:].mean()) for row, length in zip(chosen, lengths, strict=True)]
