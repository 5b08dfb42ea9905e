"""Example -> chat messages: the one place where prompts are written.

Training, evaluation, chat and export all render through this file, so they see the same tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from qreason.errors import InputError
from qreason.recipe.sections import Data
from qreason.types import Example, Messages

HELPDESK = (
    "You are an IT helpdesk assistant. Work through the issue inside <reasoning></reasoning>, "
    "then give the resolution inside <answer></answer>."
)
SYSTEM_PROMPTS = {
    "general": "Work through the question inside <reasoning></reasoning>, then give the answer inside "
    "<answer></answer>.",
    "helpdesk": HELPDESK,
    "math": "You solve math problems. Work through the problem inside <reasoning></reasoning>, "
    "then give only the final number inside <answer></answer>.",
    "choice": "You answer multiple-choice questions. Work through the question inside <reasoning></reasoning>, "
    "then give only the letter of the right choice inside <answer></answer>.",
    "none": "",
}
"""The values of `data.prompt`; `none` asks without a system prompt, and for no reasoning."""
DIRECT_PROMPTS = {
    "general": "Give only the answer, inside <answer></answer>.",
    "helpdesk": "You are an IT helpdesk assistant. Give only the resolution, inside <answer></answer>.",
    "math": "You solve math problems. Give only the final number, inside <answer></answer>.",
    "choice": "You answer multiple-choice questions. Give only the letter of the choice, inside <answer></answer>.",
    "none": "",
}
"""The same tasks without chain of thought: they ask for the answer alone."""

JUDGE = "You compare a response with a reference. Reply yes if both say the same, otherwise no."
VERDICTS = {"yes": 1.0, "Yes": 1.0, "no": 0.0, "No": 0.0}
"""The judge's answers and their values."""
CHOOSE = "You compare two responses with a reference. Reply 1 or 2: the one that is closer to the reference."
CHOICES = {"1": 1.0, "2": 0.0}
"""The answers of a judge that compares two responses, and the first one's share of the win."""


def system_prompt(data: Data, *, direct: bool = False) -> str:
    """The system prompt of a recipe's data, empty for none; `direct` is the version without chain of thought.

    Raises InputError where a text of one's own has no such version.
    """
    if data.system is None:
        return (DIRECT_PROMPTS if direct else SYSTEM_PROMPTS)[data.prompt or "helpdesk"]
    if direct:
        raise InputError(
            "data.system: a system prompt of your own has no version without chain of thought; evaluate with "
            "chain_of_thought: true, or take a shipped one with data.prompt"
        )
    return data.system


def asks_for_reasoning(data: Data) -> bool:
    """Whether the system prompt of a recipe's data asks for the tags of a reply."""
    return "<answer>" in system_prompt(data)


def render(example: Example, system: str = HELPDESK, shots: Sequence[Example] = ()) -> Messages:
    """The messages that ask for a reply: system prompt, examples, earlier turns and the prompt.

    The row's own system prompt wins; a plain example has no other, and no shots.
    """
    own = example.system if example.system is not None else "" if example.plain else system
    shown = [(role, text) for shot in shots for role, text in (("user", shot.prompt), ("assistant", demonstrate(shot)))]
    turns = [
        *([("system", own)] if own else []),
        *([] if example.plain else shown),
        *example.history,
        ("user", example.prompt),
    ]
    return [{"role": role, "content": text} for role, text in turns]


def demonstrate(example: Example) -> str:
    """The target reply of SFT: steps as reasoning, then the answer; without steps the reference alone."""
    if example.reasoning is None:
        return example.reference
    return f"<reasoning>{example.reasoning}</reasoning>\n<answer>{example.reference}</answer>"


def teach(example: Example, system: str) -> tuple[Messages, str]:
    """(messages, reply) of an SFT row. Without steps, no shipped system prompt asks for reasoning."""
    plain = example.plain or example.reasoning is None
    return render(replace(example, plain=plain), system), demonstrate(example)


def lesson(example: Example, system: str) -> Messages:
    """The whole chat of an SFT row, its reply included."""
    messages, reply = teach(example, system)
    return [*messages, {"role": "assistant", "content": reply}]


def unlearned(example: Example) -> set[int]:
    """The messages of its lesson that SFT does not learn, counted from the end: -1 is the last."""
    return {place - len(example.history) - 2 for place in example.unlearned}


def fence(text: str) -> str:
    """Text without <<<, >>> and the <| of special tokens, so that it cannot close the fence around it."""
    return re.sub(r"<{2,}|>{2,}|<\||\|>", " ", text).strip()


def shorten(text: str, words: int) -> str:
    """The first words of a text, followed by ... if there are more."""
    kept = text.split(maxsplit=words)
    return " ".join([*kept[:words], "..."]) if len(kept) > words else text


def render_judge(reference: str, response: str) -> Messages:
    """The messages that ask the judge whether a response, fenced, says what the reference says.

    A response more than twice as long as the reference is cut: very long ones degrade the verdict.
    """
    shown = shorten(response, 20 + 2 * len(reference.split()))
    question = f"Reference: {fence(reference)}\nResponse: <<< {fence(shown)} >>>\nDo they say the same?"
    return [{"role": "system", "content": JUDGE}, {"role": "user", "content": question}]


def render_choice(reference: str, first: str, second: str) -> Messages:
    """The messages that ask the judge which of two responses, fenced, is closer to the reference."""
    question = (
        f"Reference: {fence(reference)}\n1: <<< {fence(first)} >>>\n2: <<< {fence(second)} >>>\nWhich one is closer?"
    )
    return [{"role": "system", "content": CHOOSE}, {"role": "user", "content": question}]
