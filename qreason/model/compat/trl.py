"""TRL: prompts read once, micro-batches computed in pieces, steps that can be resumed, adapters that stay float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# --- each prompt once ------------------------------------------------------------------------------


class SharedPrompts:
    """TRL's GRPO trainer, reading each prompt once per micro-batch. Mixed in before GRPOTrainer by `sharing_prompts`.

    The replies of a group share their prompt, which is often longer than they are. Its keys and values are computed
    once for all its replies; gradients flow back through them, so the step's gradient is the same up to rounding.

    Read in TRL 1.14.2 and 1.16.0: log-probabilities come from `_get_per_token_logps_and_entropies`, which calls the
    model it is given with input_ids and attention_mask. 1.14.2 expects logits, and with Liger uses the model's parts;
    1.16.0, whose models have a fused LM head, expects log-probabilities and entropies.
    """

    args: Any
    temperature: float

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, **kwargs: Any
    ) -> Any:
        uses_parts = kwargs.get("compute_aux_loss") or getattr(self, "use_liger_kernel", False)
        if can_share_prompts(self.args) and not uses_parts:
            model = partial(answer_once, model, logits_to_keep, self.temperature)
        compute = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        return compute(model, input_ids, attention_mask, logits_to_keep, **kwargs)


def answer_once(
    model: Any, completion: int, temperature: float, *, fused_lm_head: bool = False, **inputs: Any
) -> SimpleNamespace:
    """What model(...) returns: logits, or what a fused LM head gives, for the last `completion` tokens of each row."""
    if not fused_lm_head:
        return read_prompts_once(model, **inputs)
    from trl.trainer.utils import selective_log_softmax_and_entropy

    labels = inputs.pop("labels")[:, -completion:]
    logits = read_prompts_once(model, logits_to_keep=completion + 1, **inputs).logits[:, :-1]
    scored = selective_log_softmax_and_entropy(
        logits, labels.clamp(min=0), temperature=temperature, row_mask=(labels != -100).int()
    )
    return SimpleNamespace(log_probs=scored[0], entropy=scored[1])


def can_share_prompts(args: Any) -> bool:
    """On a CPU only: a GPU reads repeated prompts at little cost; and checkpointed layers keep no cache."""
    return bool(args.use_cpu and not args.gradient_checkpointing)


def read_prompts_once(
    model: Any, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, use_cache: bool = False
) -> SimpleNamespace:
    """What model(...) returns: the last `logits_to_keep` logits of each row, (rows, logits_to_keep, vocabulary).

    input_ids and attention_mask are (rows, tokens); all but the last `logits_to_keep` - 1 tokens of a row are prompt.
    """
    import torch
    from transformers import DynamicCache

    length = input_ids.shape[1] - logits_to_keep + 1
    prompts = torch.stack([input_ids, attention_mask], 1)[:, :, :length]
    each, which = torch.unique(prompts, dim=0, return_inverse=True)
    cache = DynamicCache(config=model.config)
    first = model(
        input_ids=each[:, 0], attention_mask=each[:, 1], past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits
    cache.batch_select_indices(which)
    rest = model(
        input_ids=input_ids[:, length:], attention_mask=attention_mask, past_key_values=cache, use_cache=True
    ).logits
    return SimpleNamespace(logits=torch.cat([first[which], rest], 1))


def sharing_prompts(trainer: type) -> Any:
    """TRL's GRPO trainer class, reading prompts once."""
    return type(trainer.__name__, (SharedPrompts, trainer), {})


# --- micro-batches in pieces -----------------------------------------------------------------------

Cut = Callable[[dict[str, Any]], Sequence[tuple[dict[str, Any], float]]]
"""A prepared micro-batch -> its pieces, and the weight of each in the loss of the micro-batch."""
Policy = Callable[[Any, Any, Callable[[Cut | None], Any]], Any]
"""(trainer, model, attempt) -> the loss of a micro-batch; attempt(None) computes it whole, attempt(cut) in pieces."""


class InPieces:
    """A TRL trainer whose `policy` decides how a micro-batch is computed. Mixed in before a trainer by `in_pieces`.

    Read in TRL 1.14.2 and 1.16.0, transformers 5.10.0 and 5.24.0: Trainer.training_step passes the result of
    `_prepare_inputs` to `compute_loss`. The GRPO and distillation trainers make rollouts in the first and count their
    micro-batches around the second, so the prepared batch is kept, and only the last piece is counted.
    """

    policy: Policy
    piece: dict[str, Any] | None = None
    share = 1.0
    """The weight of the current piece in the loss of its micro-batch."""
    prepared: dict[str, Any] | None = None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.prepared = None

        def attempt(cut: Cut | None) -> Any:
            if cut is None:
                return super(InPieces, self).training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
            return self.step_by_piece(cut, model, inputs, num_items_in_batch)

        return self.policy(self, model, attempt)

    def step_by_piece(self, cut: Cut, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        """The trainer's step for each piece; only the last one is counted."""
        from transformers import Trainer

        if self.prepared is None:
            model.train()
            self.prepared = self._prepare_inputs(inputs)
        pieces = cut(self.prepared)
        losses = []
        try:
            for number, (self.piece, self.share) in enumerate(pieces):
                last = number == len(pieces) - 1
                step = super().training_step if last else partial(Trainer.training_step, self)  # type: ignore[misc]
                losses.append(step(model, inputs, num_items_in_batch))
        finally:
            self.piece, self.share = None, 1.0
        return sum(losses)

    def _prepare_inputs(self, inputs: Any) -> Any:
        if self.piece is not None:
            return dict(self.piece)
        self.prepared = super()._prepare_inputs(inputs)  # type: ignore[misc]
        return dict(self.prepared)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        return loss if self.share == 1.0 else loss * self.share


def in_pieces(trainer: type, policy: Policy) -> Any:
    """TRL's trainer class, with micro-batches computed as the policy decides."""
    return type(trainer.__name__, (InPieces, trainer), {"policy": staticmethod(policy)})


# --- checkpoints -----------------------------------------------------------------------------------


class Resumable:
    """A TRL trainer that reports each step to `checkpoints` and starts from one. Mixed in by `resumable`.

    Read in transformers 5.17: `_save_checkpoint` is called after the step's logging where a callback set
    control.should_save; the others by train(resume_from_checkpoint). TRL's RepeatSampler goes on drawing from its own
    random source from epoch to epoch, so the draws of earlier epochs are repeated.
    """

    checkpoints: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.checkpoints.asked:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.checkpoints.step_done(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.checkpoints.load_weights(self, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint:
            self.checkpoints.load_optimizer(self, Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        pass  # with the optimizer

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint:
            self.checkpoints.load_random()

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        if hasattr(sampler, "mini_repeat_count"):
            for _ in range(self.checkpoints.finished_epochs()):
                next(iter(sampler), None)
        return sampler


def resumable(trainer: type, checkpoints: Any) -> Any:
    """TRL's trainer class, with checkpoints of its own."""
    return type(trainer.__name__, (Resumable, trainer), {"checkpoints": checkpoints})


# --- adapters --------------------------------------------------------------------------------------


def recast_adapter(trainer: Any) -> None:
    """Cast trainable weights back to float32.

    Read in TRL 1.14.2 and 1.16.0: the trainers' __init__ casts an adapter on a quantized base to bfloat16, which loses
    small updates and does not work with a float16 scaler (TRL #4901).
    """
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
