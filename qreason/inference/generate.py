"""The one way replies are made: rollouts, evaluation and sampling all go through here."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qreason.errors import DataError
from qreason.machine.rows import Rows
from qreason.model.resident import Resident
from qreason.types import Messages, Reply, Sampling

if TYPE_CHECKING:
    import torch


def render_ids(tokenizer: Any, prompts: Sequence[Messages]) -> list[list[int]]:
    """Chat messages -> token ids, up to where the assistant begins."""
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


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn: by which settings, from which random numbers, and after which tokens a row ends."""

    sampling: Sampling
    source: torch.Generator | None
    stops: Set[int]


def draw(logits: torch.Tensor, sampling: Sampling, source: torch.Generator | None) -> torch.Tensor:
    """The next token of each row, (rows,), from logits (rows, vocabulary)."""
    import torch

    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / sampling.temperature, -1)
    if 0 < sampling.top_k < probabilities.shape[-1]:
        least = probabilities.topk(sampling.top_k).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        cut = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.masked_fill(cut.scatter(-1, order, cut), 0)
    if sampling.min_p > 0:
        probabilities = probabilities.masked_fill(
            probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True), 0
        )
    # Inverse transform sampling: the first token whose cumulative probability exceeds a uniform number.
    cumulative = probabilities.cumsum(-1)
    uniform = torch.rand(len(logits), 1, generator=source, device=logits.device) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, uniform, right=True).squeeze(1)
    return tokens.clamp(max=logits.shape[-1] - 1)


def staying(alive: torch.Tensor) -> torch.Tensor:
    """The rows that go on, (left,), from a mark for each row: the last ones take the places of those that end."""
    import torch

    left = int(alive.sum())
    rows = torch.arange(left, device=alive.device)
    rows[~alive[:left]] = left + alive[left:].nonzero().squeeze(1)
    return rows


def take(left: list[tuple[int, int]], most: int) -> tuple[list[int], int, list[tuple[int, int]]]:
    """The prompts that are answered next, the replies to each, and what is left; at most `most` replies at a time."""
    index, replies = left[0]
    if replies > most:
        return [index], most, [(index, replies - most), *left[1:]]
    alike = next((i for i, (_, other) in enumerate(left) if other != replies), len(left))
    count = min(alike, most // replies)
    return [index for index, _ in left[:count]], replies, left[count:]


class LocalGenerator:
    """Replies of the resident model, adapter on. A prompt is read once, however many replies it gets.

    `fast` computes as training steps do, in bfloat16 on CPUs that have it: for rollouts, which are drawn anyway.
    """

    def __init__(
        self, resident: Resident, on_progress: Callable[[int], None] | None = None, *, fast: bool = False
    ) -> None:
        self.resident = resident
        self.fast = fast
        self.on_progress = on_progress or (lambda replies: None)
        self.rows: Rows | None = None
        stops = resident.model.generation_config.eos_token_id
        self.stops = {resident.tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}

    def checked_ids(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[int]]:
        """The token ids of prompts. Raises DataError for one that leaves no room for a reply of the asked length."""
        ids = render_ids(self.resident.tokenizer, prompts)
        room = self.resident.context_length - sampling.max_completion_length
        for row, prompt in zip(ids, prompts, strict=True):
            if len(row) > room:
                raise DataError(
                    f"prompt of {len(row)} tokens ('{prompt[-1]['content'][:60]}…'): a context of "
                    f"{self.resident.context_length} less max_completion_length {sampling.max_completion_length} "
                    f"leaves {room}; shorten it or lower max_completion_length"
                )
        return ids

    def generate(self, prompts: Sequence[Messages], *, n: int, sampling: Sampling) -> list[list[Reply]]:
        """n replies to each prompt, in order.

        Raises DataError for a prompt that leaves no room for a reply of sampling.max_completion_length tokens.
        """
        ids, drawing = self.checked_ids(prompts, sampling), self.drawing(sampling)
        replies: list[list[Reply]] = [[] for _ in prompts]
        left = [(index, n) for index in sorted(range(len(ids)), key=lambda index: -len(ids[index]))]
        self.rows = rows = self.rows or Rows(sampling.max_num_seqs, "replies", self.resident.say)
        with self.resident.inference(fast=self.fast) as model:
            while left:
                chosen, each, rest = take(left, rows.most)
                work = partial(self.decode, model, [ids[index] for index in chosen], each, drawing)
                completions = rows.attempt(work, len(chosen) * each)
                if completions is None:
                    continue
                left = rest
                texts = self.resident.tokenizer.batch_decode(completions, skip_special_tokens=True)
                for position, (text, tokens) in enumerate(zip(texts, completions, strict=True)):
                    index = chosen[position // each]
                    finished = bool(tokens) and tokens[-1] in self.stops
                    replies[index].append(Reply(text, tuple(tokens), tuple(ids[index]), finished))
                self.on_progress(len(completions))
        return replies

    def drawing(self, sampling: Sampling, stop_at: Set[int] = frozenset()) -> Drawing:
        """How to draw by these settings, from their seed on; rows end after the tokens of `stop_at` too."""
        import torch

        source = None
        if sampling.seed is not None:
            source = torch.Generator(self.resident.device).manual_seed(sampling.seed)
        return Drawing(sampling, source, self.stops | stop_at)

    def decode(self, model: Any, ids: list[list[int]], n: int, drawing: Drawing) -> list[list[int]]:
        """Token ids of n replies for each row of prompt ids, the stop token included."""
        if self.resident.backend == "unsloth":
            return self.decode_by_generate(model, ids, n, drawing)
        import torch

        from qreason.model.compat.cache import roomy_cache

        inputs = pad_left(self.resident.tokenizer, ids, self.resident.device)
        cache = roomy_cache(model.config, drawing.sampling.max_completion_length)
        logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        cache.batch_repeat_interleave(n)
        logits = logits.repeat_interleave(n, 0)
        mask = inputs["attention_mask"].repeat_interleave(n, 0)
        position = inputs["position_ids"][:, -1:].repeat_interleave(n, 0)
        stops, most = torch.tensor(sorted(drawing.stops), device=logits.device), drawing.sampling.max_completion_length
        completions: list[list[int]] = [[] for _ in range(len(ids) * n)]
        running = list(range(len(completions)))
        for _ in range(most):
            tokens = draw(logits, drawing.sampling, drawing.source)
            for index, token in zip(running, tokens.tolist(), strict=True):
                completions[index].append(token)
            stay = staying(~torch.isin(tokens, stops))
            if len(stay) == 0 or len(completions[running[0]]) == most:
                break
            if len(stay) < len(running):  # finished rows leave the batch
                running = [running[index] for index in stay.tolist()]
                cache.batch_select_indices(stay)
                tokens, mask, position = tokens[stay], mask[stay], position[stay]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            position = position + 1
            logits = model(
                input_ids=tokens.unsqueeze(1),
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        return completions

    def decode_by_generate(self, model: Any, ids: list[list[int]], n: int, drawing: Drawing) -> list[list[int]]:
        """The same through the model's own generate, for models whose caches are not transformers' own."""
        import torch

        sampling, source = drawing.sampling, drawing.source
        inputs = pad_left(self.resident.tokenizer, ids, self.resident.device)
        del inputs["position_ids"]  # generate makes them itself
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            names = ("temperature", "top_p", "top_k", "min_p")
            options = {"do_sample": True} | {name: getattr(sampling, name) for name in names}
        if source is not None:
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=source, device=source.device)))
        made = model.generate(
            **inputs,
            **options,
            num_return_sequences=n if sampling.temperature else 1,
            max_new_tokens=sampling.max_completion_length,
            eos_token_id=sorted(drawing.stops),
            pad_token_id=self.resident.tokenizer.pad_token_id,
        )
        rows = made[:, inputs["input_ids"].shape[1] :].tolist()
        if not sampling.temperature:
            rows = [row for row in rows for _ in range(n)]
        return [up_to(row, drawing.stops) for row in rows]


def up_to(tokens: list[int], stops: Set[int]) -> list[int]:
    """Tokens up to the first stop token, and that one; what follows is padding."""
    end = next((position for position, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]
