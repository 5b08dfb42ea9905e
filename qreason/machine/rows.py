"""Work on many rows, in halves when a GPU's memory runs out."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from qreason.errors import OutOfMemoryError

T = TypeVar("T")
OUT_OF_MEMORY = re.compile(
    r"out of memory|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation|CU\w+_STATUS_ALLOC_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED",
    re.IGNORECASE,
)
"""Of torch's allocator, the driver (Triton's launches, torch.AcceleratorError), cuBLAS and cuDNN, which need memory of
their own; cuBLAS that cannot get its first says that it is not initialized."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory ran out, by whichever library's error."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or bool(
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
    )


def free_memory() -> None:
    """Free GPU memory that nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def take_peak_memory() -> int | None:
    """The most bytes since the last call: that PyTorch has reserved on the GPU, or on a CPU that the process had.

    None where the system does not count the latter (Linux does, proc(5)).
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return take_peak_of_process()
    peak: int = torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return peak


def take_peak_of_process() -> int | None:
    own = Path("/proc/self")
    try:
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", (own / "status").read_text(), re.M)
        (own / "clear_refs").write_text("5")  # the peak is counted anew
    except OSError:
        return None
    return int(peak[1]) * 1024 if peak else None


class Rows:
    """How many rows are computed at a time; halved permanently when memory runs out, reported once."""

    def __init__(self, most: int, what: str, say: Callable[[str], None]) -> None:
        self.most, self.what, self.say = most, what, say
        self.halved = False

    def attempt(self, work: Callable[[], T], rows: int) -> T | None:
        """The result of work on `rows` rows; None where memory ran out and fewer should be tried.

        Raises OutOfMemoryError where it was one row.
        """
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if rows <= 1:
                raise OutOfMemoryError(f"the GPU has not enough memory for one row of {self.what}") from None
        self.most = rows // 2
        if not self.halved:
            self.say(f"out of GPU memory with {rows} rows of {self.what}: continuing with fewer at a time")
        self.halved = True
        free_memory()
        return None
