"""Example -> chat messages: the one place where prompts are written.

Training, evaluation, chat and export all render through this file, so they see the same tokens.
"""

from __future__ import annotations

from qreason.types import Example, Messages

HELPDESK = (
    "You are an IT helpdesk assistant. Work through the issue inside <reasoning></reasoning>, "
    "then give the resolution inside <answer></answer>."
)
MATH = (
    "You solve math problems. Work through the problem inside <reasoning></reasoning>, "
    "then give only the final number inside <answer></answer>."
)
SYSTEM_PROMPTS = {"helpdesk": HELPDESK, "math": MATH}

JUDGE = "You compare a response with a reference. Reply yes if both say the same, otherwise no."
VERDICTS = {"yes": 1.0, "Yes": 1.0, "no": 0.0, "No": 0.0}
"""Score tokens of the judge: the first token of its reply -> what it is worth."""


def render(example: Example, system: str = HELPDESK) -> Messages:
    """The messages that ask for a reply to an example: system prompt and issue."""
    return [{"role": "system", "content": system}, {"role": "user", "content": example.prompt}]


def demonstrate(example: Example) -> str:
    """The reply SFT teaches for an example: its steps as reasoning, its reference as answer."""
    return f"<reasoning>{example.reasoning}</reasoning>\n<answer>{example.reference}</answer>"


def render_judge(reference: str, response: str) -> Messages:
    """The messages that ask the judge whether a response says what the reference says."""
    question = f"Reference: {reference}\nResponse: {response}\nDo they say the same?"
    return [{"role": "system", "content": JUDGE}, {"role": "user", "content": question}]
