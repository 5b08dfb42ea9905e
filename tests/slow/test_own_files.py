"""Files of every kind, from the three commands of docs/data.md to a trained adapter on the embedded base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from qreason.cli import main

FILES = sorted((Path(__file__).parents[1] / "fixtures" / "data").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_file_of_each_kind_reaches_a_trained_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(file, tmp_path)
    recipe = CliRunner().invoke(main, ["init", "--from", file.name]).stdout.strip()
    short = ["--set", "sft.max_steps=2", "--set", "evaluate.samples=1", "--set", "evaluate.reasoning=0"]
    for command in (["validate", recipe, *short], ["run", recipe, *short, "--out", "out"]):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "01-sft" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "02-merge" / "merge.json").is_file()
