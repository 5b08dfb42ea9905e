"""A Qwen2 tokenizer as GGUF metadata: tokens with their types, merges, special ids, chat template."""

from __future__ import annotations

import json
from typing import Any

from qreason.errors import ModelError


def tokenizer_metadata(tokenizer: Any, rows: int, name: str) -> dict[str, Any]:
    """The keys under `tokenizer.`, in llama.cpp's names, for an embedding of `rows` rows.

    Raises ModelError where llama.cpp would split text otherwise than this tokenizer, or where it has more tokens
    than the embedding has rows.
    """
    from gguf import TokenType

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    check_splitting(parts, name)
    tokens = {number: (token, TokenType.NORMAL) for token, number in parts["model"]["vocab"].items()}
    for token in parts["added_tokens"]:
        tokens[token["id"]] = token["content"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if (last := max(tokens)) >= rows:
        raise ModelError(
            f"{name}: the tokenizer was extended ('{tokens[last][0]}' has id {last}, the embedding {rows} rows); "
            "export with the tokenizer of the base, or resize the base's embedding before training"
        )
    every = [tokens.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(rows)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [token for token, _ in every],
        "tokenizer.ggml.token_type": [int(kind) for _, kind in every],
        "tokenizer.ggml.merges": [
            pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]
        ],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        # Never added, but without it llama.cpp takes whatever token has id 11.
        "tokenizer.ggml.bos_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def check_splitting(parts: dict[str, Any], name: str) -> None:
    """ModelError unless words are cut as llama.cpp's pre-tokenizer `qwen2` cuts them."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    steps = (parts["pre_tokenizer"] or {}).get("pretokenizers", [])
    pattern = next((step["pattern"].get("Regex") for step in steps if step["type"] == "Split"), None)
    bytes_only = [step["type"] for step in steps] == ["Split", "ByteLevel"] and not steps[1]["add_prefix_space"]
    if parts["model"]["type"] != "BPE" or pattern != PRETOKENIZE_REGEX or not bytes_only:
        raise ModelError(f"{name}: the tokenizer does not cut words as Qwen2's does; only that one can be exported")
    if parts["normalizer"] not in (None, {"type": "NFC"}):
        raise ModelError(f"{name}: the tokenizer normalizes text ({parts['normalizer']['type']}); llama.cpp would not")
