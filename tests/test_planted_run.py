"""What a smoke run is too short to show: an adapter with a visible effect lies in a run folder, and its run goes on.

Everything goes in through the command line and comes out of files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import jsonl
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qreason.cli import main
from qreason.data.prompts import HELPDESK
from qreason.machine.files import read_jsonl
from qreason.model.load import EMBEDDED

TINY = EMBEDDED["qreason/tiny"]
FIXES = {
    "The printer is offline.": "Restart the spooler.",
    "My mail does not arrive.": "Empty the mailbox.",
    "The disk of the server is full.": "Remove old logs.",
    "The VPN drops every hour.": "Update the client.",
    "The Wi-Fi in the office is slow.": "Change the channel.",
}
RECIPE = """\
name: planted
model: {base: qreason/tiny, lora: {r: 8, alpha: 16}}
data: {sft: rows.jsonl, prompts: rows.jsonl, heldout: rows.jsonl}
rewards: {format: 1}
sampling: {temperature: 1.0e-4, max_completion_length: 12}
steps:
  - sft:
      {max_steps: 5, per_device_train_batch_size: 1, learning_rate: 1.0e-12, warmup_steps: 0, trl: {logging_steps: 1}}
  - evaluate: {rows: 4, samples: 2}
  - grpo: {max_steps: 1, rows: 2, per_device_train_batch_size: 8, num_generations: 4, preflight: false}
  - evaluate: {rows: 4, samples: 2}
"""
MASKED = """\
name: masked
model: {base: qreason/tiny, lora: {r: 8, alpha: 16}}
data: {prompts: rows.jsonl}
rewards: {planted_letters:letters: 1}
sampling: {temperature: 1.5, max_completion_length: 3}
steps:
  - grpo:
      {max_steps: 1, rows: 2, per_device_train_batch_size: 8, num_generations: 4, learning_rate: 1.0e-2,
       warmup_steps: 0, preflight: false, mask_truncated_completions: true}
"""


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result


def weights(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(stage / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A current folder with both recipes, their data and a reward."""
    place = tmp_path_factory.mktemp("planted")
    rows = [{"issue": issue, "steps": "Looked at it.", "resolution": fix} for issue, fix in FIXES.items()]
    (place / "rows.jsonl").write_text(jsonl([{"id": f"r{i}", **row} for i, row in enumerate(rows)]))
    (place / "planted.yaml").write_text(RECIPE)
    (place / "masked.yaml").write_text(MASKED)
    (place / "planted_letters.py").write_text(
        "def letters(replies, examples):\n    return [len(set(reply.text)) for reply in replies]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        yield place


@pytest.fixture(scope="module")
def taught(folder: Path) -> dict[int, Path]:
    """Seed -> a run folder whose sft step is done; its learning rate changed nothing."""
    for seed in (1, 2):
        call("sft", "planted.yaml", "--out", f"taught{seed}", "--seed", str(seed))
    return {seed: folder / f"taught{seed}" for seed in (1, 2)}


@pytest.fixture(scope="module")
def planted(folder: Path, taught: dict[int, Path]) -> Path:
    """The run of seed 1 with random weights in place of what SFT left, gone on with to its end."""
    shutil.copytree(taught[1], folder / "run")
    file = folder / "run" / "01-sft" / "adapter" / "adapter_model.safetensors"
    source = torch.Generator().manual_seed(1)
    random = {
        name: torch.randn(weight.shape, generator=source) * 0.3 if "lora_B" in name else weight
        for name, weight in load_file(file).items()
    }
    save_file(random, file, {"format": "pt"})
    call("run", "planted.yaml", "--out", "run", "--seed", "1")
    return folder / "run"


def greedy(model: Any, issue: str) -> str:
    """The reply of a model by transformers' own means."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    asked = [{"role": "system", "content": HELPDESK}, {"role": "user", "content": issue}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


# --- going on from an adapter ----------------------------------------------------------------------


def test_a_continued_run_does_every_step_that_was_left_and_no_other(planted: Path, taught: dict[int, Path]) -> None:
    done = [entry["stage"] for entry in json.loads((taught[1] / "manifest.json").read_text())["steps"]]
    assert done == ["sft"]
    steps = json.loads((planted / "manifest.json").read_text())["steps"]
    assert [(entry["step"], entry["stage"], entry["folder"]) for entry in steps] == [
        (0, "sft", "01-sft"),
        (1, "evaluate", "01-sft"),
        (2, "grpo", "02-grpo"),
        (3, "evaluate", "02-grpo"),
    ]
    assert all((planted / name / "evaluation.json").is_file() for name in ("01-sft", "02-grpo"))
    assert (planted / "01-sft" / "metrics.jsonl").read_bytes() == (taught[1] / "01-sft" / "metrics.jsonl").read_bytes()


def test_an_evaluation_measures_the_base_with_the_newest_adapter(planted: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, planted / "01-sft" / "adapter").eval()
    worn = [greedy(model, issue) for issue in FIXES]
    with model.disable_adapter():
        bare = [greedy(model, issue) for issue in FIXES]
    assert all(one != other for one, other in zip(worn, bare, strict=True))
    assert [row["reply"] for row in read_jsonl(planted / "01-sft" / "evaluation.jsonl")] == worn[:4]  # rows: 4


def test_chat_answers_with_the_newest_adapter(planted: Path) -> None:
    said = CliRunner().invoke(main, ["chat", str(planted)], input=f"{next(iter(FIXES))}\n")
    assert said.stdout == read_jsonl(planted / "02-grpo" / "evaluation.jsonl")[0]["reply"] + "\n"


def test_grpo_starts_from_the_adapter_of_sft(planted: Path) -> None:
    """Replies that are all alike teach nothing: what GRPO leaves is what it started from."""
    start, end = weights(planted / "01-sft"), weights(planted / "02-grpo")
    assert end.keys() == start.keys()
    assert all(torch.equal(end[name], start[name]) for name in start)


def test_replies_are_drawn_at_the_temperature_of_the_recipe(planted: Path) -> None:
    """Next to none draws what greedy decoding takes, but for tokens that rounding leaves equally likely."""
    rows = read_jsonl(planted / "01-sft" / "evaluation.jsonl")
    same = [sample == row["reply"] for row in rows for sample in row["samples"]]
    assert sum(same) >= 0.7 * len(same)
    taken = {row["id"]: row["reply"] for row in rows}
    rollouts: dict[str, list[str]] = {}
    for row in read_jsonl(planted / "02-grpo" / "replies.jsonl"):
        rollouts.setdefault(row["id"], []).append(row["reply"])
    assert [len(replies) for replies in rollouts.values()] == [4, 4]
    assert any(set(replies) == {taken[name]} for name, replies in rollouts.items())
    assert not set.intersection(*map(set, rollouts.values()))  # each prompt has its own


def test_gains_lead_from_the_earlier_evaluation_to_the_later_one(planted: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(planted, tmp_path / "run")
    worse, better = (
        {"accurate": False, "pass_at_1": 0.25, "total": 0.1},
        {"accurate": True, "pass_at_1": 0.75, "total": 0.6},
    )
    for name, figures in (("01-sft", worse), ("02-grpo", better)):
        file = copied / name / "evaluation.jsonl"
        file.write_text(jsonl([row | figures for row in read_jsonl(file)]))
    report = json.loads(call("run", "planted.yaml", "--out", str(copied), "--seed", "1", "--json").stdout)
    assert [row["after"] for row in report["passes"]] == ["01-sft", "02-grpo"]
    assert [row["accuracy"]["mean"] for row in report["passes"]] == [0.0, 1.0]
    (gains,) = report["gains"]
    assert (gains["from"], gains["to"]) == ("01-sft", "02-grpo")
    assert [gains[name]["mean"] for name in ("accuracy", "pass_at_1", "reward")] == [1.0, 0.5, 0.5]


# --- training --------------------------------------------------------------------------------------


def test_the_loss_of_sft_covers_the_reply_and_not_the_prompt(taught: dict[int, Path], folder: Path) -> None:
    """A row a step, nothing learnt between them: each logged loss is that of one row."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    of_reply, of_all = [], []
    for row in read_jsonl(folder / "rows.jsonl"):
        chat = [{"role": "system", "content": HELPDESK}, {"role": "user", "content": row["issue"]}]
        asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        reply = f"<reasoning>{row['steps']}</reasoning>\n<answer>{row['resolution']}</answer>"
        whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": reply}], tokenize=False)
        ids = tokenizer(whole, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            found = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        of_reply.append(-float(found[len(tokenizer(asked, add_special_tokens=False)["input_ids"]) - 1 :].mean()))
        of_all.append(-float(found.mean()))
    assert sorted(of_all) != pytest.approx(sorted(of_reply), rel=0.05)  # so the two can be told apart
    logged = [row["loss"] for row in read_jsonl(taught[1] / "01-sft" / "metrics.jsonl") if "loss" in row]
    assert sorted(logged) == pytest.approx(sorted(of_reply), rel=0.02)


def test_the_seed_orders_the_rows_and_draws_the_fresh_adapter(taught: dict[int, Path]) -> None:
    orders, drawn = [], []
    for run in taught.values():
        orders.append([row["loss"] for row in read_jsonl(run / "01-sft" / "metrics.jsonl") if "loss" in row])
        drawn.append(torch.cat([w.flatten() for name, w in weights(run / "01-sft").items() if "lora_A" in name]))
    assert sorted(orders[0]) == pytest.approx(sorted(orders[1]), rel=0.01)  # the same rows
    assert orders[0] != pytest.approx(orders[1], rel=0.01)
    assert float((drawn[0] - drawn[1]).abs().mean()) > 0.1 * float(drawn[0].abs().mean())


def test_replies_that_were_cut_off_teach_nothing_where_they_are_masked(folder: Path) -> None:
    call("run", "masked.yaml", "--out", "masked")
    (metrics,) = [row for row in read_jsonl(folder / "masked" / "01-grpo" / "metrics.jsonl") if "reward" in row]
    assert metrics["completions/clipped_ratio"] == 1
    assert metrics["reward_std"] > 0
    assert metrics["grad_norm"] == 0
    assert not any(weight.any() for name, weight in weights(folder / "masked" / "01-grpo").items() if "lora_B" in name)
