"""Strange values, and what a surface is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import yaml
from click.testing import CliRunner
from hypothesis import strategies as st

from qreason.cli import main as command_line
from qreason.errors import QReasonError

DEEP = "deep nesting goes here"
"""A value that stands for 100 000 levels of nesting, which json.dumps cannot write."""
GONE = "this key is gone"
EDGES = (
    0,
    -1,
    10**30,
    10**400,
    1e308,
    5e-324,
    -0.0,
    True,
    None,
    "",
    " ",
    "nan",
    "../..",
    "/",
    "\0",
    "\ud83d",
    DEEP,
    GONE,
)
SCALARS = st.one_of(
    st.sampled_from(EDGES), st.integers(), st.floats(), st.text(max_size=30), st.booleans(), st.just("x" * 5000)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of keys to every value inside a value."""
    yield above
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*above, key))


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy of a value with another one at a place; without it for GONE."""
    if not place:
        return new
    copied, key = (dict(value) if isinstance(value, dict) else list(value)), place[0]
    copied[key] = put(value[key], place[1:], new)
    if len(place) == 1 and new == GONE:
        del copied[key]
    return copied


def changed(value: Any) -> st.SearchStrategy[Any]:
    """A value with one to three others inside it."""

    def change(drawn: Sequence[tuple[float, Any]]) -> Any:
        found = value
        for share, new in drawn:
            known = list(places(found))
            found = put(found, known[int(share * len(known))], new)
        return found

    share = st.integers(0, 999).map(lambda number: number / 1000)
    return st.lists(st.tuples(share, VALUES), min_size=1, max_size=3).map(change)


def as_json(value: Any) -> bytes:
    deep = "[" * 100_000 + "]" * 100_000
    return json.dumps(value).replace(json.dumps(DEEP), deep).encode()


def as_lines(rows: Any) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in rows) if isinstance(rows, list) else as_json(rows)


def as_yaml(value: Any) -> bytes:
    deep = "[" * 5000 + "]" * 5000
    return yaml.safe_dump(value, sort_keys=False).replace(DEEP, deep).encode("utf-8", "surrogatepass")


def broken(raw: bytes) -> st.SearchStrategy[bytes]:
    """Bytes cut off, flipped, doubled, or others."""
    place = st.integers(0, max(0, len(raw) - 1))
    flips = st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=8)

    def flip(pairs: Sequence[tuple[int, int]]) -> bytes:
        copied = bytearray(raw or b"x")
        for at, byte in pairs:
            copied[at] = byte
        return bytes(copied)

    inserted = st.tuples(place, st.binary(max_size=8) | st.text(max_size=8).map(str.encode))
    return st.one_of(
        place.map(lambda end: raw[:end]),
        flips.map(flip),
        inserted.map(lambda found: raw[: found[0]] + found[1] + raw[found[0] :]),
        st.binary(max_size=200),
        st.just(raw + raw),
    )


def damaged(name: str, raw: bytes) -> st.SearchStrategy[bytes]:
    """A file with damaged bytes, or with other values in it."""
    if name.endswith(".json"):
        return broken(raw) | changed(json.loads(raw)).map(as_json)
    if name.endswith(".jsonl"):
        return broken(raw) | changed([json.loads(line) for line in raw.splitlines()]).map(as_lines)
    if name.endswith(".yaml"):
        return broken(raw) | changed(yaml.safe_load(raw)).map(as_yaml)
    return broken(raw)


Surface = tuple[st.SearchStrategy[Any], Callable[[Any], None]]


def attempt(*readers: Callable[[], Any]) -> None:
    """Call each; errors of ours are an answer, too."""
    for reader in readers:
        with suppress(QReasonError):
            reader()


def call(arguments: Sequence[str]) -> None:
    """The command line may end with 0, 1 or 2, and without a traceback."""
    result = CliRunner().invoke(command_line, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2), result.exit_code
    assert "Traceback" not in result.output, result.output
