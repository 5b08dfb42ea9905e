"""The schema of a recipe: its steps, and checks that they fit together and have what they need."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from qreason.errors import nearest, redact_values
from qreason.recipe.sections import Data, Draw, Model, Rewards, Strict, Weighted, preference_models
from qreason.recipe.settings import Evaluate, Export, Merge, Pull, Sample
from qreason.recipe.stage import BASE, NEWEST, Stage, Start
from qreason.recipe.training import RIGHT, Distill, Grpo, Preference, Sft


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
    def settings(self) -> Stage:
        settings: Stage = getattr(self, self.stage)
        return settings


STAGES: dict[str, type[Stage]] = {name: get_args(field.annotation)[0] for name, field in Step.model_fields.items()}
"""Every stage, and the class of its settings."""
OWN_FOLDER = re.compile(r"\d{2,}-[a-z]+")
"""The name of a stage folder, such as `02-preference`."""


def stage_folders(steps: Sequence[Step]) -> list[str]:
    """The folder of each step: `01-sft`, `02-grpo`, …; an evaluation is in the folder of the stage it measures."""
    folders, current, number = [], BASE, 0
    for step in steps:
        if step.stage != "evaluate":
            number += 1
            current = f"{number:02d}-{step.stage}"
        folders.append(current)
    return folders


class Recipe(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Letters, digits, dots and dashes; the run folder is `runs/NAME`."""
    model: Model
    """The base and its adapter."""
    data: Data
    """What it is trained and measured on."""
    rewards: Rewards
    """Name of a reward -> its weight, or a mapping with `weight` and its settings (docs/rewards.md)."""
    sampling: Draw = Draw()
    """How replies are drawn."""
    steps: list[Step] = Field(min_length=1)
    """The stages, in order; each with its settings."""
    fit: Literal["auto", "none"] = "auto"
    """`auto`: micro-batches and replies per pass are reduced until they fit the memory of the GPU, or of the machine
    without one, with the same results up to rounding; a run that cannot fit is refused. `none`: as written."""
    seed: int = Field(1, ge=0, lt=2**32)
    """Of everything that is drawn."""

    @property
    def weights(self) -> dict[str, float]:
        return {name: reward.weight for name, reward in self.rewards.items()}

    def rewards_of(self, step: Step) -> dict[str, Weighted]:
        """The rewards of a step: its own, or those of the recipe."""
        return step.settings.own_rewards or self.rewards

    def right_by(self, step: Step) -> list[str]:
        """The rewards of a step, by name, that say whether a reply is right: one of them is above 0."""
        return [name for name, one in self.rewards_of(step).items() if one.kind(name) in RIGHT]

    def asks_for(self, reward: str) -> bool:
        """Whether a reward is among those of the recipe or of one of its steps."""
        return any(one.kind(name) == reward for step in self.steps for name, one in self.rewards_of(step).items())

    @property
    def plain_stage(self) -> str | None:
        """The first stage that trains on the plain backend only, such as `a preference step`."""
        return next(filter(None, (step.settings.plain_backend for step in self.steps)), None)

    @model_validator(mode="after")
    def check_data(self) -> Recipe:
        """Every step has the data it reads, and a temperature above 0 where it must draw."""
        for step in self.steps:
            for key, what in step.settings.reads().items():
                if getattr(self.data, key) is None:
                    raise ValueError(f"data.{key} is missing: the {step.stage} step needs {what}")
            if step.settings.draws and self.sampling.temperature == 0:
                raise ValueError(f"sampling.temperature is 0: {step.settings.draws}; give it a value above 0")
        return self

    @model_validator(mode="after")
    def check_order(self) -> Recipe:
        """Evaluations are comparable, and each stage follows the one it needs."""
        if len({step.evaluate for step in self.steps if step.evaluate}) > 1:
            raise ValueError("steps: evaluate steps with different settings cannot be compared; give all the same")
        for before, after in pairwise(self.steps):
            if before.stage == after.stage == "evaluate":
                raise ValueError("steps: two evaluate steps in a row would measure the same model twice")
        producing = [step for step in self.steps if step.stage != "evaluate"]
        for earlier, step in zip([None, *producing], producing, strict=False):
            needed = step.settings.follows
            if needed and (earlier is None or earlier.stage not in needed):
                raise ValueError(f"steps: an {step.stage} takes a merged model; put a {needed[0]} step before it")
        return self

    @model_validator(mode="after")
    def check_dependencies(self) -> Recipe:
        """The adapter, sampled data or reward model of an earlier step that a step names exists."""
        folders = stage_folders(self.steps)
        for position, step in enumerate(self.steps):
            settings = step.settings
            before = list(zip(folders[:position], self.steps, strict=False))
            trained = [folder for folder, earlier in before if earlier.settings.leaves_adapter]
            if isinstance(settings, Start) and settings.start not in (NEWEST, BASE, *trained):
                known = ", ".join((NEWEST, BASE, *trained))
                raise ValueError(
                    f"steps.{position}.{step.stage}.from: no earlier '{settings.start}'; there are {known}"
                )
            if settings.reads_sampled and not any(earlier.sample for _, earlier in before):
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
    def check_rankings(self) -> Recipe:
        """Replies are ranked or filtered by the total, a reward, or the likelihood."""
        for position, step in enumerate(self.steps):
            known = ["total", *self.rewards] + ([] if step.sample else ["likelihood"])
            for name, setting in step.settings.rankings().items():
                if name not in known:
                    raise ValueError(
                        f"steps.{position}.{step.stage}.{setting}: '{name}' is none of {', '.join(known)}"
                        f"{nearest(name, known)}; add it to rewards (weight 0 keeps it out of the total)"
                    )
        return self

    @model_validator(mode="after")
    def check_filtering(self) -> Recipe:
        """Where prompts are left out by how many replies are right, a reward says which are."""
        for position, step in enumerate(self.steps):
            if step.grpo and step.grpo.difficulty_filtering and not self.right_by(step):
                raise ValueError(
                    f"steps.{position}.grpo.difficulty_filtering: no reward of this step says which replies are right; "
                    f"add one of {', '.join(RIGHT)} to its rewards (weight 0 keeps it out of the total), or leave "
                    "difficulty_filtering out: open answers are neither right nor wrong"
                )
        return self

    def dump(self) -> dict[str, Any]:
        """The recipe as resolved, as plain values that load again; without secrets, since it is stored."""
        steps = [{step.stage: plain_values(step.settings)} for step in self.steps]
        values: dict[str, Any] = redact_values(plain_values(self) | {"steps": steps})
        return values


def plain_values(section: Strict) -> dict[str, Any]:
    """The fields of a section as plain values that load again; only what is None by default is left out."""
    values = section.model_dump(mode="json", by_alias=True)
    for name, field in type(section).model_fields.items():
        key, value = field.alias or name, getattr(section, name)
        if isinstance(value, Strict):
            values[key] = plain_values(value)
        elif value is None and field.default is None:
            del values[key]
    return values
