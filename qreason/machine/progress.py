"""Progress bars, on stderr, so that stdout holds results only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

console = Console(stderr=True)


class Bar:
    """One line: the task, the steps done, the time, and a note with the newest figures."""

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


@contextmanager
def progress_bar(what: str, total: int | None = None) -> Iterator[Bar]:
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, progress.add_task(what, total=total, note=""))
