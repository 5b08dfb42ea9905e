"""The client of judges and teachers for a server with OpenAI's chat completions, with bounded retries."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from qreason.errors import HIDDEN, ModelError, TrainingError, first_line, hide, redact
from qreason.types import Messages


class NoAnswerError(TrainingError):
    """The server did not answer in the last attempt either; the message says what happened."""


@dataclass(frozen=True)
class Completion:
    """A server's answer: its text (empty if the body had none), and tokens as the server counted them, else 0."""

    text: str
    finished: bool = True
    prompt_tokens: int = 0
    completion_tokens: int = 0
    problem: str = ""
    """Why the body was no chat completion."""

    @property
    def cut_in_thoughts(self) -> bool:
        """Whether it reached the token limit before it said anything after its thoughts."""
        return not self.finished and not self.text.rpartition("</think>")[2].partition("<think>")[0].strip()


class Endpoint:
    """Chat completions of one model; may be called from several threads."""

    def __init__(self, endpoint: str, model: str, api_key: str, *, timeout: float, retries: int) -> None:
        """`api_key` is the environment variable that holds the key; `timeout` in seconds per request."""
        from openai import OpenAI

        self.model, self.api_key = model, api_key
        key = os.environ.get(api_key, "").strip() or "none"  # the client requires one, a local server may not
        hide(key)
        if HIDDEN in endpoint:
            raise ModelError(f"{endpoint}: a run folder does not keep a password; give the recipe it was made with")
        if not (key.isascii() and key.isprintable()):  # the HTTP library's error would show it
            raise ModelError(f"{api_key}: its key has characters that an HTTP header cannot carry")
        try:
            self.client = OpenAI(base_url=endpoint, api_key=key, timeout=timeout, max_retries=retries)
        except Exception as error:
            raise ModelError(f"{endpoint}: not an address ({first_line(error)}); write http://HOST:PORT/v1") from None

    def complete(self, messages: Messages, **body: Any) -> Completion:
        """One completion; `body` is sent in addition to model and messages.

        The client retries timeouts, 408, 409, 429 and 5xx, with Retry-After or growing waits. Raises NoAnswerError
        after the last attempt, and ModelError immediately for other error statuses.
        """
        from openai import APIConnectionError, APIStatusError

        chat = self.client.chat.completions.with_raw_response  # raw: the client does not check bodies
        try:
            answer = chat.create(model=self.model, messages=messages, extra_body=body)  # type: ignore[arg-type]
        except APIStatusError as error:
            status, problem = error.status_code, f"{error.status_code} {redact(error.response.text)[:200]}".strip()
            if status < 500 and status not in (408, 429):
                cure = f"check the address, the model name and the key in {self.api_key}"
                raise ModelError(f"{error.request.url}: {problem}; {cure}") from error
        except APIConnectionError as error:
            problem = redact(str(error.__cause__ or error))[:200]
        else:
            return read_completion(answer.http_response)
        raise NoAnswerError(f"{self.client.base_url}: no answer in {self.client.max_retries + 1} attempts ({problem})")


def read_completion(response: Any) -> Completion:
    """The first choice of a chat completion; an empty text, and the problem, for a malformed body."""
    try:
        body = response.json()
        choice = body["choices"][0]
        content, finished = choice["message"]["content"], choice.get("finish_reason") != "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return Completion("", problem=f"not a chat completion ({type(error).__name__})")
    usage = body.get("usage")
    tokens = count(usage, "prompt_tokens"), count(usage, "completion_tokens")
    if content is None and choice["message"].get("reasoning_content") is not None:
        content = ""  # the server keeps thoughts apart, and there was no room for more
    if not isinstance(content, str):
        return Completion("", finished, *tokens, "the message has no text")
    return Completion(content.encode(errors="replace").decode(), finished, *tokens)


def count(usage: Any, key: str) -> int:
    """A number of tokens as a server reports it; 0 for anything else."""
    number = usage.get(key) if isinstance(usage, dict) else None
    return number if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**31 else 0
