"""The rollouts of a GRPO run: made by the session's generator, scored once, handed to TRL as one column per reward."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

from qreason.errors import TrainingError
from qreason.judge.calibration import correlation
from qreason.machine import ranks
from qreason.machine.files import write_jsonl
from qreason.machine.progress import phase
from qreason.rewards.scoring import reply_row
from qreason.run.session import Rewards, Session
from qreason.training.alarms import UNJUDGED, UNJUDGED_STEPS, Alarm, Watchdog
from qreason.training.reasoning import Reasoned, ReasoningWatch, reasoning_metrics
from qreason.types import Example, Messages, Reply, Score

COUNTS = ("groups", "groups_without_variance", "unjudged", "unjudged_steps")
LogMetric = Callable[[str, float], None]


class Rollouts:
    """What TRL's GRPO trainer calls: `make` for replies, then one function per reward for their scores."""

    def __init__(
        self,
        run: Session,
        rewards: Rewards,
        examples: Sequence[Example],
        folder: Path,
        *,
        stop: bool,
        stop_unjudged: bool = True,
    ) -> None:
        """`stop`: raise an error where a reward looks gamed, in place of a message; `stop_unjudged`: if few judge."""
        self.run, self.scorer, self.examples, self.folder = run, rewards.scorer, examples, folder
        self.stop, self.stop_unjudged = stop, stop_unjudged
        self.sampling = run.recipe.sampling.sampling()
        self.watchdog = Watchdog(self.scorer.weights)
        gain = rewards.gain or run.reasoning_gain()
        self.reasoning = ReasoningWatch(run.reference_steps, gain, rewarded=rewards.gain is not None)
        self.judge = rewards.judge
        self.replies: list[Reply] = []
        self.scores: list[Score] = []
        self.groups = self.groups_without_variance = self.unjudged = self.unjudged_steps = 0
        self.rollout_seconds = 0.0

    @property
    def summary(self) -> str:
        flat = self.groups_without_variance
        text = f"{self.groups} groups; {flat} ({flat / self.groups:.0%}) had no reward variance"
        return text + (f"; {self.unjudged} replies could not be judged" if self.unjudged else "")

    def make(self, prompts: list[Messages], trainer: Any) -> dict[str, Any]:
        """TRL's rollout_func; each prompt comes num_generations times, consecutively."""
        phase("replies")
        group, start = trainer.num_generations, time.perf_counter()
        made = self.run.generator.generate(prompts[::group], n=group, sampling=self.sampling, fast=True)
        self.replies, self.scores = [reply for replies in made for reply in replies], []
        self.rollout_seconds = time.perf_counter() - start
        return {
            "prompt_ids": [list(reply.prompt_ids) for reply in self.replies],
            "completion_ids": [list(reply.token_ids) for reply in self.replies],
            "logprobs": None,
        }

    def reward_functions(self) -> list[Callable[..., list[float | None]]]:
        """One function per reward, for TRL to weight and log; the first one called scores the batch."""
        return [self.reward_function(name) for name in self.scorer.rewards]

    def reward_function(self, name: str) -> Callable[..., list[float | None]]:
        def part(
            completion_ids: list[list[int]], example: list[int], trainer_state: Any, log_metric: LogMetric, **_: Any
        ) -> list[float | None]:
            if [tuple(ids) for ids in completion_ids] != [reply.token_ids for reply in self.replies]:
                raise TrainingError(
                    "the trainer passed other replies to the rewards than were made, or in another order; no adapter "
                    "was written. This version of TRL does not fit: `qreason doctor` shows the tested one"
                )
            if not self.scores:
                self.score([self.examples[index] for index in example], trainer_state.global_step + 1, log_metric)
            # All parts of a reply without a total are withheld, so that TRL skips it.
            return [score.parts[name] if score.total is not None else None for score in self.scores]

        part.__name__ = name
        return part

    def score(self, examples: list[Example], step: int, log_metric: LogMetric) -> None:
        phase("rewards")
        start = time.perf_counter()
        self.scores = self.scorer(self.replies, examples, self.folder)
        reasoned = self.reasoning.look(step, self.replies, examples)
        log_metric("seconds/rollout", self.rollout_seconds)
        log_metric("seconds/rewards", time.perf_counter() - start)
        # Each process of a launch has scored its own; all look at all of them.
        parts = ranks.gather((self.replies, examples, self.scores, reasoned))
        everything: list[Any] = [list(chain(*part)) for part in zip(*parts, strict=True)]
        self.note(step, log_metric, *everything)

    def note(
        self,
        step: int,
        log_metric: LogMetric,
        replies: list[Reply],
        examples: list[Example],
        scores: list[Score],
        reasoned: list[Reasoned],
    ) -> None:
        """Store the scored replies of a step, log what they are like, and report what looks wrong."""
        if ranks.is_first():
            rows = [reply_row(*row) for row in zip(replies, examples, scores, strict=True)]
            write_jsonl(self.folder / "replies.jsonl", [{"step": step, **row} for row in rows], append=True)
        groups: dict[str, set[float | None]] = {}
        for example, score in zip(examples, scores, strict=True):
            groups.setdefault(example.id, set()).add(score.total)
        flat = sum(len(totals) == 1 for totals in groups.values())
        self.groups += len(groups)
        self.groups_without_variance += flat
        self.watch_unjudged(step, scores)
        log_metric("groups_without_signal", flat / len(groups))
        log_metric("distinct_replies", len({reply.text for reply in replies}) / len(replies))
        log_metric("reply_words", sum(len(reply.text.split()) for reply in replies) / len(replies))
        if (agreement := judge_agreement(scores)) is not None:
            log_metric("judge_correctness_correlation", agreement)
        for name, value in reasoning_metrics(reasoned):
            log_metric(name, value)
        for alarm in self.watchdog.look(step, replies, examples, scores, reasoned):
            self.report(alarm)
        phase("update ")

    def watch_unjudged(self, step: int, scores: Sequence[Score]) -> None:
        """TrainingError where most replies of several steps in a row have no total."""
        unjudged = sum(score.total is None for score in scores)
        self.unjudged += unjudged
        self.unjudged_steps = self.unjudged_steps + 1 if unjudged > UNJUDGED * len(scores) else 0
        if self.stop_unjudged and self.unjudged_steps == UNJUDGED_STEPS:
            silent = {name: sum(score.parts[name] is None for score in scores) for name in self.scorer.rewards}
            name = max(silent, key=lambda name: silent[name])
            raise TrainingError(
                f"step {step}: {unjudged} of {len(scores)} replies could not be judged, nor could most in the "
                f"{UNJUDGED_STEPS - 1} steps before ('{name}': None for {silent[name]}). Stopped (stop_on_unjudged), "
                "no adapter was written; see that it can judge: that its server answers, that rows have what it reads"
            )

    def report(self, alarm: Alarm) -> None:
        """A message of what looks like gaming, with the replies kept; TrainingError where that stops the run."""
        file = self.folder / "alarms.jsonl"
        if ranks.is_first():
            write_jsonl(file, [asdict(alarm)], append=True)
        message = f"step {alarm.step}: looks like reward hacking: {alarm.text}; replies that show it are in {file}"
        if self.stop:
            raise TrainingError(f"{message}. Stopped (stop_on_reward_hacking); no adapter was written")
        self.run.say(message)

    # --- checkpoints ---------------------------------------------------------------------------

    def remember(self) -> Callable[[], dict[str, Any]]:
        counts, watched = {name: getattr(self, name) for name in COUNTS}, self.watchdog.remember()
        verdicts = self.judge.verdicts if self.judge else {}
        known = len(verdicts)  # later ones come after these

        def memory() -> dict[str, Any]:
            rows = [[*pair, value] for pair, value in islice(verdicts.items(), known)]
            return {"counts": counts, "verdicts": rows, "watchdog": watched()}

        return memory

    def recall(self, memory: Mapping[str, Any]) -> None:
        for name, count in memory["counts"].items():
            setattr(self, name, count)
        if self.judge:
            self.judge.verdicts.update({(reference, reply): value for reference, reply, value in memory["verdicts"]})
        self.watchdog.recall(memory["watchdog"], {example.id: example for example in self.examples})


def judge_agreement(scores: Sequence[Score]) -> float | None:
    """The correlation of judge and correctness over replies that have both; None where one does not vary."""
    both = [(score.parts.get("judge"), score.parts.get("correctness")) for score in scores]
    known = [(judge, right) for judge, right in both if judge is not None and right is not None]
    return correlation([judge for judge, _ in known], [right for _, right in known])
