"""The hierarchy of qreason errors.

QReasonError
|-- InputError            the user can fix it; exit code 2
|   |-- RecipeError       a recipe: names the file, the line and the key
|   |-- DataError         a data file: names the file and the line
|   |-- ModelError        a base or an adapter that cannot be used
|   |-- RunFolderError    an output folder that belongs to something else
|   `-- MissingExtra      an optional dependency: names the extra
|-- TrainingError         training had to stop; exit code 1
|-- OutOfMemoryError      one row alone does not fit on the GPU; exit code 1
|-- HubError              a pull from or a push to the Hub failed; exit code 1
|-- ExportError           an exported file differs from what was trained; exit code 1
`-- StoppedElsewhere      another process of a distributed launch stopped; its exit code
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from typing import Any

HIDDEN = "***"
"""In place of a secret."""
SECRETS = (
    re.compile(r"(://)[^\s/?#'\"<>:@]*(?::[^\s'\"<>]*)?(?=@)"),
    re.compile(r"([?&;](?:[\w-]*key|[\w-]*token|auth|passw(?:or)?d|pwd|secret|sig(?:nature)?)=)[^\s&#'\"<>]+", re.I),
    re.compile(r"(\bbearer\s+|\bauthorization\b['\"]?\s*[:=]\s*b?['\"]?(?:\w+\s+)?)[^\s'\",;)}\]]+", re.I),
    re.compile(r"\b(hf_|ghp_)[A-Za-z0-9]{10,}"),
    re.compile(r"\b(sk-)[\w-]{10,}"),
)
"""User and password of an address, values in its query, credentials in headers, and tokens by their first letters."""
NAMES = ("API_KEY", "TOKEN", "SECRET", "PASSWORD")
"""Ends of the names of environment variables that hold secrets."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Such as the start of an escape sequence."""
LEAST_SECRET = 8
"""Characters of a secret; shorter values, such as `none`, are words."""
_known: set[str] = set()


def hide(secret: str) -> None:
    """Let `redact` leave out this text, and each part of it between spaces and line ends."""
    _known.update(part for part in secret.split() if len(part) >= LEAST_SECRET)


def redact(text: str) -> str:
    """A text without keys, tokens and passwords: for everything that is printed, stored or published."""
    for pattern in SECRETS:
        text = pattern.sub(lambda found: f"{found[1]}{HIDDEN}", text)
    for name, value in os.environ.items():
        if name.upper().endswith(NAMES):
            hide(value)
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def redact_values(value: Any) -> Any:
    """Plain values with every text redacted."""
    if isinstance(value, dict):
        return {key: redact_values(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [redact_values(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def visible(text: str) -> str:
    """A text with the codes of its control characters in their place: one could change the terminal."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def kind_and_line(error: BaseException) -> str:
    """The type of an error and the first line of its message, at most 200 characters of it."""
    kind, line = type(error).__name__, first_line(error)[:200]
    return kind if line == kind else f"{kind}: {line}"


def nearest(word: str, words: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the most similar word, or an empty text."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


class QReasonError(Exception):
    """Base of all errors that are shown without a traceback; their text holds no secret and steers no terminal."""

    exit_code = 1

    def __str__(self) -> str:
        return visible(redact(super().__str__()))


class InputError(QReasonError):
    exit_code = 2


class RecipeError(InputError):
    pass


class DataError(InputError):
    pass


class ModelError(InputError):
    pass


class RunFolderError(InputError):
    pass


class MissingExtra(InputError):  # noqa: N818
    pass


class TrainingError(QReasonError):
    pass


class OutOfMemoryError(QReasonError):
    pass


class HubError(QReasonError):
    pass


class ExportError(QReasonError):
    pass


class StoppedElsewhere(QReasonError):  # noqa: N818
    def __init__(self, text: str, exit_code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = exit_code
