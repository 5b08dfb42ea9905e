"""JSON and JSON Lines files, written atomically; hashes; free names."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qreason.errors import RunFolderError, first_line, redact

DRAFT = "draft"
"""What is not complete yet is called so, or ends so."""


def free_name(folder: Path) -> Path:
    """The first free name beside a folder: NAME.1, NAME.2, …"""
    return next(path for i in range(1, 10_000) if not (path := folder.with_name(f"{folder.name}.{i}")).exists())


def write_text(file: Path, text: str) -> None:
    """Write the whole file or nothing: an interruption leaves the earlier file."""
    draft = file.with_suffix(f"{file.suffix}.{DRAFT}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)


def write_json(file: Path, value: Any) -> None:
    """Write the whole file or nothing, without secrets."""
    write_text(file, redact(json.dumps(value, indent=2, ensure_ascii=False)) + "\n")


def flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder (which Windows does by itself)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


MOST_SHOWN = 200
"""Characters of a problem that a message repeats."""
RESTORE = "restore it from a copy, or make the run anew with `qreason run RECIPE --fresh`"


def read_json(file: Path, shape: Any = Any, cure: str = RESTORE) -> Any:
    """The value in a file, which has the shape of a type; RunFolderError with the cure for anything else."""
    return read_value(file, read_text(file, cure), shape, cure)


def read_text(file: Path, cure: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file}: {getattr(error, 'strerror', None) or 'not UTF-8'}; {cure}") from None


@cache
def checker(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(list[shape], config=ConfigDict(strict=True, allow_inf_nan=False))  # TypedDicts inherit it here


def read_value(place: Path | str, text: str, shape: Any, cure: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = "empty" if not text.strip() else f"not JSON, perhaps cut off ({first_line(error)})"
        raise RunFolderError(f"{place}: {problem}; {cure}") from None
    try:
        checker(shape).validate_python([value])
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"][1:]))
        said = f"no {where} in it" if found["type"] == "missing" else f"{where}: {found['msg']}".removeprefix(": ")
        raise RunFolderError(f"{place}: {said[:MOST_SHOWN]}; {cure}") from None
    return value


def write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]], *, append: bool = False) -> None:
    """Write the whole file or nothing; with `append`, add rows to it."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if append:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(lines)
    else:
        write_text(file, lines)


def cut_to_lines(file: Path) -> None:
    """Shorten a file to its whole lines: an interruption may have cut off the last one."""
    text = file.read_bytes()
    os.truncate(file, text.rfind(b"\n") + 1)


def read_jsonl(file: Path, shape: Any = dict[str, Any], cure: str = RESTORE) -> list[dict[str, Any]]:
    """The rows of a file, which all have a shape; RunFolderError with the line and the cure for anything else."""
    # not splitlines(): a reply may hold U+2028 or U+0085, which JSON leaves as they are
    lines = enumerate(read_text(file, cure).split("\n"), 1)
    return [read_value(f"{file}:{number}", line, shape, cure) for number, line in lines if line]


def hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
