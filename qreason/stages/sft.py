"""Supervised fine-tuning: the adapter learns the form from written-up incidents; the loss covers the reply only."""

from __future__ import annotations

from typing import Any

from qreason.data.examples import check_lengths
from qreason.data.prompts import SYSTEM_PROMPTS, teach
from qreason.recipe.training import Sft
from qreason.run.session import Artifact, Session
from qreason.types import Example


def stage(settings: Sft, run: Session) -> Artifact:
    """Train an adapter on data.sft, or on what was sampled: a fresh one, or one of the run."""
    examples = (run.sampled() if settings.data == "sampled" else run.examples("sft"))[: settings.rows]
    resident = run.resident
    rows = [conversation(example, SYSTEM_PROMPTS[run.recipe.data.prompt]) for example in examples]
    texts = [resident.tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in rows]
    lengths = [len(resident.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    check_lengths(lengths, examples, resident.context_length, f"the base's context of {resident.context_length}")

    from trl import SFTConfig, SFTTrainer

    from qreason.training.resuming import open_checkpoints
    from qreason.training.trainer import start_adapter, train, trl_config

    start_adapter(run, settings)
    checkpoints = open_checkpoints(run, settings)
    # Unsloth would lay all rows of a micro-batch into one, which cannot be halved when memory runs out.
    defaults = {"max_length": resident.context_length, "completion_only_loss": True, "padding_free": False}
    config = SFTConfig(**defaults | trl_config(settings, run, checkpoints.folder))
    shown = ("loss", "mean_token_accuracy")
    adapter, state = train(SFTTrainer, config, rows, run, checkpoints.folder, shown=shown, checkpoints=checkpoints)
    kind = "sampled rows" if settings.data == "sampled" else "incidents"
    return Artifact(adapter, f"{len(examples)} {kind}, {state.global_step} steps")


def conversation(example: Example, system: str) -> dict[str, Any]:
    """TRL's prompt/completion row in chat messages."""
    messages, reply = teach(example, system)
    return {"prompt": messages, "completion": [{"role": "assistant", "content": reply}]}
