"""The smoke recipe through the real entry point: every stage, its files, continuing, and what must stop it."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qreason.cli import main
from qreason.machine.progress import LIVE
from qreason.model.load import EMBEDDED
from qreason.rewards import registry
from qreason.run.lock import HOLDER
from qreason.types import Example, Reply

TINY = str(EMBEDDED["qreason/tiny"])
NUMBERS = {"mean", "low", "high"}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run folder with every step of the smoke recipe done, and what the command printed."""
    folder = tmp_path_factory.mktemp("run") / "smoke"
    result = call("run", "smoke", "--out", str(folder), "--seed", "3", "--json")
    assert result.exit_code == 0, result.output
    return folder, result


def test_the_report_has_the_documented_keys(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    report = json.loads((folder / "report.json").read_text())
    assert json.loads(result.stdout) == report
    assert report["recipe"] == "smoke"
    assert report["seed"] == 3
    assert json.loads((folder / LIVE).read_text())["phase"] == "merge"
    assert [row["after"] for row in report["passes"]] == ["base", "01-sft", "02-grpo"]
    for row in report["passes"]:
        assert row["rows"] == report["rows"]
        assert set(row["parts"]) == {"correctness", "format", "rouge_l", "length", "judge"}
        for key in ("accuracy", "answer_anywhere", "pass_at_1", "format", "reward", "reply_words"):
            assert set(row[key]) == NUMBERS
        unmeasured = {key for key, figure in row["reasoning"].items() if figure is None}
        assert row["reasoning"]["why"].keys() == unmeasured
    assert [(row["from"], row["to"]) for row in report["gains"]] == [
        ("base", "01-sft"),
        ("01-sft", "02-grpo"),
        ("base", "02-grpo"),
    ]
    for row in report["gains"]:
        assert set(row["accuracy"]) >= NUMBERS
        assert set(row["pass_at_1"]) == set(row["reward"]) == NUMBERS


def test_the_report_draws_how_the_rewards_went(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    metrics = [json.loads(line) for line in (folder / "02-grpo" / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in metrics if "reward" in row]
    curve = json.loads((folder / "report.json").read_text())["curves"][0]
    assert curve["folder"] == "02-grpo"
    assert curve["step"] == [row["step"] for row in logged] == [1, 2]
    assert curve["reward"] == [round(row["reward"], 4) for row in logged]
    assert curve["parts"]["format"] == [round(row["rewards/format/mean"], 4) for row in logged]
    shown = call("run", "smoke", "--out", str(folder), "--seed", "3").stdout
    assert all(f" {name} " in shown for name in ("reward", "correctness", "format", "rouge_l", "length", "judge"))
    assert f"{curve['reward'][0]:.2f} to {curve['reward'][1]:.2f}" in shown


def test_replies_lie_side_by_side_and_their_totals_follow_from_their_parts(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    rows = [json.loads(line) for line in (folder / "replies.jsonl").read_text().splitlines()]
    assert [row["after"] for row in rows[:3]] == ["base", "01-sft", "02-grpo"]
    assert len({row["id"] for row in rows[:3]}) == 1
    weights = {"correctness": 0.1, "format": 0.1, "rouge_l": 0.2, "length": 0.2, "judge": 0.4}
    for row in rows:
        assert set(row) == {"after", "id", "prompt", "reply", "reference", "parts", "total"}
        assert row["total"] == pytest.approx(sum(weights[name] * part for name, part in row["parts"].items()))


def test_metrics_carry_steps_and_trls_names_for_every_reward(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    sft = [json.loads(line) for line in (folder / "01-sft" / "metrics.jsonl").read_text().splitlines()]
    grpo = [json.loads(line) for line in (folder / "02-grpo" / "metrics.jsonl").read_text().splitlines()]
    assert sft[0]["step"] >= 1
    assert "loss" in sft[0]
    for name in ("correctness", "format", "rouge_l", "length", "judge"):
        assert f"rewards/{name}/mean" in grpo[0]
    assert 0 <= grpo[0]["groups_without_signal"] <= 1


def test_every_rollout_is_kept_with_its_score(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    rows = [json.loads(line) for line in (folder / "02-grpo" / "replies.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {1, 2}
    assert all(set(row) == {"step", "id", "prompt", "reply", "reference", "parts", "total"} for row in rows)


def test_the_manifest_says_what_the_run_was_made_of(finished: tuple[Path, Result]) -> None:
    manifest = json.loads((finished[0] / "manifest.json").read_text())
    assert manifest["base"]["id"] == "qreason/tiny"
    assert manifest["base"]["fingerprint"].startswith("sha256:")
    assert {"sft", "prompts", "heldout"} == set(manifest["data"])
    assert {"torch", "trl", "peft"} <= set(manifest["versions"])
    assert manifest["hardware"]["device"] in ("cpu", "cuda")


def test_the_merged_folder_loads_plainly_and_speaks_like_the_adapter(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    trained = PeftModel.from_pretrained(base, folder / "02-grpo" / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(folder / "03-merge" / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "03-merge" / "model")
    asked = [{"role": "user", "content": "Which fix helps when the disk is full?"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    told = [model.generate(**inputs, max_new_tokens=20, do_sample=False).tolist() for model in (trained, merged)]
    assert told[0] == told[1]


def test_running_again_does_nothing_twice_and_says_so(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != HOLDER}
    result = call("run", "smoke", "--out", str(folder), "--seed", "3")
    assert result.exit_code == 0
    assert "6 of 6 steps are done" in result.stderr
    assert all(file.read_bytes() == content for file, content in before.items())


@pytest.mark.slow
def test_stage_commands_run_the_next_step_only_and_end_like_one_run(
    finished: tuple[Path, Result], tmp_path: Path
) -> None:
    folder = tmp_path / "steps"
    settings = ("smoke", "--out", str(folder), "--seed", "3")
    assert "the next step is sft, not merge" in call("merge", *settings).stderr
    assert call("sft", *settings).exit_code == 0
    assert (folder / "01-sft" / "adapter" / "adapter_config.json").is_file()
    assert not (folder / "02-grpo").exists()
    assert call("grpo", *settings).exit_code == 0
    assert not (folder / "03-merge").exists()
    assert call("merge", *settings).exit_code == 0
    again = call("run", *settings, "--json")
    assert again.exit_code == 0, again.output
    whole, steps = json.loads(finished[1].stdout), json.loads(again.stdout)
    for row in (*whole["passes"], *steps["passes"]):
        del row["seconds"]
    assert steps == whole


def test_a_run_folder_is_measured_on_a_task_of_ones_own(finished: tuple[Path, Result], tmp_path: Path) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text('{"question": "The printer is offline.", "answer": "Restart it."}\n')
    result = call("evaluate", str(finished[0]), "--task", str(task), "--samples", "2", "--json")
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)
    assert numbers["rows"] == 1
    assert "judge" in numbers["parts"]
    merged = call("evaluate", str(finished[0] / "03-merge" / "model"), "--task", str(task), "--samples", "1")
    assert merged.exit_code == 0, merged.output
    assert "task" in merged.stdout


def test_an_adapter_folder_is_no_model_to_evaluate(finished: tuple[Path, Result], tmp_path: Path) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "a", "reference": "b"}\n')
    result = call("evaluate", str(finished[0] / "01-sft" / "adapter"), "--task", str(task))
    assert result.exit_code == 2
    assert "give its run folder" in result.stderr


def test_a_loss_that_is_no_number_stops_before_the_adapter_is_written(tmp_path: Path) -> None:
    out = tmp_path / "run"
    steps = "steps=[{sft: {rows: 16, max_steps: 4, learning_rate: 1.0e+30, warmup_steps: 0, logging_steps: 1}}]"
    result = call("run", "smoke", "--out", str(out), "--set", steps)
    assert result.exit_code == 1
    assert "no adapter was written" in result.stderr
    assert not (out / "01-sft" / "adapter").exists()


def test_a_reward_that_raises_stops_the_run_and_keeps_the_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
        raise ZeroDivisionError("in the reward")

    monkeypatch.setitem(registry.REWARDS, "length", broken)
    out = tmp_path / "run"
    steps = "steps=[{grpo: {rows: 8, max_steps: 1, per_device_train_batch_size: 4, num_generations: 2}}]"
    result = call("run", "smoke", "--out", str(out), "--set", steps)
    assert result.exit_code == 1
    assert "reward 'length' raised ZeroDivisionError" in result.stderr
    failed = json.loads((out / "01-grpo" / "failed_reply.json").read_text())
    assert failed["reward"] == "length"
    assert failed["id"]
    assert not (out / "01-grpo" / "adapter").exists()


def test_where_all_is_right_already_the_step_keeps_its_adapter_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Such a run used to stop with an error.
    monkeypatch.setattr("qreason.stages.grpo.check_rollouts", lambda *_, **__: "every reply is right")
    monkeypatch.setattr("qreason.stages.grpo.check_gold", lambda *_: None)
    out = tmp_path / "run"
    steps = "steps=[sft: {rows: 8, max_steps: 1}, grpo: {}, grpo: {from: base}, merge: {rows: 2}]"
    result = call("run", "smoke", "--out", str(out), "--set", steps)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("0 steps: nothing is left to learn, every reply is right; the adapter is unchanged") == 2
    trained, kept, fresh = (
        load_file(out / name / "adapter" / "adapter_model.safetensors") for name in ("01-sft", "02-grpo", "03-grpo")
    )
    assert kept.keys() == trained.keys()
    assert all(torch.equal(kept[name], trained[name]) for name in kept)
    assert not any(weight.any() for name, weight in fresh.items() if "lora_B" in name)
    assert (out / "04-merge" / "model").is_dir()


def test_replies_without_a_total_teach_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.REWARDS, "length", lambda replies, examples: [None] * len(replies))
    out = tmp_path / "run"
    steps = "steps=[{grpo: {rows: 2, per_device_train_batch_size: 4, num_generations: 2, preflight: false}}]"
    result = call("run", "smoke", "--out", str(out), "--set", steps)
    assert result.exit_code == 0, result.output
    (metrics,) = [json.loads(line) for line in (out / "01-grpo" / "metrics.jsonl").read_text().splitlines()][:1]
    assert metrics["grad_norm"] == pytest.approx(0, abs=1e-6)
    assert "(100%) had no reward variance" in result.stderr


def test_a_row_longer_than_the_context_is_named_before_training(tmp_path: Path) -> None:
    rows = [
        {"issue": "short", "steps": "a", "resolution": "b"},
        {"issue": "disk full " * 2000, "steps": "a", "resolution": "b"},
    ]
    file = tmp_path / "sft.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = call("run", "smoke", "--out", str(tmp_path / "run"), "--set", f"data.sft={file}", "--set", "steps=[sft]")
    assert result.exit_code == 2
    assert f"{file}:2:" in result.stderr
    assert "tokens" in result.stderr


def test_preview_shows_what_the_loss_covers(tmp_path: Path) -> None:
    result = call("data", "preview", "smoke", "--rows", "1")
    assert result.exit_code == 0, result.output
    assert "<reasoning>" in result.stdout
    assert "covered by the loss" in result.stdout
