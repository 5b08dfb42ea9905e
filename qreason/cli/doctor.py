"""Whether this machine can train, with what, and what to do where it cannot."""

from __future__ import annotations

import logging
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qreason.errors import kind_and_line
from qreason.machine.hardware import COMPILER, GIB, Hardware, compiler_trouble, detect, free_bytes
from qreason.model.backends import choose
from qreason.model.compat.bitsandbytes import four_bit_trouble
from qreason.model.compat.noise import CUDA, is_news, without
from qreason.model.compat.trl_logprobs import check_kernel

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

TESTED = {
    "torch": "2.13.0",
    "transformers": "5.17.0",
    "trl": "1.14.2",
    "peft": "0.21.2",
    "datasets": "4.8.5",
    "bitsandbytes": "0.50.2",
    "accelerate": "1.15.0",
    "unsloth": "2026.10.9",
}
"""The version set of the tests and of constraints/*.txt."""
OPTIONAL = {"unsloth"}
CUDA_BUILDS = {580: "cu130", 525: "cu126"}
"""Builds of the tested torch by the oldest NVIDIA driver they run on (NVIDIA, CUDA minor version compatibility)."""
AUTOCAST = {"none": "no autocast", "bfloat16": "bfloat16 autocast", "float16": "float16 autocast and GradScaler"}
LEAST_DISK = 1 * GIB
LEAST_CACHE = 4 * GIB
"""Qwen2.5-1.5B in 16 bits takes 3 GiB."""
LEAST_GPU_MEMORY = 1 * GIB


@dataclass(frozen=True)
class Finding:
    """`ok` is None for information; `cure` is a command, an action, or one line of each."""

    what: str
    value: str
    ok: bool | None
    cure: str = ""


@dataclass(frozen=True)
class Card:
    """A GPU as its driver reports it, whatever torch finds."""

    name: str
    driver: str

    @property
    def driver_major(self) -> int:
        digits = re.match(r"\d+", self.driver)
        return int(digits[0]) if digits else 0


def examine() -> list[Finding]:
    """Examine this machine. Imports torch, TRL and bitsandbytes; opens no connection and writes nothing."""
    card = nvidia_smi()
    build = torch_build(card)
    findings = [Finding("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}", True)]
    findings += [library(name, build) for name in TESTED]
    logging.getLogger("bitsandbytes.cextension").addFilter(is_news)
    with without(*CUDA):
        findings += computing(card)
    return [*findings, *disks(), hub_login(), machine()]


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether training can work here."""
    return not any(finding.ok is False for finding in findings)


def library(name: str, build: str) -> Finding:
    """Whether a library is installed, within qreason's bounds, and in the tested version."""
    from packaging.version import Version

    cure = install_torch(build) if name == "torch" else f"pip install {name}=={TESTED[name]}"
    if (found := installed(name)) is None:
        optional = Finding(name, "not installed, optional", None)
        return optional if name in OPTIONAL else Finding(name, "not installed", False, cure)
    if not (allowed := bounds(name)).contains(found, prereleases=True):
        return Finding(name, f"{found}, but qreason needs {allowed}", False, cure)
    if Version(found).public == TESTED[name]:
        return Finding(name, f"{found}, as tested", True)
    # Replacing torch breaks what was built for it, such as Colab's torchvision.
    return Finding(name, f"{found}; tested with {TESTED[name]}", None, "" if name == "torch" else cure)


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def bounds(name: str) -> SpecifierSet:
    """The versions of a library that qreason requires; any version where it requires none."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    own = map(Requirement, (requires("qreason") if installed("qreason") else None) or ())
    return next((requirement.specifier for requirement in own if requirement.name == name), SpecifierSet())


def torch_build(card: Card | None) -> str:
    """The PyTorch index with the tested torch for this machine: cpu, cu126 or cu130."""
    driver = card.driver_major if card else 0
    return next((build for oldest, build in CUDA_BUILDS.items() if driver >= oldest), "cpu")


def install_torch(build: str) -> str:
    """With the local version, or pip would keep another build of it; and with what is built for one torch alone."""
    others = "".join(f" {name}" for name in ("torchvision", "torchaudio") if installed(name))
    command = f"pip install torch=={TESTED['torch']}"
    if platform.system() == "Darwin":
        return command + others
    return f"{command}+{build}{others} -i https://download.pytorch.org/whl/{build}"


def nvidia_smi() -> Card | None:
    """The first NVIDIA GPU that the driver's tool lists."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    name, _, driver = done.stdout.decode(errors="replace").partition("\n")[0].partition(", ")
    return Card(name, driver) if driver else None


def computing(card: Card | None) -> list[Finding]:
    """torch's build, the GPU, the trainers, 4-bit weights, and what a run will use, as far as they are installed."""
    if installed("torch") is None:
        return []
    try:
        import torch

        hardware = detect()
    except Exception as error:
        return [Finding("torch starts", kind_and_line(error), False, install_torch(torch_build(card)))]
    findings = gpu(torch, card) if hardware.device == "cuda" else [no_gpu(torch, card)]
    sound = healthy(findings)
    findings += [trainers()] if installed("trl") else []
    findings += [four_bit(hardware.device)] if installed("bitsandbytes") and sound else []
    findings += [kernels()] if hardware.device == "cuda" and sound else []
    return findings + plan(hardware, torch.cuda.get_device_capability() if hardware.device == "cuda" else None)


def no_gpu(torch: Any, card: Card | None) -> Finding:
    """Why torch computes on the CPU; a failure only where there is a GPU whose CUDA does not start."""
    build = torch.version.cuda
    name = f"for CUDA {build}" if build else "for CPUs"
    if card is None:
        return Finding("torch build", f"{name}; no NVIDIA GPU here", None if build else True)
    if not build:
        return Finding("torch build", f"{name}, and there is a {card.name}", None, install_torch(torch_build(card)))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return Finding("torch build", f"{name}; CUDA_VISIBLE_DEVICES hides it", None, "unset CUDA_VISIBLE_DEVICES")
    value = f"{name}, but cannot use the {card.name}"
    needed = next((oldest for oldest, known in CUDA_BUILDS.items() if known[2:4] == build.partition(".")[0]), 0)
    if card.driver_major < needed:
        cure = f"Update the NVIDIA driver from {card.driver} to {needed} or newer."
        if (older := torch_build(card)) != "cpu":
            cure += f" Or take torch for this driver:\n{install_torch(older)}"
        return Finding("torch build", value, False, cure)
    cure = "Restart the machine if its driver was updated; start a container with --gpus all. The reason:"
    return Finding("torch build", value, False, f"{cure}\npython -c 'import torch; torch.cuda.init()'")


def gpu(torch: Any, card: Card | None) -> list[Finding]:
    """torch's build, the GPU in use, whether the build has code for it, and its memory."""
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else f"for ROCm {torch.version.hip}"
    findings = [Finding("torch build", f"{build}, driver {card.driver}" if card else build, True)]
    capability = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}"
    if torch.version.cuda and not has_code(torch.cuda.get_arch_list(), capability):
        cure = install_torch("cu126" if capability < (7, 5) else "cu130")
        return [*findings, Finding("GPU", f"{name}: this torch has no code for it", False, cure)]
    findings.append(Finding("GPU", name, True))
    if (count := torch.cuda.device_count()) > 1:
        findings.append(Finding("GPUs", f"{count}, of which one is used", None, "export CUDA_VISIBLE_DEVICES=0"))
    cure = "nvidia-smi   # lists what holds its memory; end what you do not need"
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError as error:
        return [*findings, Finding("GPU memory", kind_and_line(error), False, cure)]
    enough, amount = free >= LEAST_GPU_MEMORY, f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    return [*findings, Finding("GPU memory", amount, enough, "" if enough else cure)]


def has_code(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a build runs on a card: binary code of the same major version, or PTX (compute_…), no newer than it."""
    known = [match for name in architectures if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)", name))]
    builds = [(match[1], (int(match[2]), int(match[3]))) for match in known]
    return not builds or any(
        own <= capability and (kind == "compute" or own[0] == capability[0]) for kind, own in builds
    )


def trainers() -> Finding:
    """Whether the installed versions work together."""
    try:
        from trl import GRPOTrainer, SFTTrainer  # noqa: F401
    except Exception as error:
        cure = "pip install " + " ".join(f"{name}=={TESTED[name]}" for name in ("trl", "transformers", "peft"))
        return Finding("trainers", f"TRL cannot be imported: {kind_and_line(error)}", False, cure)
    return Finding("trainers", "TRL and what it needs can be imported", True)


def four_bit(device: str) -> Finding:
    """Whether 4-bit weights work on a device."""
    if (trouble := four_bit_trouble(device)) is None:
        return Finding("4-bit weights", f"bitsandbytes works on the {device}", True)
    reinstall = f"pip install --force-reinstall --no-deps bitsandbytes=={TESTED['bitsandbytes']}"
    return Finding("4-bit weights", trouble, False, f"{reinstall}\npython -m bitsandbytes   # prints details")


def kernels() -> Finding:
    """Whether Triton's kernels work, TRL's and Unsloth's; a run without them is slower and needs more memory."""
    if trouble := compiler_trouble():
        return Finding("fused kernels", f"{trouble}; runs go without them", None, COMPILER)
    try:
        trouble = check_kernel("cuda")
    except ImportError:  # of TRL, which has a finding of its own
        return Finding("fused kernels", "can be compiled", True)
    return Finding(
        "fused kernels", f"{trouble}; runs go without TRL's" if trouble else "work", None if trouble else True
    )


def plan(hardware: Hardware, capability: tuple[int, int] | None) -> list[Finding]:
    """Number formats, attention and backend of a run on this machine, with the reasons."""
    steps = AUTOCAST[hardware.autocast]
    if capability is None:
        why = "no GPU"
        steps += "" if hardware.autocast == "none" else ": this processor has instructions for it"
    else:
        side = "8.0 or newer" if capability >= (8, 0) else "below 8.0"
        why = f"compute capability {capability[0]}.{capability[1]} is {side}"
    used = {
        "device": f"{hardware.device}: {hardware.name}".rstrip(": "),
        "weights": f"{hardware.dtype}: {why}",
        "adapters": "float32: 16 bits lose small updates",
        "nf4 computes in": f"{hardware.dtype}, as the weights",
        "training steps": steps,
        "attention": f"{hardware.attention}: part of PyTorch, runs on every device",
    }
    choice = choose("auto", capability)
    backend = Finding("backend", f"{choice.name}: {choice.why}", None, choice.cure)
    return [*(Finding(what, value, None) for what, value in used.items()), backend]


def disks() -> list[Finding]:
    """Free space for runs here, and for downloaded models in the Hub's cache."""
    free = free_bytes(Path.cwd())
    cure = "" if free >= LEAST_DISK else "Free 1 GiB here, or cd to a folder on another disk."
    here = Finding("disk here", f"{free / GIB:.1f} GiB free", not cure, cure)
    if installed("huggingface_hub") is None:
        return [here]
    from huggingface_hub.constants import HF_HUB_CACHE

    free = free_bytes(Path(HF_HUB_CACHE))
    cure = "" if free >= LEAST_CACHE else "export HF_HOME=/a/folder/with/room   # a 1.5B model takes 3 GiB"
    return [here, Finding("Hub cache", f"{free / GIB:.1f} GiB free", None if cure else True, cure)]


def hub_login() -> Finding:
    """Whether there is a token. Not by get_token(), which may renew one over the network."""
    if installed("huggingface_hub") is None:
        return Finding("Hub login", "huggingface_hub is missing", None)
    from huggingface_hub.constants import HF_TOKEN_PATH

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return Finding("Hub login", f"a token in {name}", None)
    with suppress(OSError, ValueError):
        if Path(HF_TOKEN_PATH).read_text(encoding="utf-8").strip():
            return Finding("Hub login", "a saved token", None)
    return Finding("Hub login", "no token", None, "hf auth login   # needed only for gated models and for pushing")


def machine() -> Finding:
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    memory = f", {size / GIB:.1f} GiB of memory" if size else ""
    return Finding("processor", f"{os.cpu_count() or 1} cores{memory}", None)


def findings_table(findings: Sequence[Finding]) -> Group:
    """All findings, then the cures, failures first; 80 columns wide."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    marks = {True: Text("ok", "green"), False: Text("FAIL", "red"), None: Text("–", "dim")}
    for finding in findings:
        mark = Text("note", "yellow") if finding.ok is None and finding.cure else marks[finding.ok]
        table.add_row(mark, finding.what, Text(finding.value))
    lines: list[Table | Text] = [table]
    for finding in sorted(findings, key=lambda finding: finding.ok is not False):
        if finding.cure:
            style = "red" if finding.ok is False else "yellow"
            lines.append(Text.assemble(("\n" + finding.what, style), "\n  " + finding.cure.replace("\n", "\n  ")))
    failures = sum(finding.ok is False for finding in findings)
    closing = f"Training cannot work here yet: {failures} to cure." if failures else "This machine can train."
    return Group(*lines, Text(f"\n{closing}", "red" if failures else "green"))
