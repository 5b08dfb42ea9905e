"""The only implementation of Generator: rollouts, evaluation and sampling all use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qreason.errors import DataError, ModelError
from qreason.inference.decoding import decode, decode_by_generate, not_finite
from qreason.inference.drawing import Drawing, take
from qreason.inference.journal import Journal
from qreason.inference.reading import (
    Ids,
    batches,
    last_logits,
    logits_by_generate,
    mean_log_probabilities,
    render_ids,
)
from qreason.machine.hardware import detect
from qreason.machine.rows import Rows
from qreason.model.resident import Resident
from qreason.recipe.sections import Model
from qreason.types import Messages, Reply, Sampling

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
QUESTIONS = 64
"""Questions that are answered in parallel."""
RANKED = 64
"""Replies whose likelihood is computed in parallel."""
LOGITS = 2**25
"""Logits held at a time while likelihoods are computed: 128 MiB in float32."""


class LocalGenerator:
    """The resident model as a Generator (types.py has the contract). A prompt is read once for all its replies.

    `offload` keeps the model in the CPU's memory while it is not used: for a judge with a separate base.
    """

    journal: Journal | None = None

    def __init__(self, resident: Resident, *, offload: bool = False) -> None:
        self.resident, self.offload = resident, offload
        self.decoded: dict[int, Rows] = {}
        """max_num_seqs -> the number of rows that fit."""
        self.asked = Rows(QUESTIONS, "judgements", resident.say)
        self.ranked = Rows(RANKED, "replies to rank", resident.say)
        eos = resident.model.generation_config.eos_token_id
        self.stops: Set[int] = {resident.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        if offload:
            resident.model.to("cpu")

    @contextmanager
    def awake(self, *, adapter: bool | Path = True, fast: bool = False) -> Iterator[Any]:
        """The model on its device, ready to answer."""
        if self.offload:
            self.resident.model.to(self.resident.hardware.device)
        try:
            with self.resident.inference(adapter=adapter, fast=fast) as model:
                yield model
        finally:
            if self.offload:
                self.resident.model.to("cpu")

    @contextmanager
    def recording(self, journal: Journal | None) -> Iterator[None]:
        """What is made within is kept in a journal, or read from it where it has been made before."""
        self.journal = journal
        try:
            yield
        finally:
            self.journal = None

    def attempt(
        self, rows: Rows, work: Callable[[], list[T]], count: int, asked: Any, source: torch.Generator | None = None
    ) -> list[T] | None:
        """As `rows.attempt`; `asked` says what the work depends on, `source` is what it draws from."""
        if self.journal:
            return self.journal.attempt(rows, work, count, asked, source)
        return rows.attempt(work, count)

    def rows(self, most: int) -> Rows:
        """How many replies are decoded in parallel: `most`, or fewer once memory ran out."""
        return self.decoded.setdefault(most, Rows(most, "replies", self.resident.say))

    def prompt_ids(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[int]]:
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

    def generate(
        self,
        prompts: Sequence[Messages],
        *,
        n: int,
        sampling: Sampling,
        fast: bool = False,
        on_progress: Callable[[int], None] = lambda replies: None,
        on_tokens: Callable[[list[Ids]], None] | None = None,
    ) -> list[list[Reply]]:
        """As in the contract; `on_tokens` gets the token ids so far of the replies that are decoded in parallel."""
        ids, drawing = self.prompt_ids(prompts, sampling), replace(self.drawing(sampling), on_tokens=on_tokens)
        replies: list[list[Reply]] = [[] for _ in prompts]
        left = [(index, n) for index in sorted(range(len(ids)), key=lambda index: -len(ids[index]))]
        rows = self.rows(sampling.max_num_seqs)
        with self.awake(fast=fast) as model:
            while left:
                chosen, each, rest = take(left, rows.most)
                now = [ids[index] for index in chosen]
                work = partial(self.decode, model, now, each, drawing)
                completions = self.attempt(rows, work, len(chosen) * each, (now, each, sampling, fast), drawing.source)
                if completions is None:
                    continue
                left = rest
                texts = self.resident.tokenizer.batch_decode(completions, skip_special_tokens=True)
                for position, (text, tokens) in enumerate(zip(texts, completions, strict=True)):
                    index = chosen[position // each]
                    finished = bool(tokens) and tokens[-1] in self.stops
                    replies[index].append(Reply(text, tuple(tokens), tuple(ids[index]), finished))
                on_progress(len(completions))
        return replies

    def extend(
        self, beginnings: Sequence[list[int]], *, n: int, sampling: Sampling, stop_at: Set[int]
    ) -> list[list[list[int]]]:
        drawing, rows = self.drawing(sampling, stop_at), self.rows(sampling.max_num_seqs)
        ways: list[list[list[int]]] = []
        with self.awake() as model:
            while left := beginnings[len(ways) :]:
                now = list(left[: max(1, rows.most // n)])
                work = partial(self.decode, model, now, n, drawing)
                count, asked = len(now) * n if len(now) > 1 else 1, (now, n, sampling, sorted(stop_at))
                drawn = self.attempt(rows, work, count, asked, drawing.source)
                if drawn is not None:
                    ways += [drawn[start : start + n] for start in range(0, len(drawn), n)]
        return ways

    def expect(
        self,
        groups: Sequence[Sequence[Messages]],
        values: Mapping[str, float],
        *,
        adapter: Path | None = None,
        fast: bool = False,
    ) -> list[list[float]]:
        tokens, word_values = self.single_tokens(values)
        rows = [render_ids(self.resident.tokenizer, group) for group in groups]
        answers: list[list[float]] = [[] for _ in rows]
        with self.awake(adapter=adapter or False, fast=fast) as model:
            left = batches(rows, self.asked.most)
            while left:
                batch = [rows[index] for index in left[0]]
                logits = self.asked.attempt(partial(self.read, model, batch), len(batch))
                if logits is None:
                    self.asked.most = sum(map(len, batch)) // 2
                    halves = [(b[: len(b) // 2], b[len(b) // 2 :]) for b in left]
                    left = [half for pair in halves for half in pair if half]
                    continue
                weights = logits[:, tokens].float().softmax(-1)
                expected = self.finite((weights @ weights.new_tensor(word_values)).tolist())
                for index in left.pop(0):
                    answers[index], expected = expected[: len(rows[index])], expected[len(rows[index]) :]
        return answers

    def single_tokens(self, values: Mapping[str, float]) -> tuple[list[int], list[float]]:
        """The words that are a single token: their tokens and values."""
        encoded = {word: self.resident.tokenizer.encode(word, add_special_tokens=False) for word in values}
        single = {word: ids[0] for word, ids in encoded.items() if len(ids) == 1}
        if len({values[word] for word in single}) < 2:
            base, words = self.resident.settings.base, " and ".join(values)
            raise ModelError(f"{base}: cannot judge: its tokenizer splits the words {words}")
        return list(single.values()), [values[word] for word in single]

    def read(self, model: Any, groups: Sequence[Sequence[Ids]]) -> torch.Tensor:
        """(rows, vocabulary): the logits after each row of token ids."""
        if self.resident.backend == "unsloth":
            return logits_by_generate(self.resident, model, [row for group in groups for row in group])
        return last_logits(self.resident, model, groups)

    def likelihoods(
        self, replies: Sequence[Reply], *, last: Sequence[int] | None = None, fast: bool = False
    ) -> list[float]:
        counted = [len(reply.token_ids) for reply in replies] if last is None else last
        longest = dict.fromkeys((reply.prompt_ids for reply in replies), 0)
        for reply, count in zip(replies, counted, strict=True):
            longest[reply.prompt_ids] = max(longest[reply.prompt_ids], count)
        scores = [float("-inf")] * len(replies)
        left = [index for index in range(len(replies)) if counted[index]]
        left.sort(key=lambda index: (longest[replies[index].prompt_ids], replies[index].prompt_ids))
        vocabulary = self.resident.model.config.get_text_config().vocab_size
        with self.awake(fast=fast) as model:
            while left:
                logits = longest[replies[left[-1]].prompt_ids] * vocabulary
                batch = left[-max(1, min(self.ranked.most, LOGITS // logits)) :]
                rows = [(replies[index], counted[index]) for index in batch]
                work = partial(mean_log_probabilities, self.resident, model, rows)
                asked = [(reply.prompt_ids, reply.token_ids, count, fast) for reply, count in rows]
                found = self.attempt(self.ranked, work, len(batch), asked)
                if found is not None:
                    left = left[: -len(batch)]
                    for index, score in zip(batch, self.finite(found), strict=True):
                        scores[index] = score
        return scores

    def finite(self, values: list[float]) -> list[float]:
        """Values of the model; raises TrainingError where one is no number."""
        if any(isnan(value) for value in values):
            raise not_finite(self.resident)
        return values

    def step_tokens(self, ends: tuple[str, ...]) -> set[int]:
        tokenizer = self.resident.tokenizer
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        return {token for token, text in enumerate(texts) if text.rstrip(" ").endswith(ends)}

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self.resident.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def text(self, tokens: Sequence[int]) -> str:
        text: str = self.resident.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def drawing(self, sampling: Sampling, stop_at: Set[int] = frozenset()) -> Drawing:
        """Sampling parameters with a seeded random source; rows also end after the tokens of `stop_at`."""
        import torch

        source = None
        if sampling.seed is not None:
            source = torch.Generator(self.resident.device).manual_seed(sampling.seed)
        return Drawing(sampling, source, self.stops | stop_at)

    def decode(self, model: Any, ids: list[Ids], n: int, drawing: Drawing) -> list[Ids]:
        """Token ids of n replies for each row of prompt ids, the stop token included."""
        way = decode_by_generate if self.resident.backend == "unsloth" else decode
        return way(self.resident, model, ids, n, drawing)


def open_generator(
    model: Model, say: Callable[[str], None] = lambda line: None, *, offload: bool = False
) -> LocalGenerator:
    """A generator with a separately loaded model."""
    hardware = detect()
    return LocalGenerator(Resident(model, hardware, say), offload=offload and hardware.device != "cpu")
