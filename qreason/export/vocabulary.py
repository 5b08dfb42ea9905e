"""A Qwen2 tokenizer as GGUF metadata: tokens with their types, merges, special ids, chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qreason.errors import ModelError


@dataclass(frozen=True)
class Vocabulary:
    """`tokens` and `types` have one entry for each row of the embedding."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    eos: int
    pad: int
    template: str

    @property
    def metadata(self) -> dict[str, Any]:
        """The keys under `tokenizer.`, in llama.cpp's names."""
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.types,
            "tokenizer.ggml.merges": self.merges,
            "tokenizer.ggml.eos_token_id": self.eos,
            "tokenizer.ggml.padding_token_id": self.pad,
            # Never added, but without it llama.cpp takes whatever token has id 11.
            "tokenizer.ggml.bos_token_id": self.pad,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": self.template,
        }


def read_vocabulary(tokenizer: Any, rows: int, name: str) -> Vocabulary:
    """The vocabulary of a transformers tokenizer for an embedding of `rows` rows.

    Raises ModelError where llama.cpp would split text otherwise than this tokenizer, or where it has more tokens
    than the embedding has rows.
    """
    from gguf import TokenType

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    check_splitting(parts, name)
    added = {token["id"]: token for token in parts["added_tokens"]}
    ids = {number: token for token, number in parts["model"]["vocab"].items()}
    ids |= {number: token["content"] for number, token in added.items()}
    if (last := max(ids)) >= rows:
        raise ModelError(
            f"{name}: the tokenizer was extended ('{ids[last]}' has id {last}, the embedding {rows} rows); "
            "export with the tokenizer of the base, or resize the base's embedding before training"
        )
    types = []
    for number in range(rows):
        if number in added:
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        else:
            kind = TokenType.NORMAL if number in ids else TokenType.UNUSED
        types.append(int(kind))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]]
    return Vocabulary(
        tokens=[ids.get(number, f"[PAD{number}]") for number in range(rows)],
        types=types,
        merges=merges,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        template=tokenizer.chat_template,
    )


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
