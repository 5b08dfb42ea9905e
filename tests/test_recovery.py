"""Out of GPU memory: the same step in smaller pieces, and the same adapter at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import RecipeWriter
from safetensors.torch import load_file

from qreason.data.prompts import VERDICTS, render_judge
from qreason.errors import OutOfMemoryError
from qreason.inference.drawing import take
from qreason.inference.generate import LocalGenerator
from qreason.judge.verdict import LocalModel
from qreason.machine.rows import Rows
from qreason.model.classifier import PreferenceModel
from qreason.model.resident import Resident
from qreason.recipe.load import load_recipe
from qreason.run.session import Session
from qreason.stages import run_stage
from qreason.training.recovery import Recovery, row_count, split_rows
from qreason.types import Sampling

Trouble = Callable[[Any], None]


def trained(write_recipe: RecipeWriter, stage: str, settings: str, name: str) -> tuple[dict[str, Any], list[str]]:
    """The adapter after two optimizer steps of four micro-batches, and what was said."""
    steps = f"  - {stage}: {{{settings}}}\n"
    Path("planted.py").write_text(
        "def letters(replies, examples):\n    return [reply.text.count('e') for reply in replies]\n"
    )
    rewards = ("rewards: {correctness: 0.1, format: 0.1}", "rewards: {planted:letters: 1}")
    before, _, _ = (
        write_recipe(rewards, ("max_completion_length: 12", "max_completion_length: 16"))
        .read_text()
        .partition("  - evaluate")
    )
    file = Path(f"{name}.yaml")
    file.write_text(before + steps)
    said: list[str] = []
    run = Session.open(load_recipe(str(file)), Path("runs") / name, say=said.append)
    artifact = run_stage(run.recipe.steps[0], run)
    return load_file(artifact.path / "adapter_model.safetensors"), said


def out_of_memory(monkeypatch: pytest.MonkeyPatch, when: Callable[[int, int], bool]) -> list[int]:
    """Make backward passes fail with torch's own error, half-way through; returns the rows of each attempt.

    `when` is asked with the number of the attempt and its rows.
    """
    from accelerate import Accelerator
    from trl import GRPOTrainer, SFTTrainer

    attempts: list[int] = []
    backward = Accelerator.backward

    def counting(compute_loss: Any) -> Any:
        def wrapped(self: Any, model: Any, inputs: Any, **kwargs: Any) -> Any:
            attempts.append(row_count(inputs))
            return compute_loss(self, model, inputs, **kwargs)

        return wrapped

    def failing(self: Any, loss: Any, **kwargs: Any) -> None:
        backward(self, loss, **kwargs)  # the gradients are there when it fails: they must not count
        if when(len(attempts), attempts[-1]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    for trainer in (SFTTrainer, GRPOTrainer):
        monkeypatch.setattr(trainer, "compute_loss", counting(trainer.compute_loss))
    monkeypatch.setattr(Accelerator, "backward", failing)
    return attempts


# Plain gradient descent: what it adds to the weights is the gradient. Adam's first steps are as large for a gradient of
# rounding errors as for any other, and those differ between processors and between batches of two and of four rows.
DESCENT = "gradient_accumulation_steps: 2, learning_rate: 1, optim: sgd, lr_scheduler_type: constant, "
SFT = DESCENT + "per_device_train_batch_size: 2, max_steps: 3"
GRPO = (
    DESCENT + "per_device_train_batch_size: 4, num_generations: 4, max_steps: 2, preflight: false, num_iterations: 2, "
    "loss_type: "
)


@pytest.mark.parametrize(
    ("stage", "settings", "moment"),  # the second micro-batch of SFT's steps is a single row
    [
        ("sft", SFT, 3),
        pytest.param("grpo", GRPO + "dapo", 2, marks=pytest.mark.slow),
        pytest.param("sft", SFT + ", packing: true, trl: {max_length: 64}", 3, marks=pytest.mark.slow),
        *(pytest.param("grpo", GRPO + loss, 4, marks=pytest.mark.slow) for loss in ("bnpo", "grpo", "dr_grpo")),
    ],
)
def test_a_step_that_ran_out_of_memory_leaves_the_same_adapter(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch, stage: str, settings: str, moment: int
) -> None:
    monkeypatch.setattr("qreason.machine.hardware.fast_bfloat16", lambda: False)  # equal to 1e-4 in float32 only
    monkeypatch.setattr("qreason.model.compat.trl_logprobs.can_share_prompts", lambda args: False)  # as on a GPU
    with monkeypatch.context() as patch:
        patch.setattr("qreason.training.trainer.in_pieces", lambda trainer, policy: trainer)  # TRL's own
        undisturbed, silence = trained(write_recipe, stage, settings, "undisturbed")
    attempts = out_of_memory(monkeypatch, lambda attempt, rows: attempt == moment)
    recovered, said = trained(write_recipe, stage, settings, "recovered")
    assert len(set(attempts)) > 1  # it did go on with smaller pieces
    assert sum("out of GPU memory" in line for line in said) == 1
    assert not any("out of GPU memory" in line for line in silence)
    moved = max(float(weight.abs().max()) for name, weight in undisturbed.items() if "lora_B" in name)
    assert moved > 1e-3
    for name, weight in undisturbed.items():
        assert torch.allclose(recovered[name], weight, rtol=0, atol=1e-4 * moved), name


def test_one_row_that_does_not_fit_stops_with_the_adapter_kept(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = out_of_memory(monkeypatch, lambda attempt, rows: attempt > 4)
    with pytest.raises(OutOfMemoryError, match=r"one row .* the last full step is in .*checkpoint.*qreason plan"):
        trained(write_recipe, "sft", SFT, "stuck")
    assert attempts[-1] == 1
    kept = load_file(Path("runs/stuck/01-sft/checkpoint/adapter_model.safetensors"))
    assert any(weight.any() for name, weight in kept.items() if "lora_B" in name)
    assert not Path("runs/stuck/01-sft/adapter").exists()
    monkeypatch.undo()


def test_what_a_step_had_is_kept_when_it_starts_again(workplace: Path, write_recipe: RecipeWriter) -> None:
    run = Session.open(load_recipe(str(write_recipe())), Path("runs/small"), say=lambda line: None)
    run.step = 1
    (run.clear_stage_folder() / "checkpoint").mkdir()
    run.clear_stage_folder()
    assert Path("runs/small/01-sft.1/checkpoint").exists()


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_the_pieces_of_a_micro_batch_are_all_of_it(parts: int) -> None:
    rows = {"ids": torch.arange(10).reshape(5, 2), "total": torch.tensor(7.0), "completion_mask": torch.ones(5, 3)}
    for loss_type in ("dapo", "grpo", "bnpo"):
        pieces = split_rows(rows, parts, loss_type)
        assert torch.equal(torch.cat([piece["ids"] for piece, _ in pieces]), rows["ids"])
        assert all(float(piece["total"]) == 7.0 for piece, _ in pieces)
        assert sum(share for _, share in pieces) == pytest.approx(parts if loss_type == "dapo" else 1)


def test_rows_that_were_packed_into_one_come_apart_at_their_beginnings() -> None:
    """A packed micro-batch counted as one row, so that it could not be halved."""
    lengths = torch.tensor([3, 2, 4])
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    packed = {"input_ids": torch.arange(9).unsqueeze(0), "position_ids": positions, "lengths": lengths}
    assert row_count(packed) == 3
    pieces = [piece for piece, share in split_rows(packed, 2, "chunked_nll") if share == 1.0]
    assert [piece["input_ids"].tolist() for piece in pieces] == [[[0, 1, 2]], [[3, 4, 5, 6, 7, 8]]]
    assert [piece["position_ids"][0, 0] for piece in pieces] == [0, 0]
    assert [piece["lengths"].tolist() for piece in pieces] == [[3], [2, 4]]
    beside = {"input_ids": torch.ones(1, 4), "attention_mask": torch.ones(1, 4), "position_ids": torch.zeros(1, 4)}
    assert row_count(beside) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_every_library_may_run_out_of_memory(error: RuntimeError) -> None:
    def work() -> None:
        raise error

    assert Rows(4, "replies", lambda line: None).attempt(work, 4) is None
    trainer = SimpleNamespace(prepared={"ids": torch.ones(4, 2)}, state=SimpleNamespace(global_step=0))
    pieces: list[bool] = []

    def attempt(cut: Any) -> float:
        pieces.append(cut is not None)
        if cut is None:
            work()
        return 1.0

    assert Recovery(lambda line: None)(trainer, torch.nn.Linear(1, 1), attempt) == 1.0
    assert pieces == [False, True]


def test_a_preference_model_goes_on_with_fewer_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def rate(self: PreferenceModel, pairs: Sequence[tuple[str, str]]) -> list[float]:
        read.append(len(pairs))
        if len(pairs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [float(len(reply)) for _, reply in pairs]

    monkeypatch.setattr(PreferenceModel, "rate", rate)
    model, said = PreferenceModel.__new__(PreferenceModel), []
    model.rows = Rows(4, "replies to rate", said.append)
    assert model.outputs([("prompt", "a" * length) for length in range(5)]) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert read == [4, 2, 2, 1]
    assert len(said) == 1


def test_other_errors_of_a_gpu_are_not_taken_for_its_memory() -> None:
    def work() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError, match="illegal"):
        Rows(4, "replies", lambda line: None).attempt(work, 4)


def test_replies_are_taken_in_portions_and_none_is_lost() -> None:
    left, taken = [(3, 4), (1, 4), (0, 4), (2, 4)], []
    while left:
        chosen, each, left = take(left, 6 if len(left) > 2 else 3)
        assert len(chosen) * each <= 6
        taken += chosen * each
    assert sorted(taken) == sorted([0, 1, 2, 3] * 4)


def test_rollouts_go_on_with_fewer_rows(own_resident: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    own_resident.say = said.append
    generator = LocalGenerator(own_resident)
    decode, tried = generator.decode, []

    def small(model: Any, ids: Any, n: int, *rest: Any) -> Any:
        tried.append(len(ids) * n)
        if len(ids) * n > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(model, ids, n, *rest)

    monkeypatch.setattr(generator, "decode", small)
    prompts = [[{"role": "user", "content": f"Repeat this: {word}"}] for word in ("printer", "mail", "disk")]
    replies = generator.generate(prompts, n=4, sampling=Sampling(max_completion_length=4, seed=1))
    assert [len(group) for group in replies] == [4, 4, 4]
    assert tried[:3] == [12, 4, 2]
    assert max(tried[2:]) == 2
    assert len(said) == 1
    assert generator.generate(prompts, n=1, sampling=Sampling(max_completion_length=2))
    assert max(tried[2:]) == 2


def test_judging_goes_on_with_fewer_questions(own_resident: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [[render_judge("restart the spooler", reply)] for reply in ("restart it", "buy a printer", "spooler")]
    expected = LocalModel(LocalGenerator(own_resident)).ask(groups, VERDICTS)
    generator = LocalGenerator(own_resident)
    model, read = LocalModel(generator), generator.read

    def small(answering: Any, batch: Any) -> Any:
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(answering, batch)

    monkeypatch.setattr(generator, "read", small)
    for alone, together in zip(model.ask(groups, VERDICTS), expected, strict=True):
        assert alone[0] == pytest.approx(together[0], abs=1e-4)
