"""transformers: attention of one new token, llama.cpp's angles, models around quantized layers, one GPU a process."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
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
    """Within it, the keys and values for one new token are read once per group of heads, not copied for each head.

    transformers repeats them for every head where there is a mask, which takes a CPU most of the time of decoding.
    Models with other attention than SDPA are not changed.

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


def takes_ready_mask(model: Any) -> bool:
    """Whether a mask for SDPA may be given, (rows, 1, 1, tokens), or None where nothing is hidden.

    Read in transformers 5.10.0 and 5.24.0: models with rotary angles make their masks by create_causal_mask, which
    leaves a ready one as it is; of (rows, tokens) it asks whether anything is hidden, which waits for the device.
    Others read positions out of the mask.
    """
    known = ("sdpa", GROUPED)
    return hasattr(model.base_model, "rotary_emb") and model.config.get_text_config()._attn_implementation in known


# --- rotary angles ---------------------------------------------------------------------------------


def rope_factors(rope: Mapping[str, Any], width: int) -> torch.Tensor | None:
    """By what Llama 3 divides the frequencies of a head of `width` dimensions, (width / 2,); None without a scaling.

    Computed as by llama.cpp's converter (conversion/llama.py of llama-cpp-python 0.3.36), which writes it as a tensor.
    """
    import torch

    if rope["rope_type"] != "llama3":
        return None
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    own = rope["original_max_position_embeddings"]
    length = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    smooth = (own / length - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    ends = torch.where(length < own / high, torch.ones_like(length), torch.full_like(length, factor))
    return torch.where((length < own / high) | (length > own / low), ends, between)


@contextmanager
def engine_angles(model: Any) -> Iterator[None]:
    """Within it, the model rotates queries and keys by exactly the angles of llama.cpp.

    Each engine's float32 angles are off by up to 1e-5, in different ways: transformers multiplies the position by each
    frequency, ggml the previous angle by a constant. That alone moves logits by 1e-4 and more, and says nothing about
    the exported file. Kernels with their own angles (Unsloth's) keep them.

    Read in transformers 5.10.0 and 5.24.0: a rotary embedding has inv_freq and its config, is called with states and
    position_ids (Llama's: by name), and returns (cos, sin) with the angles of both halves of a head beside each other.
    """
    import torch

    def turned(module: Any, inputs: tuple[Any, ...], named: dict[str, Any], own: tuple[Any, Any]) -> tuple[Any, Any]:
        positions = named["position_ids"] if "position_ids" in named else inputs[1]
        pairs = len(module.inv_freq)  # of dimensions that turn together
        factors = rope_factors(module.config.rope_parameters, 2 * pairs)
        ratio = torch.tensor(module.config.rope_parameters["rope_theta"]).pow(-1 / pairs).item()
        angles = [positions[..., None].float()]
        while len(angles) < pairs:
            angles.append(angles[-1] * ratio)
        half = torch.cat(angles, dim=-1)
        half = half if factors is None else half / factors.to(half.device)
        angle = torch.cat([half, half], dim=-1)
        return angle.cos().to(own[0].dtype), angle.sin().to(own[0].dtype)

    rotary = [module for module in model.modules() if hasattr(module, "inv_freq")]
    own = [module for module in rotary if type(module).__module__.startswith("transformers.")]
    hooks = [module.register_forward_hook(turned, with_kwargs=True) for module in own]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- generate --------------------------------------------------------------------------------------


@contextmanager
def own_sampling(model: Any) -> Iterator[None]:
    """Within it, generate takes nothing from the generation_config that came with the base, such as its penalties.

    Read in transformers 5.10.0 and 5.24.0: generate fills what it is not given from `self.generation_config`, which
    PEFT 0.20.0 and 0.21.2 set on the inner model from the outer one before each call.
    """
    from transformers import GenerationConfig

    kept = model.generation_config
    model.generation_config = GenerationConfig(bos_token_id=kept.bos_token_id)
    try:
        yield
    finally:
        model.generation_config = kept
        inner: Any = getattr(getattr(model, "base_model", None), "model", None)
        if hasattr(inner, "generation_config"):
            inner.generation_config = kept


# --- quantized models ------------------------------------------------------------------------------


def unquantized_config(model: Any) -> Any:
    """A copy of a model's config to build an unquantized model from.

    Read in transformers 5.10.0 and 5.24.0: a `quantization_config` makes from_pretrained quantize.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def mark_quantized(model: Any, like: Any) -> None:
    """Copy the attributes that mark a model as quantized to one that holds its layers.

    Read in transformers 5.10.0 and 5.24.0: only from_pretrained sets them. Trainer reads is_quantized, hf_quantizer
    and quantization_method, PEFT is_loaded_in_4bit, and without them both treat it as a 16-bit model.
    """
    for key in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method"):
        if hasattr(like, key):
            setattr(model, key, getattr(like, key))


# --- trainers --------------------------------------------------------------------------------------


def use_one_gpu(arguments: Any) -> None:
    """Let a trainer with these arguments use one GPU, however many torch sees.

    Read in transformers 5.10.0 and 5.24.0: without a distributed launch, setting up the device counts the GPUs as
    `_n_gpu`, by which the batch is multiplied, and for which the model is wrapped in DataParallel.
    """
    _ = arguments.device  # sets it up, once
    arguments._n_gpu = min(1, arguments._n_gpu)
