"""What this machine can do: device, number formats, attention, free disk space; process-wide settings."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import platform
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """`dtype` holds the frozen base, `autocast` is the number format of training steps."""

    device: Literal["cuda", "cpu"]
    name: str
    dtype: Literal["float32", "float16", "bfloat16"]
    autocast: Literal["none", "float16", "bfloat16"]
    attention: str
    cores: int


def detect() -> Hardware:
    """Examine the machine.

    bfloat16 is used on GPUs from compute capability 8.0 (older ones only emulate it, and get float16), and for
    the training steps on CPUs with AVX512-BF16 or AMX, where it is twice as fast as float32.
    """
    import torch

    cores = os.cpu_count() or 1
    if torch.cuda.is_available():
        native = torch.cuda.get_device_capability() >= (8, 0)
        number: Literal["float16", "bfloat16"] = "bfloat16" if native else "float16"
        return Hardware("cuda", torch.cuda.get_device_name(), number, number, "sdpa", cores)
    name = platform.processor() or platform.machine()
    return Hardware("cpu", name, "float32", "bfloat16" if fast_bfloat16() else "none", "sdpa", cores)


def fast_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16. torch has no public function for it."""
    import torch

    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.cpu._is_avx512_bf16_supported()
    except (AttributeError, RuntimeError):  # a build without oneDNN, as for macOS
        return False


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that may not exist yet."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def collect_less() -> None:
    """Collect garbage less often, and not at exit: the libraries create many objects that live until then.

    Importing them takes a quarter less time, and the process ends 1.5 seconds sooner.
    """
    gc.set_threshold(10_000, 20, 20)
    atexit.register(gc.freeze)


def prepare_process() -> None:
    """Process-wide settings; those in the environment must be set before torch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # it keeps code for each shape; 1024 take gigabytes
    # How often an idle thread polls for work before it sleeps. Most work arrives within that time, and waking up takes
    # a sixth of a run. Next to another process polling costs: rollouts of 1.0 s take 2.0 s with 2000, 2.8 with 4000,
    # 3.4 with 6000 and 7 with 20000.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        # The C library keeps freed memory: requesting it again for each tensor takes a tenth of a step on a CPU.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
    collect_less()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU: with more, the trainers would wrap the model
