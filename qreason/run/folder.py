"""The run folder on disk: its recipe and manifest, what each stage wrote; starting, continuing, starting over.

runs/NAME/
  recipe.yaml       as resolved, with overrides
  manifest.json     versions, seed, hardware, hashes of data and base, finished steps
  report.json       every evaluation and the gains between them
  replies.jsonl     the greedy replies of all evaluations, row by row, side by side
  base/             evaluation of the untrained base
  01-sft/           adapter/, metrics.jsonl, evaluation.json, evaluation.jsonl
  02-grpo/          the same, and replies.jsonl: every scored rollout
  03-merge/         model/
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from qreason import __version__
from qreason.errors import RunFolderError, first_line
from qreason.machine.files import free_name, hash_files, read_json, write_json, write_text
from qreason.recipe.schema import Recipe, stage_folders
from qreason.recipe.stage import BASE, NEWEST

CHECKPOINT = "checkpoint"
"""The adapter of a training step that could not go on."""
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate")
Say = Callable[[str], None]


def silent(line: str) -> None:
    """Say nothing."""


class RunFolder:
    """A run on disk; `read_only` ones are looked at and not written to."""

    def __init__(self, path: Path, recipe: Recipe, manifest: dict[str, Any], *, read_only: bool = False) -> None:
        self.path, self.recipe, self.manifest, self.read_only = path, recipe, manifest, read_only
        self.stage_names = stage_folders(recipe.steps)

    @classmethod
    def open(cls, recipe: Recipe, path: Path, *, fresh: bool = False, say: Say = silent) -> RunFolder:
        """Start a run in a folder, or continue the one that is there; `fresh` moves an earlier run aside.

        Raises RunFolderError where the folder holds something else, or a run with other settings or data.
        """
        if path.is_file():
            raise RunFolderError(f"{path} is a file; choose a folder with --out")
        manifest: dict[str, Any] = {}
        if path.exists() and any(path.iterdir()):
            earlier = read_manifest(path)
            if fresh:
                aside = free_name(path)
                path.rename(aside)
                say(f"--fresh: the earlier run is kept in {aside}")
            elif earlier["recipe"] != recipe.name or earlier["steps"]:
                check_same(path, recipe, earlier)
                manifest = earlier
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, recipe, manifest or new_manifest(recipe))
        write_text(path / "recipe.yaml", yaml.safe_dump(recipe.dump(), sort_keys=False))
        run.save()
        return run

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """The run that a folder holds, with the recipe it was made with, to look at."""
        return cls(path, read_recipe(path), read_manifest(path), read_only=True)

    @classmethod
    def unwritten(cls, path: Path, recipe: Recipe) -> RunFolder:
        """A run without a folder: for commands that take a recipe and leave no records."""
        return cls(path, recipe, {"steps": []}, read_only=True)

    def save(self) -> None:
        if not self.read_only:
            write_json(self.path / "manifest.json", self.manifest)

    @property
    def finished(self) -> int:
        """How many steps are done."""
        return len(self.manifest["steps"])

    def stage(self, step: int) -> Path:
        """The folder of a step."""
        return self.path / self.stage_names[step]

    def clear_stage(self, step: int, say: Say) -> Path:
        """The folder of a step, empty: a step that was cut off starts again."""
        folder = self.stage(step)
        if (folder / CHECKPOINT).exists():
            aside = free_name(folder)
            folder.rename(aside)
            say(f"{folder.name} was not finished: starting it again; what it had is kept in {aside}")
        elif folder.exists():
            say(f"{folder.name} was not finished: starting it again")
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return folder

    def finish_step(self, step: int, seconds: float) -> None:
        """Record that a step is done."""
        self.manifest["steps"].append(
            {
                "step": step,
                "stage": self.recipe.steps[step].stage,
                "folder": self.stage_names[step],
                "seconds": round(seconds, 1),
            }
        )
        self.save()

    def evaluations(self) -> list[Path]:
        """The folders of the finished evaluations, in order."""
        return [self.path / done["folder"] for done in self.manifest["steps"] if done["stage"] == "evaluate"]

    def adapter(self, start: str = NEWEST) -> Path | None:
        """The newest adapter of the finished steps, or that of the stage folder `start`; None for the base."""
        if start == BASE:
            return None
        if start != NEWEST:
            return self.path / start / "adapter"
        return self.newest("adapter")

    def newest(self, name: str) -> Path | None:
        """What has this name in the newest stage folder that has it, of the finished steps."""
        done = [self.path / entry["folder"] / name for entry in self.manifest["steps"]]
        return next((path for path in reversed(done) if path.exists()), None)

    def record_base(self, base: dict[str, str], hardware: dict[str, Any]) -> None:
        """Record the base that the run stands on; RunFolderError where its weights changed."""
        if self.manifest.setdefault("base", base)["fingerprint"] != base["fingerprint"]:
            raise RunFolderError(
                f"{self.path}: the weights of {base['id']} changed since this run began; --fresh starts over"
            )
        self.manifest["hardware"] = hardware
        self.save()


def new_manifest(recipe: Recipe) -> dict[str, Any]:
    return {
        "qreason": __version__,
        "recipe": recipe.name,
        "seed": recipe.seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {name: version(name) for name in LIBRARIES},
        "data": data_hashes(recipe),
        "steps": [],
    }


def data_hashes(recipe: Recipe) -> dict[str, str]:
    """Data key -> SHA-256 of the file, or the Hub id as it stands in the recipe."""
    return {
        key: f"sha256:{hash_files([Path(source)])}" if Path(source).is_file() else f"hub:{source}"
        for key, source in recipe.data.all_sources.items()
    }


def is_run_folder(path: Path) -> bool:
    return (path / "manifest.json").is_file()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run folder; RunFolderError where the folder is something else."""
    try:
        manifest: dict[str, Any] = read_json(path / "manifest.json")
        manifest["recipe"], manifest["steps"], manifest["data"]
        (path / "recipe.yaml").stat()
    except (OSError, ValueError, KeyError, TypeError):
        raise RunFolderError(f"{path} is not empty and not a run folder; choose another one with --out") from None
    return manifest


def read_recipe(path: Path) -> Recipe:
    """The recipe that a run folder was made with."""
    file = path / "recipe.yaml"
    try:
        return Recipe.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError) as error:
        raise RunFolderError(
            f"{file}: not a recipe of this version ({first_line(error)}); --fresh starts over"
        ) from None


def check_same(path: Path, recipe: Recipe, manifest: dict[str, Any]) -> None:
    """RunFolderError unless the finished steps of a folder are what the recipe would have done."""
    if manifest["recipe"] != recipe.name:
        raise RunFolderError(
            f"{path} belongs to the recipe '{manifest['recipe']}', not '{recipe.name}'; "
            "choose another folder with --out"
        )
    for done in manifest["steps"]:
        if not (place := path / done["folder"]).is_dir():
            raise RunFolderError(f"{place} is missing, though its step was finished; put it back; --fresh starts over")
    earlier, now = read_recipe(path).dump(), recipe.dump()  # the earlier one with today's fields
    finished = len(manifest["steps"])
    same_steps = earlier.pop("steps")[:finished] == now.pop("steps")[:finished]
    changed = [key for key in now | earlier if now.get(key) != earlier.get(key)] + ([] if same_steps else ["steps"])
    if changed:
        raise RunFolderError(
            f"{path} was made with other settings ({', '.join(changed)}); --fresh starts over and keeps "
            "the earlier run beside it, --out DIR takes another folder"
        )
    if changed := [name for name, hash_ in data_hashes(recipe).items() if manifest["data"].get(name) != hash_]:
        raise RunFolderError(
            f"{path}: the data changed since this run began (data.{', data.'.join(changed)}); "
            "--fresh starts over, --out DIR takes another folder"
        )
