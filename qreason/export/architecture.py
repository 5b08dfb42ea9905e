"""What llama.cpp computes alike: the families that are exported, their keys, names and layouts of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qreason.errors import ModelError, first_line
from qreason.model.compat.transformers import rope_factors

if TYPE_CHECKING:
    import torch

FAMILIES = ("qwen2", "qwen3", "llama")
"""Model types that are exported; llama.cpp has them under the same names."""
KNOWN = "Qwen2, Qwen2.5 and their kin (qwen2), Qwen3 (qwen3), Llama 3 and SmolLM2 (llama)"
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""Types that are written here, with vectors in F32 -> llama.cpp's name of the file type."""
NATIVE = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
"""Number format of a folder's weights -> the type that holds them without loss."""
ANEW = "restore it from a copy, or make it anew by training or `qreason merge RUN`"


def read_config(folder: Path) -> Any:
    """The configuration of a folder; ModelError where llama.cpp would compute something else, or does not know it."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder / 'config.json'}: damaged ({first_line(error)[:200]}); {ANEW}") from error
    if config.model_type not in FAMILIES:
        raise ModelError(f"{folder}: a {config.model_type} model; export writes {KNOWN}")
    rope = config.rope_parameters["rope_type"]
    unlike = {
        f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
        f"rope_type {rope}": rope != "default" and (config.model_type, rope) != ("llama", "llama3"),
        **{key: getattr(config, key, None) for key in ("use_sliding_window", "attention_bias", "mlp_bias")},
    }
    if found := [what for what, differs in unlike.items() if differs]:
        raise ModelError(f"{folder}: {', '.join(found)} cannot be exported; llama.cpp would compute something else")
    return config


def native_type(config: Any) -> str:
    """The type that holds a folder's weights without loss."""
    return NATIVE[str(config.dtype).removeprefix("torch.")]


def head_width(config: Any) -> int:
    """Dimensions of an attention head: Qwen3's are wider than its hidden size divided by its heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def architecture_metadata(config: Any, name: str, kind: str) -> dict[str, Any]:
    """The keys under `general.` and those of the family. Nothing from generation_config: servers would apply it."""
    import gguf

    family, width = config.model_type, head_width(config)
    own = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if family != "qwen2":
        own |= {"attention.key_length": width, "attention.value_length": width}
    if family == "llama":
        own |= {"rope.dimension_count": width, "vocab_size": config.vocab_size}
    return {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(gguf.LlamaFileType[FILE_TYPES[kind]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **{f"{family}.{key}": value for key, value in own.items()},
    }


def gguf_names(config: Any, names: Sequence[str]) -> dict[str, str]:
    """Name in transformers -> name in GGUF; ModelError for a tensor that the family does not have."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    if unknown := [name for name, known in found.items() if known is None]:
        raise ModelError(f"{unknown[0]}: no tensor of a {config.model_type} model; it cannot be exported")
    return found


def extra_tensors(config: Any) -> dict[str, torch.Tensor]:
    """Tensors that a file has beside the model's own, by name in GGUF: Llama 3's factors of its rotary frequencies."""
    factors = rope_factors(config.rope_parameters, head_width(config))
    return {} if factors is None else {"rope_freqs.weight": factors}


# --- layouts ---------------------------------------------------------------------------------------


def turned_heads(config: Any, name: str) -> int:
    """Heads whose rows llama.cpp has in another order, in a weight of queries or keys; 0 where the order is the same.

    transformers turns dimension i of a head together with i + half of it, llama.cpp's `llama` the pairs beside each
    other, as Meta's own weights have them.
    """
    if config.model_type != "llama":
        return 0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return int(next((heads[part] for part in heads if f".{part}." in name), 0))


def to_engine(config: Any, name: str, load: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A function that loads a tensor with its rows in llama.cpp's order, from one that loads transformers' own."""
    if not (heads := turned_heads(config, name)):
        return load

    def turned() -> torch.Tensor:
        rows = load()
        return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    return turned


def from_engine(config: Any, name: str, rows: torch.Tensor) -> torch.Tensor:
    """A tensor of a GGUF file with its rows in transformers' order."""
    if not (heads := turned_heads(config, name)):
        return rows
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
