"""A server that speaks OpenAI's chat completions: one client for judges and teachers, with bounded retries."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from qreason.errors import ModelError, TrainingError, kind_and_line
from qreason.types import Messages

FIRST_WAIT = 0.5
"""Seconds before the first further attempt; doubled for each one after it."""
LONGEST_WAIT = 60.0
"""Seconds a server may ask us to wait with Retry-After."""


class NoAnswerError(TrainingError):
    """The server did not answer, the last attempt included; says what it did instead."""


@dataclass(frozen=True)
class Completion:
    """What a server answered: its text (empty where the body had none), tokens as it counted them (0: it did not)."""

    text: str
    finished: bool = True
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Endpoint:
    """Chat completions of one model; may be called from several threads."""

    def __init__(self, endpoint: str, model: str, api_key: str, *, timeout: float, retries: int) -> None:
        """`api_key` is the environment variable that holds the key; `timeout` in seconds a request."""
        import httpx

        self.model, self.api_key, self.retries = model, api_key, retries
        key = os.environ.get(api_key)
        self.client = httpx.Client(timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else None)
        self.url = f"{endpoint.rstrip('/')}/chat/completions"

    def complete(self, messages: Messages, **body: Any) -> Completion:
        """One completion; `body` is what goes out beside model and messages.

        Timeouts, 429 and 5xx are tried again, then raise NoAnswerError; another error status raises ModelError at once.
        """
        import httpx

        body = {"model": self.model, "messages": messages, **body}
        problem, asked_wait = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(max(FIRST_WAIT * 2 ** (attempt - 1), asked_wait))
            try:
                response = self.client.post(self.url, json=body)
            except httpx.TransportError as error:  # a timeout, a refused or a dropped connection
                problem, asked_wait = kind_and_line(error), 0.0
                continue
            if response.status_code == 429 or response.status_code >= 500:
                problem, asked_wait = f"{response.status_code} {response.text[:200]}".strip(), read_wait(response)
                continue
            if response.is_error:
                cure = f"check the address, the model name and the key in {self.api_key}"
                raise ModelError(f"{self.url}: {response.status_code} {response.text[:200]}; {cure}")
            return read_completion(response)
        raise NoAnswerError(f"{self.url}: no answer in {self.retries + 1} attempts ({problem})")


def read_wait(response: Any) -> float:
    """Seconds to wait as Retry-After says; 0 where it says nothing or a date."""
    try:
        return min(LONGEST_WAIT, max(0.0, float(response.headers.get("retry-after", 0))))
    except ValueError:
        return 0.0


def read_completion(response: Any) -> Completion:
    """The first choice of a chat completion; an empty text where the body is something else."""
    try:
        body = response.json()
        choice = body["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return Completion("")
    usage = body.get("usage") or {}
    return Completion(
        content if isinstance(content, str) else "",
        choice.get("finish_reason") != "length",
        int(usage.get("prompt_tokens") or 0),
        int(usage.get("completion_tokens") or 0),
    )
