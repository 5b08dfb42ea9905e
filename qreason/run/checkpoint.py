"""What `evaluate` and `chat` are pointed at: a run folder's newest adapter, a model folder, or a Hub model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qreason.errors import ModelError
from qreason.model.resident import Resident
from qreason.recipe.sections import Data, Draw, Model
from qreason.recipe.settings import Teacher
from qreason.rewards.registry import REWARDS
from qreason.rewards.scoring import Scorer
from qreason.run.session import Run

MAIN_WEIGHTS = {"correctness": 0.1, "format": 0.1, "rouge_l": 0.2, "length": 0.2}
"""The rewards of a bare model: those of the main recipe that need no judge."""


@dataclass(frozen=True)
class Checkpoint:
    """A model in memory, and how to ask it: as its run did, or by the defaults."""

    resident: Resident
    scorer: Scorer
    draw: Draw
    data: Data
    seed: int


def open_checkpoint(target: str) -> Checkpoint:
    """Load a run folder, a model folder or a Hub id; ModelError for an adapter by itself."""
    folder = Path(target)
    if (folder / "manifest.json").is_file():
        return newest_of(Run.reopen(folder))
    check_target(target)
    from qreason.machine.hardware import detect

    scorer = Scorer({name: REWARDS[name] for name in MAIN_WEIGHTS}, MAIN_WEIGHTS)
    return Checkpoint(Resident(Model(base=target), detect()), scorer, Draw(), Data(), 1)


def newest_of(run: Run) -> Checkpoint:
    """The newest adapter of a run on its base, the bare base before the first."""
    run.resident.load_adapter(run.adapter())
    recipe = run.recipe
    return Checkpoint(run.resident, Scorer(run.rewards, recipe.weights), recipe.sampling, recipe.data, recipe.seed)


def open_teacher(settings: Teacher, say: Callable[[str], None]) -> Resident:
    """Load a teacher that answers here: a run folder's newest adapter on its base, a model folder or a Hub id."""
    from qreason.machine.hardware import detect

    if (Path(settings.model) / "manifest.json").is_file():
        run = Run.reopen(Path(settings.model), say)
        run.resident.load_adapter(run.adapter())
        return run.resident
    check_target(settings.model)
    say(f"loading the teacher {settings.model}")
    return Resident(Model(base=settings.model, quantization=settings.quantization), detect(), say)


def check_target(target: str) -> None:
    if (Path(target) / "adapter_config.json").is_file():
        raise ModelError(f"{target} is an adapter; give its run folder, or the merged model")
