"""TRL: chosen rows, micro-batches in pieces, resumable steps, float32 adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# --- rows that are trained on ----------------------------------------------------------------------


class SelectedRows:
    """TRL's GRPO trainer, which trains on the rollouts that a `selection` chooses. Mixed in by `select_rows`.

    Read in TRL 1.14.2 and 1.16.0: `_prepare_inputs` calls `_generate_and_score_completions`, shuffles its rows,
    splits them into micro-batches and keeps those as `_buffered_inputs`, for `_compute_loss`; advantages are made of
    what `_calculate_rewards` returns, (rollouts, rewards).
    """

    args: Any
    selection: Any
    rewards_per_function: torch.Tensor
    _buffered_inputs: list[dict[str, Any]] | None
    _step: int

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        self.rewards_per_function = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        return self.rewards_per_function

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        return self.selection.choose(self, super()._generate_and_score_completions(inputs))  # type: ignore[misc]

    def _prepare_inputs(self, inputs: Any) -> Any:
        before = self._buffered_inputs
        prepared = super()._prepare_inputs(inputs)  # type: ignore[misc]
        if self._buffered_inputs is None or self._buffered_inputs is before:
            return prepared
        self._buffered_inputs = self.selection.pack(self, self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        if not len(inputs["completion_ids"]):  # the gradient is zero, not missing: the optimizer makes its step
            return sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad) * 0.0
        return super()._compute_loss(model, inputs) * inputs["row_share"]  # type: ignore[misc]


def select_rows(trainer: type, selection: Any) -> Any:
    """TRL's GRPO trainer class, training on the rollouts that `selection` (of qreason.training) chooses."""
    return type(trainer.__name__, (SelectedRows, trainer), {"selection": selection})


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


@contextmanager
def float32_adapter(model: Any) -> Iterator[None]:
    """Within it, a trainer may be made; afterwards the trainable weights are float32, with the values they had.

    Read in TRL 1.14.2 and 1.16.0: the trainers' __init__ casts an adapter on a quantized base to bfloat16, which
    rounds it, loses small updates and does not work with a float16 scaler (TRL #4901).
    """
    before = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
    yield
    for parameter in model.parameters():
        if parameter in before or parameter.requires_grad:
            parameter.data = before.get(parameter, parameter.data).to(parameter.device).float()
