"""The run folder on disk: recipe, manifest and stage folders; how a run starts, continues or starts over.

runs/NAME/
  recipe.yaml       as resolved, with overrides
  manifest.json     versions, seed, hardware, hashes of data and base, finished steps
  report.json       every evaluation and the gains between them
  replies.jsonl     the greedy replies of all evaluations, row by row, side by side
  base/             the evaluation of the untrained base
  01-sft/           adapter/, metrics.jsonl, evaluation.json, evaluation.jsonl
  02-grpo/          the same, and replies.jsonl: every scored rollout
  03-merge/         model/
"""

from __future__ import annotations

import difflib
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from pydantic import ValidationError

from qreason import __version__
from qreason.errors import RunFolderError, first_line
from qreason.machine.files import MOST_SHOWN, RESTORE, free_name, hash_files, read_json, write_json, write_text
from qreason.machine.records import Manifest
from qreason.recipe.parse import parse_yaml
from qreason.recipe.schema import STAGES, Recipe, stage_folders
from qreason.recipe.sections import STORED
from qreason.recipe.stage import BASE, NEWEST
from qreason.run.lock import LOCK, hold, is_empty, sign
from qreason.run.resume import DRAWN, checkpoints, cut_back, is_of, newest_checkpoint, step_of

CHECKPOINT = "checkpoint"
"""The last adapter of a training step that ran out of memory."""
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate")
Say = Callable[[str], None]


def silent(line: str) -> None:
    """Print nothing."""


class RunFolder:
    """A run on disk; a `read_only` one is never written to."""

    lock: FileLock | None = None

    def __init__(self, path: Path, recipe: Recipe, manifest: dict[str, Any], *, read_only: bool = False) -> None:
        self.path, self.recipe, self.manifest, self.read_only = path, recipe, manifest, read_only
        self.stage_names = stage_folders(recipe.steps)

    @classmethod
    def open(
        cls, recipe: Recipe, path: Path, *, fresh: bool = False, say: Say = silent, wait: float = 0.0
    ) -> RunFolder:
        """Start a run in a folder, or continue the one in it; `fresh` moves an earlier run aside.

        Waits for seconds where another process holds it.

        Raises RunFolderError for a folder with something else in it, or with a run of other settings or data.
        """
        if path.is_file():
            raise RunFolderError(f"{path} is a file; choose a folder with --out")
        manifest: dict[str, Any] = {}
        path.mkdir(parents=True, exist_ok=True)
        if not ((path / LOCK).exists() or is_empty(path)):
            read_manifest(path)  # nothing is written into a folder that is no run
        lock = hold(path, wait)
        if not is_empty(path):
            earlier = read_manifest(path)
            if fresh:
                lock = start_afresh(path, lock, say)
            elif earlier["recipe"] != recipe.name or earlier["steps"]:
                check_same(path, recipe, earlier)
                manifest = earlier
        run = cls(path, recipe, manifest or new_manifest(recipe))
        run.lock = lock
        sign(path)
        write_text(path / "recipe.yaml", yaml.safe_dump(recipe.dump(), sort_keys=False))
        run.save()
        return run

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """The run in a folder, with the recipe it was made with, read-only."""
        manifest = read_manifest(path)
        return cls(path, read_recipe(path, manifest), manifest, read_only=True)

    @classmethod
    def unwritten(cls, path: Path, recipe: Recipe) -> RunFolder:
        """A run without a folder, for commands that take a recipe and keep no records."""
        return cls(path, recipe, {"steps": []}, read_only=True)

    def save(self) -> None:
        if not self.read_only:
            write_json(self.path / "manifest.json", self.manifest)

    def leave(self) -> None:
        """Let other processes write; this one no longer does."""
        self.read_only = True
        if self.lock:
            self.lock.release(force=True)

    @property
    def finished(self) -> int:
        """The number of finished steps."""
        return len(self.manifest["steps"])

    def stage(self, step: int) -> Path:
        """The folder of a step."""
        return self.path / self.stage_names[step]

    def settings(self, step: int) -> dict[str, Any]:
        """The settings of a step as JSON values."""
        return {"seed": self.recipe.seed, **self.recipe.dump()["steps"][step]}

    def resume_stage(self, step: int, say: Say) -> tuple[Path, Path | None]:
        """The folder of a training step, cut back to its newest checkpoint, and that; emptied where it has none."""
        folder = self.stage(step)
        checkpoint = newest_checkpoint(folder)
        if checkpoint is None or not is_of(checkpoint, self.settings(step)):
            return self.clear_stage(step, say), None
        cut_back(folder, checkpoint)
        say(f"{folder.name} was not finished: continuing after step {step_of(checkpoint)}")
        return folder, checkpoint

    def clear_stage(self, step: int, say: Say) -> Path:
        """The folder of a step, emptied: an interrupted step starts again. Kept aside where it has adapters."""
        folder = self.stage(step)
        drawn = {name: file.read_bytes() for name in DRAWN if (file := folder / name).exists()}
        if (folder / CHECKPOINT).exists() or checkpoints(folder) or any(folder.glob("checkpoint-*")):
            aside = free_name(folder)
            folder.rename(aside)
            say(f"{folder.name} was not finished: starting it again; its files are kept in {aside}")
        elif folder.exists():
            say(f"{folder.name} was not finished: starting it again")
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        for name, content in drawn.items():
            (folder / name).write_bytes(content)
        return folder

    def finish_step(self, step: int, seconds: float) -> None:
        """Record that a step is done."""
        self.manifest["steps"].append({**entries(self.recipe)[step], "seconds": round(seconds, 1)})
        self.save()

    def evaluations(self) -> list[Path]:
        """The folders of the finished evaluations, in order."""
        return [self.path / done["folder"] for done in self.manifest["steps"] if done["stage"] == "evaluate"]

    @property
    def adapters(self) -> list[str]:
        """The folders of the finished steps that leave an adapter, the newest last."""
        return [entry["folder"] for entry in self.manifest["steps"] if STAGES[entry["stage"]].leaves_adapter]

    @property
    def same_evaluation(self) -> Path | None:
        """The folder of a finished evaluation of the weights that are the newest now; all have the same settings."""
        now = weights_of(self.adapter())
        adapter: Path | None = None
        for done in self.manifest["steps"]:
            folder: Path = self.path / done["folder"]
            if STAGES[done["stage"]].leaves_adapter:
                adapter = folder / "adapter"
            elif done["stage"] == "evaluate" and weights_of(adapter) == now:
                return folder
        return None

    def adapter(self, start: str = NEWEST) -> Path | None:
        """The newest adapter of the finished steps, or that of the stage folder `start`; None for the base.

        RunFolderError where a step that left one was finished, and it is gone.
        """
        done = self.adapters
        if start == BASE or (start == NEWEST and not done):
            return None
        adapter = self.path / (done[-1] if start == NEWEST else start) / "adapter"
        if not adapter.is_dir():
            raise RunFolderError(f"{adapter}: the adapter to start from is missing; restore it, or use --fresh")
        return adapter

    def newest(self, name: str) -> Path | None:
        """The newest file or folder of this name that a finished step wrote; None where there is none."""
        done = [self.path / entry["folder"] / name for entry in self.manifest["steps"]]
        return next((path for path in reversed(done) if path.exists()), None)

    def need(self, name: str) -> Path:
        """The same; RunFolderError where there is none."""
        if (file := self.newest(name)) is None:
            raise RunFolderError(f"{self.path}: {name} of its sample step is missing; {RESTORE}")
        return file

    def record_base(self, base: dict[str, str], hardware: dict[str, Any]) -> None:
        """Record the base of the run; RunFolderError where its weights changed."""
        if self.manifest.setdefault("base", base)["fingerprint"] != base["fingerprint"]:
            raise RunFolderError(
                f"{self.path}: the weights of {base['id']} changed since this run began; --fresh starts over"
            )
        self.manifest["hardware"] = hardware
        self.save()


def weights_of(adapter: Path | None) -> str:
    """What tells the weights of an adapter from those of others; without one, those of the base."""
    return hash_files(sorted(adapter.glob("*.safetensors"))) if adapter else "base"


def start_afresh(path: Path, lock: FileLock | None, say: Say) -> FileLock | None:
    """Move a run aside; the lock on the new, empty folder in its place."""
    if lock:
        lock.release(force=True)
    aside = free_name(path)
    path.rename(aside)
    say(f"--fresh: the earlier run is kept in {aside}")
    path.mkdir()
    return hold(path)


def new_manifest(recipe: Recipe) -> dict[str, Any]:
    return {
        "qreason": __version__,
        "recipe": recipe.name,
        "seed": recipe.seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["qreason", *sys.argv[1:]]),
        "versions": {name: version(name) for name in LIBRARIES},
        "data": data_hashes(recipe),
        "steps": [],
    }


def data_hashes(recipe: Recipe) -> dict[str, str]:
    """Data key -> SHA-256 of the file, or the Hub id."""
    return {
        key: f"sha256:{hash_files([Path(source)])}" if Path(source).is_file() else f"hub:{source}"
        for key, source in recipe.data.all_sources.items()
    }


def is_run_folder(path: Path) -> bool:
    return (path / "manifest.json").is_file()


def near(path: Path, cutoff: float = 0.5) -> str:
    """` (did you mean 'runs/x'?)` for the run most like a path that is not there: beside it, or in `runs`."""
    places = [path.parent, *([Path("runs")] if path.parent == Path() else [])]
    names = {one.name: str(one) for place in places if place.is_dir() for one in place.iterdir() if is_run_folder(one)}
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=cutoff)
    return f" (did you mean '{names[close[0]]}'?)" if close else ""


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run folder; RunFolderError for any other folder."""
    file, cure = path / "manifest.json", "restore it from a copy, or choose another folder with --out"
    try:
        manifest: dict[str, Any] = read_json(file, Manifest, cure)
    except RunFolderError as error:
        raise RunFolderError(f"{path} is not empty and not a run folder: {error}") from None
    if not (path / "recipe.yaml").exists():
        raise RunFolderError(f"{path} is not empty and not a run folder: it has no recipe.yaml; {cure}")
    return manifest


def entries(recipe: Recipe) -> list[dict[str, Any]]:
    """What the manifest says of each step once it is finished, beside its time."""
    folders = stage_folders(recipe.steps)
    return [{"step": place, "stage": step.stage, "folder": folders[place]} for place, step in enumerate(recipe.steps)]


def read_recipe(path: Path, manifest: dict[str, Any] | None = None) -> Recipe:
    """The recipe that a run folder was made with; with a manifest, RunFolderError unless it made the finished steps."""
    file = path / "recipe.yaml"
    try:
        recipe = Recipe.model_validate(parse_yaml(file.read_text(encoding="utf-8"))[0], context=STORED)
    except (OSError, yaml.YAMLError, ValueError) as error:
        problem = first_line(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")[:MOST_SHOWN]
        raise RunFolderError(f"{file}: not a recipe of this version ({problem}); --fresh starts over") from None
    known = entries(recipe)
    for place, done in enumerate(manifest["steps"] if manifest else ()):
        if place >= len(known):
            raise RunFolderError(f"{file}: fewer steps than were finished; restore it from a copy")
        if done != {**known[place], "seconds": done["seconds"]}:
            raise RunFolderError(
                f"{path / 'manifest.json'}: its step {place + 1} is not that of {file.name}; restore both from a copy"
            )
    return recipe


def check_same(path: Path, recipe: Recipe, manifest: dict[str, Any]) -> None:
    """RunFolderError unless the recipe would have made the finished steps of the folder."""
    if manifest["recipe"] != recipe.name:
        raise RunFolderError(
            f"{path} belongs to the recipe '{manifest['recipe']}', not '{recipe.name}'; "
            "choose another folder with --out"
        )
    for done in manifest["steps"]:
        if not (place := path / done["folder"]).is_dir():
            raise RunFolderError(f"{place} is missing, though its step was finished; restore it, or use --fresh")
    earlier, now = (
        read_recipe(path, manifest).dump(),
        recipe.dump(),
    )  # the earlier recipe with the fields of this version
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
