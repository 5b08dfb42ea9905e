"""The rows of a file or a Hub data set, each with file and line."""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
from collections.abc import Iterator
from io import StringIO
from itertools import zip_longest
from os.path import isfile
from pathlib import Path
from typing import Any, Literal

from qreason.errors import DataError, first_line
from qreason.recipe.sections import SUFFIXES, Data, is_hub_id

Row = tuple[str, dict[str, Any]]
"""(`file:line`, the row)"""
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def read_rows(source: str | Path, data: Data, use: str) -> Iterator[Row]:
    """The rows of a JSONL, JSON, CSV, TSV or Parquet file, in any case of its ending, or of a Hub data set.

    Raises DataError with `file:line` for what cannot be read; a path is never looked up on the Hub.
    """
    hub = is_hub_id(str(source)) and not isfile(source)
    rows = read_hub(str(source), data, use) if hub else read_file(Path(source), data)
    return ((location, in_small_letters(row)) for location, row in rows)


def in_small_letters(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose columns can be found in small letters too: `Prompt` as `prompt`."""
    return {name.strip().lower(): cell for name, cell in row.items()} | row


def read_file(file: Path, data: Data | None = None) -> Iterator[Row]:
    """The rows of a file, by its ending; DataError for another one."""
    data, kind = data or Data(), file.suffix.lower()
    if kind in (".csv", ".tsv"):
        return read_table(file, "\t" if kind == ".tsv" else data.separator or ",", data.encoding)
    if kind in (".jsonl", ".json"):
        return (read_jsonl if kind == ".jsonl" else read_json_list)(file, data.encoding)
    if kind == ".parquet":
        return read_parquet(file)
    raise DataError(f"{file}: a data file ends with {', '.join(SUFFIXES)}; save its rows as one of them")


def encoding_of(raw: bytes) -> Literal["utf-8", "cp1252", "utf-16"]:
    """The likely encoding of a text file."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8"


def separator_of(header: str, usual: str) -> str:
    """What separates the columns of a table, by its first line."""
    others = [mark for mark in SEPARATORS if mark in header]
    return usual if usual in header or not others else others[0]


def read_text(file: Path, encoding: str) -> str:
    """The text of a file, without a byte order mark."""
    try:
        return (raw := file.read_bytes()).decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        likely = encoding_of(raw)
        kind = "UTF-16" if likely == "utf-16" else "perhaps Windows-1252"
        cure = f"save the file as UTF-8, or set data.encoding: {likely}"
        problem = f"not UTF-8 ({kind})" if encoding == "utf-8" else f"not {encoding}, as data.encoding says"
        raise DataError(f"{file}:{line}: {problem}; {cure}") from None
    except UnicodeError as error:  # UTF-16 without a byte order mark
        raise DataError(f"{file}: not {encoding}, as data.encoding says ({error}); leave it out for UTF-8") from None
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"{file}: {problem}; give the path of a readable file") from None


# --- JSON ------------------------------------------------------------------------------------------


def read_jsonl(file: Path, encoding: str) -> Iterator[Row]:
    """The rows of a JSON Lines file; empty lines are skipped."""
    for number, line in enumerate(read_text(file, encoding).split("\n"), 1):
        if line.strip():
            location = f"{file}:{number}"
            row, end = read_object(line, len(line) - len(line.lstrip()), file, (number, number), "one object per line")
            if line[end:].strip():
                raise DataError(f"{location}: not JSON at column {end + 1}: extra data; one object per line")
            yield location, row


def read_json_list(file: Path, encoding: str) -> Iterator[Row]:
    """The objects of a JSON file: a list of them, or one after the other."""
    text = read_text(file, encoding)
    gap = re.compile(r"[\s,]*")
    listed = text.lstrip().startswith("[")
    position = text.index("[") + 1 if listed else 0
    line, counted = 1, 0
    while (start := gap.match(text, position).end()) < len(text) and not (listed and text[start] == "]"):  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, start), start
        row, position = read_object(text, start, file, (1, line), "the file is a list of objects")
        yield f"{file}:{line}", row
    if listed and (start >= len(text) or text[start + 1 :].strip()):
        line += text.count("\n", counted)
        raise DataError(f"{file}:{line}: not JSON: the list has no end, or something follows it; was it cut off?")


def read_object(text: str, start: int, file: Path, lines: tuple[int, int], form: str) -> tuple[dict[str, Any], int]:
    """(the JSON object at a place of a text, where it ends); DataError for anything else, and for half a character.

    `lines` are the lines of the file where the text and the object start, `form` says what the file should look like.
    """
    first, line = lines
    try:
        row, end = DECODER.raw_decode(text, start)
        if "\\ud" in text[start:end].lower():
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line, problem = first + error.lineno - 1, f"not JSON at column {error.colno}: {error.msg}; {form}"
    except UnicodeEncodeError:
        problem = "half of a surrogate pair (\\ud800 to \\udfff), which is no character; write the character itself"
    except RecursionError:
        problem = "nested too deeply; a row is an object with texts"
    except ValueError as error:
        problem = f"{first_line(error).partition(':')[0]}; write it as a text, in quotes"
    else:
        if isinstance(row, dict):
            return row, end
        problem = "not an object; write a row as {...}"
    raise DataError(f"{file}:{line}: {problem}")


def finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


DECODER = json.JSONDecoder(parse_float=finite, parse_constant=finite)


# --- tables ----------------------------------------------------------------------------------------


def read_table(file: Path, separator: str, encoding: str) -> Iterator[Row]:
    """The rows of a CSV or TSV file: every cell is text as written, an empty one is None."""
    csv.field_size_limit(2**31 - 1)  # more is an error on Windows
    reader = csv.reader(StringIO(read_text(file, encoding), newline=""), delimiter=separator, strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            location, line = f"{file}:{line}", reader.line_num + 1
            if not any(cells):
                continue
            if not header:
                header = check_header(cells, separator, location)
                continue
            if any(cells[len(header) :]):
                problem = f"{len(cells)} cells, but the first line names {len(header)} columns"
                raise DataError(f"{location}: {problem}; put quotes around a cell with {SEPARATORS[separator]} in it")
            yield location, {name: cell or None for name, cell in zip_longest(header, cells[: len(header)])}
    except csv.Error as error:
        raise DataError(f"{file}:{line}: {error}; is a quote missing, or one too many?") from None


def check_header(cells: list[str], separator: str, location: str) -> list[str]:
    """The column names of a table; DataError where another character separates them, or one is there twice."""
    if len(cells) == 1 and (other := separator_of(cells[0], separator)) != separator:
        cure = "name it .tsv" if other == "\t" else "save it as CSV with commas"
        cure += f", or set data.separator: '{repr(other)[1:-1]}'"
        raise DataError(f"{location}: separated by {SEPARATORS[other]}, not by {SEPARATORS[separator]}; {cure}")
    names = [cell.strip() for cell in cells]
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise DataError(f"{location}: two columns are called '{twice[0]}'; rename one")
    return names


def read_parquet(file: Path) -> Iterator[Row]:
    """The rows of a Parquet file."""
    from pyarrow.parquet import ParquetFile

    try:
        rows = (row for batch in ParquetFile(file).iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{file}:{number}", row
    except Exception as error:
        raise DataError(f"{file}: cannot be loaded ({first_line(error)}); is it a Parquet file?") from error


def read_hub(source: str, data: Data, use: str) -> Iterator[Row]:
    """The rows of a Hub data set, through `datasets`."""
    import datasets

    split = data.splits.get(use, "test" if use == "heldout" else "train")  # type: ignore[call-overload]
    try:
        table = datasets.load_dataset(source, data.name, split=split)
    except Exception as error:
        raise DataError(
            f"{source}: cannot be loaded ({first_line(error)}); check the Hub id, and the connection"
        ) from error
    for number, row in enumerate(table, 1):
        yield f"{source}:{number}", row
