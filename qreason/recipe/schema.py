"""The schema of a recipe: its steps, and whether they fit together and have what they need."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from qreason.errors import nearest
from qreason.recipe.sections import Data, Draw, Model, Strict, Weighted, check_rewards, preference_models, weights
from qreason.recipe.settings import (
    BASE,
    NEWEST,
    Distill,
    Evaluate,
    Export,
    Grpo,
    Merge,
    Preference,
    Pull,
    Sample,
    Sft,
    Start,
)

Settings = Sft | Grpo | Sample | Distill | Preference | Evaluate | Merge | Pull | Export


class Step(Strict):
    """One stage with its settings; exactly one of the fields is set."""

    sft: Sft | None = None
    grpo: Grpo | None = None
    sample: Sample | None = None
    distill: Distill | None = None
    preference: Preference | None = None
    evaluate: Evaluate | None = None
    merge: Merge | None = None
    pull: Pull | None = None
    export: Export | None = None

    @model_validator(mode="before")
    @classmethod
    def bare_name(cls, raw: Any) -> Any:
        """`- evaluate` and `- evaluate:` mean the stage with its defaults."""
        if isinstance(raw, str):
            return {raw: {}}
        return {key: {} if value is None else value for key, value in raw.items()} if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def one_stage(self) -> Step:
        if len(self.model_fields_set) != 1:
            raise ValueError("a step is one stage: start each stage with its own dash")
        return self

    @property
    def stage(self) -> str:
        (name,) = self.model_fields_set
        return name

    @property
    def settings(self) -> Settings:
        settings: Settings = getattr(self, self.stage)
        return settings


STAGES = tuple(Step.model_fields)
POLICIES = ("sft", "grpo", "distill", "pull")
"""Stages whose adapter later ones may start from."""
OWN_FOLDER = re.compile(r"\d{2,}-[a-z]+")
"""How the run's own stages are named, as `02-preference`."""
NEEDS = {
    "sft": (("sft",), "incidents"),
    "prompts": (("grpo", "sample", "distill"), "prompts"),
    "heldout": (("evaluate", "export"), "held-out rows"),
    "pairs": (("preference",), "ranked pairs"),
    "plain": (("sample", "grpo"), "rows without reasoning (plain_share)"),
}
"""Data key -> (stages that read it, what it holds)."""


def reads(step: Step, key: str) -> bool:
    """Whether a step of a stage that may read a data key does so with its settings."""
    if isinstance(step.settings, (Sft, Preference)):
        return step.settings.data == key
    return key != "plain" or bool(getattr(step.settings, "plain_share", 0))


def stage_folders(steps: Sequence[Step]) -> list[str]:
    """The folder of each step: `01-sft`, `02-grpo`, …; an evaluation lies with the stage it measures."""
    folders, current, number = [], BASE, 0
    for step in steps:
        if step.stage != "evaluate":
            number += 1
            current = f"{number:02d}-{step.stage}"
        folders.append(current)
    return folders


class Recipe(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: Model
    data: Data
    rewards: dict[str, Weighted] = Field(min_length=1)
    sampling: Draw = Draw()
    steps: list[Step] = Field(min_length=1)
    fit: Literal["auto", "none"] = "auto"
    """`auto`: on a GPU, micro-batches and replies side by side are cut down to what its memory holds, or the run is
    refused; the mathematics stays the same. `none`: as written."""
    seed: int = Field(1, ge=0)

    @field_validator("rewards")
    @classmethod
    def known_rewards(cls, rewards: dict[str, Weighted]) -> dict[str, Weighted]:
        return check_rewards(rewards)

    @property
    def weights(self) -> dict[str, float]:
        return weights(self.rewards)

    def rewards_of(self, step: Step) -> dict[str, Weighted]:
        """The rewards of a step: its own, or those of the recipe."""
        return (step.grpo.rewards if step.grpo else None) or self.rewards

    @model_validator(mode="after")
    def has_what_steps_need(self) -> Recipe:
        for key, (stages, what) in NEEDS.items():
            used = [step.stage for step in self.steps if step.stage in stages and reads(step, key)]
            if used and getattr(self.data, key) is None:
                raise ValueError(f"data.{key} is missing: the {used[0]} step needs {what}")
        for step in self.steps if self.sampling.temperature == 0 else ():
            if step.stage in ("grpo", "distill"):
                why = "grpo compares different replies" if step.grpo else "distill draws replies"
                raise ValueError(f"sampling.temperature is 0: {why}; give it a value above 0")
        if len({step.evaluate for step in self.steps if step.evaluate}) > 1:
            raise ValueError("steps: evaluate steps with different settings cannot be compared; give all the same")
        makers = [step.stage for step in self.steps if step.stage != "evaluate"]
        for before_it, stage in zip(["", *makers], makers, strict=False):
            if stage == "export" and before_it not in ("merge", "export"):
                raise ValueError("steps: an export takes a merged model; put a merge step before it")
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            if before.stage == after.stage == "evaluate":
                raise ValueError("steps: two evaluate steps in a row would measure the same model twice")
        return self

    @model_validator(mode="after")
    def earlier_steps_give_what_later_ones_take(self) -> Recipe:
        folders = stage_folders(self.steps)
        for position, step in enumerate(self.steps):
            settings = step.settings
            before = list(zip(folders[:position], self.steps, strict=False))
            trained = [folder for folder, earlier in before if earlier.stage in POLICIES]
            if isinstance(settings, Start) and settings.start not in (NEWEST, BASE, *trained):
                known = ", ".join((NEWEST, BASE, *trained))
                raise ValueError(
                    f"steps.{position}.{step.stage}.from: no earlier '{settings.start}'; there are {known}"
                )
            samples = isinstance(settings, (Sft, Preference)) and settings.data == "sampled"
            if samples and not any(earlier.sample for _, earlier in before):
                raise ValueError(f"steps.{position}.{step.stage}.data: sampled: there is no sample step before it")
            learnt = [folder for folder, earlier in before if earlier.preference]
            for name, model in preference_models(self.rewards_of(step)):
                if OWN_FOLDER.fullmatch(model) and model not in learnt:
                    raise ValueError(
                        f"{f'steps.{position}.grpo.' if step.grpo else ''}rewards.{name}.model: no earlier preference "
                        f"step '{model}'; there are {', '.join(learnt) or 'none'}. A grpo step names one in its own "
                        "rewards"
                    )
        return self

    @model_validator(mode="after")
    def rankings_are_rewards(self) -> Recipe:
        for position, step in enumerate(self.steps):
            named: dict[str, str] = {}
            if isinstance(step.settings, Sample):
                named = {name: f"sample.keep: '{name}'" for name in step.settings.keep}
            elif isinstance(step.settings, Evaluate):
                named[step.settings.best_by] = f"evaluate.best_by: '{step.settings.best_by}'"
                if step.settings.beam:
                    named[step.settings.beam.by] = f"evaluate.beam.by: '{step.settings.beam.by}'"
            known = ["total", *self.rewards] + ([] if step.sample else ["likelihood"])
            for name, place in named.items():
                if name not in known:
                    raise ValueError(
                        f"steps.{position}.{place} is none of {', '.join(known)}{nearest(name, known)}; "
                        "add it to rewards (weight 0 keeps it out of the total)"
                    )
        return self

    def dump(self) -> dict[str, Any]:
        """The recipe as resolved, as plain values that load again."""
        return self.model_dump(mode="json", exclude_none=True, by_alias=True)
