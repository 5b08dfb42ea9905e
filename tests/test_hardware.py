"""What is set for a process before torch is imported, and what Triton needs of a machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from qreason.machine.hardware import compiler_trouble, has_growing_segments, prepare_process

SET = ("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment in which the user has set nothing."""
    for name in SET:
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)
    compiler_trouble.cache_clear()
    yield
    compiler_trouble.cache_clear()


# --- GPUs ------------------------------------------------------------------------------------------


def test_one_process_uses_the_first_of_the_gpus_it_is_given_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    line = prepare_process()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    assert line == "CUDA_VISIBLE_DEVICES names 2 GPUs; one process uses one of them: 2"


@pytest.mark.parametrize(("given", "used"), [(None, "0"), ("1", "1"), ("", ""), ("-1", "-1")])
def test_nothing_is_said_of_one_gpu_or_none(monkeypatch: pytest.MonkeyPatch, given: str | None, used: str) -> None:
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert prepare_process() is None
    assert os.environ["CUDA_VISIBLE_DEVICES"] == used


@pytest.mark.parametrize("given", [None, "0,1"])
def test_a_distributed_launch_chooses_its_gpus_itself(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert prepare_process() is None
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == given


def test_a_command_prints_the_line_before_its_result() -> None:
    command = [sys.executable, "-m", "qreason", "recipes"]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": "0,1"}, check=True
    )
    assert ended.stderr.startswith("CUDA_VISIBLE_DEVICES names 2 GPUs")
    assert "names 2 GPUs" not in ended.stdout


# --- CUDA's memory ---------------------------------------------------------------------------------


def test_memory_segments_grow_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qreason.machine.hardware.has_growing_segments", lambda: True)
    prepare_process()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_settings_of_the_user_for_the_allocator_stay(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64")
    prepare_process()
    assert {os.environ.get(key) for key in SET[1:3]} == {"max_split_size_mb:64", None}


@pytest.mark.parametrize(
    ("system", "release", "machine", "grows"),
    [
        ("linux", "6.8.0-45-generic", "x86_64", True),
        ("linux", "5.15.167.4-microsoft-standard-WSL2", "x86_64", False),
        ("linux", "5.15.148-tegra", "aarch64", False),
        ("win32", "11", "AMD64", False),
    ],
)
def test_segments_do_not_grow_on_wsl_windows_and_tegra(
    monkeypatch: pytest.MonkeyPatch, system: str, release: str, machine: str, grows: bool
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert has_growing_segments() is grows


def test_torch_knows_the_allocator_setting() -> None:
    import torch

    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    if not library.exists():
        pytest.skip("another platform")
    assert {b"PYTORCH_ALLOC_CONF", b"expandable_segments"} <= set(library.read_bytes().split(b"\0"))


# --- Triton's compiler -----------------------------------------------------------------------------


def compiler(folder: Path, script: str) -> str:
    file = folder / "compiler"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)


def test_a_compiler_that_finds_pythons_header_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "CC", compiler(tmp_path, 'grep -q Python.h "$1" && case "$*" in *-I*python3*) exit 0;; esac; exit 1')
    )
    assert compiler_trouble() is None


def test_no_compiler_is_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler_trouble() == "there is no C compiler (gcc or clang)"


def test_a_compiler_that_does_not_run_is_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "nothing"))
    assert "does not run" in (compiler_trouble() or "")


def test_missing_headers_are_named_as_the_compiler_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "trial.c:1:10: fatal error: Python.h: No such file or directory"
    monkeypatch.setenv("CC", compiler(tmp_path, f"echo '{said}' >&2; exit 1"))
    assert compiler_trouble() == said


def test_the_real_compiler_is_asked_for_pythons_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    if compiler_trouble() is not None:
        pytest.skip("no compiler, or no headers here")
    compiler_trouble.cache_clear()
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert "Python.h" in (compiler_trouble() or "")
