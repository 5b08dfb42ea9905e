"""scripts/bench_gpu.py from its command line, on the embedded base, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_gpu.py"
ONLY = "(sft 2 rows|grpo 4 x 8), qreason/tiny nf4, (no cap|4 GiB): (qreason plain|TRL)"


def bench(out: Path, *more: str) -> str:
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--device", "cpu", "--bases", "qreason/tiny", *more]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out.parent)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_both_trainings_side_by_side_with_and_without_a_cap(tmp_path: Path) -> None:
    out = tmp_path / "benchmarks.md"
    small = ("--tokens", "8", "--rounds", "1", "--only", ONLY)
    assert "8 measurements, 0 settings not run" in bench(out, *small)
    text = out.read_text()
    for task in ("sft 2 rows", "grpo 4 x 8"):
        assert f"{task}, qreason/tiny nf4: a step of qreason plain takes no longer than TRL's" in text
    assert text.count("| qreason plain |") == text.count("| TRL |") == 4
    assert "failed" not in text.replace("Left out, failed, not run", "")
    again = out.with_suffix(".jsonl").read_text()
    bench(out, *small)
    assert out.with_suffix(".jsonl").read_text() == again  # all is known


@pytest.mark.slow
def test_a_setting_that_dies_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    out = tmp_path / "benchmarks.md"
    bench(out, "--bases", "no/such-base", "--only", "sft 2 rows, .*nf4, no cap: TRL", "--rounds", "1")
    assert "TRL: qreason.errors.ModelError: no/such-base" in out.read_text()
