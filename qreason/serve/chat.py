"""A conversation with a checkpoint: greedily, by majority vote, or best of n; prompts and decoding as in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qreason.data.prompts import render, system_prompt
from qreason.errors import DataError, InputError, nearest
from qreason.inference.selection import best, check_ranking, open_ranking, vote, votes_for
from qreason.rewards.registry import REFERENCED
from qreason.run.checkpoint import Checkpoint
from qreason.types import Example, Messages, Reply, Sampling


@dataclass(frozen=True)
class Answer:
    """A reply, how it was chosen, the number of tokens drawn for it, and the earlier turns that had no room."""

    reply: Reply
    how: str
    tokens: int
    forgotten: int = 0

    @property
    def note(self) -> str:
        forgotten = f"; the earliest {self.forgotten} turns have no room any more" if self.forgotten else ""
        return f"{self.how}, {self.tokens} tokens{forgotten}"


class Stopped(Exception):  # noqa: N818
    """The reply was stopped between two tokens."""


class Talk:
    """Questions and replies; the model sees the earlier ones, unless each question is `single`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        votes: int | None = None,
        best_of: int | None = None,
        by: str = "likelihood",
        single: bool = False,
        fold: bool = False,
    ) -> None:
        """`fold`: reasoning is hidden. Raises InputError for a ranking that needs a reference."""
        self.checkpoint, self.by, self.single = checkpoint, by, single
        check_ranking(by, checkpoint.scorer)
        self.rank = open_ranking(by, checkpoint.generator, checkpoint.scorer, Path.cwd())
        self.draw(votes=votes, best_of=best_of)
        self.system = system_prompt(checkpoint.data)
        self.stage = list(checkpoint.stages)[-1] if checkpoint.stages else ""
        self.history: tuple[tuple[str, str], ...] = ()
        self.turn = 0
        self.fold, self.stopping = fold, False

    # --- settings ------------------------------------------------------------------------------

    def draw(self, *, votes: int | None = None, best_of: int | None = None) -> None:
        """How a reply is chosen from now on: by vote, as the best of n, or greedily. Raises InputError as above."""
        scorer, by = self.checkpoint.scorer, self.by
        needed = REFERENCED & ({by} if by != "total" else scorer.rewards.keys())
        if best_of and needed:
            free = ["likelihood", *(name for name in scorer.rewards if name not in REFERENCED)]
            raise InputError(
                f"--by {by}: {', '.join(sorted(needed))} needs a reference, which a question does not have; "
                f"there are {', '.join(free)}"
            )
        self.votes, self.best_of = votes, best_of

    def go_to(self, stage: str) -> None:
        """Answer as after another stage of the run, in a new conversation; InputError for one that is not there."""
        stages = self.checkpoint.stages
        if stage not in stages:
            known = f"known are {', '.join(stages)}" if stages else "this is a model and not a run"
            raise InputError(f"no stage '{stage}'{nearest(stage, stages)}; {known}")
        self.stage = stage
        self.forget()

    def instruct(self, system: str | None) -> None:
        """Another system prompt, or that of training (None), in a new conversation."""
        self.system = system_prompt(self.checkpoint.data) if system is None else system
        self.forget()

    def forget(self) -> None:
        """Start a new conversation."""
        self.history = ()

    # --- a turn --------------------------------------------------------------------------------

    def stop(self) -> None:
        """End the reply that is being made after its next token; what is there of it is the reply."""
        self.stopping = True

    def ask(self, question: str, on_text: Callable[[str], None] = lambda text: None) -> Answer:
        """The answer to a question; `on_text` gets a reply that is made alone, as far as it is there.

        The seed changes with each question, so that the same one draws new replies. Raises DataError for a question
        that is too long.
        """
        checkpoint, drawn = self.checkpoint, self.votes or self.best_of
        if self.stage:  # another conversation with this model may have had another stage
            checkpoint.generator.resident.load_adapter(checkpoint.stages[self.stage])
        sampling = checkpoint.draw.sampling(greedy=not drawn, seed=checkpoint.seed + self.turn)
        example = Example(id="chat", prompt=question, reference="", history=self.history)
        prompt, forgotten = self.fit(example, sampling)
        self.turn += 1
        self.stopping, made = False, [[0] * 0]

        def look(rows: list[list[int]]) -> None:
            made[:] = rows
            if not drawn:
                on_text(checkpoint.generator.text(rows[0]))
            if self.stopping:
                raise Stopped

        try:
            (replies,) = checkpoint.generator.generate([prompt], n=drawn or 1, sampling=sampling, on_tokens=look)
            reply, how = self.choose(replies, example)
            tokens = sum(len(one.token_ids) for one in replies)
        except Stopped:
            text = "" if drawn else checkpoint.generator.text(made[0])
            reply, how, tokens = Reply(text, tuple(made[0]), finished=False), "stopped", sum(map(len, made))
        if not self.single and reply.text.strip():
            self.history = (*self.history[forgotten:], ("user", question), ("assistant", reply.text))
        return Answer(reply, how, tokens, forgotten)

    def fit(self, example: Example, sampling: Sampling) -> tuple[Messages, int]:
        """The prompt, and how many of the earliest turns it leaves out to have room for a reply of full length."""
        for forgotten in range(0, len(example.history) + 1, 2):
            prompt = render(replace(example, history=example.history[forgotten:]), self.system)
            try:
                self.checkpoint.generator.prompt_ids([prompt], sampling)
            except DataError:
                if forgotten == len(example.history):
                    raise
            else:
                return prompt, forgotten
        raise AssertionError("turns come in pairs")

    def choose(self, replies: Sequence[Reply], example: Example) -> tuple[Reply, str]:
        """The reply to show, and how it was chosen."""
        n = len(replies)
        if self.votes:
            if (place := vote(replies)) is None:
                return replies[0], f"none of {n} replies has an answer"
            return replies[place], f"{votes_for(replies, place)} of {n} votes"
        if self.best_of:
            return replies[best(self.rank(replies, [example] * n))], f"best of {n}"
        return replies[0], "greedy"
