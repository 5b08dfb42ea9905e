"""The model that `evaluate`, `chat` or a teacher names: a run folder's newest adapter, a model folder, a Hub model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qreason.errors import ModelError
from qreason.inference.generate import LocalGenerator, open_generator
from qreason.recipe.sections import Data, Draw, Model
from qreason.recipe.stage import BASE
from qreason.recipe.training import Teacher
from qreason.rewards.registry import REWARDS
from qreason.rewards.scoring import Scorer
from qreason.run.folder import is_run_folder, near
from qreason.run.session import Session

MAIN_WEIGHTS = {"correctness": 0.1, "format": 0.1, "rouge_l": 0.2, "length": 0.2}
"""The rewards for a model without a recipe: those of the helpdesk recipe that need no judge."""
ALIKE = 0.8
"""How much a name without a slash is like that of a run (difflib's ratio), to be taken for it and not for a Hub id."""


@dataclass(frozen=True)
class Checkpoint:
    """A model in memory, and how to prompt, draw and score: as in its run, or by the defaults."""

    generator: LocalGenerator
    scorer: Scorer
    draw: Draw
    data: Data
    seed: int
    stages: Mapping[str, Path | None] = field(default_factory=dict)
    """The stages of a run that left an adapter, the newest last, and the base (None)."""


def open_checkpoint(target: str) -> Checkpoint:
    """Load a run folder, a model folder or a Hub id; ModelError for an adapter without its base."""
    if is_run_folder(Path(target)):
        return newest_of(Session.reopen(Path(target)))
    check_target(target)
    scorer = Scorer({name: REWARDS[name] for name in MAIN_WEIGHTS}, MAIN_WEIGHTS)
    return Checkpoint(open_generator(Model(base=target)), scorer, Draw(), Data(), 1)


def newest_of(run: Session) -> Checkpoint:
    """The newest adapter of a run on its base, or the base where there is none yet."""
    run.load_adapter()
    recipe = run.recipe
    stages = {name: run.disk.adapter(name) for name in (BASE, *run.disk.adapters)}
    return Checkpoint(run.generator, run.rewards.scorer, recipe.sampling, recipe.data, recipe.seed, stages)


def open_teacher(settings: Teacher, say: Callable[[str], None]) -> LocalGenerator:
    """Load a local teacher: a run folder's newest adapter on its base, a model folder or a Hub id."""
    if is_run_folder(Path(settings.model)):
        run = Session.reopen(Path(settings.model), say)
        run.load_adapter()
        return run.generator
    check_target(settings.model)
    say(f"loading the teacher {settings.model}")
    return open_generator(Model(base=settings.model, quantization=settings.quantization), say)


def check_target(target: str) -> None:
    """ModelError for a folder that is neither a run nor a model, or is not there."""
    folder = Path(target)
    is_path = folder.is_absolute() or target.startswith((".", "~"))
    like = near(folder, cutoff=ALIKE if folder.parent == Path() else 0.5)
    if not folder.exists() and (is_path or like):
        raise ModelError(f"{target}: no such folder{like}; give a run folder, a model's folder or a Hub id")
    if (Path(target) / "recipe.yaml").is_file() and not is_run_folder(Path(target)):
        raise ModelError(f"{target}: a run folder without its manifest.json; restore it from a copy")
    if (Path(target) / "adapter_config.json").is_file():
        raise ModelError(f"{target} is an adapter; give its run folder, or one that `qreason pull {target}` makes")
    if folder.is_dir() and not is_run_folder(folder) and not (folder / "config.json").is_file():
        raise ModelError(f"{target}: neither a run folder (no manifest.json) nor a model's (no config.json); give one")
