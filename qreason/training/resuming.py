"""Writes and reads the checkpoints of a training stage: one that is cut off ends as if it had not been."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, cast

from qreason.errors import RunFolderError, first_line
from qreason.machine import ranks
from qreason.machine.files import DRAFT, flush, hash_files, read_json, write_json, write_text
from qreason.machine.records import Progress, State
from qreason.recipe.training import Training
from qreason.run.resume import RECORDS, RESUME, checkpoints, newest_checkpoint, step_of
from qreason.run.session import Session

SECONDS = 300.0
"""Between two checkpoints where no number of steps is given."""
MOST_TIME = 0.01
"""Share of the time that checkpoints by time may take."""
SUMS = ("_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step", "_total_train_tokens", "current_flos")
"""What transformers and TRL add up, and from where, beside the TrainerState (read in transformers 5.17 and 5.24, which
divides the sum of losses by the steps since `_initial_global_step`; TRL 1.14.2)."""


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


class Remembers(Protocol):
    """Something with a memory of the steps so far."""

    def remember(self) -> Callable[[], dict[str, Any]]:
        """Gives the memory as of now, as JSON values; itself cheap, as it is called after every step."""

    def recall(self, memory: Mapping[str, Any]) -> None: ...


class Nothing:
    """No memory."""

    def remember(self) -> Callable[[], dict[str, Any]]:
        return dict

    def recall(self, memory: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Snapshot:
    """What a step left behind, apart from weights and optimizer, which stay as they are until the next one."""

    trainer_state: dict[str, Any]
    learning_rate: Any
    random: Any
    progress: dict[str, Any]
    memory: Callable[[], dict[str, Any]]


class Checkpoints:
    """Writes and reads the checkpoints of one training stage."""

    memory: Remembers = Nothing()
    random: dict[str, Any]

    def __init__(
        self,
        folder: Path,
        resumed: Path | None,
        settings: Mapping[str, Any],
        *,
        steps: int | None,
        keep: int,
        mirror: Callable[[], None] | None,
    ) -> None:
        """`resumed` is the one to continue from, made with the same `settings` of the step.

        `steps` between two of them, else by time; `mirror` is called after each.
        """
        self.folder, self.resumed, self.settings = folder, resumed, settings
        self.steps, self.keep, self.mirror = steps, keep, mirror
        self.asked = self.stepping = False
        self.pending: type[KeyboardInterrupt] | None = None
        self.snapshot: Snapshot | None = None
        self.written, self.cost = time.monotonic(), 0.0

    # --- writing -------------------------------------------------------------------------------

    def step_done(self, trainer: Any) -> None:
        """After every optimizer step, once it is logged: note what it left, and write it where it is time."""
        self.snapshot = take_snapshot(trainer, self.folder, self.memory, self.settings)
        if self.snapshot and self.is_due(trainer.state.global_step):
            self.write(trainer)
        self.stepping = False
        if self.pending:
            raise self.pending

    def is_due(self, step: int) -> bool:
        if self.asked or (self.steps and step % self.steps == 0):
            return True
        return self.steps is None and time.monotonic() - self.written > max(SECONDS, self.cost / MOST_TIME)

    def write(self, trainer: Any) -> Path | None:
        """The newest snapshot as a folder; None within an optimizer step, whose result has no snapshot yet.

        None too in a process of a launch that is not the first.
        """
        if self.snapshot is None or not ranks.is_first():
            return None
        start = time.monotonic()
        made = write_checkpoint(self.folder / RESUME, trainer, self.snapshot)
        for old in checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old)
        if self.mirror:
            self.mirror()
        self.written = time.monotonic()
        self.cost = self.written - start
        return made

    def rescue(self, trainer: Any) -> Path | None:
        """When a run is stopped: write the last full step, unless it is written already or is not whole."""
        if self.stepping or self.snapshot is None:
            return None
        newest = newest_checkpoint(self.folder)
        return newest if newest and step_of(newest) == trainer.state.global_step else self.write(trainer)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop the training at once, but never within an optimizer step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
            if not self.stepping:
                raise kind
            self.pending = kind

        wanted = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) is not signal.SIG_IGN]
        earlier = {number: signal.signal(number, stop) for number in wanted}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    # --- reading -------------------------------------------------------------------------------

    def finished_epochs(self) -> int:
        """Of the checkpoint that the training starts from."""
        return int(read_json(self.resumed / "trainer_state.json", State)["epoch"]) if self.resumed else 0

    def was_at_end(self, trainer: Any) -> bool:
        """Whether the checkpoint is that of the last step: then the trainer is as after its training.

        transformers would make a further step.
        """
        from transformers import TrainerState

        if self.resumed is None:
            return False
        state = TrainerState.load_from_json(str(self.resumed / "trainer_state.json"))
        if state.global_step < state.max_steps:
            return False
        trainer.state = state
        self.load_weights(trainer, self.resumed)
        self.memory.recall(read_json(self.resumed / "progress.json", Progress)["memory"])
        return True

    def load_weights(self, trainer: Any, folder: Path) -> None:
        from safetensors.torch import load_file

        weights = load_file(folder / "weights.safetensors")
        trained = {name: one for name, one in trainer.model.named_parameters() if one.requires_grad}
        if weights.keys() != trained.keys():
            raise RunFolderError(f"{folder}: its weights are not those of this adapter; remove {folder.parent}")
        for name, parameter in trained.items():
            parameter.data.copy_(weights[name])

    def load_optimizer(self, trainer: Any, folder: Path) -> None:
        """The random states are kept for load_random, which the trainer may ask for twice."""
        state = read_state(folder)
        if len(state["random"]) != ranks.count():
            raise RunFolderError(
                f"{folder}: made by {len(state['random'])} processes; continue with as many, or remove {folder.parent} "
                "to start this step again"
            )
        self.random = state["random"][ranks.number()]
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.lr_scheduler.load_state_dict(state["learning_rate"])
        if state["scaler"] is not None:
            trainer.accelerator.scaler.load_state_dict(state["scaler"])

    def load_random(self) -> None:
        set_random(self.random)

    def load_progress(self, trainer: Any, folder: Path) -> None:
        """What is added up: after the trainer has set its sums to zero."""
        progress = read_json(folder / "progress.json", Progress)
        for name, value in progress["sums"].items():
            setattr(trainer, name, value)
        trainer._tr_loss += progress["loss"][ranks.number()]
        for name, values in progress["metrics"].items():
            trainer._metrics["train"][name] = values
        self.memory.recall(progress["memory"])


def open_checkpoints(run: Session, settings: Training) -> Checkpoints:
    """Those of the current training step, whose folder is cut back to the newest one, or emptied."""
    folder, newest = ranks.from_first(run.resume_stage_folder)
    return Checkpoints(
        folder,
        newest,
        run.disk.settings(run.step),
        steps=settings.save_steps,
        keep=settings.keep,
        mirror=run.mirror,
    )


def take_snapshot(trainer: Any, folder: Path, memory: Remembers, settings: Mapping[str, Any]) -> Snapshot | None:
    """None between two optimizer steps on the same rollouts: those are not kept."""
    args = trainer.args
    replies = getattr(args, "steps_per_generation", None)
    if replies and trainer._step % (replies * args.num_iterations):
        return None
    losses, random_states = zip(*ranks.gather((trainer._tr_loss.item(), get_random())), strict=True)
    progress = {
        "settings": settings,
        "sums": {name: getattr(trainer, name) for name in SUMS if hasattr(trainer, name)},
        "loss": losses,
        "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
        "lengths": {name: file.stat().st_size if (file := folder / name).exists() else 0 for name in RECORDS},
    }
    state = {field.name: getattr(trainer.state, field.name) for field in fields(trainer.state)}
    state["log_history"] = list(state["log_history"])
    return Snapshot(state, trainer.lr_scheduler.state_dict(), list(random_states), progress, memory.remember())


def write_checkpoint(folder: Path, trainer: Any, snapshot: Snapshot) -> Path:
    """Write the folder of one step, whole or not at all."""
    import torch
    from safetensors.torch import save_file

    draft, made = folder / DRAFT, folder / f"step-{snapshot.trainer_state['global_step']:06d}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    trained = {n: p.detach().contiguous() for n, p in trainer.model.named_parameters() if p.requires_grad}
    save_file(trained, draft / "weights.safetensors")
    scaler = trainer.accelerator.scaler
    state = {
        "optimizer": trainer.optimizer.state_dict(),
        "learning_rate": snapshot.learning_rate,
        "scaler": scaler and scaler.state_dict(),
        "random": snapshot.random,
    }
    torch.save(state, draft / "state.pt")
    progress = {**snapshot.progress, "memory": snapshot.memory()}
    for name, value in (("trainer_state", snapshot.trainer_state), ("progress", progress)):
        write_text(draft / f"{name}.json", json.dumps(value))  # replies as they are
    files = sorted(draft.iterdir())
    write_json(draft / "manifest.json", {file.name: hash_files([file]) for file in files})
    for file in [*draft.iterdir(), draft]:
        flush(file)
    shutil.rmtree(made, ignore_errors=True)
    draft.rename(made)
    flush(folder)
    return made


def read_state(folder: Path) -> dict[str, Any]:
    import torch

    try:
        state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RunFolderError(f"{folder / 'state.pt'}: {first_line(error)[:100]}; remove {folder}") from None
    return state


def get_random() -> dict[str, Any]:
    """The state of every random source."""
    import numpy
    import torch

    kind, keys, *rest = cast("tuple[Any, ...]", numpy.random.get_state())
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []  # of this process's GPU
    numbers = [kind, keys.tolist(), *map(float, rest)]
    return {"python": random.getstate(), "numpy": numbers, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random(state: dict[str, Any]) -> None:
    import numpy
    import torch

    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, place, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), int(place), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
