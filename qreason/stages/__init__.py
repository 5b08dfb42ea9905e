"""The stages: a module each, named as in a recipe, whose `stage(settings, run)` does the work.

A stage reads the run, writes its own folder and returns what it wrote. Stages do not import stages.
"""

from __future__ import annotations

import time
from importlib import import_module

from qreason.run.lineage import write_lineage
from qreason.run.session import Artifact, Session, Stage


def run_step(run: Session, step: int) -> tuple[Artifact, float]:
    """Run one step of a recipe and record it as finished; what it wrote, and the seconds it took."""
    start = time.perf_counter()
    run.begin_step(step)
    wanted = run.recipe.steps[step]
    stage: Stage = import_module(f"qreason.stages.{wanted.stage}").stage
    artifact = stage(wanted.settings, run)
    seconds = time.perf_counter() - start
    run.disk.finish_step(step, seconds)
    write_lineage(run)
    return artifact, seconds
