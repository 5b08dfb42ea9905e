"""qreason doctor: what it says about this machine, and about machines that are faked through torch.cuda."""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console

from qreason.cli import doctor
from qreason.cli.doctor import TESTED, Card, Finding, examine, findings_table, healthy
from qreason.machine.hardware import free_bytes
from qreason.model import backends

ROOT = Path(__file__).parents[1]
CONSTRAINTS = [file for file in sorted((ROOT / "constraints").glob("*.txt")) if file.stem not in ("oldest", "colab")]
TOKEN = "hf_thisMustNeverBeShown"
T4 = Card("Tesla T4", "580.95.05")
TORCH_2_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.fixture(autouse=True)
def own_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No GPU of the machine under test, and a Hub login that is the test's own; returns the token's file."""
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: None)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path / "token"


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine whose torch sees a GPU of the given capability; its 4-bit kernels cannot run here and pass."""
    import bitsandbytes  # noqa: F401  before CUDA is faked
    import torch
    import trl

    assert trl.GRPOTrainer

    def fake(capability: tuple[int, int], *, card: Card = T4, free: int = 14 * 2**30, count: int = 1) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        for name, value in {
            "is_available": True,
            "get_device_capability": capability,
            "get_device_name": card.name,
            "get_arch_list": TORCH_2_13,
            "mem_get_info": (free, 15 * 2**30),
            "device_count": count,
            "is_bf16_supported": True,  # what torch says of a T4, by emulation
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *args, value=value, **options: value)
        monkeypatch.setattr(doctor, "nvidia_smi", lambda: card)
        monkeypatch.setattr(doctor, "four_bit_trouble", lambda device: None)
        for place in (doctor, backends):
            monkeypatch.setattr(place, "compiler_trouble", lambda: None)

    return fake


def fake_versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Other installed versions; None for a library that is not there."""
    real = doctor.version

    def version(name: str) -> str:
        found = versions[name] if name in versions else real(name)
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(doctor, "version", version)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    named = {finding.what: finding for finding in findings}
    assert len(named) == len(findings), "two findings of one name"
    return named


def everything(findings: list[Finding]) -> str:
    return "\n".join(f"{finding.what} {finding.value} {finding.cure}" for finding in findings)


def rendered(findings: list[Finding]) -> str:
    stream = io.StringIO()
    Console(width=80, file=stream).print(findings_table(findings))
    return stream.getvalue()


# --- this machine --------------------------------------------------------------------------


def test_this_machine_can_train() -> None:
    import torch

    from qreason.machine.hardware import detect

    findings = by_name(examine())
    assert healthy(list(findings.values()))
    assert set(TESTED) <= findings.keys()
    assert findings["torch"].value.startswith(torch.__version__.partition("+")[0])
    assert findings["4-bit weights"].ok
    assert findings["trainers"].ok
    assert findings["weights"].value.startswith(detect().dtype)
    assert str(os.cpu_count()) in findings["processor"].value
    assert findings["disk here"].ok


def test_looking_opens_no_connection(monkeypatch: pytest.MonkeyPatch, own_login: Path) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("connects")

    own_login.write_text(TOKEN)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert healthy(examine())


def test_looking_writes_nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    examine()
    assert list(here.iterdir()) == []


# --- GPUs ----------------------------------------------------------------------------------


def test_t4_gets_float16_and_no_bfloat16_anywhere(fake_gpu: Callable[..., None]) -> None:
    fake_gpu((7, 5))
    findings = examine()
    told = by_name(findings)
    assert told["weights"].value == "float16: compute capability 7.5 is below 8.0"
    assert told["nf4 computes in"].value.startswith("float16")
    assert "float16 autocast and GradScaler" in told["training steps"].value
    assert told["adapters"].value.startswith("float32")
    assert told["attention"].value.startswith("sdpa")
    assert told["GPU"] == Finding("GPU", "Tesla T4, compute capability 7.5", True)
    assert told["torch build"].value == "for CUDA 13.0, driver 580.95.05"
    assert told["GPU memory"].value == "14.0 of 15.0 GiB free"
    assert not re.search("bf16|bfloat16", everything(findings), re.IGNORECASE)
    assert healthy(findings)


def test_ampere_gets_bfloat16_without_a_scaler(fake_gpu: Callable[..., None]) -> None:
    fake_gpu((8, 6), card=Card("NVIDIA GeForce RTX 3060", "580.95.05"))
    findings = examine()
    told = by_name(findings)
    assert told["weights"].value == "bfloat16: compute capability 8.6 is 8.0 or newer"
    assert told["nf4 computes in"].value.startswith("bfloat16")
    assert told["training steps"].value == "bfloat16 autocast"
    assert "GradScaler" not in everything(findings)
    assert healthy(findings)


@pytest.mark.parametrize(
    ("capability", "unsloth", "start"),
    [((7, 5), TESTED["unsloth"], "unsloth"), ((7, 5), None, "plain"), ((6, 1), TESTED["unsloth"], "plain")],
)
def test_backend_is_unsloth_where_it_is_installed_and_the_card_runs_it(
    fake_gpu: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    unsloth: str | None,
    start: str,
) -> None:
    fake_gpu(capability)
    monkeypatch.setattr("qreason.model.backends.find_spec", lambda name: unsloth)
    assert by_name(examine())["backend"].value.startswith(start)


def test_full_gpu_memory_is_a_failure(fake_gpu: Callable[..., None]) -> None:
    fake_gpu((7, 5), free=300 * 2**20)
    findings = examine()
    assert not healthy(findings)
    assert by_name(findings)["GPU memory"].cure.startswith("nvidia-smi")


def test_second_gpu_is_pointed_out(fake_gpu: Callable[..., None]) -> None:
    fake_gpu((7, 5), count=2)
    findings = examine()
    assert by_name(findings)["GPUs"].cure == "export CUDA_VISIBLE_DEVICES=0"
    assert healthy(findings)


def test_missing_compiler_is_pointed_out_and_training_goes_without(
    fake_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu((7, 5))
    assert by_name(examine())["fused kernels"].ok
    for place in (doctor, backends):
        monkeypatch.setattr(place, "compiler_trouble", lambda: "fatal error: Python.h: No such file or directory")
    monkeypatch.setattr(backends, "find_spec", lambda name: name)
    findings = examine()
    told = by_name(findings)
    assert told["fused kernels"].ok is None
    assert "Python.h" in told["fused kernels"].value
    assert told["fused kernels"].cure.startswith("apt install build-essential python3-dev")
    assert told["backend"].value.startswith("plain: Unsloth's kernels cannot be compiled")
    assert healthy(findings)


def test_card_without_code_in_this_torch_is_a_failure(fake_gpu: Callable[..., None]) -> None:
    fake_gpu((6, 0), card=Card("Tesla P100-PCIE-16GB", "580.95.05"))
    findings = examine()
    told = by_name(findings)
    assert told["GPU"].ok is False
    assert "+cu126 -i https://download.pytorch.org/whl/cu126" in told["GPU"].cure
    assert "4-bit weights" not in told, "would fail for the same reason, with another cure"


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 5), True), ((8, 9), True), ((9, 0), True), ((12, 1), True), ((7, 0), False), ((11, 0), False)],
)
def test_code_runs_on_cards_of_the_same_major_version(capability: tuple[int, int], runs: bool) -> None:
    assert doctor.has_code(TORCH_2_13, capability) is runs


def test_ptx_runs_on_every_newer_card() -> None:
    assert doctor.has_code(["sm_80", "compute_90"], (12, 0))
    assert not doctor.has_code(["sm_80", "compute_90"], (7, 5))


@pytest.mark.parametrize(
    ("driver", "cure"),
    [
        ("550.54.15", "pip install torch==2.13.0+cu126 -i https://download.pytorch.org/whl/cu126"),
        ("470.82.01", "Update the NVIDIA driver from 470.82.01 to 580 or newer."),
        ("580.95.05", "python -c 'import torch; torch.cuda.init()'"),
    ],
)
def test_cuda_build_that_cannot_use_its_gpu_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, driver: str, cure: str
) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: Card("Tesla T4", driver))
    findings = examine()
    assert not healthy(findings)
    build = by_name(findings)["torch build"]
    assert build.ok is False
    assert build.value == "for CUDA 13.0, but cannot use the Tesla T4"
    assert cure in build.cure.splitlines()


def test_hidden_gpu_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: T4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    build = by_name(examine())["torch build"]
    assert build.ok is None
    assert build.cure == "unset CUDA_VISIBLE_DEVICES"


def test_cpu_build_beside_a_gpu_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: T4)
    findings = examine()
    assert by_name(findings)["torch build"].cure.startswith("pip install torch==2.13.0+cu130 -i ")
    assert healthy(findings)


def test_driver_and_name_are_read_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    two = SimpleNamespace(stdout=b"NVIDIA GeForce RTX 3060, 580.95.05\nTesla T4, 580.95.05\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: two)
    assert doctor.nvidia_smi() == Card("NVIDIA GeForce RTX 3060", "580.95.05")


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.CalledProcessError(9, "nvidia-smi")])
def test_no_nvidia_smi_is_no_card(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "run", fail)
    assert doctor.nvidia_smi() is None


# --- libraries -----------------------------------------------------------------------------


def test_missing_bitsandbytes_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_versions(monkeypatch, bitsandbytes=None)
    findings = examine()
    assert not healthy(findings)
    assert by_name(findings)["bitsandbytes"] == Finding(
        "bitsandbytes", "not installed", False, f"pip install bitsandbytes=={TESTED['bitsandbytes']}"
    )


def test_bitsandbytes_that_cannot_be_imported_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", None)
    findings = examine()
    assert not healthy(findings)
    assert "bitsandbytes fails: " in by_name(findings)["4-bit weights"].value
    assert "pip install --force-reinstall" in by_name(findings)["4-bit weights"].cure


def test_bitsandbytes_without_its_cuda_library_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, fake_gpu: Callable[..., None]
) -> None:
    real = doctor.four_bit_trouble
    fake_gpu((8, 6))
    monkeypatch.setattr(doctor, "four_bit_trouble", real)  # the library of this CPU machine is no CUDA library
    findings = examine()
    assert not healthy(findings)
    assert by_name(findings)["4-bit weights"].value == "bitsandbytes did not load its library for CUDA 13.0"


def test_wrong_4_bit_values_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional

    real = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *args: -real(*args))
    assert "off by" in (doctor.four_bit_trouble("cpu") or "")


def test_missing_torch_is_told_once_with_the_build_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_versions(monkeypatch, torch=None)
    findings = examine()
    assert [finding.what for finding in findings if finding.ok is False] == ["torch"]
    assert by_name(findings)["torch"].cure.endswith("/whl/cpu")
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: T4)
    assert by_name(examine())["torch"].cure.endswith("/whl/cu130")


def test_versions_that_do_not_go_together_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    findings = examine()
    assert not healthy(findings)
    assert f"trl=={TESTED['trl']}" in by_name(findings)["trainers"].cure


def test_untested_version_within_the_bounds_is_information(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_versions(monkeypatch, peft="0.20.0", torch="2.12.1+cu130")
    findings = examine()
    told = by_name(findings)
    assert told["peft"] == Finding(
        "peft", f"0.20.0; tested with {TESTED['peft']}", None, f"pip install peft=={TESTED['peft']}"
    )
    assert told["torch"].ok is None
    assert healthy(findings)


def test_another_torch_within_the_bounds_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colab's, for which its torchvision was built; the cure used to replace it."""
    fake_versions(monkeypatch, torch="2.14.1+cu128")
    assert by_name(examine())["torch"] == Finding("torch", f"2.14.1+cu128; tested with {TESTED['torch']}", None)


def test_a_torch_that_must_go_takes_with_it_what_was_built_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_versions(monkeypatch, torch="2.7.1", torchvision="0.22.1", torchaudio=None)
    cure = by_name(examine())["torch"].cure
    assert cure == f"pip install torch=={TESTED['torch']}+cpu torchvision -i https://download.pytorch.org/whl/cpu"


@pytest.mark.parametrize("build", ["", "+cpu", "+cu126"])
def test_every_build_of_the_tested_torch_is_tested(monkeypatch: pytest.MonkeyPatch, build: str) -> None:
    fake_versions(monkeypatch, torch=TESTED["torch"] + build)
    assert doctor.library("torch", "cpu") == Finding("torch", f"{TESTED['torch']}{build}, as tested", True)


def test_version_outside_the_bounds_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_versions(monkeypatch, torch="2.7.1")
    findings = examine()
    assert not healthy(findings)
    needed = doctor.bounds("torch")
    assert not needed.contains("2.7.1")
    assert f"but qreason needs {needed}" in by_name(findings)["torch"].value


def test_unsloth_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_versions(monkeypatch, unsloth=None)
    findings = examine()
    assert by_name(findings)["unsloth"].ok is None
    assert healthy(findings)


# --- disk and login ------------------------------------------------------------------------


def test_under_one_gib_of_disk_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30 - 1))
    findings = examine()
    assert [finding.what for finding in findings if finding.ok is False] == ["disk here"]
    assert "HF_HOME" in by_name(findings)["Hub cache"].cure


def test_disk_of_a_cache_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") > 0


@pytest.mark.parametrize("where", ["HF_TOKEN", "file"])
def test_token_is_found_and_never_shown(where: str, monkeypatch: pytest.MonkeyPatch, own_login: Path) -> None:
    if where == "file":
        own_login.write_text(TOKEN + "\n")
    else:
        monkeypatch.setenv(where, TOKEN)
    findings = examine()
    assert "a " in by_name(findings)["Hub login"].value
    assert TOKEN not in repr(findings) + rendered(findings)


def test_no_token_is_information_with_its_cure() -> None:
    login = doctor.hub_login()
    assert login.ok is None
    assert login.cure.startswith("hf auth login")


# --- the table -----------------------------------------------------------------------------


def test_table_fits_80_columns_and_leaves_nothing_out() -> None:
    findings = [
        Finding("4-bit weights", "a reason that is long " * 8 + "and a_path_without_any_space/" * 6, False, "cure one"),
        Finding("torch build", "CUDA", None, f"Update it, or:\n{doctor.install_torch('cu126')}"),
        Finding("GPU", "Tesla T4", True),
    ]
    text = rendered(findings)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for finding in findings:
        assert re.sub(r"\s", "", finding.value) in re.sub(r"\s", "", text)
    assert "cure one" in text
    assert f"  {doctor.install_torch('cu126')}" in [line.rstrip() for line in text.splitlines()], (
        "a command is one line"
    )
    assert "Training cannot work here yet: 1 to cure." in text


def test_table_of_this_machine_fits_80_columns(fake_gpu: Callable[..., None]) -> None:
    for look in (lambda: None, lambda: fake_gpu((7, 5), card=Card("NVIDIA RTX 6000 Ada Generation Laptop", "580.9"))):
        look()
        text = rendered(examine())
        assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
        assert "This machine can train." in text


# --- constraints ---------------------------------------------------------------------------


def pins(file: Path) -> dict[str, str]:
    """Library -> pinned version."""
    lines = [line for line in file.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    found = [(canonicalize_name(name), pinned) for name, pinned in (line.split("==") for line in lines)]
    assert len(dict(found)) == len(found), "pinned twice"
    return dict(found)


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [Requirement(line) for line in (*project["dependencies"], *extras.get("unsloth", []))]


def test_there_is_a_set_for_each_generation() -> None:
    assert [file.name for file in CONSTRAINTS] == ["ampere-and-newer.txt", "cpu.txt", "turing.txt"]


@pytest.mark.parametrize("file", CONSTRAINTS, ids=lambda file: file.stem)
def test_constraints_are_the_tested_set(file: Path) -> None:
    gpu_only = {"unsloth"} if file.stem == "cpu" else set()
    assert {name: pins(file).get(name) for name in TESTED.keys() - gpu_only} == {
        name: tested for name, tested in TESTED.items() if name not in gpu_only
    }


@pytest.mark.parametrize("file", CONSTRAINTS, ids=lambda file: file.stem)
def test_constraints_pin_every_requirement_within_its_bounds(file: Path) -> None:
    pinned = pins(file)
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        if file.stem == "cpu" and name.startswith("unsloth"):
            continue
        assert requirement.specifier.contains(pinned[name]), requirement


@pytest.mark.parametrize("file", CONSTRAINTS, ids=lambda file: file.stem)
def test_constraints_say_how_to_install_them_and_when_they_were_resolved(file: Path) -> None:
    head = file.read_text("utf-8").partition("\n\n")[0]
    assert f"\n# pip install -c constraints/{file.name} " in head
    assert re.search(r"Resolved 20\d\d-\d\d-\d\d", head)
    assert head.startswith("# For ")


def test_gpu_sets_only_add_to_the_one_that_is_tested_everywhere() -> None:
    cpu, turing, ampere = (pins(ROOT / "constraints" / f"{name}.txt") for name in ("cpu", "turing", "ampere-and-newer"))
    for gpu in (turing, ampere):
        assert cpu.items() <= gpu.items()
        assert {"unsloth", "unsloth-zoo", "triton"} <= gpu.keys() - cpu.keys()


def test_the_set_for_colab_leaves_alone_what_is_there() -> None:
    """torch, and what Colab's other packages were built for, such as NumPy and its torchvision."""
    colab, cpu = pins(ROOT / "constraints" / "colab.txt"), pins(ROOT / "constraints" / "cpu.txt")
    assert colab.items() <= cpu.items()
    assert colab.keys() >= TESTED.keys() - {"torch", "unsloth"}
    assert not colab.keys() & {"torch", "torchvision", "triton", "numpy", "pandas", "pyarrow", "sympy", "fsspec"}
    named = {canonicalize_name(one.name) for one in requirements()}
    assert colab.keys() <= named | {"tokenizers", "safetensors"}
