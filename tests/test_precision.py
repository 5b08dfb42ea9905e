"""Number formats: what cards without bfloat16 get, and when a float16 run is stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import RecipeWriter

from qreason.errors import TrainingError
from qreason.machine import hardware
from qreason.machine.hardware import Hardware
from qreason.recipe.load import load_recipe
from qreason.run.session import Session
from qreason.stages import run_stage
from qreason.training.trainer import MOST_OVERFLOWS, Watch


def fake_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> Hardware:
    """What detect() says of a GPU that claims to do bfloat16 whatever it is, as torch does by emulation."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    found = hardware.detect()
    monkeypatch.undo()
    return found


@pytest.mark.parametrize(
    ("capability", "number"), [((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((8, 9), "bfloat16")]
)
def test_bfloat16_is_used_from_capability_8_only(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], number: str
) -> None:
    found = fake_card(monkeypatch, capability)
    assert (found.device, found.dtype, found.autocast, found.attention) == ("cuda", number, number, "sdpa")


class ReachedError(Exception):
    """Training would begin now."""


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_on_a_t4_no_number_is_bfloat16_and_adapters_are_float32(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    from transformers import Trainer

    t4 = replace(fake_card(monkeypatch, (7, 5)), device="cpu")  # its number formats, on what is there to compute
    monkeypatch.setattr(hardware, "detect", lambda: t4)
    seen: dict[str, Any] = {}

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        seen["trainer"] = self
        raise ReachedError

    monkeypatch.setattr(Trainer, "train", begin)
    file = write_recipe(("{base: qreason/tiny}", "{base: qreason/tiny, quantization: nf4}"))
    text = file.read_text().partition("  - evaluate")[0]
    file.write_text(text + f"  - {stage}: {{trl: {{}}{', preflight: false' if stage == 'grpo' else ''}}}\n")
    run = Session.open(load_recipe(str(file)), Path("runs/t4"), say=lambda line: None)
    with pytest.raises(ReachedError):
        run_stage(run.recipe.steps[0], run)
    trainer = seen["trainer"]
    assert (trainer.args.fp16, trainer.args.bf16) == (True, False)
    assert trainer.model.config._attn_implementation == "sdpa"
    trained = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert trained == {torch.float32}
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    assert torch.bfloat16 not in {tensor.dtype for tensor in tensors}
    layers = [module for module in trainer.model.modules() if hasattr(module, "compute_dtype")]
    assert layers
    assert {layer.compute_dtype for layer in layers} == {torch.float16}


def watched(tmp_path: Path) -> Any:
    bar: Any = SimpleNamespace(total=lambda n: None, advance=lambda n: None, note=lambda text: None)
    watch = Watch(tmp_path, bar, {"loss": "loss"})

    def log(fp16: bool, **logs: float) -> None:
        arguments = SimpleNamespace(fp16=fp16, learning_rate=1e-3, max_grad_norm=1.0)
        watch.on_log(arguments, SimpleNamespace(global_step=3), None, logs)

    return log


def test_a_float16_run_may_skip_steps_while_its_scale_is_found_but_not_for_ever(tmp_path: Path) -> None:
    log = watched(tmp_path)
    for _ in range(5):
        log(True, loss=1.0, grad_norm=float("inf"))
    log(True, loss=1.0, grad_norm=0.5)
    for _ in range(MOST_OVERFLOWS - 1):
        log(True, loss=1.0, grad_norm=float("inf"))
    with pytest.raises(TrainingError, match="grad_norm is inf"):
        log(True, loss=1.0, grad_norm=float("inf"))


def test_a_loss_that_is_no_number_stops_any_run_at_once(tmp_path: Path) -> None:
    log = watched(tmp_path)
    with pytest.raises(TrainingError, match="loss is nan"):
        log(True, loss=float("nan"), grad_norm=1.0)
    with pytest.raises(TrainingError, match="grad_norm is inf"):
        log(False, loss=1.0, grad_norm=float("inf"))
