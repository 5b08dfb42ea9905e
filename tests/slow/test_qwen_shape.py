"""The helpdesk recipe on a model of Qwen2.5-0.5B's real shape: memory and shapes are real, numbers are not."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from qreason.cli import main

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from random_qwen import write_random_qwen

ONE_STEP = (
    "evaluate.rows=2",
    "evaluate.samples=1",
    "sft.max_steps=1",
    "grpo.max_steps=1",
    "grpo.preflight=false",  # random weights answer nothing
    "sampling.max_completion_length=16",
)


@pytest.mark.slow
def test_every_stage_of_the_helpdesk_recipe_takes_a_step(tmp_path: Path) -> None:
    base, out = tmp_path / "qwen", tmp_path / "run"
    write_random_qwen(base, "0.5b")
    overrides = [part for value in (f"model.base={base}", *ONE_STEP) for part in ("--set", value)]
    result = CliRunner().invoke(main, ["run", "helpdesk", "--out", str(out), *overrides])
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert [row["after"] for row in report["passes"]] == ["base", "01-sft", "02-grpo"]
    merged = json.loads((out / "03-merge" / "model" / "config.json").read_text())
    assert merged["hidden_size"] == 896
    assert merged["vocab_size"] == 151936
    assert "quantization_config" not in merged
