"""Progress bars, on stderr, so that stdout holds results only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

console = Console(stderr=True)
REMEMBERED = 900.0
"""Seconds whose speed the time left is estimated from: a step of GRPO may take a minute."""


class Bar:
    """One line: the task, the steps done, the time, the time left, and a note with the newest figures."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def total(self, steps: int) -> None:
        self.progress.update(self.task, total=steps)

    def grow(self, steps: int) -> None:
        """Steps that were not known at the start."""
        task = next(task for task in self.progress.tasks if task.id == self.task)
        self.total(int(task.total or 0) + steps)

    def advance(self, steps: int) -> None:
        self.progress.advance(self.task, steps)

    def note(self, text: str) -> None:
        self.progress.update(self.task, note=text)


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
        yield Bar(progress, progress.add_task(what, total=total, note=""))
