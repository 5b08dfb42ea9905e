"""When a GPU's memory runs out: the same work again, in smaller pieces."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

from qreason.errors import OutOfMemoryError
from qreason.machine.rows import free_memory

T = TypeVar("T")
BY_ROWS = {"grpo", "dr_grpo", "sapo", "luspo"}
"""GRPO losses that are a mean over the rows of a micro-batch; the others are sums over what a whole step has."""


class Recovering:
    """A TRL trainer that, out of memory, repeats a micro-batch in halves: same rows, same gradient up to rounding.

    Mixed in before SFTTrainer or GRPOTrainer by `recovering`. The gradients of earlier micro-batches are set aside
    during a backward pass, so that one that breaks off in the middle leaves nothing in them.
    """

    say: Callable[[str], None]
    args: Any
    state: Any
    parts = 1
    """Pieces that a micro-batch is cut into."""
    share = 1.0
    """What the piece at hand counts in the loss of its micro-batch."""
    piece: dict[str, Any] | None = None
    prepared: dict[str, Any] | None = None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        import torch

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        earlier = [parameter.grad for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        self.prepared = None
        step = self.state.global_step + 1
        while True:
            try:
                loss = self.in_parts(model, inputs, num_items_in_batch)
                break
            except torch.OutOfMemoryError:
                rows = row_count(self.prepared)
                if self.prepared is None or self.parts >= rows:
                    raise OutOfMemoryError(
                        f"step {step}: the GPU has not enough memory for one row of training"
                    ) from None
                if self.parts == 1:
                    self.say(f"out of GPU memory at step {step}: going on with smaller micro-batches, same gradient")
                self.parts = min(rows, self.parts * 2)
            for parameter in trained:
                parameter.grad = None
            free_memory()
        for parameter, before in zip(trained, earlier, strict=True):
            if before is not None:
                parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)
        return loss

    def in_parts(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        """The step of the trainer, or as many as there are pieces; the trainer counts the last one only."""
        step = super().training_step  # type: ignore[misc]
        if self.parts == 1:
            return step(model, inputs, num_items_in_batch)
        if self.prepared is None:
            model.train()
            self.prepared = self._prepare_inputs(inputs)
        pieces = split_rows(
            self.prepared, min(self.parts, row_count(self.prepared)), getattr(self.args, "loss_type", None)
        )
        losses = []
        try:
            for number, (self.piece, self.share) in enumerate(pieces):
                count = step if number == len(pieces) - 1 else self.uncounted
                losses.append(count(model, inputs, num_items_in_batch))
        finally:
            self.piece, self.share = None, 1.0
        return sum(losses)

    def uncounted(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        from transformers import Trainer

        return Trainer.training_step(self, model, inputs, num_items_in_batch)

    def _prepare_inputs(self, inputs: Any) -> Any:
        if self.piece is not None:
            return dict(self.piece)
        self.prepared = super()._prepare_inputs(inputs)  # type: ignore[misc]
        return dict(self.prepared)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        return loss if self.share == 1.0 else loss * self.share


def recovering(trainer: type, say: Callable[[str], None]) -> Any:
    """TRL's trainer class with recovery."""
    return type(trainer.__name__, (Recovering, trainer), {"say": staticmethod(say)})


def row_count(inputs: dict[str, Any] | None) -> int:
    return max((len(value) for value in (inputs or {}).values() if has_rows(value)), default=0)


def has_rows(value: Any) -> bool:
    return hasattr(value, "shape") and len(value.shape) > 0


def split_rows(inputs: dict[str, Any], parts: int, loss_type: str | None) -> list[tuple[dict[str, Any], float]]:
    """Pieces of a micro-batch, and what each counts in its loss."""
    rows = row_count(inputs)
    cuts = [rows * part // parts for part in range(parts + 1)]
    pieces = [
        {key: value[start:end] if has_rows(value) and len(value) == rows else value for key, value in inputs.items()}
        for start, end in pairwise(cuts)
    ]
    if loss_type in BY_ROWS:
        return [(piece, row_count(piece) / rows) for piece in pieces]
    if loss_type == "bnpo":
        tokens = [float(piece["completion_mask"].sum()) for piece in pieces]
        return [(piece, count / max(1.0, sum(tokens))) for piece, count in zip(pieces, tokens, strict=True)]
    return [(piece, 1.0) for piece in pieces]
