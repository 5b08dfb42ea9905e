"""Supervised fine-tuning: the adapter learns to reply as the data do; the loss covers the assistant's turns only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qreason.data.examples import check_lengths
from qreason.data.prompts import lesson, system_prompt, teach, unlearned
from qreason.data.turns import mask_turns
from qreason.recipe.training import Sft
from qreason.run.session import Artifact, Session
from qreason.types import Example


def stage(settings: Sft, run: Session) -> Artifact:
    """Train an adapter on data.sft, or on what was sampled: a fresh one, or one of the run."""
    examples = (run.sampled() if settings.data == "sampled" else run.examples("sft"))[: settings.rows]
    resident, system = run.resident, system_prompt(run.recipe.data)
    chats = [lesson(example, system) for example in examples]
    texts = [resident.tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    lengths = [len(resident.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    check_lengths(lengths, examples, resident.context_length, f"the base's context of {resident.context_length}")
    rows = training_rows(settings, resident.tokenizer, examples, system)

    from trl import SFTConfig, SFTTrainer

    from qreason.training.resuming import open_checkpoints
    from qreason.training.trainer import start_adapter, train, trl_config

    start_adapter(run, settings)
    checkpoints = open_checkpoints(run, settings)
    # Unsloth would lay all rows of a micro-batch into one, which cannot be halved when memory runs out.
    defaults = {"max_length": resident.context_length, "completion_only_loss": True, "padding_free": False}
    config = SFTConfig(**defaults | trl_config(settings, run, checkpoints.folder))
    shown = {"loss": "loss", "mean_token_accuracy": "token accuracy"}
    adapter, state = train(SFTTrainer, config, rows, run, checkpoints.folder, shown=shown, checkpoints=checkpoints)
    kind = "sampled rows" if settings.data == "sampled" else "rows"
    return Artifact(adapter, f"{len(examples)} {kind}, {state.global_step} steps")


def training_rows(settings: Sft, tokenizer: Any, examples: Sequence[Example], system: str) -> list[dict[str, Any]]:
    """TRL's rows: prompt and completion; where the loss covers several turns of a chat, token ids and a mask.

    TRL's own mask of turns needs generation marks, which few chat templates have.
    """
    if settings.turns == "last" or not any(example.history for example in examples):
        return [conversation(example, system) for example in examples]
    return [mask_turns(tokenizer, lesson(example, system), example.source, unlearned(example)) for example in examples]


def conversation(example: Example, system: str) -> dict[str, Any]:
    """TRL's prompt/completion row in chat messages."""
    messages, reply = teach(example, system)
    return {"prompt": messages, "completion": [{"role": "assistant", "content": reply}]}
