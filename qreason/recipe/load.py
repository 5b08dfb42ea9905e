"""Reading a recipe: the file, --set overrides, and all problems at once, each with its line and the nearest key."""

from __future__ import annotations

import os.path
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from qreason.errors import RecipeError, nearest
from qreason.recipe.parse import parse_yaml
from qreason.recipe.schema import OWN_FOLDER, STAGES, Recipe, Step
from qreason.recipe.sections import Weighted, is_hub_id

MOST_SHOWN = 200
"""Characters of a value that a message repeats."""


def shipped() -> Path:
    """The folder that holds `recipes/` and `data/`: inside an installed package, or the checkout."""
    inside = Path(__file__).parents[1] / "shipped"
    return inside if inside.exists() else Path(__file__).parents[2]


def shipped_recipes() -> list[Path]:
    return sorted((shipped() / "recipes").rglob("*.yaml"))


def recipe_name(file: Path) -> str:
    """The name of a shipped recipe: its path below recipes/, such as `bench/gsm8k`."""
    return file.relative_to(shipped() / "recipes").with_suffix("").as_posix()


def find_recipe(name: str | Path) -> Path:
    """A recipe file: the path as given, or the name of a shipped recipe."""
    path = Path(name)
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        raise RecipeError(f"{name}: a folder; give a recipe file (a run folder has its own in recipe.yaml)")
    named = {recipe_name(recipe): recipe for recipe in shipped_recipes()}
    if str(name) in named:
        return named[str(name)]
    close = nearest(os.path.splitext(path)[0], named) or nearest(path.stem, named)
    raise RecipeError(f"{str(name)[:MOST_SHOWN]}: no such recipe file{close}; `qreason recipes` lists the shipped ones")


def load_recipe(name: str | Path, overrides: Sequence[str] = (), seed: int | None = None) -> Recipe:
    """Read, override and check a recipe; its local paths become absolute.

    Raises RecipeError with every problem, each with its line.
    """
    file = find_recipe(name)
    try:
        raw, lines = parse_yaml(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 (byte {error.start}); save the recipe as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{file}: {error.strerror}; give a recipe that can be read") from None
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
    for folder in (str(file.resolve().parent), str(Path.cwd())):  # where custom rewards are imported from
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("\n".join(describe(file, lines, overrides, p) for p in error.errors())) from None
    return find_files(recipe, file, lines)


MODEL_KEYS = {"judge": ("adapter", "base"), "preference": ("model",)}
"""Settings of a reward that may be a folder."""


def find_files(recipe: Recipe, file: Path, lines: dict[tuple[Any, ...], int]) -> Recipe:
    """Make local paths absolute; what does not look like a Hub id must exist."""
    data, cure = recipe.data, "here or beside the recipe; give its path, or a Hub id"
    found = {key: find_file(value, file) for key, value in data.files.items()}
    missing = {key: value for key, value in data.files.items() if found[key] is None}
    if missing:
        places = {key: f"{file}:{lines.get(('data', key), 1)}" for key in missing}
        raise RecipeError(
            "\n".join(f"{places[k]}: data.{k}: no file {v[:MOST_SHOWN]} {cure}" for k, v in missing.items())
        )
    updates = {
        "data": data.model_copy(update=found),
        "model": recipe.model.model_copy(update={"base": absolute(recipe.model.base)}),
        "rewards": find_models(recipe.rewards),
        "steps": [find_models_of(step) for step in recipe.steps],
    }
    return recipe.model_copy(update=updates)


def find_models(rewards: dict[str, Weighted]) -> dict[str, Weighted]:
    """Rewards with absolute paths of their models."""
    found = {}
    for name, reward in rewards.items():
        keys = MODEL_KEYS.get(reward.kind(name), ())
        settings = {k: absolute(v) if k in keys and v else v for k, v in reward.settings.items()}
        found[name] = reward.model_copy(update={"settings": settings})
    return found


def find_models_of(step: Step) -> Step:
    """A step with absolute paths of the models it asks."""
    changes: dict[str, Any] = {}
    if step.grpo and step.grpo.rewards:
        changes["rewards"] = find_models(step.grpo.rewards)
    teacher = getattr(step.settings, "teacher", None)
    if teacher and not teacher.endpoint:
        changes["teacher"] = teacher.model_copy(update={"model": absolute(teacher.model)})
    if step.pull:
        changes["repo"] = absolute(step.pull.repo)
    return step.model_copy(update={step.stage: step.settings.model_copy(update=changes)}) if changes else step


def absolute(model: str) -> str:
    """A model's folder as an absolute path; a Hub id, an embedded base or a stage of the run unchanged."""
    if OWN_FOLDER.fullmatch(model):
        return model
    if model.startswith((".", "/", "~")) or os.path.isdir(model):
        return os.path.realpath(os.path.expanduser(model))
    return model


def find_file(value: str, recipe_file: Path) -> str | None:
    """A data file in the recipe's folder, one above it, or the current folder; a Hub id unchanged; None for neither."""
    for folder in (*recipe_file.resolve().parents, Path.cwd()):
        if os.path.isfile(file := folder / os.path.expanduser(value)):
            return os.path.realpath(file)
    return value if is_hub_id(value) else None


def set_value(raw: dict[str, Any], override: str) -> None:
    """Apply `a.b=value` (the value is YAML); `sft.x=value` reaches every sft step."""
    path, equals, value = override.partition("=")
    override = override[:MOST_SHOWN]
    if any("\ud800" <= character <= "\udfff" for character in path + value):
        raise RecipeError(f"--set {override}: not UTF-8; write it in UTF-8")
    keys = path.strip().split(".")
    if not equals or not all(keys) or (keys[0] in STAGES and len(keys) == 1):
        raise RecipeError(f"--set {override}: write it as key=value, for example --set model.base=qreason/tiny")
    try:
        parsed, _ = parse_yaml(value)
    except yaml.YAMLError:
        parsed = value
    for target, inner in targets(raw, keys, override):
        for key in inner[:-1]:
            below = {} if target.get(key) is None else target[key]
            if not isinstance(below, dict):
                raise RecipeError(f"--set {override}: '{key}' holds a value, not a mapping")
            target[key] = dict(below)  # elsewhere, an alias of it stays as it was
            target = target[key]
        target[inner[-1]] = parsed


def targets(raw: dict[str, Any], keys: list[str], override: str) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The mappings that an override writes into, and the keys inside them."""
    if keys[0] not in STAGES:
        yield raw, keys
        return
    steps = raw.get("steps")
    found = False
    for position, step in enumerate(steps if isinstance(steps, list) else []):
        name = next(iter(step)) if isinstance(step, dict) and step else step
        if name == keys[0]:
            found = True
            settings = (step[name] or {}) if isinstance(step, dict) else {}
            if not isinstance(settings, dict):
                raise RecipeError(f"--set {override}: the {name} step holds a value, not a mapping")
            settings = dict(settings)
            raw["steps"][position] = (step if isinstance(step, dict) else {}) | {name: settings}
            yield settings, keys[1:]
    if not found:
        raise RecipeError(f"--set {override}: the recipe has no {keys[0]} step")


def describe(file: Path, lines: dict[tuple[Any, ...], int], overrides: Sequence[str], problem: Any) -> str:
    """A problem that pydantic found, as `file:line: key: message`, or `--set NAME: key: message` of an override."""
    path = tuple(problem["loc"])
    key = ".".join(str(part) for part in path)
    line = next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), 1)
    names = [override.partition("=")[0].strip() for override in overrides]  # a value may be a secret
    given = next((f"--set {name}" for name in names if f".{name}." in f".{key}."), None)
    where = given or (f"{file}:{line}" if key else str(file))
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'{nearest(str(path[-1]), sibling_fields(path[:-1]))}"
    if problem["type"] == "missing":
        return f"{where}: '{key}' is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{where}: {key}: {message}" if key else f"{where}: {message}"


def sibling_fields(path: tuple[Any, ...]) -> list[str]:
    """The valid keys at a place in a recipe."""
    model: Any = Recipe
    for part in path:
        if part == "steps":
            model = Step
        elif isinstance(part, str) and part in model.model_fields:
            kinds = get_args(model.model_fields[part].annotation) or (model.model_fields[part].annotation,)
            model = kinds[0]
    return [field.alias or name for name, field in getattr(model, "model_fields", {}).items()]
