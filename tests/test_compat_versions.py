"""The ends of the version bounds that scripts/check runs on, and the set in between that Unsloth goes with."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from qreason.cli.doctor import TESTED
from qreason.model.backends import INSTALL

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMED = {one.name: one for one in map(Requirement, PROJECT["dependencies"])}
UNSLOTH = {one.name: one for one in map(Requirement, PROJECT["optional-dependencies"]["unsloth"])}


def oldest() -> dict[str, Version]:
    lines = (ROOT / "constraints" / "oldest.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name: Version(version) for name, version in pins}


@pytest.mark.parametrize("name", sorted(NAMED))
def test_the_oldest_set_is_that_of_the_lower_bounds(name: str) -> None:
    lower = {Version(one.version) for one in NAMED[name].specifier if one.operator == ">="}
    assert {oldest()[name]} == ({Version(TESTED[name])} if name == "torch" else lower)


@pytest.mark.parametrize("name", sorted(TESTED.keys() - {"unsloth"}))
def test_the_tested_set_is_within_the_bounds_and_goes_with_unsloth(name: str) -> None:
    requirements = [NAMED[name], *([UNSLOTH[name]] if name in UNSLOTH else [])]
    assert all(one.specifier.contains(TESTED[name]) for one in requirements)


@pytest.mark.parametrize(
    ("name", "newest"), [("datasets", "5.2.0"), ("torch", "2.14.1"), ("torch", "2.15.0"), ("transformers", "5.24.0")]
)
def test_the_newest_versions_are_left_out_for_unsloth_alone(name: str, newest: str) -> None:
    assert NAMED[name].specifier.contains(newest)
    assert name == "torch" or not UNSLOTH[name].specifier.contains(newest)


@pytest.mark.parametrize("version", ["1.15.0", "1.16.0"])
def test_no_trl_is_allowed_that_cannot_train_on_a_cpu_or_whose_memory_is_not_planned(version: str) -> None:
    assert not NAMED["trl"].specifier.contains(version)


def test_the_command_that_installs_unsloth_names_the_tested_version() -> None:
    assert f"pip install unsloth=={TESTED['unsloth']}" == INSTALL
