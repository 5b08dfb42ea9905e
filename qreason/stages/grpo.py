"""Group relative policy optimization (DeepSeekMath, arXiv 2402.03300) on TRL's trainer.

qreason makes the rollouts and scores them; TRL turns the scores into advantages and the advantages into steps.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qreason.data.prompts import SYSTEM_PROMPTS, render
from qreason.errors import TrainingError
from qreason.inference.generate import LocalGenerator
from qreason.judge.calibration import correlation
from qreason.machine.files import write_jsonl
from qreason.machine.progress import progress_bar
from qreason.recipe.schema import Step
from qreason.recipe.sections import weights
from qreason.recipe.settings import Grpo
from qreason.rewards.scoring import Scorer, reply_row
from qreason.run.session import Artifact, Run
from qreason.training.alarms import Alarm, Watchdog
from qreason.training.preflight import check_gold, check_judge, check_rollouts
from qreason.types import Example, Generator, Messages, Reply, Score


def grpo(step: Step, run: Run) -> Artifact:
    """Train the newest adapter of the run (or another, or a fresh one) against rewards on data.prompts."""
    settings = step.settings
    assert isinstance(settings, Grpo)
    examples = run.examples("prompts")[: settings.rows]
    if plain := run.plain(settings.plain_share, len(examples)):
        random.Random(run.recipe.seed).shuffle(examples := examples + plain)
    resident = run.resident

    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from qreason.model.compat.trl import sharing_prompts
    from qreason.training.recovery import recovering
    from qreason.training.trainer import Watch, start_adapter, train, trl_arguments

    start_adapter(run, settings)
    wanted = run.recipe.rewards_of(step)
    rewards = run.build(wanted) if settings.rewards else run.rewards
    scorer = Scorer(rewards, weights(wanted))
    folder = run.clear_stage_folder()
    generator = LocalGenerator(resident, fast=True)
    system = SYSTEM_PROMPTS[run.recipe.data.prompt]
    if settings.preflight:
        check_gold(examples, rewards, {name: one.kind(name) for name, one in wanted.items()}, folder)
        drawn = run.recipe.sampling.sampling(seed=run.recipe.seed)
        check_rollouts(
            generator, scorer, examples, system=system, n=settings.num_generations, sampling=drawn, folder=folder
        )
        weight, labels = scorer.weights.get("judge", 0.0), run.recipe.data.labels
        if run.judge and weight and labels and (warning := check_judge(run.judge, Path(labels), weight, folder)):
            run.say(warning)
    rollouts = Rollouts(generator, scorer, examples, run, folder, settings.stop_on_reward_hacking)
    sampling = run.recipe.sampling.model_dump(exclude={"max_num_seqs"})
    arguments = GRPOConfig(
        **{"reward_weights": list(scorer.weights.values())} | sampling | trl_arguments(settings, run, folder)
    )
    with progress_bar(folder.name) as bar:
        trainer = recovering(sharing_prompts(GRPOTrainer), run.say)(
            model=resident.model,
            args=arguments,
            train_dataset=Dataset.from_list(
                [{"prompt": render(example, system), "example": index} for index, example in enumerate(examples)]
            ),
            processing_class=resident.tokenizer,
            reward_funcs=rollouts.columns(),
            rollout_func=rollouts.make,
            callbacks=[Watch(folder, bar, ("reward", "rewards/correctness/mean", "entropy"))],
        )
        adapter = train(trainer, run, folder)
    groups, flat = rollouts.groups, rollouts.groups_without_signal
    summary = f"{trainer.state.global_step} steps, {groups} groups; in {flat} ({flat / groups:.0%}) all scored the same"
    if rollouts.unjudged:
        summary += f"; {rollouts.unjudged} replies could not be judged"
    return Artifact(adapter, summary)


class Rollouts:
    """The rollouts of a GRPO run: made by our generator, scored once, handed to TRL as one column a reward."""

    def __init__(
        self, generator: Generator, scorer: Scorer, examples: Sequence[Example], run: Run, folder: Path, stop: bool
    ) -> None:
        self.generator, self.scorer, self.examples = generator, scorer, examples
        self.sampling = run.recipe.sampling.sampling()
        self.folder, self.say = folder, run.say
        self.watchdog = Watchdog(scorer.weights)
        self.stop_on_reward_hacking = stop
        self.replies: list[Reply] = []
        self.scores: list[Score] = []
        self.groups = self.groups_without_signal = self.unjudged = 0
        self.rollout_seconds = 0.0

    def make(self, prompts: list[Messages], trainer: Any) -> dict[str, Any]:
        """TRL's rollout seam: prompts come repeated, num_generations times in a row."""
        group, start = trainer.num_generations, time.perf_counter()
        made = self.generator.generate(prompts[::group], n=group, sampling=self.sampling)
        self.replies = [reply for replies in made for reply in replies]
        self.scores = []
        self.rollout_seconds = time.perf_counter() - start
        return {
            "prompt_ids": [list(reply.prompt_ids) for reply in self.replies],
            "completion_ids": [list(reply.token_ids) for reply in self.replies],
            "logprobs": None,
        }

    def columns(self) -> list[Callable[..., list[float | None]]]:
        """One reward function a part, for TRL to weight and log; the first one called scores the batch."""
        return [self.column(name) for name in self.scorer.rewards]

    def column(self, name: str) -> Callable[..., list[float | None]]:
        def part(
            completions: list[Any], example: list[int], trainer_state: Any, log_metric: Any, **kwargs: Any
        ) -> list[float | None]:
            if not self.scores:
                self.score([self.examples[index] for index in example], trainer_state.global_step + 1, log_metric)
            # A reply without a total teaches nothing: all its parts are withheld, so that TRL skips it.
            return [score.parts[name] if score.total is not None else None for score in self.scores]

        part.__name__ = name
        return part

    def score(self, examples: list[Example], step: int, log_metric: Callable[[str, float], None]) -> None:
        start = time.perf_counter()
        self.scores = self.scorer(self.replies, examples, self.folder)
        log_metric("seconds/rollout", self.rollout_seconds)
        log_metric("seconds/rewards", time.perf_counter() - start)
        rows = [reply_row(*row) for row in zip(self.replies, examples, self.scores, strict=True)]
        write_jsonl(self.folder / "replies.jsonl", [{"step": step, **row} for row in rows], append=True)
        groups: dict[str, set[float | None]] = {}
        for example, score in zip(examples, self.scores, strict=True):
            groups.setdefault(example.id, set()).add(score.total)
        flat = sum(len(totals) == 1 for totals in groups.values())
        self.groups += len(groups)
        self.groups_without_signal += flat
        self.unjudged += sum(score.total is None for score in self.scores)
        log_metric("groups_without_signal", flat / len(groups))
        log_metric("distinct_replies", len({reply.text for reply in self.replies}) / len(self.replies))
        log_metric("reply_words", sum(len(reply.text.split()) for reply in self.replies) / len(self.replies))
        if (agreement := judge_agreement(self.scores)) is not None:
            log_metric("judge_correctness_correlation", agreement)
        for alarm in self.watchdog.look(step, self.replies, examples, self.scores):
            self.raise_alarm(alarm)

    def raise_alarm(self, alarm: Alarm) -> None:
        """Say what looks like gaming, and keep the replies that show it; TrainingError where that stops the run."""
        file = self.folder / "alarms.jsonl"
        write_jsonl(file, [asdict(alarm)], append=True)
        told = f"step {alarm.step}: looks like reward hacking: {alarm.text}; replies that show it are in {file}"
        if self.stop_on_reward_hacking:
            raise TrainingError(f"{told}. Stopped (stop_on_reward_hacking); no adapter was written")
        self.say(told)


def judge_agreement(scores: Sequence[Score]) -> float | None:
    """The correlation of judge and correctness over replies that have both; None where one does not vary."""
    both = [(score.parts.get("judge"), score.parts.get("correctness")) for score in scores]
    known = [(judge, right) for judge, right in both if judge is not None and right is not None]
    return correlation([judge for judge, _ in known], [right for _, right in known])
