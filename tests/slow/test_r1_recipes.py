"""The R1 recipes on the embedded model, cut down: every stage runs, and hands on what it made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qreason.cli import main

FEW = ("evaluate.rows=4", "evaluate.samples=1", "sft.rows=240")
BRIEF = ("grpo.max_steps=1", "grpo.preflight=false", "grpo.learning_rate=1e-7")


def run(recipe: str, *overrides: str, out: str = "out") -> dict[str, Any]:
    options = [option for override in overrides for option in ("--set", override)]
    result = CliRunner().invoke(main, ["run", recipe, "--out", out, *options])
    assert result.exit_code == 0, result.output
    return {node["name"]: node for node in json.loads(Path(out, "lineage.json").read_text())["nodes"]}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rollouts(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out", folder, "replies.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_r1_runs_from_cold_start_to_rl_for_all_scenarios() -> None:
    nodes = run("r1/r1-tiny", *FEW, *BRIEF, "sample.rows=60", "sample.keep={}", "preference.rows=200")
    assert [nodes[name]["from"] for name in ("02-grpo", "03-sample", "04-sft", "07-grpo")] == [
        *("01-sft", "02-grpo", "base", "04-sft")
    ]
    sample = nodes["03-sample"]["numbers"]
    assert sample["plain"] == round(sample["kept"] / 3)  # three to one
    assert nodes["06-preference"]["numbers"]["heldout_accuracy"] > 0.9  # one of eight sentences tells
    for row in rollouts("07-grpo"):
        liked = {row["parts"][name] for name in ("helpfulness", "harmlessness")}
        ruled = {row["parts"][name] for name in ("correctness", "format")}
        assert (None in liked) != (None in ruled)


@pytest.mark.slow
def test_rlhf_stays_near_the_sft_policy_and_is_paid_by_the_reward_model_and_two_rules() -> None:
    nodes = run("r1/rlhf-tiny", *FEW, *BRIEF, "preference.rows=200")
    assert nodes["03-grpo"]["from"] == "01-sft"
    assert {tuple(row["parts"]) for row in rollouts("03-grpo")} == {("preference", "format_strict", "correctness")}
    metrics = [json.loads(line) for line in Path("out/03-grpo/metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-4)  # the reference is where training started, not the base


@pytest.mark.slow
def test_a_run_teaches_a_student_that_then_learns_by_rl() -> None:
    run("quickstart", *FEW, *BRIEF, out="teacher")
    nodes = run("r1/distill-rl-tiny", *FEW, *BRIEF, "sample.teacher.model=teacher", "sample.rows=40", "sample.keep={}")
    assert nodes["01-sample"]["data"][-1] == str(Path("teacher").resolve())
    assert nodes["03-grpo"]["from"] == "02-sft"


@pytest.mark.slow
def test_pure_rl_begins_at_the_base() -> None:
    assert run("r1/zero-tiny", *FEW[:2], *BRIEF)["01-grpo"]["from"] == "base"


@pytest.mark.slow
def test_a_student_comes_nearer_to_a_teacher_with_its_vocabulary() -> None:
    taught = "[{sft: {rows: 240, per_device_train_batch_size: 16, learning_rate: 2e-3}}]"
    run("quickstart", f"steps={taught}", out="teacher")
    settings = "per_device_train_batch_size: 16, learning_rate: 2e-3, max_steps: 20, teacher: {model: teacher}"
    run("quickstart", "sampling.max_completion_length=48", f"steps=[{{distill: {{{settings}}}}}]")
    rows = [json.loads(line) for line in Path("out/01-distill/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
