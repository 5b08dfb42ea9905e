"""The rows of a file or a Hub data set, each with file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qreason.errors import DataError, first_line
from qreason.recipe.sections import SUFFIXES, Data

Row = tuple[str, dict[str, Any]]
"""(`file:line`, the row)"""


def read_jsonl(file: Path) -> Iterator[Row]:
    """The rows of a JSON Lines file; empty lines are skipped."""
    try:
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; give the path of a readable file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file}:{line}: not UTF-8; save the file as UTF-8") from None
    for number, line_text in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if not line_text.strip():
            continue
        try:
            row = json.loads(line_text)
        except json.JSONDecodeError as error:
            problem = f"not JSON at column {error.colno}: {error.msg}; one object per line"
            raise DataError(f"{file}:{number}: {problem}") from None
        if not isinstance(row, dict):
            raise DataError(f"{file}:{number}: not an object; write a row as {{...}}")
        yield f"{file}:{number}", row


def read_table(source: str, data: Data, use: str) -> Iterator[Row]:
    """The rows of a CSV or Parquet file or a Hub data set, through `datasets`."""
    import datasets

    try:
        if source.endswith(SUFFIXES):
            kind = "csv" if source.endswith(".csv") else "parquet"
            table = datasets.load_dataset(kind, data_files=source, split="train")
        else:
            split = data.splits.get(use, "test" if use == "heldout" else "train")  # type: ignore[call-overload]
            table = datasets.load_dataset(source, data.name, split=split)
    except Exception as error:
        raise DataError(
            f"{source}: cannot be loaded ({first_line(error)}); check the file or the Hub id, and the connection"
        ) from error
    for number, row in enumerate(table, 2 if source.endswith(".csv") else 1):
        yield f"{source}:{number}", row
