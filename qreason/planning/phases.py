"""Bytes on a card, phase by phase: exact for what is stored, modelled for what is computed.

Stored are weights, adapters, gradients, optimizer states and KV caches. Activations, logits and dequantized weights
follow what TRL, transformers, PEFT and bitsandbytes allocate for a dense decoder (RMSNorm, SDPA, gated MLP) whose
numbers have `shape.number` bytes, all rows at their longest. A phase is a dict component -> bytes at its peak.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import ceil

from qreason.inference.generate import QUESTIONS
from qreason.model.classifier import ROWS as PREFERENCES
from qreason.planning.shapes import Asked, Card, Lengths, Linear, Shape
from qreason.recipe.sections import Draw, Lora, Model
from qreason.recipe.stage import Work
from qreason.recipe.training import Training

FRAGMENTATION = 0.05
"""Memory that torch holds beyond what it allocates, as a share of it; a cache that grows per token leaves gaps."""
CPU_FRAGMENTATION = 0.6
"""The same of the C library, as a share of all but the weights. Measured on a 0.5B base: 0.3 to 0.65 (LOG.md)."""
CHUNK = 256
"""Tokens per chunk of logits in TRL's chunked SFT loss."""
TILE = (2048, 8192)
"""Tokens and words of a tile of logits in TRL's chunked log-probabilities."""
SFT_LOGIT, TILE_LOGIT, FUSED_LOGIT, PLAIN_LOGIT = 16, 22, 8, 16
"""Bytes per logit at the peak of SFT's chunk, of a tile of GRPO's log-probabilities, and of these where they are not
computed in tiles, with Triton's kernel and without."""

Phase = dict[str, int]
COMPONENTS = (
    *("weights", "judge", "adapters", "gradients", "optimizer", "KV cache", "activations", "logits", "dequantized"),
    *("fragmentation", "CUDA context", "libraries"),
)


# --- exact ---------------------------------------------------------------------------------------


def nf4_bytes(weights: int) -> int:
    """A matrix in NF4 with double quantization, as bitsandbytes' QuantState holds it.

    Half a byte per weight, an 8-bit maximum per block of 64, a float32 maximum per 256 of those, tables of 16 and 256
    float32 and an offset.
    """
    blocks = ceil(weights / 64)
    return ceil(weights / 2) + blocks + 4 * ceil(blocks / 256) + 4 * (16 + 256 + 1)


def weight_bytes(shape: Shape, quantization: str) -> int:
    """All weights and buffers."""
    packed = [linear.outputs * linear.inputs for linear in shape.linears if linear.quantized and quantization == "nf4"]
    return (shape.parameters - sum(packed)) * shape.number + sum(map(nf4_bytes, packed)) + shape.buffer_bytes


def adapted(shape: Shape, lora: Lora) -> list[Linear]:
    """The Linear layers that get an adapter, matched as PEFT does."""
    wanted = lora.target_modules
    if isinstance(wanted, list):
        return [one for one in shape.linears if any(f".{one.name}".endswith(f".{name}") for name in wanted)]
    if wanted.lower() == "all-linear":
        return [one for one in shape.linears if not one.head]
    return [one for one in shape.linears if re.fullmatch(wanted, one.name)]


def adapter_sizes(shape: Shape, lora: Lora) -> list[int]:
    """The number of weights of each adapter matrix."""
    return [lora.r * width for linear in adapted(shape, lora) for width in (linear.inputs, linear.outputs)]


STATES = {
    "adamw_torch": 2, "adamw_torch_fused": 2, "paged_adamw_32bit": 2,
    "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2,
    "ademamix": 3, "ademamix_8bit": 3, "paged_ademamix_32bit": 3, "paged_ademamix_8bit": 3,
    "lion_32bit": 1, "paged_lion_32bit": 1, "lion_8bit": 1, "paged_lion_8bit": 1,
    "rmsprop": 1, "rmsprop_bnb": 1, "rmsprop_bnb_32bit": 1, "rmsprop_bnb_8bit": 1,
    "adagrad": 1, "sgd": 0,
}  # fmt: skip
"""`optim` -> numbers it keeps per trained weight; an unknown one is taken for AdamW in float32."""


def optimizer_bytes(optim: str, sizes: Iterable[int]) -> int:
    """The state of an optimizer over matrices of these sizes.

    The 8-bit ones of bitsandbytes keep a byte per number, a float32 maximum per block of 256 and a table of 256 float32
    per state, but float32 where a matrix has fewer than 4,096 weights.
    """
    states = STATES.get(optim, 2)
    if "8bit" not in optim or optim not in STATES:
        return 4 * states * sum(sizes)
    each = [size + 4 * ceil(size / 256) if size >= 4096 else 4 * size for size in sizes]
    return states * sum(each) + 1024 * min(states, 2)


def cache_bytes(shape: Shape, rows: int, tokens: int) -> int:
    """Keys and values of all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * rows * tokens * shape.number


# --- modelled ------------------------------------------------------------------------------------


def dequantized(shape: Shape, model: Model) -> int:
    """The largest 4-bit matrix in 16 bits, with its maxima in float32, during its multiplication."""
    if model.quantization == "none":
        return 0
    largest = max((linear.outputs * linear.inputs for linear in shape.linears if linear.quantized), default=0)
    return largest * shape.number + largest // 16


def saved_by_layer(shape: Shape, model: Model, rows: int, tokens: int, computed: int | None = None) -> int:
    """Bytes that a layer keeps for its backward pass, with autocast.

    `computed` of the rows * tokens go through it where rows share what they begin with; keys and values are each row's.

    Both norms in float32; queries, keys and values repeated for every head, the attention's output and its
    log-sum-exp; gate, its activation and up; what the adapters read and their ranks; a mask of T x T, because rows are
    padded. PEFT copies what an adapter reads, unless the layer is 4-bit or in float32, and without dropout, which adds
    a byte each.
    """
    linears = adapted(shape, model.lora)
    inputs = sum(linear.inputs for linear in linears) / shape.layers
    shared = (model.quantization == "nf4" or shape.number == 4) and not model.lora.dropout
    read = 2 * shape.hidden + shape.intermediate if shared else inputs
    ranks = model.lora.r * len(linears) / shape.layers
    width = shape.heads * shape.head_dim
    numbers = 2 * width + 3 * shape.intermediate + read + ranks + tokens
    dropped = inputs if model.lora.dropout else 0
    each = 8 * shape.hidden + 4 * shape.heads + shape.number * numbers + dropped
    return ceil((computed or rows * tokens) * each + rows * tokens * 2 * width * shape.number)


def peak_phase(moments: Sequence[Phase]) -> Phase:
    """The one that needs most memory."""
    return max(moments, key=lambda moment: sum(moment.values()))


def backward(
    shape: Shape, model: Model, settings: Training, rows: int, tokens: int, logits: int, computed: int | None = None
) -> Phase:
    """The peak of three moments: the loss, the last layer's backward pass, the optimizer's step."""
    trained = sum(adapter_sizes(shape, model.lora))
    layer = saved_by_layer(shape, model, rows, tokens, computed)
    count = computed or rows * tokens
    kept = count * (8 * shape.hidden + tokens)  # the last norm, the mask
    if settings.gradient_checkpointing:
        kept += shape.layers * count * shape.hidden * shape.number
    else:
        kept += shape.layers * layer + trained * shape.number  # the adapters as autocast reads them
    gradients = count * shape.intermediate * shape.number * (2 if model.quantization == "nf4" else 4)
    again = layer if settings.gradient_checkpointing else 0
    return peak_phase(
        [
            {"activations": kept, "logits": logits},
            {"activations": kept + again + gradients, "dequantized": dequantized(shape, model)},
            {"activations": 4 * trained if settings.optim == "adamw_torch" else 0},  # its multi-tensor temporaries
        ]
    )


def loss_logits(
    shape: Shape, model: Model, work: Work, tokens: int, completion: int, *, compiles: bool = True, tiled: bool = True
) -> int:
    """Bytes of the logits that a loss holds in float32, with their gradient.

    GRPO's are computed in tiles, if `tiled`, unless the LM head has an adapter. `compiles`: whether Triton's kernels
    can be used.
    """
    if work.logits == "none":
        return 0
    if work.logits == "completion":
        if not tiled or any(linear.head for linear in adapted(shape, model.lora)):
            return (FUSED_LOGIT if compiles else PLAIN_LOGIT) * work.rows * (completion + 1) * shape.vocabulary
        count, words = work.rows * completion, min(TILE[1], shape.vocabulary)
        return TILE_LOGIT * min(TILE[0], count) * words + 4 * shape.hidden * (words + 2 * count)
    held = work.rows * tokens if work.logits == "whole" else min(CHUNK, work.rows * tokens)
    return SFT_LOGIT * shape.vocabulary * held


def row_tokens(shape: Shape, work: Work, lengths: Lengths, completion: int) -> int:
    """Tokens of the longest row that is trained on."""
    limit = int(work.most_tokens or shape.context)
    longest = {"example": lengths.example, "reply": lengths.prompt + completion, "pair": lengths.pair}[work.text]
    return limit if work.fills_rows else min(limit, longest)


def reading(shape: Shape, model: Model, rows: int, tokens: int, *, adapter: bool) -> Phase:
    """A pass without gradients over rows of tokens, the cache filled; adapters compute in float32 there."""
    token = (12 * shape.intermediate + 13 * shape.hidden) if adapter else (6 * shape.intermediate + 9 * shape.hidden)
    return {
        "KV cache": cache_bytes(shape, rows, tokens),
        "activations": rows * tokens * token,
        "logits": rows * shape.vocabulary * shape.number,
        "dequantized": dequantized(shape, model),
    }


def draw_bytes(shape: Shape, sampling: Draw) -> int:
    """Bytes per logit while tokens are drawn: softmax and cumulative sum; top_p sorts, which a GPU does in copies."""
    if sampling.temperature == 0:
        return shape.number
    return shape.number + (48 if sampling.top_p < 1 else 9 if sampling.top_k or sampling.min_p else 8)


def rollout(
    shape: Shape, model: Model, sampling: Draw, prompts: int, n: int, lengths: Lengths, *, shared: bool = True
) -> Phase:
    """n replies to each prompt, as many prompts at a time as generate.py takes: at the prefill, or the last token.

    `shared`: whether a prompt is read once for all its replies; Unsloth's generate reads it for each.
    """
    chosen = min(prompts, max(1, sampling.max_num_seqs // n))
    rows, tokens = chosen * min(n, sampling.max_num_seqs), lengths.prompt + sampling.max_completion_length
    cache = cache_bytes(shape, rows, tokens)
    # For transformers' cache and attention, which Unsloth decodes with: keys and values repeated for every head, and
    # one layer's cache beside its longer copy. Our own (model/compat) need less.
    attention = rows * tokens * shape.number * shape.head_dim * (2 * shape.heads + shape.kv_heads)
    return peak_phase(
        [
            reading(shape, model, chosen if shared else rows, lengths.prompt, adapter=True),
            {"KV cache": cache, "activations": attention, "dequantized": dequantized(shape, model)},
            {"KV cache": cache, "logits": rows * shape.vocabulary * draw_bytes(shape, sampling)},
        ]
    )


def judging(asked: Asked, replies: int, n: int, lengths: Lengths, completion: int) -> Phase:
    """Questions about n replies to a prompt; an answer is assumed to be at most twice the longest reference."""
    answer = min(completion, 2 * lengths.reference)
    if asked.kind == "preference":
        rows, tokens = min(replies, PREFERENCES), lengths.prompt + completion
    elif asked.kind == "groupwise":
        group = max(1, n * (n - 1))
        rows, tokens = min(replies // n * group, QUESTIONS - 1 + group), lengths.question + 2 * answer
    else:
        rows, tokens = min(replies, QUESTIONS - 1 + n), lengths.question + answer
    phase = reading(asked.shape, asked.model, rows, tokens, adapter=asked.adapter)
    return phase | {"judge": asked.stored if asked.offload else 0}


def complete(card: Card, *parts: Phase) -> Phase:
    """The sum of the parts, with what the allocator and the driver hold beyond them."""
    phase = {name: sum(part.get(name, 0) for part in parts) for name in COMPONENTS}
    allocated = sum(phase.values())
    gaps = CPU_FRAGMENTATION * (allocated - phase["weights"]) if card.on_cpu else FRAGMENTATION * allocated
    phase["fragmentation"] = int(gaps)
    phase["libraries" if card.on_cpu else "CUDA context"] = card.context_bytes
    return {name: size for name, size in phase.items() if size}
