"""Code that is not ours (a reward of one's own, a chat template): with a time limit, and where in it it was."""

from __future__ import annotations

import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LIBRARIES = (str(Path(__file__).parents[1]), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))


class TimedOut(Exception):  # noqa: N818
    """Work that did not end in time; `place` is where it was."""

    def __init__(self, seconds: float, place: str) -> None:
        super().__init__(f"did not end within {seconds:g} seconds; it was at {place}")
        self.place = place


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of work, or what it raised; TimedOut where it takes longer.

    It runs in a thread, which goes on until the process ends: nothing else interrupts a call into C.
    """
    outcome: dict[str, Any] = {}

    def record() -> None:
        try:
            outcome["result"] = work()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=record, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        frame = sys._current_frames().get(thread.ident or 0)
        raise TimedOut(seconds, innermost(traceback.extract_stack(frame)))
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def place_of(error: BaseException) -> str:
    """`file:line` in the user's own code that raised an error, or where that code does not parse."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    return innermost(traceback.extract_tb(error.__traceback__))


def innermost(frames: Sequence[traceback.FrameSummary]) -> str:
    """The innermost frame that is neither ours nor a library's, or else the innermost one."""
    own = [frame for frame in frames if not frame.filename.startswith((*LIBRARIES, "<"))]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"
