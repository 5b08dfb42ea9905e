"""What the training stages share: TRL's arguments, one way to run a trainer, and what is watched while it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed

from qreason.data.prompts import lesson, system_prompt
from qreason.errors import OutOfMemoryError, TrainingError
from qreason.machine import ranks
from qreason.machine.files import write_jsonl
from qreason.machine.progress import Bar, progress_bar
from qreason.model.compat.peft import POLICY, name_base
from qreason.model.compat.transformers import use_one_gpu
from qreason.model.compat.trl import float32_adapter, in_pieces, resumable
from qreason.model.compat.trl_logprobs import check_kernel
from qreason.recipe.training import Training
from qreason.run.folder import CHECKPOINT
from qreason.run.resume import step_of
from qreason.run.session import Session
from qreason.training.arguments import trl_arguments
from qreason.training.recovery import Recovery, compute_whole
from qreason.training.resuming import Checkpoints

CALIBRATION = 32
"""Rows of the run's data that a compensating adapter is fitted to."""
MOST_OVERFLOWS = 20
"""Consecutive logged overflows that stop a float16 run; its scaler skips such steps and halves its scale of 65,536."""


def trl_config(settings: Training, run: Session, folder: Path) -> dict[str, Any]:
    """The keyword arguments of TRL's configs, every one explicit."""
    return trl_arguments(settings, run.recipe.seed, run.resident.hardware, folder)


def start_adapter(run: Session, settings: Training) -> None:
    """Seed everything, and put the adapter to train on the base: one of the run, or a fresh one."""
    seed, checkpointing = run.recipe.seed, settings.gradient_checkpointing
    set_seed(seed)
    if (start := run.disk.adapter(settings.start)) is not None:
        run.resident.load_adapter(start, trainable=True, checkpointing=checkpointing)
    else:
        run.resident.new_adapter(run.recipe.model.lora, seed=seed, checkpointing=checkpointing)
        if run.recipe.model.quantization == "nf4" and run.recipe.model.lora.init == "quantization_error":
            compensate_quantization(run)


def compensate_quantization(run: Session) -> None:
    """Initialize the fresh adapter so that it offsets the NF4 quantization error on texts of the run."""
    from qreason.model.compensation import compensate

    if run.resident.backend == "unsloth":
        run.say("model.lora.init: quantization_error is for model.backend: plain; Unsloth's adapter starts at zero")
        return
    data = run.recipe.data
    examples = run.examples("sft" if data.sft else "prompts")[:CALIBRATION]
    chats = [lesson(example, system_prompt(data)) for example in examples]
    texts = [run.resident.tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    before, after = compensate(run.resident, texts)
    run.say(f"NF4 changes the layers' outputs by {before:.1%}, with the adapter's initial weights by {after:.1%}")


class Steps(TrainerCallback):  # type: ignore[misc]
    """Tells checkpoints when the weights change, and has the trainer report each step to them."""

    def __init__(self, checkpoints: Checkpoints, trainer: Any) -> None:
        self.checkpoints, self.trainer = checkpoints, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.checkpoints.resumed:
            self.checkpoints.load_progress(self.trainer, self.checkpoints.resumed)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.checkpoints.stepping = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.checkpoints.asked, control.should_save = control.should_save, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.checkpoints.asked = control.should_save


class Watch(TrainerCallback):  # type: ignore[misc]
    """Writes metrics.jsonl, moves the progress bar, and stops a run whose loss is not finite."""

    def __init__(self, folder: Path, bar: Bar, shown: Mapping[str, str]) -> None:
        self.folder, self.bar, self.shown, self.overflows = folder, bar, shown, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.total(state.max_steps)
        self.bar.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        numbers = {key: value for key, value in (logs or {}).items() if isinstance(value, (int, float))}
        row = {key: value if math.isfinite(value) else None for key, value in numbers.items()}  # JSON has no NaN
        if ranks.is_first():
            write_jsonl(self.folder / "metrics.jsonl", [{"step": state.global_step, **row}], append=True)
        overflowed = args.fp16 and not math.isfinite(numbers.get("grad_norm", 0.0))
        self.overflows = self.overflows + 1 if overflowed else 0
        scaling_down = overflowed and self.overflows < MOST_OVERFLOWS
        for key in ("loss",) if scaling_down else ("loss", "grad_norm"):
            if key in numbers and not math.isfinite(numbers[key]):
                raise TrainingError(
                    f"{key} is {numbers[key]} at step {state.global_step}; no adapter was written. "
                    f"Lower the learning rate ({args.learning_rate:g}) or max_grad_norm ({args.max_grad_norm:g})"
                )
        self.bar.note(", ".join(f"{title} {numbers[key]:.3g}" for key, title in self.shown.items() if key in numbers))


def train(
    trainer_class: type, config: Any, rows: list[dict[str, Any]], run: Session, folder: Path, **more: Any
) -> tuple[Path, Any]:
    """Train the adapter on the base and save it as `adapter/`; its folder, and the state of TRL's trainer.

    `more` as for run_trainer. Out of GPU memory, it goes on in smaller pieces, unless it is one of several processes:
    those add up gradients in the backward pass. Nothing is saved after a failure.
    """
    recovering = in_pieces(trainer_class, Recovery(run.say) if ranks.count() == 1 else compute_whole)
    trainer = run_trainer(recovering, config, rows, run, folder, model=run.resident.model, **more)
    run.resident.adapter = save_adapter(trainer, run, folder / "adapter")
    return run.resident.adapter, trainer.state


def run_trainer(
    trainer_class: type,
    config: Any,
    rows: list[dict[str, Any]],
    run: Session,
    folder: Path,
    *,
    shown: Mapping[str, str],
    checkpoints: Checkpoints | None = None,
    **more: Any,
) -> Any:
    """Run a TRL trainer on rows under a progress bar, which names the metrics `shown`; `more` are its other arguments.

    With `checkpoints` it continues from the newest one. Raises TrainingError where it leaves weights that are not
    finite.
    """
    import torch

    use_one_gpu(config)
    if trouble := check_kernel(run.resident.hardware.device):
        run.say(f"TRL's fused kernel does not work here, its plain one is used ({trouble}); `qreason doctor` says more")
    with progress_bar(folder.name) as bar:
        with float32_adapter(more["model"]):
            trainer = (resumable(trainer_class, checkpoints) if checkpoints else trainer_class)(
                args=config,
                train_dataset=Dataset.from_list(rows),
                processing_class=run.resident.tokenizer,
                callbacks=[Watch(folder, bar, shown)],
                **more,
            )
        trainer.remove_callback(PrinterCallback)
        try:
            if checkpoints:
                train_resumably(trainer, checkpoints, run)
            else:
                trainer.train()
        except OutOfMemoryError as error:
            kept = save_adapter(trainer, run, folder / CHECKPOINT)
            raise OutOfMemoryError(
                f"{error}; the adapter of the last full step is in {kept}. `qreason plan` shows what to change"
            ) from None
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise TrainingError(f"{name} is not finite after training; no adapter was written. Lower the learning rate")
    return trainer


def train_resumably(trainer: Any, checkpoints: Checkpoints, run: Session) -> None:
    """Train from the newest checkpoint; whatever stops it, the last full step is kept."""
    if checkpoints.was_at_end(trainer):
        return
    trainer.add_callback(Steps(checkpoints, trainer))
    kept = None
    with checkpoints.interruptible():
        try:
            trainer.train(resume_from_checkpoint=str(checkpoints.resumed) if checkpoints.resumed else None)
        except BaseException:  # an interruption too
            with suppress(Exception):  # a full disk; the first error counts
                kept = checkpoints.rescue(trainer)
            if kept:
                run.say(f"{checkpoints.folder.name}: step {step_of(kept)} is kept; the same command continues after it")
            raise


def save_adapter(trainer: Any, run: Session, folder: Path) -> Path:
    """The trained adapter as a PEFT folder."""
    return write_adapter(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), run, folder)


def write_adapter(model: Any, run: Session, folder: Path) -> Path:
    """A model's adapter as a PEFT folder that names the recipe's base; the first process of a launch writes it."""
    if ranks.is_first():
        name_base(model, run.recipe.model.base)
        model.save_pretrained(str(folder), selected_adapters=[POLICY], save_embedding_layers=False)
    return folder
