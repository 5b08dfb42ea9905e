"""transformers: attention of one new token, llama.cpp's rotary angles, models built around quantized layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# --- attention -------------------------------------------------------------------------------------

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
    """Within it, keys and values of one new token are read once per group of heads, not copied for each head.

    transformers repeats them for every head where there is a mask; while a reply is decoded, that is most of the time
    a CPU spends. Nothing changes for a model that attends in another way than by SDPA.

    Read in transformers 5.10.0 and 5.24.0: each attention layer takes its function from the interface by
    config._attn_implementation, and the mask's by the same name; the public setter checks and walks the whole model.
    5.24.0 does the same by itself.
    """
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


# --- rotary angles ---------------------------------------------------------------------------------


@contextmanager
def engine_angles(model: Any) -> Iterator[None]:
    """Within it, the model turns queries and keys by the very angles of llama.cpp.

    Angles in float32 are off by up to 1e-5 in each engine, a little differently: transformers multiplies the position
    by each frequency, ggml takes the angle before times one constant. That alone moves logits by 1e-4 and more, and it
    is no property of the file that is checked. Kernels that bring angles of their own (Unsloth's) keep them.

    Read in transformers 5.10.0 and 5.24.0: a rotary embedding has inv_freq and its config, is called with (states,
    position_ids), and returns (cos, sin) with the angles of both halves of a head beside each other.
    """
    import torch

    def turned(module: Any, inputs: tuple[Any, Any], _: Any) -> tuple[Any, Any]:
        states, positions = inputs
        pairs = len(module.inv_freq)  # of dimensions that turn together
        ratio = torch.tensor(module.config.rope_parameters["rope_theta"]).pow(-1 / pairs).item()
        angles = [positions[..., None].float()]
        while len(angles) < pairs:
            angles.append(angles[-1] * ratio)
        angle = torch.cat(angles * 2, dim=-1)
        return angle.cos().to(states.dtype), angle.sin().to(states.dtype)

    rotary = [module for module in model.modules() if hasattr(module, "inv_freq")]
    own = [module for module in rotary if type(module).__module__.startswith("transformers.")]
    hooks = [module.register_forward_hook(turned) for module in own]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- quantized models ------------------------------------------------------------------------------


def unquantized_config(model: Any) -> Any:
    """A copy of a model's config for one that is built from it without quantizing anything.

    Read in transformers 5.10.0 and 5.24.0: a `quantization_config` makes from_pretrained quantize.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def mark_quantized(model: Any, like: Any) -> None:
    """Give a model that holds the quantized layers of another one what says so.

    Read in transformers 5.10.0 and 5.24.0: only from_pretrained sets them. Trainer asks for is_quantized, hf_quantizer
    and quantization_method, PEFT for is_loaded_in_4bit, and both behave as on a 16-bit model without.
    """
    for key in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method"):
        if hasattr(like, key):
            setattr(model, key, getattr(like, key))
