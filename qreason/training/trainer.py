"""What the training stages share: TRL's arguments, and what is watched while a trainer runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback, set_seed

from qreason.data.prompts import SYSTEM_PROMPTS, lesson
from qreason.errors import OutOfMemoryError, TrainingError
from qreason.machine.files import write_jsonl
from qreason.machine.progress import Bar
from qreason.model.compat.peft import POLICY, name_base
from qreason.model.compat.trl import recast_adapter
from qreason.recipe.training import Training
from qreason.run.folder import CHECKPOINT
from qreason.run.session import Session

CALIBRATION = 32
"""Rows of the run's data that a compensating adapter is fitted to."""

MOST_OVERFLOWS = 20
"""Logged overflows in a row that stop a float16 run. Its scaler skips such steps and halves its scale of 65,536."""


def trl_config(settings: Training, run: Session, folder: Path) -> dict[str, Any]:
    """The keyword arguments of TRL's configs, every one explicit."""
    hardware = run.resident.hardware
    return {
        **settings.trl_arguments(),
        "output_dir": str(folder),
        "seed": run.recipe.seed,
        "use_cpu": hardware.device == "cpu",
        "bf16": hardware.autocast == "bfloat16",
        "fp16": hardware.autocast == "float16",
        "dataloader_pin_memory": hardware.device == "cuda",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        **settings.trl,
    }


def start_adapter(run: Session, settings: Training) -> None:
    """Seed everything, and put on the base what is trained further: an adapter of the run, or a fresh one."""
    set_seed(run.recipe.seed)
    if (start := run.disk.adapter(settings.start)) is not None:
        run.resident.load_adapter(start, trainable=True, checkpointing=settings.gradient_checkpointing)
    else:
        seed, checkpointing = run.recipe.seed, settings.gradient_checkpointing
        run.resident.new_adapter(run.recipe.model.lora, seed=seed, checkpointing=checkpointing)
        if run.recipe.model.quantization == "nf4" and run.recipe.model.lora.init == "quantization_error":
            compensate_quantization(run)


def compensate_quantization(run: Session) -> None:
    """Begin the fresh adapter with what 4 bits took from the base, as the texts of the run show it."""
    from qreason.model.compensation import compensate

    if run.resident.backend == "unsloth":
        run.say("model.lora.init: quantization_error is for model.backend: plain; Unsloth's adapter begins at zero")
        return
    data = run.recipe.data
    examples = run.examples("sft" if data.sft else "prompts")[:CALIBRATION]
    chats = [lesson(example, SYSTEM_PROMPTS[data.prompt]) for example in examples]
    texts = [run.resident.tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    before, after = compensate(run.resident, texts)
    run.say(f"4 bits change the layers' outputs by {before:.1%}; with the adapter they begin {after:.1%} off")


class Watch(TrainerCallback):  # type: ignore[misc]
    """Writes metrics.jsonl, moves the progress bar, and stops a run whose loss is no number."""

    def __init__(self, folder: Path, bar: Bar, shown: tuple[str, ...]) -> None:
        self.folder, self.bar, self.shown = folder, bar, shown
        self.overflows = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.total(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        numbers = {key: value for key, value in (logs or {}).items() if isinstance(value, (int, float))}
        row = {"step": state.global_step, **{key: finite(value) for key, value in numbers.items()}}
        write_jsonl(self.folder / "metrics.jsonl", [row], append=True)
        overflowed = args.fp16 and not math.isfinite(numbers.get("grad_norm", 0.0))
        self.overflows = self.overflows + 1 if overflowed else 0
        searching = overflowed and self.overflows < MOST_OVERFLOWS
        for key in ("loss",) if searching else ("loss", "grad_norm"):
            if key in numbers and not math.isfinite(numbers[key]):
                raise TrainingError(
                    f"{key} is {numbers[key]} at step {state.global_step}; no adapter was written. "
                    f"Lower the learning rate ({args.learning_rate:g}) or max_grad_norm ({args.max_grad_norm:g})"
                )
        self.bar.note(" ".join(f"{name.split('/')[-1]} {numbers[name]:.3g}" for name in self.shown if name in numbers))


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def train(trainer: Any, run: Session, folder: Path) -> Path:
    """Session a TRL trainer on the resident model and save its adapter; nothing is saved after a failure."""
    run_trainer(trainer, run, folder)
    run.resident.adapter = save_adapter(trainer, run, folder / "adapter")
    return run.resident.adapter


def run_trainer(trainer: Any, run: Session, folder: Path) -> None:
    """Session a TRL trainer. Raises TrainingError where it leaves weights that are no numbers."""
    import torch

    trainer.remove_callback(PrinterCallback)
    recast_adapter(trainer)
    try:
        trainer.train()
    except OutOfMemoryError as error:
        kept = save_adapter(trainer, run, folder / CHECKPOINT)
        raise OutOfMemoryError(
            f"{error}; the adapter of the last full step is in {kept}. `qreason plan` shows what to change"
        ) from None
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise TrainingError(f"{name} is no number after training; no adapter was written. Lower the learning rate")


def save_adapter(trainer: Any, run: Session, folder: Path) -> Path:
    """The trained adapter as a PEFT folder that names the recipe's base."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    name_base(model, run.recipe.model.base)
    model.save_pretrained(str(folder), selected_adapters=[POLICY], save_embedding_layers=False)
    return folder
