"""The run folder: recipe, manifest, what each stage wrote; opening, continuing and starting over.

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

import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qreason import __version__
from qreason.data.examples import read_examples
from qreason.data.pairs import read_pairs
from qreason.errors import RunFolderError, first_line
from qreason.machine.files import free_name, read_json, write_json
from qreason.recipe.schema import Recipe, Step, stage_folders
from qreason.recipe.sections import Weighted
from qreason.recipe.settings import BASE, NEWEST
from qreason.rewards.judged import JudgeSettings
from qreason.rewards.preferred import PreferenceSettings
from qreason.sampling.draws import DRAWS, SAMPLED
from qreason.types import Example, Pair

if TYPE_CHECKING:
    from qreason.judge.verdict import Judge
    from qreason.model.backends import Choice
    from qreason.model.classifier import PreferenceModel
    from qreason.model.resident import Resident
    from qreason.types import Reward

REWARD_MODEL = "reward_model"
"""What a preference step writes: a PEFT folder with a scalar head."""
CHECKPOINT = "checkpoint"
"""The adapter of a training step that could not go on."""
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate")


@dataclass(frozen=True)
class Artifact:
    """What a stage wrote: its main file or folder, and one line for the terminal."""

    path: Path
    summary: str


Stage = Callable[[Step, "Run"], Artifact]


class Run:
    """A recipe on its way through a run folder, and what it has in memory."""

    def __init__(self, recipe: Recipe, folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.recipe = recipe
        self.folder = folder
        self.say = say
        self.folders = stage_folders(recipe.steps)
        self.manifest: dict[str, Any] = {}
        self.step = 0
        self.read_only = False
        self.judge: Judge | None = None
        """The judge of the recipe's rewards, once they are built."""
        self._judges: dict[JudgeSettings, Judge] = {}
        self._preferences: dict[str, PreferenceModel] = {}
        self._examples: dict[str, list[Example]] = {}

    # --- opening -------------------------------------------------------------------------------

    @classmethod
    def open(cls, recipe: Recipe, folder: Path, *, fresh: bool = False, say: Callable[[str], None]) -> Run:
        """Start a run in a folder, or continue the one that is there.

        Raises RunFolderError where the folder holds something else; `fresh` moves an earlier run aside.
        All data is read before the folder is touched.
        """
        run = cls(recipe, folder, say)
        for use in recipe.data.sources:
            run.examples(use)
        if recipe.data.pairs:
            _ = run.pairs
        if folder.is_file():
            raise RunFolderError(f"{folder} is a file; choose a folder with --out")
        if folder.exists() and any(folder.iterdir()):
            earlier = read_manifest(folder)
            if fresh:
                aside = free_name(folder)
                folder.rename(aside)
                say(f"--fresh: the earlier run is kept in {aside}")
            elif earlier["recipe"] != recipe.name or earlier["steps"]:
                run.continue_from(earlier)
        folder.mkdir(parents=True, exist_ok=True)
        if not run.manifest:
            run.manifest = {
                "qreason": __version__,
                "recipe": recipe.name,
                "seed": recipe.seed,
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "versions": {name: version(name) for name in LIBRARIES},
                "data": run.data_hashes(),
                "steps": [],
            }
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.dump(), sort_keys=False), encoding="utf-8")
            run.save_manifest()
        return run

    @classmethod
    def reopen(cls, folder: Path, say: Callable[[str], None] = lambda line: None) -> Run:
        """The run that a folder holds, with the recipe it was made with, to look at: nothing is written to it."""
        manifest = read_manifest(folder)
        run = cls(cls.read_recipe(folder), folder, say)
        run.manifest = manifest
        run.read_only = True
        return run

    @staticmethod
    def read_recipe(folder: Path) -> Recipe:
        """The recipe that a run folder was made with."""
        file = folder / "recipe.yaml"
        try:
            return Recipe.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (yaml.YAMLError, ValueError) as error:
            raise RunFolderError(
                f"{file}: not a recipe of this version ({first_line(error)}); --fresh starts over"
            ) from None

    def continue_from(self, manifest: dict[str, Any]) -> None:
        """Take over the finished steps of an earlier run of the same recipe."""
        if manifest["recipe"] != self.recipe.name:
            raise RunFolderError(
                f"{self.folder} belongs to the recipe '{manifest['recipe']}', not '{self.recipe.name}'; "
                "choose another folder with --out"
            )
        for done in manifest["steps"]:
            if not (place := self.folder / done["folder"]).is_dir():
                raise RunFolderError(
                    f"{place} is missing, though its step was finished; put it back; --fresh starts over"
                )
        earlier = self.read_recipe(self.folder).dump()  # with today's fields
        now = self.recipe.dump()
        finished = len(manifest["steps"])
        same_steps = earlier.pop("steps")[:finished] == now.pop("steps")[:finished]
        if changed := [key for key in now if now[key] != earlier.get(key)] + ([] if same_steps else ["steps"]):
            raise RunFolderError(
                f"{self.folder} was made with other settings ({', '.join(changed)}); --fresh starts over and keeps "
                "the earlier run beside it, --out DIR takes another folder"
            )
        if changed := [name for name, hash_ in self.data_hashes().items() if manifest["data"].get(name) != hash_]:
            raise RunFolderError(
                f"{self.folder}: the data changed since this run began (data.{', data.'.join(changed)}); "
                "--fresh starts over, --out DIR takes another folder"
            )
        self.manifest = manifest
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe.dump(), sort_keys=False), encoding="utf-8")

    def data_hashes(self) -> dict[str, str]:
        """Data key -> SHA-256 of the file, or the Hub id as it stands in the recipe."""
        from qreason.machine.files import hash_files

        return {
            key: f"sha256:{hash_files([Path(source)])}" if Path(source).is_file() else f"hub:{source}"
            for key, source in self.recipe.data.all_sources.items()
        }

    def save_manifest(self) -> None:
        if not self.read_only:
            write_json(self.folder / "manifest.json", self.manifest)

    # --- stages --------------------------------------------------------------------------------

    @property
    def finished(self) -> int:
        """How many steps are done."""
        return len(self.manifest["steps"])

    def stage_folder(self) -> Path:
        """The folder of the step that runs now."""
        return self.folder / self.folders[self.step]

    def clear_stage_folder(self) -> Path:
        """The folder of the step that runs now, empty: a step that was cut off starts again."""
        folder = self.stage_folder()
        if (folder / CHECKPOINT).exists():
            aside = free_name(folder)
            folder.rename(aside)
            self.say(f"{folder.name} was not finished: starting it again; what it had is kept in {aside}")
        elif folder.exists():
            self.say(f"{folder.name} was not finished: starting it again")
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return folder

    def finish_step(self, seconds: float) -> None:
        self.manifest["steps"].append(
            {
                "step": self.step,
                "stage": self.recipe.steps[self.step].stage,
                "folder": self.folders[self.step],
                "seconds": round(seconds, 1),
            }
        )
        self.save_manifest()

    def adapter(self, start: str = NEWEST) -> Path | None:
        """The newest adapter of the finished steps, or that of the stage folder `start`; None for the base."""
        if start == BASE:
            return None
        if start != NEWEST:
            return self.folder / start / "adapter"
        return self.newest("adapter")

    def newest(self, name: str) -> Path | None:
        """What has this name in the newest stage folder that has it, of the finished steps."""
        done = [self.folder / entry["folder"] / name for entry in self.manifest["steps"]]
        return next((path for path in reversed(done) if path.exists()), None)

    def sampled(self) -> list[Example]:
        """What the newest finished sample step kept."""
        file = self.newest(SAMPLED)
        assert file, "the recipe has a sample step before"
        return read_examples(file, use="sampled")

    def draws(self) -> Path:
        """Every draw of the newest finished sample step."""
        file = self.newest(DRAWS)
        assert file, "the recipe has a sample step before"
        return file

    # --- what is in memory ---------------------------------------------------------------------

    @cached_property
    def pairs(self) -> list[Pair]:
        """The ranked pairs of data.pairs."""
        assert self.recipe.data.pairs
        return read_pairs(self.recipe.data.pairs, self.recipe.data)

    def plain(self, share: float, beside: int) -> list[Example]:
        """Rows of data.plain, as many as are a share of the whole beside so many others; drawn by the seed."""
        if not share:
            return []
        rows, wanted = self.examples("plain"), round(beside * share / (1 - share))
        if wanted > len(rows):
            self.say(f"data.plain has {len(rows)} rows; a share of {share:g} would take {wanted}")
        return random.Random(self.recipe.seed).sample(rows, min(wanted, len(rows)))

    def examples(self, use: str) -> list[Example]:
        """The examples of data.sft, data.prompts, data.heldout or data.plain, read once."""
        if use not in self._examples:
            self._examples[use] = read_examples(getattr(self.recipe.data, use), self.recipe.data, use)
        return self._examples[use]

    @cached_property
    def backend(self) -> Choice:
        """Who loads the base and trains it, chosen once."""
        from qreason.model.backends import start

        return start(self.recipe.model.backend)

    @cached_property
    def resident(self) -> Resident:
        """The base, loaded once for all stages."""
        backend = self.backend  # before transformers is imported
        from qreason.machine.hardware import detect
        from qreason.model.load import fingerprint
        from qreason.model.resident import Resident

        hardware, weights = detect(), self.recipe.model.quantization
        number = hardware.dtype if weights == "none" else f"{weights}, computing in {hardware.dtype}"
        where = hardware.name or hardware.device
        self.say(f"loading {self.recipe.model.base} on {where} ({number}; backend {backend.name}: {backend.why})")
        resident = Resident(self.recipe.model, hardware, self.say, backend.name)
        base = {"id": self.recipe.model.base, "fingerprint": fingerprint(self.recipe.model.base, resident.model.config)}
        if self.manifest.setdefault("base", base)["fingerprint"] != base["fingerprint"]:
            raise RunFolderError(
                f"{self.folder}: the weights of {base['id']} changed since this run began; --fresh starts over"
            )
        self.manifest["hardware"] = hardware.as_dict() | {"backend": backend.name}
        self.save_manifest()
        return resident

    def release(self) -> None:
        """Free the memory of the base; it is loaded again when something asks for it."""
        from qreason.machine.rows import free_memory

        for name in ("resident", "rewards"):  # a judge among the rewards holds the base too
            self.__dict__.pop(name, None)
        self.judge = None
        self._judges.clear()
        self._preferences.clear()
        free_memory()

    @cached_property
    def rewards(self) -> Mapping[str, Reward]:
        """The recipe's rewards, ready to be called."""
        return self.build(self.recipe.rewards)

    def build(self, wanted: Mapping[str, Weighted]) -> Mapping[str, Reward]:
        """Rewards of the recipe or of a step, ready to be called."""
        from qreason.rewards import registry

        return registry.build(
            {name: reward.settings for name, reward in wanted.items()},
            self.open_model,
            self.recipe.sampling.max_completion_length,
            kinds={name: reward.kind(name) for name, reward in wanted.items()},
            only={name: reward.only for name, reward in wanted.items()},
        )

    def open_model(self, settings: JudgeSettings | PreferenceSettings) -> Judge | PreferenceModel:
        """The model a reward asks, opened once for all steps."""
        if isinstance(settings, JudgeSettings):
            from qreason.judge.verdict import open_judge

            if settings not in self._judges:
                self._judges[settings] = open_judge(settings, lambda: self.resident)
            self.judge = self._judges[settings]
            return self.judge
        from qreason.model.classifier import PreferenceModel

        own = self.folder / settings.model / REWARD_MODEL
        name = str(own) if settings.model in self.folders else settings.model
        if name not in self._preferences:
            self._preferences[name] = PreferenceModel(name, self.resident)
        return self._preferences[name]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder; RunFolderError where the folder is something else."""
    try:
        manifest: dict[str, Any] = read_json(folder / "manifest.json")
        manifest["recipe"], manifest["steps"], manifest["data"]
        (folder / "recipe.yaml").stat()
    except (OSError, ValueError, KeyError, TypeError):
        raise RunFolderError(f"{folder} is not empty and not a run folder; choose another one with --out") from None
    return manifest
