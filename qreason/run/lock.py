"""One process at a time writes into a run folder."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qreason.errors import RunFolderError
from qreason.machine.files import read_json, write_json
from qreason.machine.records import Holder

LOCK, HOLDER = ".lock", ".holder.json"


def hold(folder: Path, wait: float = 0.0) -> FileLock | None:
    """The lock on a run folder, until it is released or this process ends, however it ends; waits for seconds.

    Raises RunFolderError that names the holder. None where the file system knows no locks (some network drives).
    """
    lock = FileLock(folder / LOCK, is_singleton=True)  # a process may open its own run again
    try:
        lock.acquire(timeout=wait, blocking=wait > 0)
    except Timeout:
        raise RunFolderError(
            f"{folder} is in use by another qreason ({describe(folder)}): wait for it or stop it, or take another "
            "folder with --out"
        ) from None
    except NotImplementedError:
        return None
    return lock


def sign(folder: Path) -> None:
    """Write down who holds the lock."""
    write_json(folder / HOLDER, {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")})


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within it, no other process works in a folder, which is made; RunFolderError that names the one that does."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = hold(folder)
    try:
        sign(folder)
        yield
    finally:
        for name in (HOLDER, LOCK):
            with suppress(OSError):  # Windows keeps a file that is open
                (folder / name).unlink(missing_ok=True)
        if lock:
            lock.release(force=True)


def is_held(folder: Path) -> bool:
    """Whether another process works in a run folder."""
    lock = FileLock(folder / LOCK, is_singleton=True)
    if lock.is_locked or not (folder / LOCK).exists():
        return False
    try:
        with lock.acquire(blocking=False):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # a folder that may not be written to
        return False


def describe(folder: Path) -> str:
    """Who holds the lock, as far as it is known: the holder may be about to say so."""
    try:
        holder: dict[str, Any] = read_json(folder / HOLDER, Holder)
        return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except RunFolderError:
        return "it has just started"


def is_empty(folder: Path) -> bool:
    """Whether there is nothing in a folder but its lock."""
    return not {path.name for path in folder.iterdir()} - {LOCK, HOLDER}
