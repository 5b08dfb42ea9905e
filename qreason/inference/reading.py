"""Logits and log-probabilities of given tokens; common prefixes are read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qreason.model.compat.transformers import own_sampling
from qreason.model.resident import Resident
from qreason.types import Messages, Reply

if TYPE_CHECKING:
    import torch

Ids = list[int]


def render_ids(tokenizer: Any, prompts: Sequence[Messages]) -> list[list[int]]:
    """Chat messages -> token ids, up to the start of the assistant's reply."""
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def pad_left(tokenizer: Any, ids: Sequence[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Token ids, attention mask and positions, each (rows, longest)."""
    import torch

    longest = max(map(len, ids))
    padded = [[tokenizer.pad_token_id] * (longest - len(row)) + list(row) for row in ids]
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
    return {
        "input_ids": torch.tensor(padded, device=device),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def last_logits(resident: Resident, model: Any, groups: Sequence[Sequence[Ids]]) -> torch.Tensor:
    """(rows, vocabulary): the logits after each row of token ids.

    The prefix of all rows is read once, then the prefix of each group once, then the rest.
    """
    from transformers import DynamicCache

    shared = common([row for group in groups for row in group])
    own = [common(group) for group in groups]
    reading = Reading(model, DynamicCache(config=model.config), resident)
    if shared:
        reading.read([groups[0][0][:shared]])
        reading.repeat([0] * len(groups))
    if any(len(group) > 1 for group in groups):
        reading.read([group[0][shared:end] for group, end in zip(groups, own, strict=True)])
    else:
        own = [shared] * len(groups)
    reading.repeat([index for index, group in enumerate(groups) for _ in group])
    return reading.read([row[end:] for group, end in zip(groups, own, strict=True) for row in group])[:, -1]


def logits_by_generate(resident: Resident, model: Any, rows: Sequence[Ids]) -> torch.Tensor:
    """The same through the model's own generate, each row read in full."""
    inputs = pad_left(resident.tokenizer, rows, resident.device)
    del inputs["position_ids"]  # generate makes them itself
    with own_sampling(model):
        answers = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=resident.tokenizer.pad_token_id,
        )
    logits: torch.Tensor = answers.logits[0]
    return logits


class Reading:
    """Reads rows of tokens piece by piece into one cache."""

    def __init__(self, model: Any, cache: Any, resident: Resident) -> None:
        self.model, self.cache, self.resident = model, cache, resident
        self.mask: torch.Tensor | None = None

    def read(self, rows: list[Ids], keep: int = 1) -> torch.Tensor:
        """Read the next piece of each row; returns its last `keep` logits, (rows, keep, vocabulary)."""
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
            logits_to_keep=keep,
        ).logits
        return logits

    def repeat(self, chosen: list[int]) -> None:
        """Continue with the chosen rows, in this order."""
        import torch

        if self.mask is not None and chosen != list(range(len(self.mask))):
            index = torch.tensor(chosen, device=self.mask.device)
            self.cache.batch_select_indices(index)
            self.mask = self.mask[index]


def common(rows: Sequence[Ids]) -> int:
    """The length of the common prefix of all rows, shorter than the shortest row."""
    first, last = min(rows), max(rows)  # the first and last in sort order differ wherever any two rows do
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(shared, min(map(len, rows)) - 1)


def batches(groups: Sequence[Sequence[Ids]], most: int) -> list[list[int]]:
    """Batches of groups of similar length, as indices, with about `most` questions each."""
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


def mean_log_probabilities(resident: Resident, model: Any, rows: Sequence[tuple[Reply, int]]) -> list[float]:
    """For (reply, count): the mean log-probability of the reply's last `count` tokens, in nats per token.

    Replies to a prompt stand together; the prompt is read once for all of them.
    """
    import torch

    counts = [count for _, count in rows]
    ids = [[*reply.prompt_ids, *reply.token_ids] for reply, _ in rows]
    keep = max(counts) + 1
    places = {reply.prompt_ids: place for place, (reply, _) in enumerate(rows)}
    if len(places) < len(rows) and resident.backend == "plain":
        logits = logits_after_prompts(resident, model, rows, keep)
    else:
        logits = model(**pad_left(resident.tokenizer, ids, resident.device), logits_to_keep=keep).logits
    logits = logits[:, :-1].float()
    tokens = torch.tensor(
        [[0] * (keep - 1 - count) + row[len(row) - count :] for row, count in zip(ids, counts, strict=True)]
    )
    chosen = torch.log_softmax(logits, -1).gather(-1, tokens.to(logits.device).unsqueeze(-1)).squeeze(-1)
    return [float(row[-count:].mean()) for row, count in zip(chosen, counts, strict=True)]


def logits_after_prompts(resident: Resident, model: Any, rows: Sequence[tuple[Reply, int]], keep: int) -> torch.Tensor:
    """(rows, keep, vocabulary): the last logits of each row; every prompt but its last token is read once."""
    from transformers import DynamicCache

    prompts = list(dict.fromkeys(reply.prompt_ids for reply, _ in rows))
    reading = Reading(model, DynamicCache(config=model.config), resident)
    reading.read([list(prompt[:-1]) for prompt in prompts])
    reading.repeat([prompts.index(reply.prompt_ids) for reply, _ in rows])
    return reading.read([[*reply.prompt_ids[-1:], *reply.token_ids] for reply, _ in rows], keep)
