"""An LLM's verdict as a number: the policy's own base, adapter off, asked whether two texts say the same.

No second model: the judge reads the weights the policy stands on. A verdict is one forward pass; its value
is the expectation over the score tokens of prompts.VERDICTS.
"""

from __future__ import annotations

from collections.abc import Sequence

from qreason.errors import ModelError
from qreason.generate import pad_left, render_ids
from qreason.models import Resident
from qreason.prompts import VERDICTS, render_judge

ROWS = 64
"""Pairs that are judged side by side."""


class Judge:
    """(reference, response) pairs -> 0..1 each; equal pairs are judged once."""

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        encoded = {word: resident.tokenizer.encode(word, add_special_tokens=False) for word in VERDICTS}
        single = {word: ids[0] for word, ids in encoded.items() if len(ids) == 1}
        if len({VERDICTS[word] for word in single}) < 2:
            raise ModelError(f"{resident.settings.base}: cannot judge: its tokenizer splits the words yes and no")
        self.tokens = list(single.values())
        self.values = [VERDICTS[word] for word in single]

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        import torch

        unique = list(dict.fromkeys(pairs))
        ids = render_ids(self.resident.tokenizer, [render_judge(*pair) for pair in unique]) if unique else []
        order = sorted(range(len(unique)), key=lambda index: len(ids[index]))
        verdicts: dict[tuple[str, str], float] = {}
        with self.resident.inference(adapter=False) as model:
            for start in range(0, len(order), ROWS):
                chosen = order[start : start + ROWS]
                inputs = pad_left(self.resident.tokenizer, [ids[index] for index in chosen], self.resident.device)
                logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1, self.tokens]
                weights = torch.softmax(logits.float(), -1)
                expected = (weights @ torch.tensor(self.values, device=weights.device)).tolist()
                verdicts.update(zip((unique[index] for index in chosen), expected, strict=True))
        return [verdicts[pair] for pair in pairs]
