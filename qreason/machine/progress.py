"""Progress bars, on stderr, so that stdout holds results only; and a file that says the same to other programs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from qreason.machine import ranks
from qreason.machine.files import write_json

console = Console(stderr=True, quiet=not ranks.is_first())
REMEMBERED = 900.0
"""Seconds whose speed the time left is estimated from: a step of GRPO may take a minute."""
LIVE = ".progress.json"
"""In a run folder: where the run is now, or was when it ended."""
WRITTEN = 2.0
"""Seconds between two writes of it."""


class Bar:
    """One line: the task and its phase, the steps done, the time, the time left, and a note with the newest figures."""

    def __init__(self, progress: Progress, what: str, total: int | None) -> None:
        self.progress, self.what = progress, what
        self.id = progress.add_task(what, total=total, note="")
        self.written = 0.0
        self.write()

    @property
    def task(self) -> Task:
        return next(task for task in self.progress.tasks if task.id == self.id)

    def total(self, steps: int) -> None:
        self.progress.update(self.id, total=steps)

    def grow(self, steps: int) -> None:
        """Steps that were not known at the start."""
        self.total(int(self.task.total or 0) + steps)

    def advance(self, steps: int) -> None:
        self.progress.advance(self.id, steps)
        self.write()

    def note(self, text: str) -> None:
        self.progress.update(self.id, note=text)

    def phase(self, text: str) -> None:
        """What is being done within a step."""
        self.progress.update(self.id, description=f"{self.what} {text}")
        self.write()

    def write(self) -> None:
        """Write LIVE now and then, where it is wanted."""
        now, task = time.time(), self.task
        if _live.folder is None or (now - self.written < WRITTEN and not task.finished):
            return
        self.written = now
        left = task.time_remaining
        state = {"phase": task.description, "done": task.completed, "total": task.total, "left": left, "at": now}
        with suppress(OSError):  # what is only looked at stops no run
            write_json(_live.folder / LIVE, state)


class _Live:
    """The folder that LIVE is written to, and the bar that is shown, where there are."""

    folder: Path | None = None
    bar: Bar | None = None


_live = _Live()


@contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """Within it, every bar is also written to LIVE in a folder."""
    _live.folder = folder
    try:
        yield
    finally:
        _live.folder = None


def phase(text: str) -> None:
    """Show on the current bar, if there is one, what is being done within a step."""
    if _live.bar:
        _live.bar.phase(text)


def note(text: str) -> None:
    """Show figures on the current bar, if there is one."""
    if _live.bar:
        _live.bar.note(text)


class TimeLeft(TimeRemainingColumn):
    """`0:12:30 left`; nothing where the number of steps is not known, or all are done."""

    def render(self, task: Task) -> Text:
        text = super().render(task)
        return Text("") if task.finished or not task.total else text.append(" left")


@contextmanager
def progress_bar(what: str, total: int | None = None) -> Iterator[Bar]:
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TimeLeft(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, ratio=1)),  # what does not fit is cut
    )
    with Progress(*columns, console=console, expand=True, speed_estimate_period=REMEMBERED) as progress:
        outer, _live.bar = _live.bar, Bar(progress, what, total)
        try:
            yield _live.bar
        finally:
            _live.bar = outer
