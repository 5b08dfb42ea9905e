"""The processes of a distributed launch (`accelerate launch -m qreason run …`): the first writes, all train."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from qreason.errors import QReasonError, StoppedElsewhere

T = TypeVar("T")
PATIENCE = timedelta(days=30)
"""How long a process waits for the others: the first may measure or merge for hours. A launcher ends those that wait
for one that is gone."""
GONE = re.compile(r"Connection (closed|reset|refused)|gloo|NCCL|Broken pipe|TCPStore", re.IGNORECASE)
"""In torch's errors where another process has ended."""


def number() -> int:
    """Of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """Of all processes of the launch; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def gpu() -> int:
    """The number of this process's GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this process writes the run folder and speaks to the terminal."""
    return number() == 0


def connect() -> None:
    """Let the processes of the launch find each other, each on its own GPU where there are."""
    if count() == 1:
        return
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(gpu())
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)


def disconnect() -> None:
    """After the last step."""
    if count() > 1:
        from torch.distributed import destroy_process_group

        destroy_process_group()


def from_first(work: Callable[[], T]) -> T:
    """What `work` returns on the first process, on all of them; StoppedElsewhere where it fails there."""
    if count() == 1:
        return work()
    from torch.distributed import broadcast_object_list

    answer: list[Any] = [None, None]
    """The result, and the exit code of an error."""
    failed: Exception | None = None
    if is_first():
        try:
            answer[0] = work()
        except Exception as error:
            failed, answer[1] = error, error.exit_code if isinstance(error, QReasonError) else 1
    broadcast_object_list(answer)
    if failed:
        raise failed
    if answer[1] is not None:
        raise StoppedElsewhere("process 0 of this launch stopped, and says why", answer[1])
    result: T = answer[0]
    return result


def gather(value: T) -> list[T]:
    """The values of all processes, in their order, on each of them."""
    if count() == 1:
        return [value]
    from torch.distributed import all_gather_object

    values: list[Any] = [None] * count()
    all_gather_object(values, value)
    return values


def is_alone(error: BaseException) -> bool:
    """Whether an error says that another process of the launch has ended."""
    return count() > 1 and isinstance(error, RuntimeError) and bool(GONE.search(str(error)))
