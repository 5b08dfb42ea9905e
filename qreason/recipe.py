"""The YAML schema of a recipe (strict), its loading, and --set overrides.

A recipe says what to train, on what, with which rewards, in which steps. Unknown keys, wrong values and
missing files are reported all at once, each with its line and, for a key, the nearest valid one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qreason.errors import RecipeError
from qreason.rewards import NAMES
from qreason.types import Sampling

SUFFIXES = (".jsonl", ".csv", ".parquet")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Lora(Strict):
    """The adapter, in PEFT's terms."""

    r: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class Model(Strict):
    base: str
    """`qreason/tiny` (embedded), a Hub id or a local folder."""
    quantization: Literal["none", "nf4"] = "none"
    lora: Lora = Lora()


class Data(Strict):
    """Where examples come from: a JSONL, CSV or Parquet file, or a Hub id (`name` and `split` with it)."""

    sft: str | None = None
    prompts: str | None = None
    heldout: str | None = None
    name: str | None = None
    """Configuration of a Hub data set."""
    splits: dict[Literal["sft", "prompts", "heldout"], str] = {}
    """Split of a Hub data set for each use; `train`, or `test` for held-out rows, when not given."""
    fields: dict[Literal["id", "prompt", "reference", "reasoning", "accepted", "category"], str] = {}
    """Column names, where they are not among the usual ones (see data.py)."""
    prompt: Literal["helpdesk", "math"] = "helpdesk"
    """Which system prompt of prompts.py the messages carry."""

    @property
    def sources(self) -> dict[str, str]:
        """`sft`, `prompts` and `heldout`, those that are given -> file or Hub id."""
        return {use: source for use in NEEDS if (source := getattr(self, use)) is not None}


class Draw(Strict):
    """How replies are drawn, in rollouts and for pass@1; in TRL's terms."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    max_completion_length: int = Field(256, gt=0)

    def sampling(self, *, greedy: bool = False, seed: int | None = None) -> Sampling:
        drawn = self.model_dump() | ({"temperature": 0.0} if greedy else {})
        return Sampling(**drawn, seed=seed)


class Training(Strict):
    """What SFT and GRPO share, in TRL's terms; `trl` passes any further field of TRL's config through."""

    per_device_train_batch_size: int = Field(8, gt=0)
    gradient_accumulation_steps: int = Field(1, gt=0)
    num_train_epochs: float = Field(1.0, gt=0)
    max_steps: int = -1
    learning_rate: float = Field(2e-4, gt=0)
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = Field(0.03, ge=0)
    """A number of steps, or below 1 a share of them."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optim: str = "adamw_torch"
    gradient_checkpointing: bool = False
    logging_steps: int = Field(5, gt=0)
    rows: int | None = Field(None, gt=0)
    """Use only the first rows."""
    trl: dict[str, Any] = {}


class Sft(Training):
    packing: bool = False


class Grpo(Training):
    num_generations: int = Field(8, ge=2)
    learning_rate: float = Field(1e-5, gt=0)
    logging_steps: int = Field(1, gt=0)
    beta: float = Field(0.0, ge=0)
    epsilon: float = Field(0.2, gt=0)
    epsilon_high: float | None = None
    num_iterations: int = Field(1, gt=0)
    scale_rewards: Literal["group", "batch", "none"] = "group"
    loss_type: str = "dapo"
    mask_truncated_completions: bool = False

    @model_validator(mode="after")
    def whole_groups(self) -> Grpo:
        if self.per_device_train_batch_size * self.gradient_accumulation_steps % self.num_generations:
            raise ValueError(
                "per_device_train_batch_size x gradient_accumulation_steps must be a multiple of "
                f"num_generations ({self.num_generations})"
            )
        return self


class Evaluate(Strict):
    rows: int | None = Field(None, gt=0)
    """Use only the first held-out rows."""
    samples: int = Field(4, ge=1)
    """Replies a row for pass@1, beside the greedy one."""


class Merge(Strict):
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"


class Step(Strict):
    """One stage with its settings; exactly one of the fields is set."""

    sft: Sft | None = None
    grpo: Grpo | None = None
    evaluate: Evaluate | None = None
    merge: Merge | None = None

    @model_validator(mode="before")
    @classmethod
    def bare_name(cls, raw: Any) -> Any:
        """`- evaluate` and `- evaluate:` mean the stage with its defaults."""
        if isinstance(raw, str):
            return {raw: {}}
        return {key: {} if value is None else value for key, value in raw.items()} if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def one_stage(self) -> Step:
        if len(self.model_fields_set) != 1:
            raise ValueError("a step is one stage: start each stage with its own dash")
        return self

    @property
    def stage(self) -> str:
        (name,) = self.model_fields_set
        return name

    @property
    def settings(self) -> Sft | Grpo | Evaluate | Merge:
        settings: Sft | Grpo | Evaluate | Merge = getattr(self, self.stage)
        return settings


STAGES = tuple(Step.model_fields)

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Recipe(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: Model
    data: Data
    rewards: dict[str, Weight] = Field(min_length=1)
    sampling: Draw = Draw()
    steps: list[Step] = Field(min_length=1)
    seed: int = Field(1, ge=0)

    @field_validator("rewards")
    @classmethod
    def known_rewards(cls, rewards: dict[str, float]) -> dict[str, float]:
        for name in rewards:
            if name not in NAMES:
                raise ValueError(f"unknown reward '{name}'{nearest(name, NAMES)}; there are {', '.join(NAMES)}")
        if not any(rewards.values()):
            raise ValueError("all weights are 0; give at least one reward a weight above 0")
        return rewards

    @model_validator(mode="after")
    def has_what_steps_need(self) -> Recipe:
        for key, (stages, what) in NEEDS.items():
            used = [step.stage for step in self.steps if step.stage in stages]
            if used and getattr(self.data, key) is None:
                raise ValueError(f"data.{key} is missing: the {used[0]} step needs {what}")
        if self.sampling.temperature == 0 and any(step.grpo for step in self.steps):
            raise ValueError("sampling.temperature is 0: grpo compares different replies; give it a value above 0")
        if len({step.evaluate for step in self.steps if step.evaluate}) > 1:
            raise ValueError("steps: evaluate steps with different settings cannot be compared; give all the same")
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            if before.stage == after.stage == "evaluate":
                raise ValueError("steps: two evaluate steps in a row would measure the same model twice")
        return self

    def dump(self) -> dict[str, Any]:
        """The recipe as resolved, as plain values that load again."""
        return self.model_dump(mode="json", exclude_none=True)


NEEDS = {
    "sft": (("sft",), "incidents"),
    "prompts": (("grpo",), "prompts"),
    "heldout": (("evaluate",), "held-out rows"),
}
"""Data key -> (stages that read it, what it holds)."""


def nearest(word: str, words: Sequence[str] | dict[str, Any]) -> str:
    """` (did you mean 'x'?)`, or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


# --- loading ------------------------------------------------------------------------------------


def shipped() -> Path:
    """The folder that holds `recipes/` and `data/`: inside an installed package, or the checkout."""
    inside = Path(__file__).parent / "shipped"
    return inside if inside.exists() else Path(__file__).parent.parent


def shipped_recipes() -> list[Path]:
    return sorted((shipped() / "recipes").rglob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """A recipe file: the path as given, or the name of a shipped recipe."""
    path = Path(name)
    if path.is_file():
        return path
    named = {recipe.stem: recipe for recipe in shipped_recipes()}
    if str(name) in named:
        return named[str(name)]
    raise RecipeError(
        f"{name}: no such recipe file{nearest(path.stem, named)}; `qreason recipes` lists the shipped ones"
    )


def load_recipe(name: str | Path, overrides: Sequence[str] = (), seed: int | None = None) -> Recipe:
    """Read, override and check a recipe; paths in it come back absolute.

    Raises RecipeError with every problem, each with its line.
    """
    file = find_recipe(name)
    try:
        text = file.read_text(encoding="utf-8")
        raw, lines = yaml.safe_load(text), read_lines(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 (byte {error.start}); save the recipe as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{file}{where}: not YAML: {what}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{file}: a recipe is a mapping with name, model, data, rewards and steps")
    for override in overrides:
        set_value(raw, override)
    if seed is not None:
        raw["seed"] = seed
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems = "\n".join(describe(file, lines, problem) for problem in error.errors())
        raise RecipeError(problems) from None
    return find_files(recipe, file, lines)


def find_files(recipe: Recipe, file: Path, lines: dict[tuple[Any, ...], int]) -> Recipe:
    """Make local paths absolute; those with a data suffix must exist, others may be Hub ids."""
    data = recipe.data
    sources = data.sources
    found = {key: find_file(value, file) for key, value in sources.items()}
    if missing := [key for key in found if found[key] is None]:
        cure = "here or beside the recipe; give its path, or a Hub id"
        raise RecipeError(
            "\n".join(
                f"{file}:{lines.get(('data', key), 1)}: data.{key}: no file {sources[key]} {cure}" for key in missing
            )
        )
    base = recipe.model.base
    if base.startswith((".", "/", "~")) or Path(base).is_dir():
        base = str(Path(base).expanduser().resolve())
    return recipe.model_copy(
        update={"data": data.model_copy(update=found), "model": recipe.model.model_copy(update={"base": base})}
    )


def find_file(value: str, recipe_file: Path) -> str | None:
    """A data file, looked for from the recipe's folder upwards, then in the current folder; a Hub id as it is."""
    folders = [*recipe_file.resolve().parents, Path.cwd()]
    for folder in folders:
        if (folder / Path(value).expanduser()).is_file():
            return str((folder / Path(value).expanduser()).resolve())
    return None if value.endswith(SUFFIXES) or value.startswith((".", "/", "~")) else value


def set_value(raw: dict[str, Any], override: str) -> None:
    """Apply `a.b=value` (the value is YAML); `sft.x=value` reaches every sft step."""
    path, equals, value = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys) or (keys[0] in STAGES and len(keys) == 1):
        raise RecipeError(f"--set {override}: write it as key=value, for example --set model.base=qreason/tiny")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    for target, inner in targets(raw, keys, override):
        for key in inner[:-1]:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise RecipeError(f"--set {override}: '{key}' holds a value, not a mapping")
        target[inner[-1]] = parsed


def targets(raw: dict[str, Any], keys: list[str], override: str) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The mappings an override writes into, and the keys inside them."""
    if keys[0] not in STAGES:
        yield raw, keys
        return
    steps = raw.get("steps")
    found = False
    for position, step in enumerate(steps if isinstance(steps, list) else []):
        name = next(iter(step)) if isinstance(step, dict) and step else step
        if name == keys[0]:
            found = True
            settings = dict(step[name] or {}) if isinstance(step, dict) else {}
            raw["steps"][position] = {name: settings}
            yield settings, keys[1:]
    if not found:
        raise RecipeError(f"--set {override}: the recipe has no {keys[0]} step")


def read_lines(text: str) -> dict[tuple[Any, ...], int]:
    """Path of keys -> line of that key in the YAML text."""
    lines: dict[tuple[Any, ...], int] = {}

    def walk(node: yaml.Node, path: tuple[Any, ...]) -> None:
        lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if (*path, key.value) in lines:
                    raise yaml.MarkedYAMLError(problem=f"'{key.value}' is there twice", problem_mark=key.start_mark)
                lines[(*path, key.value)] = key.start_mark.line + 1
                walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for position, value in enumerate(node.value):
                walk(value, (*path, position))

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        walk(root, ())
    return lines


def describe(file: Path, lines: dict[tuple[Any, ...], int], problem: Any) -> str:
    """One problem pydantic found, as `file:line: key: what (cure)`."""
    path = tuple(problem["loc"])
    known = next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), 1)
    key = ".".join(str(part) for part in path)
    if problem["type"] == "extra_forbidden":
        hint = nearest(str(path[-1]), sibling_fields(path[:-1]))
        return f"{file}:{known}: unknown key '{key}'{hint}"
    if problem["type"] == "missing":
        return f"{file}:{known}: '{key}' is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{file}:{known}: {key}: {message}" if key else f"{file}: {message}"


def sibling_fields(path: tuple[Any, ...]) -> list[str]:
    """The valid keys at a place in a recipe."""
    model: Any = Recipe
    for part in path:
        if part == "steps":
            model = Step
        elif isinstance(part, str) and part in model.model_fields:
            kinds = get_args(model.model_fields[part].annotation) or (model.model_fields[part].annotation,)
            model = kinds[0]
    return list(getattr(model, "model_fields", {}))
