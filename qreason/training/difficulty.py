"""Offline difficulty filtering: prompts that the policy always or never solves are left out before GRPO.

The difficulty of a prompt is its pass rate: the share of right replies among some that are drawn from the policy which
training starts from (Kimi k1.5, arXiv 2501.12599, section 2.1). At 0 or 1 a rule for right answers tells none of them
apart. DAPO (arXiv 2503.14476, section 3.2) leaves such prompts out of every batch instead, as training goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qreason.data.prompts import render, system_prompt
from qreason.errors import RunFolderError, TrainingError
from qreason.machine.files import cut_to_lines, read_json, read_jsonl, write_json, write_jsonl
from qreason.machine.progress import progress_bar
from qreason.machine.records import PassRate
from qreason.recipe.training import Grpo
from qreason.rewards.scoring import Scorer
from qreason.run.folder import weights_of
from qreason.run.resume import DRAWN
from qreason.run.session import Session
from qreason.training.preflight import check_ends
from qreason.types import Example, Generator, Sampling, Score

SEEDS = 1_000_003
"""From the seed of one run to that of the next: each batch has its own, so that the rest is drawn as it would have."""


def filter_prompts(
    settings: Grpo, run: Session, scorer: Scorer, examples: Sequence[Example], folder: Path
) -> list[Example]:
    """The prompts that are neither always nor never solved; none where all are always solved.

    Those that no reward could judge stay. Raises TrainingError where none is left, and some are never solved.
    """
    n, rules = settings.difficulty_filtering or 0, run.recipe.right_by(run.recipe.steps[run.step])
    rates = PassRates(folder, made_with(settings, run, rules))
    if rates.rows:
        run.say(f"{rates.file}: pass rates of {len(rates.rows)} of {len(examples)} prompts are there")
    rates.draw(
        run.generator,
        Scorer({name: scorer.rewards[name] for name in rules}, dict.fromkeys(rules, 1.0)),
        examples,
        system=system_prompt(run.recipe.data),
        n=n,
        at_a_time=settings.prompts_at_a_time,
        sampling=run.recipe.sampling.sampling(seed=run.recipe.seed),
        preflight=settings.preflight,
    )
    if run.mirror:
        run.mirror()
    found = rates.by_example(examples)
    always, never = found.count(1.0), found.count(0.0)
    kept = [example for example, rate in zip(examples, found, strict=True) if rate not in (0.0, 1.0)]
    run.say(
        f"{folder.name}: {always + never} of {len(examples)} prompts are left out, {always} always and {never} never "
        f"solved in {n} replies"
    )
    if never and not kept:
        raise TrainingError(
            f"grpo.difficulty_filtering leaves no prompt: of {len(examples)}, {always} are always and {never} never "
            f"solved in {n} replies, by {', '.join(rules)}; start from a model that is sometimes correct (sft first), "
            "raise difficulty_filtering or sampling.temperature, or leave it out"
        )
    return kept


def made_with(settings: Grpo, run: Session, rules: Sequence[str]) -> dict[str, Any]:
    """What the pass rates of a step depend on; `rules` are the rewards that say what is right."""
    recipe, rewards = run.recipe.dump(), run.recipe.rewards_of(run.recipe.steps[run.step])
    return {
        **{key: recipe[key] for key in ("model", "data", "seed")},
        "sampling": run.recipe.sampling.model_dump(exclude={"max_num_seqs"}),
        "rewards": {name: rewards[name].model_dump(mode="json") for name in rules},
        "prompts": run.disk.manifest["data"]["prompts"],
        "base": run.disk.manifest["base"]["fingerprint"],
        "adapter": weights_of(run.disk.adapter(settings.start)),
        "rows": settings.rows,
        "n": settings.difficulty_filtering,
    }


class PassRates:
    """pass_rates.jsonl in the folder of a step: a row per prompt. pass_rates.json has what it was made with."""

    def __init__(self, folder: Path, made_with: Mapping[str, Any]) -> None:
        """Read the rows that are there; none where they were made with something else."""
        self.file, header = (folder / name for name in DRAWN)
        self.again = f"restore it from a copy, or remove {header} to draw anew"
        self.rows: list[dict[str, Any]] = []
        if not header.exists() or read_json(header, cure=self.again) != made_with:
            self.file.unlink(missing_ok=True)
            write_json(header, made_with)
        elif self.file.exists():
            cut_to_lines(self.file)
            self.rows = read_jsonl(self.file, PassRate, self.again)

    def draw(
        self,
        generator: Generator,
        scorer: Scorer,
        examples: Sequence[Example],
        *,
        system: str,
        n: int,
        at_a_time: int,
        sampling: Sampling,
        preflight: bool,
    ) -> None:
        """Draw n replies to each prompt that has no row, and store the rows of `at_a_time` prompts together.

        With `preflight`, TrainingError where none of the first replies ends.
        """
        with progress_bar("pass rates", total=len(examples) * n) as bar:
            bar.advance(len(self.rows) * n)
            for start in range(len(self.rows), len(examples), at_a_time):
                batch = examples[start : start + at_a_time]
                prompts = [render(example, system) for example in batch]
                drawing = replace(sampling, seed=(sampling.seed or 0) * SEEDS + start)
                made = generator.generate(prompts, n=n, sampling=drawing, fast=True, on_progress=bar.advance)
                replies = [reply for group in made for reply in group]
                if preflight and not start:
                    check_ends(replies, sampling.max_completion_length)
                scores = scorer(replies, [example for example in batch for _ in range(n)], self.file.parent)
                groups = [scores[place : place + n] for place in range(0, len(scores), n)]
                rows = [{"id": one.id, "pass_rate": pass_rate(group)} for one, group in zip(batch, groups, strict=True)]
                write_jsonl(self.file, rows, append=True)
                self.rows += rows

    def by_example(self, examples: Sequence[Example]) -> list[float | None]:
        """The pass rate of each prompt; RunFolderError where the rows are those of others."""
        if [row["id"] for row in self.rows] != [example.id for example in examples]:
            raise RunFolderError(f"{self.file}: its rows are not the prompts in their order; {self.again}")
        return [row["pass_rate"] for row in self.rows]


def pass_rate(scores: Sequence[Score]) -> float | None:
    """The share of right replies, those with a reward above 0, among the replies that could be judged."""
    parts = [[part for part in score.parts.values() if part is not None] for score in scores]
    right = [any(part > 0 for part in judged) for judged in parts if judged]
    return sum(right) / len(right) if right else None
