"""The runs in a folder: what state each is in, its size, and what of it is left over from work that was cut off."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qreason.errors import QReasonError
from qreason.machine.files import DRAFT
from qreason.run.folder import RunFolder, is_run_folder, read_manifest
from qreason.run.lock import describe, is_held
from qreason.run.resume import RESUME, newest_checkpoint, step_of

WORK = ".work-"
"""How an export's folders for intermediate files begin."""


@dataclass(frozen=True)
class Listed:
    """A run folder as `qreason runs` shows it; sizes in bytes."""

    path: Path
    started: str
    state: str
    size: int
    leftover: int
    """The part of the size that `clean` frees."""


def list_runs(folder: Path) -> list[Listed]:
    """The runs in a folder, the newest first; or the one that the folder is."""
    places = [folder] if is_run_folder(folder) else [path for path in folder.glob("*") if is_run_folder(path)]
    return sorted((look(path) for path in places), key=lambda run: run.started, reverse=True)


def look(path: Path) -> Listed:
    try:
        run = RunFolder.reopen(path)
        started, state = str(run.manifest.get("started", "")), describe_state(run)
    except QReasonError as error:
        started, state = "", f"damaged: {error}"
    return Listed(path, started, state, size(path), sum(map(size, leftovers(path))))


def describe_state(run: RunFolder) -> str:
    done, steps = run.finished, len(run.recipe.steps)
    if is_held(run.path):
        return f"{done} of {steps} steps, working ({describe(run.path)})"
    if done == steps:
        return "finished"
    stage = run.stage(done)
    checkpoint = newest_checkpoint(stage) if stage.is_dir() else None
    place = f", {stage.name} after its step {step_of(checkpoint)}" if checkpoint else ""
    return f"{done} of {steps} steps{place}"


def leftovers(path: Path) -> Iterator[Path]:
    """What no command reads: drafts, an export's intermediate files, checkpoints of steps that are recorded."""
    if is_held(path):
        return
    needed = unfinished(path)
    yield from path.rglob(f"*.{DRAFT}")
    yield from path.rglob(f"{WORK}*")
    yield from path.rglob(f"{RESUME}/{DRAFT}")
    yield from (folder for folder in path.glob(f"*/{RESUME}") if folder not in needed)


def unfinished(path: Path) -> list[Path]:
    """The checkpoints of stages that are not recorded as finished: a run continues from them, with an adapter too."""
    try:
        done = {entry["folder"] for entry in read_manifest(path)["steps"]}
    except QReasonError:  # damaged: once it is restored, it may need any of them
        done = set()
    return sorted(folder for folder in path.glob(f"*/{RESUME}") if folder.parent.name not in done)


def clean(path: Path) -> None:
    for leftover in list(leftovers(path)):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    total = 0
    inside = (os.path.join(place, name) for place, _, names in os.walk(path) for name in names)
    for file in [path] if path.is_file() else inside:  # not rglob, which fails where a run at work removes a folder
        with suppress(FileNotFoundError):
            found = os.lstat(file)
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total
