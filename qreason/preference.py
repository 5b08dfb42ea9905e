"""A preference model: a sequence classifier with one output, higher for the reply that people prefer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qreason.errors import ModelError
from qreason.hardware import Hardware
from qreason.models import cannot_load, locate, quiet

ROWS = 32
"""Replies that are read side by side."""


class PreferenceModel:
    """(prompt, reply) pairs -> 0..1 each, the sigmoid of the model's output."""

    def __init__(self, name: str, hardware: Hardware) -> None:
        import torch
        from peft import AutoPeftModelForSequenceClassification
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        quiet()
        adapter = (Path(name) / "adapter_config.json").is_file()
        kind: Any = AutoPeftModelForSequenceClassification if adapter else AutoModelForSequenceClassification
        path = locate(name)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = kind.from_pretrained(path, num_labels=1, dtype=getattr(torch, hardware.dtype))
        except Exception as error:
            raise ModelError(f"{name}: {cannot_load(error)}") from error
        self.model.to(hardware.device).eval()
        self.tokenizer.padding_side = "right"
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        import torch

        marks: list[float | None] = []
        for start in range(0, len(pairs), ROWS):
            texts = [self.render(*pair) for pair in pairs[start : start + ROWS]]
            inputs = self.tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                outputs = self.model(**inputs.to(self.model.device)).logits.float().squeeze(-1)
            marks += outputs.sigmoid().tolist()
        return marks

    def render(self, prompt: str, reply: str) -> str:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        if not self.tokenizer.chat_template:
            return f"{prompt}\n\n{reply}"
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return text
