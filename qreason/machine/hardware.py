"""What this machine can do: device, number formats, attention, free disk space; process-wide settings."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

GIB = 2**30
COMPILER = "apt install build-essential python3-dev   # a C compiler and Python's headers"
"""The cure of `compiler_trouble`."""


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


@cache
def compiler_trouble() -> str | None:
    """Why Triton's kernels cannot be compiled here; None where they can.

    Read in Triton 3.7.1 (runtime/build.py, backends/nvidia/driver.c): before its first kernel it compiles a C file with
    Python.h, by CC, else gcc, else clang.
    """
    compiler = os.environ.get("CC", shutil.which("gcc") or shutil.which("clang"))
    if compiler is None:
        return "there is no C compiler (gcc or clang)"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's name for what pip installs
    include = sysconfig.get_paths(scheme=scheme)["include"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.c")
        source.write_text("#include <Python.h>\n")
        command = [compiler, str(source), "-shared", "-fPIC", f"-I{include}", "-o", str(source.with_suffix(".so"))]
        try:
            done = subprocess.run(command, capture_output=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            return f"the C compiler {compiler} does not run ({error})"
    if not done.returncode:
        return None
    lines = done.stderr.decode(errors="replace").splitlines()
    return next((line.strip()[-160:] for line in lines if "error" in line), f"the C compiler {compiler} fails")


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that may not exist yet."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def usable_memory() -> int:
    """Bytes that this process has or can still get: of the machine, or within a container's limit (cgroup v2)."""
    import psutil

    own: int = psutil.Process().memory_info().rss
    available: int = psutil.virtual_memory().available
    limits = Path("/sys/fs/cgroup")
    try:
        most = int((limits / "memory.max").read_text())
        cached = re.search(r"^inactive_file (\d+)$", (limits / "memory.stat").read_text(), re.M)
        used = int((limits / "memory.current").read_text()) - int(cached[1] if cached else 0)
    except (OSError, ValueError):  # no such file, or `max`
        return own + available
    return own + max(0, min(available, most - used))


def collect_less() -> None:
    """Collect garbage less often, and not at exit: the libraries create many objects that live until then.

    Importing them takes a quarter less time, and the process ends 1.5 seconds sooner.
    """
    gc.set_threshold(10_000, 20, 20)
    atexit.register(gc.freeze)


def has_growing_segments() -> bool:
    """Whether CUDA's memory can be mapped in pieces: not on Windows, WSL (unslothai/unsloth#3511) and Tegra boards."""
    plain_linux = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    return plain_linux and platform.machine() == "x86_64"


def choose_gpu() -> str | None:
    """Leave one GPU visible to this process, and say so where its environment names several.

    With several, transformers' Trainer splits each batch over all of them, and multiplies it by their number. Processes
    of a distributed launch, which have a LOCAL_RANK, choose by themselves.
    """
    if "LOCAL_RANK" in os.environ:
        return None
    named = os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0").split(",")
    if len(named) == 1:
        return None
    os.environ["CUDA_VISIBLE_DEVICES"] = named[0]
    return f"CUDA_VISIBLE_DEVICES names {len(named)} GPUs; one process uses one of them: {named[0]}"


def prepare_process() -> str | None:
    """Process-wide settings; those in the environment must be set before torch is imported. Returns a line to print."""
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
    if has_growing_segments() and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Batches of ever other lengths leave gaps in segments of a fixed size that no later tensor fits into.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return choose_gpu()
