"""Command-line options made from the settings of a stage, and settings read back from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from qreason.errors import InputError
from qreason.recipe.sections import Strict

Command = Callable[..., Any]
Settings = TypeVar("Settings", bound=Strict)


def stack(*options: Command) -> Command:
    """Options as one decorator, in the order in which --help shows them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field; repeatable."
)
shard_option = click.option(
    "--shard", metavar="I/N", help="Do the I-th of N shares only; without it, the same command joins them."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
recipe_options = stack(
    click.argument("recipe"),
    click.option("--out", type=click.Path(path_type=Path), help="Run folder [default: runs/NAME]."),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="In place of the recipe's seed."),
    set_option,
    click.option("--fresh", is_flag=True, help="Start over; an earlier run is kept beside the folder."),
    click.option(
        "--mirror", metavar="DIR|hf://USER/REPO", help="Keep a copy there, and start from it on a new machine."
    ),
    json_option,
)
"""What every command on a recipe takes."""


def settings_options(kind: type[Strict], *fields: str, **names: str) -> Command:
    """An option for each of these fields, with the field's docstring and default; `names` renames one.

    The value of a list is comma-separated; the option of a renamed list is repeated instead.
    """
    return stack(*(field_option(field, kind.model_fields[field], names.get(field)) for field in (*fields, *names)))


def field_option(name: str, field: FieldInfo, renamed: str | None) -> Command:
    flag = f"--{(renamed or name).replace('_', '-')}"
    help_text = (field.description or "").replace("`", "").replace("\n", " ")
    if field.annotation is bool:
        flags = f"{flag}/--no-{flag[2:]}" if field.default else flag
        return click.option(flags, name, is_flag=True, default=None, help=help_text)
    listed = is_list(field)
    if (default := ",".join(map(str, field.default)) if listed else field.default) not in (None, ""):
        help_text += f" [default: {default}]"
    repeated = listed and renamed is not None
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    metavar = "|".join(choices) or (renamed or name).upper().replace("_", "-") + (
        ",…" if listed and not repeated else ""
    )
    return click.option(flag, name, multiple=repeated, metavar=metavar, help=help_text)


def is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) in (list, tuple)


def read_settings(kind: type[Settings], given: dict[str, Any], **names: str) -> Settings:
    """The settings of a stage from the options that were given; InputError names the option that is wrong."""
    values: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or value == ():
            continue
        commas = isinstance(value, str) and name in kind.model_fields and is_list(kind.model_fields[name])
        values[name] = [part.strip() for part in value.split(",") if part.strip()] if commas else value
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        option = "".join(f"--{names.get(str(part), part)}: " for part in problem["loc"][:1]).replace("_", "-")
        raise InputError(option + problem["msg"].removeprefix("Value error, ")) from None
