"""A few strange inputs for every surface of scripts/fuzz, and the script itself: it notices a traceback and a hang."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import load_script
from hypothesis import strategies as st

EXAMPLES = 30
SLOW = ("mathematics", "folders")
"""Some inputs of the first take until the limit of the reward; the second draws a report for each."""


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("fuzz")


SURFACES = (
    "recipes", "overrides", "rows", "replies", "mathematics", "verdicts", "arguments", "folders", "checkpoints",
    "parts",
)  # fmt: skip


def test_every_surface_is_tested(script: Any) -> None:
    assert tuple(script.SURFACES) == SURFACES


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SURFACES]
)
def test_strange_input_ends_with_an_error_of_ours(script: Any, name: str) -> None:
    assert script.fuzz(name, EXAMPLES) >= 1


def fail(value: Any) -> None:
    raise KeyError("a fault")


def hang(value: Any) -> None:
    while True:
        pass


@pytest.mark.parametrize(("read", "error"), [(fail, "KeyError"), (hang, "TooSlowError")])
def test_a_traceback_and_a_hang_are_noticed(
    script: Any, monkeypatch: pytest.MonkeyPatch, read: Any, error: str
) -> None:
    monkeypatch.setitem(script.SURFACES, "broken", lambda: (st.just(1), read))
    monkeypatch.setattr(script, "LONGEST_S", 0.2)
    with pytest.raises(Exception, match=r"a fault|no end within") as caught:
        script.fuzz("broken", 1)
    assert type(caught.value).__name__ == error
