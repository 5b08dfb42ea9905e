"""On-policy distillation (arXiv 2306.13649) on TRL's trainer: the student replies, the teacher's distribution teaches.

For every token of the student's own replies the divergence from the teacher's next-token distribution is lowered. It
compares whole distributions, so both must have the same vocabulary; a student with another one learns from a teacher's
replies instead (`sample` with a teacher, then `sft`).
"""

from __future__ import annotations

from qreason.data.prompts import render, system_prompt
from qreason.errors import ModelError
from qreason.model.resident import Resident
from qreason.recipe.training import Distill
from qreason.run.checkpoint import open_teacher
from qreason.run.session import Artifact, Session


def stage(settings: Distill, run: Session) -> Artifact:
    """Train the newest adapter of the run (or another, or a fresh one) towards the teacher on data.prompts."""
    examples, system = run.examples("prompts")[: settings.rows], system_prompt(run.recipe.data)
    student, teacher = run.resident, open_teacher(settings.teacher, run.say).resident
    check_vocabularies(student, teacher, settings.teacher.model)

    from trl import DistillationConfig, DistillationTrainer

    from qreason.training.resuming import open_checkpoints
    from qreason.training.trainer import start_adapter, train, trl_config

    start_adapter(run, settings)
    checkpoints = open_checkpoints(run, settings)
    sampling = run.recipe.sampling.model_dump(exclude={"max_num_seqs"})
    adapter, state = train(
        DistillationTrainer,
        DistillationConfig(**sampling | trl_config(settings, run, checkpoints.folder)),
        [{"prompt": render(example, system)} for example in examples],
        run,
        checkpoints.folder,
        shown={"loss": "loss", "entropy": "entropy"},
        checkpoints=checkpoints,
        teacher_model=teacher.model.get_base_model() if teacher.wrapped else teacher.model,
    )
    losses = [row["loss"] for row in state.log_history if "loss" in row]
    divergence = f", divergence {losses[0]:.3f} to {losses[-1]:.3f} nats per token" if losses else ""
    return Artifact(adapter, f"{state.global_step} steps{divergence}")


def check_vocabularies(student: Resident, teacher: Resident, name: str) -> None:
    """ModelError unless both have the same tokens, at the same places of equally large distributions."""
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise ModelError(
            f"distill: {name} and {student.settings.base} have different tokenizers, so their distributions cannot be "
            "compared; take a teacher of the student's family, or learn from its replies: sample with a teacher, then "
            "sft with data: sampled"
        )
    sizes = [one.model.config.get_text_config().vocab_size for one in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"distill: {name} has {sizes[0]} places in its distribution, {student.settings.base} {sizes[1]} (the same "
            "tokens, padded differently); take a teacher with as many, or sample with this one and sft on that"
        )
