"""Write a model of the real Qwen2.5 shape with random weights: for memory and speed where nothing can be downloaded.

    python scripts/random_qwen.py /tmp/qwen-0.5b
    python scripts/random_qwen.py /tmp/qwen-1.5b --size 1.5b

Shapes from the config.json of Qwen/Qwen2.5-0.5B-Instruct and Qwen/Qwen2.5-1.5B-Instruct. The tokenizer is that of
the embedded model, so its ids fill only the first rows of the vocabulary.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

TINY = Path(__file__).parent.parent / "qreason" / "assets" / "tiny"
SHAPES = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}


def write_random_qwen(out: Path, size: str = "0.5b") -> None:
    """Save model and tokenizer to a folder, weights in bfloat16 as on the Hub."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    config = Qwen2Config(
        **SHAPES[size],
        vocab_size=151936,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        Qwen2ForCausalLM(config).save_pretrained(out)
    finally:
        torch.set_default_dtype(torch.float32)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SHAPES, default="0.5b")
    arguments = parser.parse_args()
    write_random_qwen(arguments.out, arguments.size)
    print(arguments.out)
