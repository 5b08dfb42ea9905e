"""What models reply: to rewards, and as judges."""

from __future__ import annotations

from collections.abc import Sequence

import httpx
from hypothesis import strategies as st

from fuzzing.strange import Surface, as_json, damaged
from qreason.data.prompts import VERDICTS
from qreason.inference.selection import vote
from qreason.judge.verdict import read_verdict
from qreason.rewards.registry import REWARDS, build
from qreason.rewards.scoring import ask
from qreason.rewards.steps import ReferenceSteps, equations_fit
from qreason.sampling.endpoint import read_completion
from qreason.types import Example, Reply


def replies(rewards: Sequence[str] = tuple(name for name in REWARDS if name not in ("code", "math"))) -> Surface:
    tags = [f"<{end}{tag}>" for tag in ("reasoning", "answer", "think", "tool_call") for end in ("", "/")]
    marks = [r"\boxed{", r"\frac{1}{0}", "$", r"\sqrt[", "{", "}", "(", "[", "^", "^9^9^9", "1e999", "-", "−", "½", "٣"]
    marks += [
        "10^18",
        "1,000",
        "3 / 0 = 1",
        "2 + 2 = 4",
        "```python",
        "yes",
        "no",
        "\n",
        "\n\n",
        ". ",
        "x",
        "漢",
        "ไ",
        "0",
    ]
    piece = st.sampled_from(tags + marks) | st.text(max_size=15) | st.integers().map(str)
    text = st.lists(piece, max_size=12).map("".join)
    long = st.tuples(st.sampled_from(tags + marks), st.integers(1, 5000)).map(lambda drawn: drawn[0] * drawn[1])
    answered = (text | long).map(lambda inner: f"<reasoning>{inner}</reasoning>\n<answer>{inner}</answer>")
    built = build({name: {} for name in rewards}, lambda _: None, 256)

    def mark(drawn: tuple[list[str], str]) -> None:
        texts, reference = drawn
        given = [Reply(one, finished=bool(place)) for place, one in enumerate(texts)]
        examples = [Example("a", reference, reference, (reference, "x"), reference)] * len(texts)
        for name, reward in built.items():
            ask(name, reward, given, examples)
        ReferenceSteps(examples).fit(reference, texts[0])
        equations_fit(texts[0], reference)
        vote(given)
        read_verdict(texts[0], VERDICTS)

    return st.tuples(st.lists(text | long | answered, min_size=1, max_size=3), text | long), mark


def mathematics() -> Surface:
    """The reward that reads LaTeX, in workers of its own."""
    return replies(["math"])


def verdicts() -> Surface:
    answer = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}

    def read(body: bytes) -> None:
        read_verdict(read_completion(httpx.Response(200, content=body)).text, VERDICTS)

    return damaged("answer.json", as_json(answer)), read
