"""How much the reasoning of a reply helps its own model to predict the reference: the gain, in nats."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qreason.data.prompts import render
from qreason.rewards.tags import read_reasoning
from qreason.types import Example, Generator, Reply, Sampling

EMPTY = ""


class ReasoningGain:
    """log p(reference | prompt, reasoning) - log p(reference | prompt, empty reasoning), under the present policy.

    VeriFree (arXiv 2505.21493) rewards p(reference | prompt, reasoning); the second term, the same for all replies to a
    prompt, says what the reasoning adds. The end tag of the answer counts as part of the reference.
    """

    def __init__(self, open_generator: Callable[[], Generator], system: str, rows: int) -> None:
        """`rows` are read at a time; with those of a training micro-batch it needs no more memory than that."""
        self.open_generator, self.system, self.rows = open_generator, system, rows
        self.measured: dict[tuple[Example, str], float] = {}
        """(example, reasoning) -> the gain, of the last call."""

    def __call__(self, replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
        """Nats per reply; None where the reply has no reasoning between its tags, or its row no reference."""
        rows = [
            (example, reasoning)
            for reply, example in zip(replies, examples, strict=True)
            if example.reference and (reasoning := read_reasoning(reply.text)).strip()
        ]
        wanted = list(
            dict.fromkeys(one for example, reasoning in rows for one in ((example, EMPTY), (example, reasoning)))
        )
        nats = dict(zip(wanted, self.log_probabilities(wanted), strict=True)) if wanted else {}
        self.measured = {row: nats[row] - nats[row[0], EMPTY] for row in rows}
        return [self.of(*row) for row in zip(replies, examples, strict=True)]

    def of(self, reply: Reply, example: Example) -> float | None:
        """What the last call measured for a reply; None where it measured nothing."""
        return self.measured.get((example, read_reasoning(reply.text)))

    def log_probabilities(self, rows: Sequence[tuple[Example, str]]) -> list[float]:
        """log p(reference and end of the answer | prompt, reasoning) for each (example, reasoning), in nats."""
        generator = self.open_generator()
        examples = list(dict.fromkeys(example for example, _ in rows))
        chats = [render(example, self.system) for example in examples]
        ids = generator.prompt_ids(chats, Sampling(max_completion_length=1))
        prompts = {example: tuple(prompt) for example, prompt in zip(examples, ids, strict=True)}
        given, counts = [], []
        for example, reasoning in rows:
            start = f"<reasoning>{reasoning}</reasoning>\n<answer>"
            tokens, before = generator.tokens(f"{start}{example.reference}</answer>"), generator.tokens(start)
            # A token may contain the end of the tag and the start of the reference; it counts for the reference.
            same = next((at for at, (a, b) in enumerate(zip(tokens, before, strict=False)) if a != b), len(before))
            given.append(Reply("", tuple(tokens), prompts[example]))
            counts.append(len(tokens) - same)
        means: list[float] = []
        for first in range(0, len(given), self.rows):
            here = slice(first, first + self.rows)
            means += generator.likelihoods(given[here], last=counts[here], fast=True)
        return [mean * count for mean, count in zip(means, counts, strict=True)]
