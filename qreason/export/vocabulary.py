"""A tokenizer in llama.cpp's terms."""

from __future__ import annotations

import json
from typing import Any

from qreason.errors import ModelError

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPLITTINGS: dict[tuple[tuple[Any, ...], ...], str] = {
    (("Split", QWEN2, "Isolated", False), ("ByteLevel", False, False)): "qwen2",
    (("Split", LLAMA3, "Isolated", False), ("ByteLevel", False, False)): "llama-bpe",
    (("Digits", True), ("ByteLevel", False, True)): "smollm",
    (("ByteLevel", False, True),): "gpt-2",
}
"""How text is cut into words, step by step -> llama.cpp's name of it, its pre-tokenizer."""
FIELDS = {
    "Split": ("pattern", "behavior", "invert"),
    "ByteLevel": ("add_prefix_space", "use_regex"),
    "Digits": ("individual_digits",),
}
"""What matters of a step."""
WHOLE_WORDS = ("llama-bpe",)
"""Pre-tokenizers with which llama.cpp takes a word that is a token as it is, without merges."""


def splitting(tokenizer: Any, name: str) -> str:
    """llama.cpp's pre-tokenizer for a tokenizer; ModelError where it has none that splits text in the same way."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model, first = parts["model"], parts["pre_tokenizer"] or {}
    steps = first.get("pretokenizers", [first] if first else [])
    steps = [step | {"pattern": step.get("pattern", {}).get("Regex")} for step in steps]
    key = tuple((step["type"], *(step[field] for field in FIELDS.get(step["type"], ()))) for step in steps)
    found = SPLITTINGS.get(key)
    if model["type"] != "BPE" or found is None or model["ignore_merges"] != (found in WHOLE_WORDS):
        raise ModelError(
            f"{name}: the tokenizer does not cut words as one of llama.cpp's pre-tokenizers "
            f"{', '.join(SPLITTINGS.values())} does; only those can be exported"
        )
    normalizer = parts["normalizer"] or {}
    for one in normalizer.get("normalizers", [normalizer] if normalizer else []):
        if one != {"type": "NFC"}:
            raise ModelError(f"{name}: the tokenizer normalizes text ({one['type']}); llama.cpp would not")
    return found


def begins_chats(tokenizer: Any) -> bool:
    """Whether chats begin with a BOS, by the chat template: servers then add it and leave the template's out."""
    chat = [{"role": "user", "content": "x"}]
    return bool(tokenizer.bos_token) and tokenizer.apply_chat_template(chat, tokenize=False).startswith(
        tokenizer.bos_token
    )


def tokenizer_metadata(tokenizer: Any, rows: int, name: str) -> dict[str, Any]:
    """The keys under `tokenizer.`, in llama.cpp's names, for an embedding of `rows` rows.

    Raises ModelError where llama.cpp would split text differently, or for more tokens than the embedding has rows.
    """
    from gguf import TokenType

    pre, parts = splitting(tokenizer, name), json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {number: (token, TokenType.NORMAL) for token, number in parts["model"]["vocab"].items()}
    for token in parts["added_tokens"]:
        tokens[token["id"]] = token["content"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if (last := max(tokens)) >= rows:
        raise ModelError(
            f"{name}: the tokenizer was extended ('{tokens[last][0]}' has id {last}, the embedding {rows} rows); "
            "export with the tokenizer of the base, or resize the base's embedding before training"
        )
    every = [tokens.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(rows)]
    begins = begins_chats(tokenizer)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in every],
        "tokenizer.ggml.token_type": [int(kind) for _, kind in every],
        "tokenizer.ggml.merges": [
            pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]
        ],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        # where it is never added: without it llama.cpp would take the token with id 11
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id if begins else tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": begins,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
