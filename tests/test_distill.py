"""On-policy distillation on the embedded model: what the loss is, that it teaches, and who may not teach."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from click.testing import CliRunner, Result

from qreason.cli import main

RecipeWriter = Callable[..., Path]
STEPS = "  - evaluate\n  - sft: {learning_rate: 1e-5}\n  - evaluate\n  - grpo: {num_generations: 4}\n  - merge\n"
LEARN = "  - distill: {max_steps: %d, per_device_train_batch_size: 4, learning_rate: %s, teacher: {model: taught}}\n"


def run(file: Path, out: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["run", str(file), "--out", out, "--set", "sampling.max_completion_length=12",
                                     *arguments])  # fmt: skip


@pytest.fixture
def taught(workplace: Path, write_recipe: RecipeWriter) -> Path:
    """A run that has learnt one reply."""
    file = write_recipe((STEPS, "  - sft: {num_train_epochs: 15, learning_rate: 1e-2}\n"), name="teacher.yaml")
    assert run(file, "taught").exit_code == 0
    return workplace / "taught"


def test_the_loss_is_the_divergence_of_student_and_teacher(
    taught: Path, write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: list[float] = []
    compute = trl.DistillationTrainer.compute_loss

    def compared(self: Any, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        said, counts = inputs["completion_ids"].shape[1], inputs["completion_mask"].bool()
        with torch.no_grad():
            own, other = (
                torch.log_softmax(one(ids, attention_mask=mask).logits[:, -said - 1 : -1].double() / 0.9, -1)
                for one in (self.model, self.teacher_model)
            )
        expected.append(
            float((own.exp() * (own - other)).sum(-1)[counts].mean())
        )  # KL(student || teacher), at the sampling temperature
        return compute(self, model, inputs, *rest, **options)

    monkeypatch.setattr(trl.DistillationTrainer, "compute_loss", compared)
    exact = "distill.trl={bf16: false}"  # a CPU may autocast
    result = run(write_recipe((STEPS, LEARN % (3, "5e-3"))), "out", "--set", exact)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in Path("out/01-distill/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses == pytest.approx(expected, rel=1e-3)
    assert f"divergence {losses[0]:.3f} to {losses[-1]:.3f} nats per token" in result.output
    (_, node) = json.loads(Path("out/lineage.json").read_text())["nodes"]
    assert node["data"][-1] == str(taught)
    assert Path("out/01-distill/adapter/adapter_config.json").exists()


def other_tokens(folder: Path, *, same_tokens: bool) -> None:
    """A small model with other tokens than the embedded one, or the same ones in a larger distribution."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from qreason.model.load import EMBEDDED

    config = AutoConfig.from_pretrained(EMBEDDED["qreason/tiny"])
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["qreason/tiny"])
    config.vocab_size += 64
    if not same_tokens:
        tokenizer.add_tokens(["entirely-new"])
    config.num_hidden_layers = 1
    config.layer_types = config.layer_types[:1]
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("same_tokens", "told"),
    [(False, "have different tokenizers"), (True, "the same tokens, padded differently")],
)
def test_a_student_with_another_vocabulary_is_refused(
    workplace: Path, write_recipe: RecipeWriter, same_tokens: bool, told: str
) -> None:
    other_tokens(workplace / "taught", same_tokens=same_tokens)
    result = run(write_recipe((STEPS, LEARN % (1, "1e-3"))), "out")
    assert result.exit_code == 2
    assert told in result.output
    assert not Path("out/01-distill").exists()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("model: taught", "model: m, endpoint: 'http://x'", "a server does not give whole distributions"),
        (", teacher: {model: taught}", "", "'steps.0.distill.teacher' is missing"),
        ("max_steps", "beta: 2, max_steps", "less than or equal to 1"),
    ],
)
def test_what_cannot_be_distilled_is_said_before_the_run(
    write_recipe: RecipeWriter, old: str, new: str, told: str
) -> None:
    file = write_recipe((STEPS, (LEARN % (1, "1e-3")).replace(old, new)))
    result = CliRunner().invoke(main, ["validate", str(file)])
    assert result.exit_code == 2
    assert told in result.output
