"""Group relative policy optimization (DeepSeekMath, arXiv 2402.03300) on TRL's trainer.

qreason makes the rollouts and scores them; TRL turns the scores into advantages and the advantages into steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qreason.generate import LocalGenerator
from qreason.progress import progress_bar
from qreason.prompts import SYSTEM_PROMPTS, render
from qreason.recipe import Grpo, Step
from qreason.rewards.scoring import Scorer, reply_row
from qreason.run import Artifact, Run, write_jsonl
from qreason.types import Example, Generator, Messages, Reply, Score


def grpo(step: Step, run: Run) -> Artifact:
    """Train the newest adapter of the run (or a fresh one) against the recipe's rewards on data.prompts."""
    settings = step.settings
    assert isinstance(settings, Grpo)
    examples = run.examples("prompts")[: settings.rows]
    resident = run.resident

    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from qreason.stages.training import Watch, start_adapter, train, trl_arguments

    start_adapter(run)
    scorer = Scorer(run.rewards, run.recipe.rewards)
    folder = run.clear_stage_folder()
    rollouts = Rollouts(LocalGenerator(resident), scorer, examples, run, folder)
    system = SYSTEM_PROMPTS[run.recipe.data.prompt]
    sampling = run.recipe.sampling.model_dump()
    arguments = GRPOConfig(
        **{"reward_weights": list(run.recipe.rewards.values())} | sampling | trl_arguments(settings, run, folder)
    )
    with progress_bar(folder.name) as bar:
        trainer = GRPOTrainer(
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
    return Artifact(adapter, summary)


class Rollouts:
    """The rollouts of a GRPO run: made by our generator, scored once, handed to TRL as one column a reward."""

    def __init__(
        self, generator: Generator, scorer: Scorer, examples: Sequence[Example], run: Run, folder: Path
    ) -> None:
        self.generator, self.scorer, self.examples = generator, scorer, examples
        self.sampling = run.recipe.sampling.sampling()
        self.folder = folder
        self.replies: list[Reply] = []
        self.scores: list[Score] = []
        self.groups = self.groups_without_signal = 0

    def make(self, prompts: list[Messages], trainer: Any) -> dict[str, Any]:
        """TRL's rollout seam: prompts come repeated, num_generations times in a row."""
        group = trainer.num_generations
        made = self.generator.generate(prompts[::group], n=group, sampling=self.sampling)
        self.replies = [reply for replies in made for reply in replies]
        self.scores = []
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
        self.scores = self.scorer(self.replies, examples, self.folder)
        rows = [reply_row(*row) for row in zip(self.replies, examples, self.scores, strict=True)]
        write_jsonl(self.folder / "replies.jsonl", [{"step": step, **row} for row in rows], append=True)
        groups: dict[str, set[float | None]] = {}
        for example, score in zip(examples, self.scores, strict=True):
            groups.setdefault(example.id, set()).add(score.total)
        flat = sum(len(totals) == 1 for totals in groups.values())
        self.groups += len(groups)
        self.groups_without_signal += flat
        log_metric("groups_without_signal", flat / len(groups))
