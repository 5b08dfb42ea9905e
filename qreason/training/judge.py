"""Measuring and training the judge of a recipe: `qreason judge calibrate` and `qreason judge train`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qreason.data.prompts import render_judge
from qreason.errors import InputError, RunFolderError
from qreason.judge.calibration import Label, calibrate, read_labels
from qreason.machine.files import write_json
from qreason.recipe.schema import Recipe
from qreason.recipe.training import Sft
from qreason.rewards.judged import JudgeSettings
from qreason.run.session import Session

HELD_OUT = 5
"""One in so many references is held out from training, to measure on."""


def judge_settings(recipe: Recipe) -> tuple[JudgeSettings, float]:
    """The judge of a recipe, or of its steps, with the largest weight, and that; the default judge, 0, without one."""
    asked = (recipe.rewards, *(recipe.rewards_of(step) for step in recipe.steps))
    judges = [one for rewards in asked for name, one in rewards.items() if one.kind(name) == "judge"]
    if not judges:
        return JudgeSettings(), 0.0
    entry = max(judges, key=lambda one: one.weight)
    return JudgeSettings.model_validate(entry.settings), entry.weight


def calibrate_judge(run: Session, labels: Path | None) -> dict[str, Any]:
    """The figures of the recipe's judge on labelled pairs (data.labels unless others are given)."""
    file = labels or run.recipe.data.labels
    if file is None:
        raise InputError(f"{run.recipe.name}: no labelled pairs; give --labels FILE, or data.labels in the recipe")
    pairs = read_labels(Path(file), run.recipe.data)
    return calibrate(run.judge(judge_settings(run.recipe)[0]), pairs)


def train_judge(run: Session, file: Path, epochs: float) -> dict[str, Any]:
    """Train a judge adapter on labelled pairs by SFT on the judge's own prompts; figures before and after.

    Both judges are measured on the pairs of every fifth reference, which are held out. Settings are those of the
    recipe's first sft step. The adapter is written to run.folder/adapter, the figures to run.folder/judge.json.
    """
    labels = read_labels(file, run.recipe.data)
    if run.folder.exists() and any(run.folder.iterdir()):
        raise RunFolderError(f"{run.folder} is not empty; choose another folder with --out")
    heldout, taught = hold_out(labels, run.recipe.seed)
    before = calibrate(run.judge(JudgeSettings()), heldout)

    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from qreason.training.trainer import train, trl_config

    sft = next((step.sft for step in run.recipe.steps if step.sft), Sft())
    settings = sft.model_copy(update={"num_train_epochs": epochs, "max_steps": -1, "packing": False})
    set_seed(run.recipe.seed)
    run.resident.new_adapter(run.recipe.model.lora)
    run.folder.mkdir(parents=True, exist_ok=True)
    config = SFTConfig(**{"completion_only_loss": True} | trl_config(settings, run, run.folder))
    rows = [lesson(*label) for label in taught]
    adapter, _ = train(SFTTrainer, config, rows, run, run.folder, shown={"loss": "loss"})
    run.resident.remove_adapter()
    after = calibrate(run.judge(JudgeSettings(adapter=str(adapter))), heldout)
    figures = {"adapter": str(adapter), "taught": len(taught), "before": before, "after": after}
    write_json(run.folder / "judge.json", figures)
    return figures


def hold_out(labels: Sequence[Label], seed: int) -> tuple[list[Label], list[Label]]:
    """(pairs to measure on, pairs to train on), no reference in both. Raises InputError where there are too few."""
    references = sorted({reference for reference, _, _ in labels})
    if len(references) < 2 * HELD_OUT:
        raise InputError(f"{len(references)} different references are too few to train a judge; give {2 * HELD_OUT}")
    random.Random(seed).shuffle(references)
    chosen = set(references[::HELD_OUT])
    heldout = [label for label in labels if label[0] in chosen]
    taught = [label for label in labels if label[0] not in chosen]
    for name, part in (("held out", heldout), ("to train on", taught)):
        if len({label >= 0.5 for *_, label in part}) < 2:
            raise InputError(f"the pairs {name} have labels of one kind only; give more labelled pairs of both kinds")
    return heldout, taught


def lesson(reference: str, reply: str, label: float) -> dict[str, Any]:
    return {
        "prompt": render_judge(reference, reply),
        "completion": [{"role": "assistant", "content": "yes" if label >= 0.5 else "no"}],
    }
