"""The sizes of usual bases, so that a plan needs neither their files nor a network.

As in the config.json of each repository on the Hub; each gives the number of parameters of its model card.
"""

from __future__ import annotations

from typing import Any

OWNERS = ("Qwen", "deepseek-ai", "meta-llama", "HuggingFaceTB", "unsloth")
VARIANTS = ("-unsloth-bnb-4bit", "-bnb-4bit", "-instruct", "-base")
"""Ends of names that say nothing of sizes."""
KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings", "tie_word_embeddings"),
)
SIZES: dict[str, tuple[str, tuple[int, ...]]] = {
    "qwen2.5-0.5b": ("qwen2", (896, 4864, 24, 14, 2, 151936, 32768, True)),
    "qwen2.5-1.5b": ("qwen2", (1536, 8960, 28, 12, 2, 151936, 32768, True)),
    "qwen2.5-3b": ("qwen2", (2048, 11008, 36, 16, 2, 151936, 32768, True)),
    "qwen2.5-7b": ("qwen2", (3584, 18944, 28, 28, 4, 152064, 32768, False)),
    "qwen2.5-coder-0.5b": ("qwen2", (896, 4864, 24, 14, 2, 151936, 32768, True)),
    "qwen2.5-coder-1.5b": ("qwen2", (1536, 8960, 28, 12, 2, 151936, 32768, True)),
    "qwen2.5-coder-3b": ("qwen2", (2048, 11008, 36, 16, 2, 151936, 32768, True)),
    "qwen2.5-coder-7b": ("qwen2", (3584, 18944, 28, 28, 4, 152064, 32768, False)),
    "qwen2.5-math-1.5b": ("qwen2", (1536, 8960, 28, 12, 2, 151936, 4096, True)),
    "qwen2.5-math-7b": ("qwen2", (3584, 18944, 28, 28, 4, 152064, 4096, False)),
    "deepseek-r1-distill-qwen-1.5b": ("qwen2", (1536, 8960, 28, 12, 2, 151936, 131072, False)),
    "deepseek-r1-distill-qwen-7b": ("qwen2", (3584, 18944, 28, 28, 4, 152064, 131072, False)),
    "qwen3-0.6b": ("qwen3", (1024, 3072, 28, 16, 8, 151936, 40960, True)),
    "qwen3-1.7b": ("qwen3", (2048, 6144, 28, 16, 8, 151936, 40960, True)),
    "qwen3-4b": ("qwen3", (2560, 9728, 36, 32, 8, 151936, 40960, True)),
    "llama-3.2-1b": ("llama", (2048, 8192, 16, 32, 8, 128256, 131072, True)),
    "llama-3.2-3b": ("llama", (3072, 8192, 28, 24, 8, 128256, 131072, True)),
    "smollm2-135m": ("llama", (576, 1536, 30, 9, 3, 49152, 8192, True)),
    "smollm2-360m": ("llama", (960, 2560, 32, 15, 5, 49152, 8192, True)),
    "smollm2-1.7b": ("llama", (2048, 8192, 24, 32, 32, 49152, 8192, True)),
}
HEADS = {"qwen3": {"head_dim": 128}}
"""What a family's config.json has beside KEYS."""


def known_config(base: str) -> Any | None:
    """The configuration of a usual base, instruct or not; None for any other."""
    owner, _, name = base.partition("/")
    name = name.lower()
    for variant in VARIANTS:
        name = name.removesuffix(variant)
    if owner not in OWNERS or name not in SIZES:
        return None
    from transformers import AutoConfig

    family, sizes = SIZES[name]
    config = AutoConfig.for_model(family, **dict(zip(KEYS, sizes, strict=True)), **HEADS.get(family, {}))
    config.architectures = [f"{family.capitalize()}ForCausalLM"]
    return config
