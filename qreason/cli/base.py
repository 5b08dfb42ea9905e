"""What all commands share: the group they belong to, one-line errors, lines for the person at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qreason import __version__
from qreason.errors import InputError, QReasonError, RunFolderError

if TYPE_CHECKING:
    from qreason.recipe.sections import Strict
    from qreason.run.session import Run


Settings = TypeVar("Settings", bound="Strict")


def say(line: str) -> None:
    """A line for the person at the terminal; stdout is kept for results."""
    click.echo(line, err=True)


def open_finished(folder: Path) -> Run:
    """The run of a folder, to take from; RunFolderError where there is none."""
    from qreason.machine.hardware import prepare_process
    from qreason.run.session import Run

    if not (folder / "manifest.json").is_file():
        raise RunFolderError(f"{folder}: not a run folder (no manifest.json); give the folder of a run")
    prepare_process()
    return Run.reopen(folder, say)


def one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of ours become one clear line and their exit code, without a traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except QReasonError as error:
            say(f"qreason: {error}")
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            say("qreason: stopped; run the same command again to continue after the last finished stage")
            sys.exit(1)

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__)
def main() -> None:
    """Train, judge and measure a small model that reasons, on one GPU or a laptop."""


def read_settings(kind: type[Settings], given: dict[str, Any]) -> Settings:
    """The settings of a stage from options of its command; InputError names the option that is wrong."""
    from pydantic import ValidationError

    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        option = "".join(f"--{part}: " for part in problem["loc"][:1]).replace("_", "-")
        raise InputError(option + problem["msg"].removeprefix("Value error, ")) from None


def set_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--set KEY=VALUE`, as `overrides`."""
    help_text = "Override a field; repeatable."
    return click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=help_text)(command)
