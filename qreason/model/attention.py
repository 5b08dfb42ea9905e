"""Attention of one new token: keys and values are read once a group of heads, not copied for each head.

transformers repeats keys and values for every head where there is a mask; while a reply is decoded, that is most of
the time a CPU spends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GROUPED = "sdpa_grouped"


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (rows, heads, 1, width), key and value (rows, groups, tokens, width).

    The heads of a group take the place of query positions. Anything but one new token goes to SDPA as it is.
    """
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, new, width = query.shape
    if new != 1 or heads == key.shape[1]:
        answer: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return answer
    grouped = query.reshape(rows, key.shape[1], -1, width)
    read = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return read.reshape(rows, 1, heads, width), None


@contextmanager
def grouped_queries(model: Any) -> Iterator[None]:
    """The model with this attention; without it where it attends in another way than by SDPA."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(GROUPED, attend)
    AttentionMaskInterface.register(GROUPED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
