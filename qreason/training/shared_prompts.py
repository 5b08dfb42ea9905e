"""A training step on a CPU reads each prompt once, however many of its replies are in the micro-batch.

The replies of a group share their prompt, and often it is longer than they are. Its keys and values are computed once
and used by each of its replies; gradients flow back through them, so the step's gradient is the same up to rounding.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class SharedPrompts:
    """TRL's GRPO trainer with such steps. Mixed in before GRPOTrainer by `sharing_prompts`."""

    args: Any

    def _full_logits_logps(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, **kwargs: Any
    ) -> Any:
        if worthwhile(self.args) and not kwargs.get("compute_aux_loss"):
            model = partial(read_prompts_once, model)
        return super()._full_logits_logps(model, input_ids, attention_mask, logits_to_keep, **kwargs)  # type: ignore[misc]


def worthwhile(args: Any) -> bool:
    """A GPU reads prompts beside replies at little cost, and checkpointed layers keep no cache."""
    return bool(args.use_cpu and not args.gradient_checkpointing)


def read_prompts_once(
    model: Any, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, use_cache: bool
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
