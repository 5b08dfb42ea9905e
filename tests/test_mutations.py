"""The list of planted faults fits the tree: each has its one place, and tests that should notice it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import load_script

ROOT = Path(__file__).parents[1]


SCRIPT = load_script("mutations")
MUTATIONS = SCRIPT.read_mutations()


def test_there_are_many_faults_and_no_two_of_a_name() -> None:
    assert len({one.name for one in MUTATIONS}) == len(MUTATIONS) >= 45


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name)
def test_every_fault_has_its_one_place_and_its_tests(mutation: Any) -> None:
    file, text = mutation.text(ROOT)
    assert text != file.read_text("utf-8")
    compile(text, str(file), "exec")
    for test in mutation.tests:
        assert (ROOT / test).is_file()


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("return f( a,\n        b,\n    )", True),
        ("return f(a, b)", True),
        ("returnf(a, b)", False),
        ("return f(a, c)", False),
        ("no_return f(a, b)", False),
    ],
)
def test_white_space_and_a_last_comma_do_not_matter(code: str, found: bool) -> None:
    assert (SCRIPT.pattern("return f(a, b)").search(code) is not None) == found


def test_a_text_that_is_gone_or_there_twice_is_not_applicable(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    for find in ("x = 1", "y = 1"):
        with pytest.raises(SCRIPT.NotApplicableError):
            SCRIPT.Mutation("n", "*.py", find, "x = 2", []).place(tmp_path)
