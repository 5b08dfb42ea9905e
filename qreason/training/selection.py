"""The rollouts of a GRPO step that are trained on: those that teach something, or the most informative ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qreason.training.recovery import BY_ROWS, has_rows

if TYPE_CHECKING:
    import torch

Batch = dict[str, Any]
"""Tensors with a row per rollout, and numbers of the whole, as TRL hands them on."""


class Selection:
    """Which rollouts a GRPO trainer computes log-probabilities and gradients of, and in which micro-batches.

    A rollout without advantage adds nothing to the gradient, nor does one that is left out of the loss. Both are
    dropped; the loss is still divided by what TRL counts. What is left is packed into fewer micro-batches, those of a
    prompt side by side, without the padding that only dropped rollouts needed.

    With `pods`, a step is one of TRL's on so many replies per prompt, chosen by max-variance (PODS, arXiv 2504.13818).
    """

    def __init__(self, pods: int | None = None) -> None:
        self.pods = pods

    def choose(self, trainer: Any, batch: Batch) -> Batch:
        """The batch, in the order of its groups; new columns: group, whether a row counts, whether it is trained."""
        import torch

        group = trainer.num_generations
        in_loss = batch["completion_mask"].bool()
        counted = torch.ones_like(in_loss[:, 0])
        if self.pods:
            totals = weigh_rewards(trainer)
            counted = choose_most_varied(totals.where(in_loss.any(1), math.nan), group, self.pods)
            advantages = advantages_among(totals.where(counted, math.nan), group, trainer.scale_rewards)
            tokens = (in_loss & counted[:, None]).sum().to(batch["num_items_in_batch"])
            batch = batch | {"advantages": advantages, "num_items_in_batch": tokens}
        trained = counted
        if not needs_all_rows(trainer):
            trained = trained & in_loss.any(1)
            if not trainer.beta:
                trained = trained & teaches(batch["advantages"], group)
        trainer._metrics["train"]["trained_share"].append(trained.float().mean().item())
        groups = torch.arange(len(trained), device=trained.device) // group
        return batch | {"group": groups, "counted": counted, "trained": trained}

    def pack(self, trainer: Any, parts: Sequence[Batch]) -> list[Batch]:
        """As many micro-batches as `parts`, with the rows that are trained on; the last ones may be empty.

        Rows stay in their optimizer step. `row_share` is what the mean over a micro-batch is multiplied by.
        """
        import torch

        rows, loss, as_made = len(parts[0]["trained"]), trainer.loss_type, needs_all_rows(trainer)
        counted = sum(float(part["counted"].sum()) for part in parts) / len(parts)
        accumulated = trainer.args.gradient_accumulation_steps
        together = 1 if loss == "bnpo" or as_made else math.gcd(len(parts), accumulated)
        packed: list[Batch] = []
        for start in range(0, len(parts), together):
            whole = join(parts[start : start + together])
            order = by_group(whole)
            pieces = torch.tensor_split(order, max(1, math.ceil(len(order) / rows)))
            for piece in (*pieces, *[order[:0]] * (together - len(pieces))):
                batch = take(whole, piece, trim=not as_made and trainer.pad_to_multiple_of is None)
                share = len(piece) / counted if loss in BY_ROWS else 1.0
                if loss == "bnpo":
                    share = float(batch["completion_mask"].sum()) / max(1.0, count_tokens(whole))
                packed.append(batch | {"row_share": share})
        return packed


def needs_all_rows(trainer: Any) -> bool:
    """Whether the loss has a term that depends on which rows share a micro-batch, and on those without advantage."""
    return bool(trainer._entropy_bonus_enabled or trainer.top_entropy_quantile < 1 or trainer.aux_loss_enabled)


def teaches(advantages: torch.Tensor, group: int) -> torch.Tensor:
    """Whether a rollout has an advantage.

    Those of a group have a mean of zero. Where all but the zeros are equal, as for equal rewards, they are what
    rounding left of zero: divided by a standard deviation that is zero as well, up to a thousandth.
    """
    grouped = advantages.view(-1, group)
    zero = grouped == 0
    highest = grouped.masked_fill(zero, -math.inf).amax(1, keepdim=True)
    lowest = grouped.masked_fill(zero, math.inf).amin(1, keepdim=True)
    return (~zero & (highest > lowest)).flatten()


# --- PODS ------------------------------------------------------------------------------------------


def weigh_rewards(trainer: Any) -> torch.Tensor:
    """The total of each rollout, as TRL has it; not a number where no reward could judge it."""
    rewards = trainer.rewards_per_function
    totals = (rewards * trainer.reward_weights.to(rewards.device)).nansum(1)
    return totals.masked_fill(rewards.isnan().all(1), math.nan)  # type: ignore[no-any-return]


def choose_most_varied(totals: torch.Tensor, group: int, count: int) -> torch.Tensor:
    """Whether each rollout is among the `count` of its group whose totals vary most; those without one come last."""
    import torch

    chosen = torch.zeros(len(totals), dtype=torch.bool, device=totals.device)
    for start in range(0, len(totals), group):
        chosen[[start + place for place in most_varied(totals[start : start + group].tolist(), count)]] = True
    return chosen


def most_varied(totals: Sequence[float], count: int) -> list[int]:
    """The places of the `count` totals of highest variance: some of the lowest and some of the highest."""
    judged = sorted((place for place, total in enumerate(totals) if total == total), key=lambda place: totals[place])
    silent = [place for place, total in enumerate(totals) if total != total]
    if len(judged) <= count:
        return [*judged, *silent[: count - len(judged)]]
    choices = [judged[:low] + judged[len(judged) - count + low :] for low in range(count + 1)]
    return max(choices, key=lambda places: variance([totals[place] for place in places]))


def variance(values: Sequence[float]) -> float:
    middle = sum(values) / len(values)
    return sum((value - middle) ** 2 for value in values)


def advantages_among(totals: torch.Tensor, group: int, scale: str) -> torch.Tensor:
    """TRL's advantages where only the rollouts with a total exist; 0 for the others."""
    from trl.trainer.utils import nanstd

    grouped = totals.view(-1, group)
    advantages = grouped - grouped.nanmean(1, keepdim=True)
    if scale != "none":
        spread = nanstd(grouped, dim=1, keepdim=True) if scale == "group" else nanstd(totals)
        advantages = advantages / (spread + 1e-4)
    return advantages.flatten().nan_to_num(nan=0.0)


# --- rows ------------------------------------------------------------------------------------------


def join(parts: Sequence[Batch]) -> Batch:
    """Micro-batches as one."""
    import torch

    return {
        key: torch.cat([part[key] for part in parts]) if has_rows(value) else value for key, value in parts[0].items()
    }


def by_group(batch: Batch) -> torch.Tensor:
    """The rows that are trained on, those of a group side by side, groups of long replies last."""
    import torch

    groups, lengths = batch["group"].tolist(), batch["completion_mask"].sum(1).tolist()
    rows = batch["trained"].nonzero().flatten().tolist()
    longest: dict[int, int] = {}
    for row in rows:
        longest[groups[row]] = max(longest.get(groups[row], 0), lengths[row])
    rows.sort(key=lambda row: (longest[groups[row]], groups[row]))
    return torch.tensor(rows, dtype=torch.long, device=batch["trained"].device)


def take(batch: Batch, rows: torch.Tensor, *, trim: bool) -> Batch:
    """Some rows of a batch, without columns of prompt or completion that are padding in all of them."""
    taken = {key: value[rows] if has_rows(value) else value for key, value in batch.items()}
    if not trim or not len(rows):
        return taken
    prompt, completion = batch["prompt_mask"].shape[1], batch["completion_mask"].shape[1]
    first = int(taken["prompt_mask"].any(0).nonzero()[0])
    last = int(taken["completion_mask"].any(0).nonzero()[-1]) + 1
    cuts = {"prompt_ids": slice(first, prompt), "prompt_mask": slice(first, prompt)}
    return {
        key: value[:, cuts.get(key, slice(0, last))]
        if key in cuts or (has_rows(value) and value.shape[1:] == (completion,))
        else value
        for key, value in taken.items()
    }


def count_tokens(batch: Batch) -> float:
    """Tokens of the rows that count."""
    return float((batch["completion_mask"].bool() & batch["counted"][:, None]).sum())
