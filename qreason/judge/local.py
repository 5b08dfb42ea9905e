"""Questions answered by a model in memory: one forward pass over many of them, common beginnings read once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qreason.errors import ModelError
from qreason.inference.generate import pad_left, render_ids
from qreason.machine.rows import Rows
from qreason.model.resident import Resident
from qreason.types import Messages

if TYPE_CHECKING:
    import torch

ROWS = 64
"""Questions that are answered side by side."""

Ids = list[int]


class LocalModel:
    """A resident model, its policy adapter off; with `adapter`, that judge adapter on.

    `offload` keeps the model in the CPU's memory between questions: for a judge that is not the policy's own base.
    """

    def __init__(self, resident: Resident, adapter: Path | None = None, *, offload: bool = False) -> None:
        self.resident, self.adapter, self.offload = resident, adapter, offload
        self.rows = Rows(ROWS, "judgements", resident.say)
        if offload:
            resident.model.to("cpu")

    def ask(self, groups: Sequence[Sequence[Messages]], values: Mapping[str, float]) -> list[list[float | None]]:
        """The expected value over the score tokens, the first tokens of the answers that `values` names."""
        tokens, worth = self.score_tokens(values)
        tokenizer = self.resident.tokenizer
        rows = [render_ids(tokenizer, group) for group in groups]
        answers: list[list[float | None]] = [[] for _ in rows]
        with self.awake(), self.resident.inference(adapter=self.adapter or False) as model:
            left = batches(rows, self.rows.most)
            while left:
                batch = [rows[index] for index in left[0]]
                logits = self.rows.attempt(partial(self.last_logits, model, batch), len(batch))
                if logits is None:
                    self.rows.most = sum(map(len, batch)) // 2
                    left = [half for whole in left for half in halves(whole)]
                    continue
                weights = logits[:, tokens].float().softmax(-1)
                expected = (weights @ weights.new_tensor(worth)).tolist()
                for index in left.pop(0):
                    answers[index] = expected[: len(rows[index])]
                    expected = expected[len(rows[index]) :]
        return answers

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The model on its device while it answers."""
        if not self.offload:
            yield
            return
        self.resident.model.to(self.resident.hardware.device)
        try:
            yield
        finally:
            self.resident.model.to("cpu")

    def score_tokens(self, values: Mapping[str, float]) -> tuple[Ids, list[float]]:
        encoded = {word: self.resident.tokenizer.encode(word, add_special_tokens=False) for word in values}
        single = {word: ids[0] for word, ids in encoded.items() if len(ids) == 1}
        if len({values[word] for word in single}) < 2:
            base, words = self.resident.settings.base, " and ".join(values)
            raise ModelError(f"{base}: cannot judge: its tokenizer splits the words {words}")
        return list(single.values()), [values[word] for word in single]

    def last_logits(self, model: Any, groups: list[list[Ids]]) -> torch.Tensor:
        """(questions, vocabulary): the logits after each question.

        What all questions begin with is read once, then once a group what its questions begin with, then the rest.
        """
        if self.resident.backend == "unsloth":
            return self.logits_by_generate(model, [row for group in groups for row in group])
        from transformers import DynamicCache

        shared = common([row for group in groups for row in group])
        own = [common(group) for group in groups]
        reading = Reading(model, DynamicCache(config=model.config), self.resident)
        if shared:
            reading.read([groups[0][0][:shared]])
            reading.repeat([0] * len(groups))
        if any(len(group) > 1 for group in groups):
            reading.read([group[0][shared:end] for group, end in zip(groups, own, strict=True)])
        else:
            own = [shared] * len(groups)
        reading.repeat([index for index, group in enumerate(groups) for _ in group])
        return reading.read([row[end:] for group, end in zip(groups, own, strict=True) for row in group])

    def logits_by_generate(self, model: Any, rows: list[Ids]) -> torch.Tensor:
        """The same through the model's own generate, each question read whole."""
        inputs = pad_left(self.resident.tokenizer, rows, self.resident.device)
        del inputs["position_ids"]  # generate makes them itself
        answers = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=self.resident.tokenizer.pad_token_id,
        )
        logits: torch.Tensor = answers.logits[0]
        return logits


class Reading:
    """Rows of tokens, read piece by piece through one cache."""

    def __init__(self, model: Any, cache: Any, resident: Resident) -> None:
        self.model, self.cache, self.resident = model, cache, resident
        self.mask: torch.Tensor | None = None

    def read(self, rows: list[Ids]) -> torch.Tensor:
        """Read the next piece of each row; the logits after it, (rows, vocabulary)."""
        import torch

        if not any(rows):
            return torch.empty(0)
        inputs = pad_left(self.resident.tokenizer, rows, self.resident.device)
        mask, positions = inputs["attention_mask"], inputs["position_ids"]
        if self.mask is not None:
            positions = positions + self.mask.sum(1, keepdim=True)
            mask = torch.cat([self.mask, mask], 1)
        self.mask = mask
        logits: torch.Tensor = self.model(
            input_ids=inputs["input_ids"],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits

    def repeat(self, chosen: list[int]) -> None:
        """Go on with these of the rows, in this order."""
        import torch

        if self.mask is not None and chosen != list(range(len(self.mask))):
            index = torch.tensor(chosen, device=self.mask.device)
            self.cache.batch_select_indices(index)
            self.mask = self.mask[index]


def common(rows: Sequence[Ids]) -> int:
    """How many tokens all rows begin with, short of the whole of any."""
    first, last = min(rows), max(rows)  # the first and the last in order differ as soon as any two do
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(shared, min(map(len, rows)) - 1)


def halves(batch: list[int]) -> list[list[int]]:
    middle = len(batch) // 2
    return [half for half in (batch[:middle], batch[middle:]) if half]


def batches(groups: Sequence[Sequence[Ids]], most: int = ROWS) -> list[list[int]]:
    """Groups of similar length together, about `most` questions at a time."""
    result: list[list[int]] = []
    filled = most
    for index in sorted(range(len(groups)), key=lambda index: max(map(len, groups[index]), default=0)):
        if not groups[index]:
            continue
        if filled >= most:
            result.append([])
            filled = 0
        result[-1].append(index)
        filled += len(groups[index])
    return result
