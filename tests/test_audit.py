"""The audit of dependencies: what is a finding, and what was not looked up."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import load_script

SCRIPT = load_script("audit")


@pytest.mark.parametrize(
    ("licence", "free"),
    [
        ("MIT License", True),
        ("BSD License", True),
        ("Apache Software License; MIT License", True),
        ("ISC", True),
        ("Mozilla Public License 2.0 (MPL 2.0)", True),
        ("Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND BSL-1.0", True),
        ("GPL-3.0-only OR MIT", True),
        ("(MIT OR Apache-2.0)", True),
        ("MIT AND GPL-3.0-only", False),
        ("GNU General Public License v3 (GPLv3)", False),
        ("GNU Library or Lesser General Public License (LGPL)", False),
        ("Other/Proprietary License", False),
        ("UNKNOWN", False),
    ],
)
def test_only_licences_on_the_list_are_free(licence: str, free: bool) -> None:
    assert SCRIPT.is_free(licence) == free


def test_a_licence_that_is_not_on_the_list_names_its_package() -> None:
    rows = [{"Name": name, "Version": "1", "License": "GPL"} for name in ("Odd_One", "nvidia-cublas", "pebble")]
    assert list(SCRIPT.licence_problems(rows)) == ["odd-one 1: GPL"]


def report(*entries: dict[str, Any]) -> str:
    return json.dumps({"dependencies": entries, "fixes": []})


FAULT = {"id": "PYSEC-1", "fix_versions": ["2.0"], "aliases": [], "description": ""}
SKIPPED = {"name": "b", "skip_reason": "Dependency not found on PyPI"}


def test_a_known_fault_is_named_with_its_cure() -> None:
    entries = [{"name": "a", "version": "1.0", "vulns": [FAULT]}, {"name": "c", "version": "1", "vulns": []}, SKIPPED]
    assert SCRIPT.advisories(report(*entries), 3) == ["a 1.0: PYSEC-1, corrected in 2.0"]


@pytest.mark.parametrize("text", ["", "Traceback (most recent call last)", report(SKIPPED, SKIPPED)])
def test_what_could_not_be_looked_up_is_no_clean_result(text: str) -> None:
    assert SCRIPT.advisories(text, 2) is None


def test_everything_that_is_needed_is_found_with_its_version() -> None:
    needed = SCRIPT.closure("qreason", frozenset({"", "dev"}), {})
    assert {"torch", "transformers", "trl", "pytest", "tokenizers", "certifi"} <= needed.keys()
    assert all(needed.values())
