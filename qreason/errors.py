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
`-- ExportError           an exported file differs from what was trained; exit code 1
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
    """Base of all errors that are shown without a traceback."""

    exit_code = 1


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
