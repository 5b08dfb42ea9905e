"""The stages by name. A stage reads the run folder, writes its own folder and returns what it wrote."""

from __future__ import annotations

from importlib import import_module

from qreason.recipe.schema import Step
from qreason.run.session import Artifact, Run, Stage

STAGES = {
    "sft": "qreason.stages.sft",
    "grpo": "qreason.stages.grpo",
    "sample": "qreason.stages.sample",
    "distill": "qreason.stages.distill",
    "preference": "qreason.stages.preference",
    "evaluate": "qreason.stages.evaluate",
    "merge": "qreason.stages.merge",
    "pull": "qreason.stages.pull",
    "export": "qreason.stages.export",
}
"""Stage -> the module whose function of the same name runs it; imported when it is needed."""


def run_stage(step: Step, run: Run) -> Artifact:
    stage: Stage = getattr(import_module(STAGES[step.stage]), step.stage)
    return stage(step, run)
