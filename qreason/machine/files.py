"""JSON and JSON Lines files, written atomically; hashes; free names."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def free_name(folder: Path) -> Path:
    """The first free name beside a folder: NAME.1, NAME.2, …"""
    return next(path for i in range(1, 10_000) if not (path := folder.with_name(f"{folder.name}.{i}")).exists())


def write_text(file: Path, text: str) -> None:
    """Write the whole file or nothing: an interruption leaves the earlier file."""
    draft = file.with_suffix(file.suffix + ".draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)


def write_json(file: Path, value: Any) -> None:
    """Write the whole file or nothing."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder (which Windows does by itself)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]], *, append: bool = False) -> None:
    """Write the whole file or nothing; with `append`, add rows to it."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if append:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(lines)
    else:
        write_text(file, lines)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    # not splitlines(): a reply may hold U+2028 or U+0085, which JSON leaves as they are
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
