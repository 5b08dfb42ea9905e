"""Questions answered by a server that speaks OpenAI's chat completions."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qreason.errors import ModelError
from qreason.rewards.judged import JudgeSettings
from qreason.types import Messages

NEW_TOKENS = 16
FIRST_WAIT = 0.5
"""Seconds before the first further attempt; doubled for each one after it."""


class Endpoint:
    """Answers as text, many at a time; what cannot be read as one of the expected answers is no verdict."""

    def __init__(self, settings: JudgeSettings) -> None:
        import httpx

        self.settings = settings
        key = os.environ.get(settings.api_key)
        self.client = httpx.Client(
            timeout=settings.timeout, headers={"Authorization": f"Bearer {key}"} if key else None
        )
        self.url = f"{(settings.endpoint or '').rstrip('/')}/chat/completions"

    def ask(self, groups: Sequence[Sequence[Messages]], values: Mapping[str, float]) -> list[list[float | None]]:
        """What each answer is worth; None after the last attempt, or for an answer that is none of `values`."""
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            answers = iter(list(pool.map(self.complete, (messages for group in groups for messages in group))))
        return [[read_verdict(next(answers), values) for _ in group] for group in groups]

    def complete(self, messages: Messages) -> str | None:
        """The answer as text, or None. Raises ModelError where asking again would not help."""
        import httpx

        body = {
            "model": self.settings.model,
            "messages": messages,
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
        }
        for attempt in range(self.settings.retries + 1):
            if attempt:
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
            try:
                response = self.client.post(self.url, json=body)
            except httpx.TransportError:  # a timeout, a refused or a dropped connection
                continue
            if response.status_code == 429 or response.status_code >= 500:
                continue
            if response.is_error:
                cure = f"check the address, the model name and the key in {self.settings.api_key}"
                raise ModelError(f"{self.url}: {response.status_code} {response.text[:200]}; {cure}")
            return read_content(response)
        return None


def read_content(response: Any) -> str | None:
    """The text of a chat completion; None where the body is something else."""
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    return content if isinstance(content, str) else None


def read_verdict(text: str | None, values: Mapping[str, float]) -> float | None:
    """What an answer is worth: its first word, thoughts aside, must be one of the expected ones."""
    spoken = re.sub(r"<think>.*?</think>", "", text or "", flags=re.DOTALL)
    word = re.match(r"\W*(\w+)", spoken)
    return values.get(word[1]) if word else None
