"""A run in memory: its recipe, data, resident base, generator, rewards and folder."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qreason.data.examples import choose_prompt, read_examples
from qreason.data.pairs import read_pairs
from qreason.data.prompts import system_prompt
from qreason.errors import RunFolderError, first_line
from qreason.recipe.schema import Recipe
from qreason.recipe.sections import Weighted
from qreason.recipe.stage import NEWEST
from qreason.rewards.judged import JudgeSettings, PreferenceSettings
from qreason.rewards.reasoned import GainSettings, StepsSettings, check_references
from qreason.rewards.scoring import Scorer
from qreason.rewards.steps import ReferenceSteps
from qreason.run.folder import RunFolder, Say, silent
from qreason.sampling.draws import DRAWS, SAMPLED
from qreason.types import Example, Pair

if TYPE_CHECKING:
    from qreason.inference.gain import ReasoningGain
    from qreason.inference.generate import LocalGenerator
    from qreason.judge.verdict import Judge
    from qreason.model.backends import Choice
    from qreason.model.classifier import PreferenceModel
    from qreason.model.resident import Resident

REWARD_MODEL = "reward_model"
"""What a preference step writes: a PEFT folder with a scalar head."""


MEASURED = 8
"""Replies whose reasoning is measured at a time in a run without GRPO."""
Check = Callable[[Recipe, Mapping[str, Sequence[Example]], Sequence[Pair]], None]
"""What looks at a recipe, its examples by use and its pairs before a run starts."""
STEPS = ("sft", "prompts")
"""Data whose rows may have reference steps."""


def check_steps(examples: Mapping[str, Sequence[Example]]) -> None:
    """DataError where `consistent_steps` has nothing to compare with in the rows of each use."""
    rows = [example for use in STEPS for example in examples.get(use, [])]
    check_references(ReferenceSteps(rows), rows)


@dataclass(frozen=True)
class Artifact:
    """What a stage wrote: its main file or folder, and one line for the terminal."""

    path: Path
    summary: str


@dataclass(frozen=True)
class Rewards:
    """A scorer, and the judge and the gain of the reasoning that its rewards ask, where they do."""

    scorer: Scorer
    judge: Judge | None
    gain: ReasoningGain | None = None


class Session:
    """What the stages of a run share: data, base, adapters and rewards."""

    def __init__(self, recipe: Recipe, disk: RunFolder, say: Say = silent) -> None:
        self.recipe, self.disk, self.say = recipe, disk, say
        self.step = 0
        """The current step."""
        self.mirror: Callable[[], None] | None = None
        """Copies the run folder elsewhere."""
        self._judges: dict[JudgeSettings, Judge] = {}
        self._preferences: dict[str, PreferenceModel] = {}
        self._examples: dict[str, list[Example]] = {}

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        path: Path,
        *,
        fresh: bool = False,
        say: Say = silent,
        check: Check | None = None,
        wait: float = 0.0,
    ) -> Session:
        """Start a run in a folder, or continue the one in it; waits for seconds where another process holds it.

        All data are read, and given to `check`, before the folder is changed.
        """
        recipe = recipe.model_copy(update={"data": choose_prompt(recipe.data)})
        examples = {use: read_examples(source, recipe.data, use) for use, source in recipe.data.sources.items()}
        pairs = read_pairs(recipe.data.pairs, recipe.data) if recipe.data.pairs else None
        if recipe.asks_for("consistent_steps"):
            check_steps(examples)
        if check:
            check(recipe, examples, pairs or [])
        session = cls(recipe, RunFolder.open(recipe, path, fresh=fresh, say=say, wait=wait), say)
        session._examples = examples
        if pairs is not None:
            session.pairs = pairs
        return session

    @classmethod
    def reopen(cls, path: Path, say: Say = silent) -> Session:
        """The run in a folder, read-only."""
        disk = RunFolder.reopen(path)
        return cls(disk.recipe, disk, say)

    @property
    def folder(self) -> Path:
        return self.disk.path

    def stage_folder(self) -> Path:
        """The folder of the current step."""
        return self.disk.stage(self.step)

    def clear_stage_folder(self) -> Path:
        """The folder of the current step, emptied: an interrupted step starts again."""
        return self.disk.clear_stage(self.step, self.say)

    def resume_stage_folder(self) -> tuple[Path, Path | None]:
        """The folder of the current training step, cut back to its newest checkpoint, and that; or emptied."""
        return self.disk.resume_stage(self.step, self.say)

    def begin_step(self, step: int) -> None:
        """Make a step the current one. Judges forget earlier verdicts, which a resumed run would not have."""
        self.step = step
        for judge in self._judges.values():
            judge.verdicts.clear()

    # --- data ----------------------------------------------------------------------------------

    def examples(self, use: str) -> list[Example]:
        """The examples of data.sft, data.prompts, data.heldout or data.plain, read once."""
        if use not in self._examples:
            self._examples[use] = read_examples(getattr(self.recipe.data, use), self.recipe.data, use)
        return self._examples[use]

    @cached_property
    def reference_steps(self) -> ReferenceSteps:
        """The steps of the reasonings in data.sft and data.prompts."""
        return ReferenceSteps(
            example for use in STEPS if use in self.recipe.data.sources for example in self.examples(use)
        )

    @cached_property
    def pairs(self) -> list[Pair]:
        """The ranked pairs of data.pairs."""
        assert self.recipe.data.pairs
        return read_pairs(self.recipe.data.pairs, self.recipe.data)

    def plain(self, share: float, beside: int) -> list[Example]:
        """Rows of data.plain, drawn by the seed: as many as make up `share` of the total with `beside` other rows."""
        if not share:
            return []
        rows, wanted = self.examples("plain"), round(beside * share / (1 - share))
        if wanted > len(rows):
            self.say(f"data.plain has {len(rows)} rows; a share of {share:g} would take {wanted}")
        return random.Random(self.recipe.seed).sample(rows, min(wanted, len(rows)))

    def sampled(self) -> list[Example]:
        """What the newest finished sample step kept."""
        asked = {example.id: example for example in self.examples("prompts")}
        rows = [
            (row, asked.get(row.id.rpartition("-")[0])) for row in read_examples(self.disk.need(SAMPLED), use="sampled")
        ]
        return [
            replace(row, system=one.system, history=one.history, unlearned=one.unlearned)
            if one and not row.plain
            else row
            for row, one in rows
        ]

    def draws(self) -> Path:
        """The file with every draw of the newest finished sample step."""
        return self.disk.need(DRAWS)

    # --- models --------------------------------------------------------------------------------

    @cached_property
    def backend(self) -> Choice:
        """The backend that loads and trains the base, chosen once."""
        from qreason.model.backends import start

        return start(self.recipe.model.backend, self.recipe.plain_stage)

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
        base = {"id": self.recipe.model.base, "fingerprint": fingerprint(self.recipe.model.base)}
        self.disk.record_base(base, asdict(hardware) | {"backend": backend.name})
        return resident

    @cached_property
    def generator(self) -> LocalGenerator:
        """Makes replies and answers questions: the only interface between the run and an inference engine."""
        from qreason.inference.generate import LocalGenerator

        return LocalGenerator(self.resident)

    def load_adapter(self, start: str = NEWEST) -> Path | None:
        """Put the newest adapter of the run, or that of a stage folder, on the base; returns its folder."""
        adapter = self.disk.adapter(start)
        self.resident.load_adapter(adapter)
        return adapter

    def release(self) -> None:
        """Free the memory of the base; it is loaded again on its next use."""
        from qreason.machine.rows import free_memory

        for name in ("resident", "generator", "rewards"):  # a judge among the rewards refers to the base too
            self.__dict__.pop(name, None)
        self._judges.clear()
        self._preferences.clear()
        free_memory()

    # --- rewards -------------------------------------------------------------------------------

    @cached_property
    def rewards(self) -> Rewards:
        """The recipe's rewards."""
        return self.build_rewards(self.recipe.rewards)

    def build_rewards(self, wanted: Mapping[str, Weighted]) -> Rewards:
        """The rewards of the recipe or of a step as functions."""
        from qreason.rewards.registry import build

        judges: list[Judge] = []
        gains: list[ReasoningGain] = []

        def open_needed(settings: JudgeSettings | PreferenceSettings | StepsSettings | GainSettings) -> Any:
            if isinstance(settings, StepsSettings):
                return self.reference_steps
            if isinstance(settings, GainSettings):
                gains.append(self.reasoning_gain())
                return gains[-1]
            if isinstance(settings, PreferenceSettings):
                return self.preference_model(settings.model)
            judges.append(self.judge(settings))
            return judges[-1]

        try:
            functions = build(
                {name: reward.settings for name, reward in wanted.items()},
                open_needed,
                self.recipe.sampling.max_completion_length,
                kinds={name: reward.kind(name) for name, reward in wanted.items()},
                only={name: reward.only for name, reward in wanted.items()},
                seconds={name: reward.call_timeout for name, reward in wanted.items() if reward.call_timeout},
            )
        except ValueError as error:  # a module of one's own that is gone since the recipe was read
            raise RunFolderError(f"{self.folder}: {first_line(error)}; run the command where its module lies") from None
        weights = {name: reward.weight for name, reward in wanted.items()}
        return Rewards(Scorer(functions, weights), judges[-1] if judges else None, gains[-1] if gains else None)

    def reasoning_gain(self) -> ReasoningGain:
        """Measures what the reasoning of a reply adds, with the adapter that is on the base then."""
        from qreason.inference.gain import ReasoningGain

        rows = [step.grpo.per_device_train_batch_size for step in self.recipe.steps if step.grpo]
        system = system_prompt(self.recipe.data)
        return ReasoningGain(lambda: self.generator, system, rows=min(rows, default=MEASURED))

    def judge(self, settings: JudgeSettings) -> Judge:
        """A judge, opened once for all steps."""
        from qreason.judge.verdict import open_judge

        if settings not in self._judges:
            self._judges[settings] = open_judge(settings, lambda: self.generator, self.say)
        return self._judges[settings]

    def preference_model(self, model: str) -> PreferenceModel:
        """A preference model, opened once for all steps; `model` is an earlier step or a model's folder."""
        from qreason.model.classifier import PreferenceModel

        name = str(self.folder / model / REWARD_MODEL) if model in self.disk.stage_names else model
        if name not in self._preferences:
            self._preferences[name] = PreferenceModel(name, self.resident)
        return self._preferences[name]


Stage = Callable[[Any, Session], Artifact]
"""`stage(settings, run)`: reads the run, writes its own folder, returns what it wrote."""
