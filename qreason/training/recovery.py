"""Recovery when a GPU's memory runs out: the same work again, in smaller pieces."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from qreason.errors import OutOfMemoryError
from qreason.machine.rows import free_memory, is_out_of_memory
from qreason.model.compat.trl import Cut

BY_ROWS = {"grpo", "dr_grpo", "sapo", "luspo"}
"""GRPO losses that are a mean over the rows of a micro-batch; the others are sums over a whole step."""


class Recovery:
    """How a TRL trainer computes a micro-batch: whole, or in `parts` once memory ran out; same gradient up to rounding.

    The number of parts is raised permanently, and that is reported once. The gradients of earlier micro-batches are set
    aside during a backward pass, so that one that breaks off in the middle leaves nothing in them.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.parts = say, 1

    def __call__(self, trainer: Any, model: Any, attempt: Callable[[Cut | None], Any]) -> Any:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        earlier = [parameter.grad for parameter in trained]
        for parameter in trained:
            parameter.grad = None

        def cut(inputs: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
            return split_rows(
                inputs, max(1, min(self.parts, row_count(inputs))), getattr(trainer.args, "loss_type", None)
            )

        while True:
            try:
                loss = attempt(cut if self.parts > 1 else None)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self.double_parts(trainer)
            for parameter in trained:
                parameter.grad = None
            free_memory()
        for parameter, before in zip(trained, earlier, strict=True):
            if before is not None:
                parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)
        return loss

    def double_parts(self, trainer: Any) -> None:
        """Raises OutOfMemoryError where a piece is one row already."""
        step, rows = trainer.state.global_step + 1, row_count(trainer.prepared)
        if trainer.prepared is None or self.parts >= rows:
            raise OutOfMemoryError(f"step {step}: the GPU has not enough memory for one row of training") from None
        if self.parts == 1:
            self.say(f"out of GPU memory at step {step}: going on with smaller micro-batches, same gradient")
        self.parts = min(rows, self.parts * 2)


def compute_whole(trainer: Any, model: Any, attempt: Callable[[Cut | None], Any]) -> Any:
    """A micro-batch as it is, in one of several processes: they add up their gradients in the backward pass."""
    try:
        return attempt(None)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        step = trainer.state.global_step + 1
        raise OutOfMemoryError(
            f"step {step}: the GPU has not enough memory; with several processes micro-batches are not cut: lower "
            "per_device_train_batch_size, and raise gradient_accumulation_steps"
        ) from None


def row_count(inputs: dict[str, Any] | None) -> int:
    rows = max((len(value) for value in (inputs or {}).values() if has_rows(value)), default=0)
    return max(rows, len(packed_starts(inputs)) if inputs else 0)


def packed_starts(inputs: dict[str, Any]) -> list[int]:
    """Where the rows begin that were packed into one, by TRL's positions; none where rows stand beside each other."""
    positions = inputs.get("position_ids")
    if positions is None or "attention_mask" in inputs or len(positions) != 1:
        return []
    starts: list[int] = (positions[0] == 0).nonzero().flatten().tolist()
    return starts


def has_rows(value: Any) -> bool:
    return hasattr(value, "shape") and len(value.shape) > 0


def split_rows(inputs: dict[str, Any], parts: int, loss_type: str | None) -> list[tuple[dict[str, Any], float]]:
    """Pieces of a micro-batch, and the weight of each in its loss."""
    rows, starts = row_count(inputs), packed_starts(inputs)
    cuts = [rows * part // parts for part in range(parts + 1)]

    def piece(value: Any, start: int, end: int) -> Any:
        if not has_rows(value):
            return value
        if starts and value.shape[:2] == inputs["position_ids"].shape:
            return value[:, starts[start] : starts[end] if end < rows else None]
        return value[start:end] if len(value) == rows else value

    pieces = [{key: piece(value, *cut) for key, value in inputs.items()} for cut in pairwise(cuts)]
    if loss_type in BY_ROWS:
        return [(piece, row_count(piece) / rows) for piece in pieces]
    if loss_type == "bnpo":
        tokens = [float(piece["completion_mask"].sum()) for piece in pieces]
        return [(piece, count / max(1.0, sum(tokens))) for piece, count in zip(pieces, tokens, strict=True)]
    return [(piece, 1.0) for piece in pieces]
