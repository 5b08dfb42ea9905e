"""The checkpoints of a training stage on disk.

STAGE/resume/step-000120/
  weights.safetensors   every trained parameter
  state.pt              optimizer, learning rate, gradient scale and random states
  trainer_state.json    transformers' TrainerState
  progress.json         the step's settings, sums not logged yet, lengths of the records, what the rollouts remember
  manifest.json         SHA-256 of these files
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qreason.errors import RunFolderError
from qreason.machine.files import hash_files, read_json
from qreason.machine.records import Progress

RESUME = "resume"
RECORDS = ("metrics.jsonl", "replies.jsonl", "alarms.jsonl")
"""Files of a stage that grow with its steps."""
DRAWN = ("pass_rates.jsonl", "pass_rates.json")
"""Files that a stage keeps when it starts again: the second says what the first was made with."""


def checkpoints(stage: Path) -> list[Path]:
    """The checkpoints of a stage, the newest last."""
    return sorted((stage / RESUME).glob("step-*"))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest_checkpoint(stage: Path) -> Path | None:
    """The newest checkpoint whose files are what its manifest says."""
    return next((folder for folder in reversed(checkpoints(stage)) if is_whole(folder)), None)


def is_whole(checkpoint: Path) -> bool:
    try:
        hashes = read_json(checkpoint / "manifest.json", dict[str, str])
        return all(hash_files([checkpoint / name]) == digest for name, digest in hashes.items())
    except (OSError, RunFolderError, AttributeError):
        return False


def is_of(checkpoint: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was made with these settings of its step."""
    return bool(read_json(checkpoint / "progress.json", Progress)["settings"] == settings)


def cut_back(stage: Path, checkpoint: Path) -> None:
    """Shorten the records of a stage to what they were at a checkpoint."""
    lengths = read_json(checkpoint / "progress.json", Progress)["lengths"]
    for file in (stage / name for name in RECORDS):
        if file.exists():
            os.truncate(file, lengths[file.name])
