"""What all commands share: the group they belong to, one-line errors, lines on stderr."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qreason import __version__
from qreason.errors import QReasonError, RunFolderError
from qreason.machine.hardware import prepare_process

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qreason.run.session import Session


def say(line: str) -> None:
    """Print status to stderr; stdout is kept for results."""
    click.echo(line, err=True)


def show(*parts: RenderableType) -> None:
    """Print tables and trees to stdout."""
    from rich.console import Console

    Console().print(*parts, sep="\n")


def open_finished(folder: Path) -> Session:
    """The run of a folder, to read from; RunFolderError where there is none."""
    from qreason.run.folder import is_run_folder
    from qreason.run.session import Session

    if not is_run_folder(folder):
        raise RunFolderError(f"{folder}: not a run folder (no manifest.json); give the folder of a run")
    return Session.reopen(folder, say)


class Commands(click.Group):
    """qreason errors become one clear line and their exit code, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QReasonError as error:
            say(f"qreason: {error}")
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            say("qreason: stopped; run the same command again to continue")
            sys.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__)
def main() -> None:
    """Train, judge and measure a small model that reasons, on one GPU or a laptop."""
    prepare_process()
