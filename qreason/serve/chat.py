"""One question to a checkpoint: greedily, by majority vote, or best of n; prompts and decoding as in evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qreason.data.prompts import render, system_prompt
from qreason.errors import InputError
from qreason.inference.selection import best, check_ranking, open_ranking, vote, votes_for
from qreason.rewards.registry import REFERENCED
from qreason.run.checkpoint import Checkpoint
from qreason.types import Example, Reply


@dataclass(frozen=True)
class Answer:
    """A reply, how it was chosen, and the number of tokens drawn for it."""

    reply: Reply
    how: str
    tokens: int


class Talk:
    """Independent questions, as in training: the model does not see earlier turns."""

    def __init__(self, checkpoint: Checkpoint, *, votes: int | None, best_of: int | None, by: str) -> None:
        """Raises InputError for a ranking that needs a reference, which a question does not have."""
        self.checkpoint, self.votes, self.best_of = checkpoint, votes, best_of
        check_ranking(by, checkpoint.scorer)
        needed = REFERENCED & ({by} if by != "total" else checkpoint.scorer.rewards.keys())
        if best_of and needed:
            free = ["likelihood", *(name for name in checkpoint.scorer.rewards if name not in REFERENCED)]
            raise InputError(
                f"--by {by}: {', '.join(sorted(needed))} needs a reference, which a question does not have; "
                f"there are {', '.join(free)}"
            )
        self.rank = open_ranking(by, checkpoint.generator, checkpoint.scorer, Path.cwd())
        self.turn = 0

    def ask(self, question: str) -> Answer:
        """One question, one answer. The seed changes with each, so that the same question draws new replies."""
        checkpoint = self.checkpoint
        example = Example(id="chat", prompt=question, reference="")
        drawn = self.votes or self.best_of
        n = drawn or 1
        sampling = checkpoint.draw.sampling(greedy=not drawn, seed=checkpoint.seed + self.turn)
        self.turn += 1
        prompt = render(example, system_prompt(checkpoint.data))
        (replies,) = checkpoint.generator.generate([prompt], n=n, sampling=sampling)
        tokens = sum(len(reply.token_ids) for reply in replies)
        if self.votes:
            if (place := vote(replies)) is None:
                return Answer(replies[0], f"none of {n} replies has an answer", tokens)
            return Answer(replies[place], f"{votes_for(replies, place)} of {n} votes", tokens)
        if self.best_of:
            return Answer(replies[best(self.rank(replies, [example] * n))], f"best of {n}", tokens)
        return Answer(replies[0], "greedy", tokens)
