"""What all commands share: the group they belong to, one-line errors, lines on stderr."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from contextlib import redirect_stderr
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import click

from qreason import __version__
from qreason.errors import QReasonError, RunFolderError, redact
from qreason.machine import ranks
from qreason.machine.hardware import prepare_process

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qreason.run.session import Session


def say(line: str) -> None:
    """Print status to stderr, from the first process of a launch; stdout is kept for results."""
    if ranks.is_first():
        click.echo(line, err=True)


def complain(line: str) -> None:
    """Print why this process ends."""
    click.echo(f"qreason: {line}" if ranks.is_first() else f"qreason (process {ranks.number()}): {line}", err=True)


def show(*parts: RenderableType) -> None:
    """Print tables and trees to stdout."""
    from rich.console import Console

    Console().print(*parts, sep="\n")


def open_finished(folder: Path) -> Session:
    """The run of a folder, to read from; RunFolderError where there is none."""
    from qreason.run.folder import is_run_folder, near
    from qreason.run.session import Session

    if not is_run_folder(folder):
        what = "not a run folder (no manifest.json)" if folder.exists() else "no such folder"
        raise RunFolderError(f"{folder}: {what}{near(folder)}; give the folder of a run")
    return Session.reopen(folder, say)


class Redacted:
    """A text stream whose lines hold no secret, whichever library prints them."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error of ours that nothing caught, without secrets."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def open_closed_streams() -> None:
    """Read nothing from a stdin that is closed, as under some services, and write nothing to a closed stdout."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  as long as the process


def accept_any_text() -> None:
    """Let a console that lacks a character show its code, and read a byte that is no text as a question mark."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, or one behind it, is that of a full disk; safetensors and torch have their own for it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if re.search(r"No space left|os error 28|PytorchStreamWriter failed|file write failed", str(error)):
        return True
    behind = error.__cause__ or error.__context__
    return behind is not None and is_full_disk(behind)


class Commands(click.Group):
    """qreason errors become one clear line and their exit code, without a traceback; nothing printed holds a secret."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        open_closed_streams()
        accept_any_text()
        sys.excepthook = print_traceback
        with redirect_stderr(Redacted(sys.stderr)):
            return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QReasonError as error:
            complain(str(error))
            sys.exit(error.exit_code)
        except Exception as error:
            if ranks.is_alone(error):
                complain("another process of this launch ended; the same command continues after the last checkpoint")
            elif is_full_disk(error):
                complain("no space is left on the disk; make room, and run the same command again to continue")
            elif isinstance(error, OSError) and error.filename is not None:
                complain(f"{error.filename}: {error.strerror}")
            else:
                raise
            sys.exit(1)
        except KeyboardInterrupt:
            complain("stopped; run the same command again to continue")
            sys.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__)
def main() -> None:
    """Train, judge and measure a small model that reasons, on one GPU or a laptop."""
    if line := prepare_process():
        say(line)
