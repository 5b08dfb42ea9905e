"""A reward model from ranked pairs (Bradley-Terry; InstructGPT, arXiv 2203.02155, section 3.5) on TRL's trainer.

An adapter with a scalar head on the resident base: nothing of the base is there twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qreason.data.pairs import filter_by_topic, hold_out, rank_draws
from qreason.errors import DataError, ModelError, OutOfMemoryError
from qreason.machine.files import read_jsonl, write_json
from qreason.machine.records import Draw
from qreason.machine.rows import is_out_of_memory
from qreason.model.classifier import LEVEL, PreferenceModel, render_ids, with_head
from qreason.model.load import lora_config
from qreason.recipe.training import Preference
from qreason.report.statistics import mean, share
from qreason.run.session import REWARD_MODEL, Artifact, Session
from qreason.types import Pair

HEAD = "base_model.model.score.weight"


def stage(settings: Preference, run: Session) -> Artifact:
    """Train a reward model on data.pairs or on what was sampled, and measure what was saved on held-out pairs."""
    pairs = rank_draws(run.draws(), read_jsonl(run.draws(), Draw)) if settings.data == "sampled" else run.pairs
    pairs = filter_by_topic(pairs, settings.about)
    learnt, kept_out = hold_out(pairs[: settings.rows], settings.heldout_share, run.recipe.seed)
    resident = run.resident
    if resident.backend == "unsloth":
        raise ModelError("a preference step trains on the plain base: set model.backend to plain")
    rows = [encode(resident.tokenizer, pair, resident.context_length) for pair in learnt]

    from transformers import set_seed
    from trl import RewardConfig, RewardTrainer

    from qreason.training.resuming import open_checkpoints
    from qreason.training.trainer import run_trainer, save_adapter, trl_config

    set_seed(run.recipe.seed)
    model = with_adapter(run, settings)
    checkpoints = open_checkpoints(run, settings)
    folder = checkpoints.folder
    config = RewardConfig(**{"max_length": None} | trl_config(settings, run, folder))
    try:
        trainer = run_trainer(
            RewardTrainer,
            config,
            rows,
            run,
            folder,
            model=model,
            shown={"loss": "loss", "accuracy": "accuracy"},
            checkpoints=checkpoints,
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            "the GPU has not enough memory for a micro-batch of pairs; lower preference.per_device_train_batch_size"
        ) from None
    saved = save_adapter(trainer, run, folder / REWARD_MODEL)  # with the head
    resident.tokenizer.save_pretrained(str(saved))
    figures = measure(PreferenceModel(str(saved), resident), kept_out)
    write_json(saved / LEVEL, {"level": figures["level"]["mean"]})
    write_json(folder / "preference.json", {"pairs": len(learnt), "heldout": len(kept_out)} | figures)
    right = figures["accuracy"]
    return Artifact(
        saved,
        f"{len(learnt)} pairs, {trainer.state.global_step} steps; of {len(kept_out)} held-out pairs "
        f"{right['mean']:.1%} [{right['low']:.0%}-{right['high']:.0%}] right",
    )


def encode(tokenizer: Any, pair: Pair, room: int) -> dict[str, list[int]]:
    """TRL's row of token ids, the same as the reward will read. Raises DataError for a side that does not fit."""
    row = {
        "chosen_ids": render_ids(tokenizer, pair.prompt, pair.chosen),
        "rejected_ids": render_ids(tokenizer, pair.prompt, pair.rejected),
    }
    if (longest := max(map(len, row.values()))) > room:
        raise DataError(f"{pair.source}: {longest} tokens, but the base's context is {room}; shorten or remove the row")
    return row


def with_adapter(run: Session, settings: Preference) -> Any:
    """The classifier with a LoRA to train: a fresh one, or one that begins with the weights of a policy's."""
    from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    start = run.disk.adapter(settings.start)
    if start is not None:
        config = PeftConfig.from_pretrained(str(start))
        config.inference_mode, config.base_model_name_or_path = False, None
    else:
        config = lora_config(run.recipe.model.lora)
    config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
    model = get_peft_model(with_head(run.resident), config)
    if start is not None:
        policy = load_peft_weights(str(start), device=str(run.resident.device))
        head = {HEAD: model.get_submodule(HEAD.removesuffix(".weight")).original_module.weight}
        set_peft_model_state_dict(model, policy | head)
    return model


def measure(model: PreferenceModel, pairs: Sequence[Pair]) -> dict[str, Any]:
    """On held-out pairs: `accuracy`, the share whose chosen reply has the higher output, `margin` and `level`.

    The margin is the mean difference of both outputs. The level is the mean of all: pairs teach differences alone and
    leave open where 0 is, so a reward is the sigmoid of what is above it (the bias of arXiv 2203.02155, section 3.5).
    """
    chosen = model.outputs([(pair.prompt, pair.chosen) for pair in pairs])
    rejected = model.outputs([(pair.prompt, pair.rejected) for pair in pairs])
    margins = [one - other for one, other in zip(chosen, rejected, strict=True)]
    return {
        "accuracy": share([margin > 0 for margin in margins]),
        "margin": mean(margins),
        "level": mean([*chosen, *rejected]),
    }
