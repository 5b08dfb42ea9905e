"""Where a run is while it works, or was when it was cut off: from its folder alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qreason.errors import QReasonError
from qreason.machine.files import read_json, read_value
from qreason.machine.progress import LIVE
from qreason.report.curves import kinds
from qreason.report.records import Live, Raised
from qreason.report.table import plain_table
from qreason.run.folder import RunFolder
from qreason.run.lineage import figures
from qreason.run.listing import describe_state
from qreason.run.lock import is_held


@dataclass(frozen=True)
class Watched:
    """A run at one moment."""

    name: str
    state: str
    working: bool
    steps: list[tuple[str, str]]
    """Every step of the recipe, and how it went."""
    here: str
    """The task that is, or was, worked on, with its progress."""
    newest: list[tuple[str, str]]
    """Name and value of the newest figures of the stage that is trained."""
    alarms: list[str]


def look(folder: Path) -> Watched:
    """A run as it is now. RunFolderError where its manifest or recipe cannot be read."""
    run, working = RunFolder.reopen(folder), is_held(folder)
    left = run.finished < len(run.recipe.steps)
    stage = run.stage(run.finished) if left else folder
    rows = read_whole_lines(stage / "metrics.jsonl", dict[str, Any])
    alarms = [
        f"{name}, step {alarm['step']}: {alarm['text']}"
        for name in dict.fromkeys(run.stage_names)
        for alarm in read_whole_lines(folder / name / "alarms.jsonl", Raised)
    ]
    steps = [describe_step(run, place, working) for place in range(len(run.recipe.steps))]
    here = describe_task(folder, working) if left else ""
    return Watched(folder.name, describe_state(run), working, steps, here, newest_figures(rows), alarms)


def describe_step(run: RunFolder, place: int, working: bool) -> tuple[str, str]:
    """A step's name, and its time and result; empty for one that has not begun."""
    step, name = run.recipe.steps[place], run.stage_names[place]
    title = f"{step.stage} {name}" if step.stage == "evaluate" else name
    if place > run.finished or (place == run.finished and not run.stage(place).exists() and not working):
        return title, ""
    if place == run.finished:
        return title, "now" if working else "was cut off"
    result = f"{timedelta(seconds=round(run.manifest['steps'][place]['seconds']))}"
    accuracy = figures(run.stage(place)).get("accuracy") if step.stage == "evaluate" else None
    return title, result if accuracy is None else f"{result}, accuracy {accuracy:.1%}"


def describe_task(folder: Path, working: bool) -> str:
    """The bar of the run in words: `02-grpo replies, 51 of 120, about 0:12:30 left`."""
    try:
        live: Live = read_json(folder / LIVE, Live)
    except QReasonError:  # none was shown yet, or by an earlier version
        return ""
    count = f", {live['done']:.0f} of {live['total']:.0f}" if live["total"] else ""
    if not working:
        return f"{live['phase']}{count}, last seen {time.strftime('%F %T', time.localtime(live['at']))}"
    left = max(0.0, live["left"] - (time.time() - live["at"])) if live["left"] else 0.0
    return f"{live['phase']}{count}" + (f", about {timedelta(seconds=round(left))} left of it" if left else "")


def newest_figures(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The figures of the last logged step, by the names of the report's curves."""
    if not rows:
        return []
    last = rows[-1]
    shown = [kind for kind in kinds([last]) if isinstance(last.get(kind.key), int | float)]
    figures = [(kind.title, f"{last[kind.key]:.1%}" if kind.is_share else f"{last[kind.key]:.3g}") for kind in shown]
    return [("step", str(last.get("step", "–"))), *figures]


def read_whole_lines(file: Path, shape: Any) -> list[dict[str, Any]]:
    """The rows of a file that another process may be writing: what is not whole or not there is left out."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(read_value(file, line, shape, ""))
        except QReasonError:
            continue
    return rows


def watched_view(run: Watched) -> Group:
    """What `qreason watch` shows."""
    parts: list[Any] = [Text.assemble((run.name, "bold"), f": {run.state}"), Text(), two_columns(run.steps)]
    if run.here:
        parts += [Text(), Text(run.here, style="bold" if run.working else "")]
    if run.newest:
        parts += [Text(), two_columns(run.newest)]
    return Group(*parts, *(Text(f"alarm: {alarm}", style="yellow") for alarm in run.alarms))


def two_columns(rows: Sequence[tuple[str, str]]) -> Table:
    table = plain_table(["", ""])
    table.show_header = False
    for row in rows:
        table.add_row(*row)
    return table
