"""The middle of the R1 pipeline on the embedded model: SFT, rejection sampling cut off by a kill, SFT from the base."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = """steps=[
  {sft: {rows: 560, num_train_epochs: 1, per_device_train_batch_size: 16, learning_rate: 2e-3}},
  {sample: {rows: 400, n: 4, per_prompt: 2}},
  {sft: {data: sampled, from: base, num_train_epochs: 2, per_device_train_batch_size: 16, learning_rate: 2e-3}},
  {evaluate: {rows: 100, samples: 8, cons_at: [8], pass_at: [8]}}]"""


@pytest.mark.slow
def test_a_second_sft_learns_from_the_base_what_a_killed_and_resumed_sampling_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "qreason", "run", "quickstart", "--out", str(out), "--set", STEPS]
    draws = out / "02-sample" / "draws.jsonl"
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while first.poll() is None and not (draws.exists() and draws.read_bytes().count(b"\n") > 300):
        time.sleep(0.1)
    assert first.poll() is None  # it is killed in the middle
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = draws.read_text().splitlines()
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in draws.read_text().splitlines()]
    assert len({(row["id"], row["number"]) for row in rows}) == len(rows) == 1600
    replies = {(row["id"], row["number"]): row["reply"] for row in rows}
    for line in before[:-1]:  # the last one may have been cut
        row = json.loads(line)
        assert replies[row["id"], row["number"]] == row["reply"]
    kept = [json.loads(line) for line in (out / "02-sample" / "sampled.jsonl").read_text().splitlines()]
    assert (
        len({row["id"] for row in kept}) == len(kept) == json.loads((out / "02-sample/sample.json").read_text())["kept"]
    )
    (measured,) = json.loads((out / "report.json").read_text())["passes"]
    assert measured["format"]["mean"] > 0.9  # the base alone never follows the form
    assert measured["accuracy"]["mean"] > 0.15
    scaling = measured["scaling"]
    assert scaling["pass@1"]["mean"] <= scaling["cons@8"]["mean"] + 0.02
    assert scaling["cons@8"]["mean"] <= scaling["pass@8"]["mean"]
