"""The stages: a module each, named as in a recipe, whose `stage(settings, run)` does the work.

A stage reads the run, writes its own folder and returns what it wrote. Stages do not import stages.
"""

from __future__ import annotations

import shutil
import time
from importlib import import_module

from qreason.machine import ranks
from qreason.machine.rows import take_peak_memory
from qreason.recipe.schema import Step
from qreason.run.lineage import write_lineage
from qreason.run.resume import RESUME
from qreason.run.session import Artifact, Session, Stage


def run_stage(step: Step, run: Session) -> Artifact:
    stage: Stage = import_module(f"qreason.stages.{step.stage}").stage
    return stage(step.settings, run)


def run_step(run: Session, position: int) -> tuple[Artifact, float]:
    """Run one step of a run's recipe and record it as finished; returns what it wrote and the seconds it took."""
    start = time.perf_counter()
    run.begin_step(position)
    step = run.recipe.steps[position]
    if step.settings.processes == "all":
        artifact = run_stage(step, run)
        ranks.gather(None)  # the adapter of the first is there
    else:
        artifact = ranks.from_first(lambda: run_stage(step, run))
    seconds = time.perf_counter() - start
    if (peak := take_peak_memory()) is not None:
        run.disk.manifest.setdefault("memory", {}).setdefault("peak_bytes", {})[str(position)] = peak
    run.disk.finish_step(position, seconds)
    if ranks.is_first():
        shutil.rmtree(run.stage_folder() / RESUME, ignore_errors=True)
        write_lineage(run)
    if run.mirror:
        run.mirror()
    return artifact, seconds
