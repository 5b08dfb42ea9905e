"""Questions answered by a server that speaks OpenAI's chat completions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from qreason.rewards.judged import JudgeSettings
from qreason.sampling import endpoint
from qreason.sampling.endpoint import NoAnswerError
from qreason.types import Messages

NEW_TOKENS = 16


class Endpoint:
    """Answers as text, many at a time; what cannot be read as one of the expected answers is no verdict."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.server = endpoint.Endpoint(
            settings.endpoint or "",
            settings.model or "",
            settings.api_key,
            timeout=settings.timeout,
            retries=settings.retries,
        )

    def ask(self, groups: Sequence[Sequence[Messages]], values: Mapping[str, float]) -> list[list[float | None]]:
        """What each answer is worth; None after the last attempt, or for an answer that is none of `values`."""
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            answers = iter(list(pool.map(self.complete, (messages for group in groups for messages in group))))
        return [[read_verdict(next(answers), values) for _ in group] for group in groups]

    def complete(self, messages: Messages) -> str | None:
        """The answer as text, or None. Raises ModelError where asking again would not help."""
        try:
            return self.server.complete(messages, max_tokens=NEW_TOKENS, temperature=0).text
        except NoAnswerError:
            return None


def read_verdict(text: str | None, values: Mapping[str, float]) -> float | None:
    """What an answer is worth: its first word, thoughts aside, must be one of the expected ones."""
    spoken = re.sub(r"<think>.*?</think>", "", text or "", flags=re.DOTALL)
    word = re.match(r"\W*(\w+)", spoken)
    return values.get(word[1]) if word else None
