"""Distillation as in DeepSeek-R1: a teacher that is loaded here replies, and the student learns what was kept."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qreason.cli import main
from qreason.model.resident import Resident

RecipeWriter = Callable[..., Path]
STEPS = "  - evaluate\n  - sft: {learning_rate: 1e-5}\n  - evaluate\n  - grpo: {num_generations: 4}\n  - merge\n"
LEARN = "  - sample: {n: 1, rows: 2, teacher: {model: taught}}\n  - sft: {data: sampled, max_steps: 1}\n"


def run(file: Path, out: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["run", str(file), "--out", out, *arguments])


def test_a_run_teaches_another_and_makes_room_for_it_and_leaves(
    workplace: Path, write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = ("max_completion_length: 12", "max_completion_length: 64")
    taught = write_recipe((STEPS, "  - sft: {num_train_epochs: 15, learning_rate: 1e-2}\n"))
    assert run(taught, "taught").exit_code == 0
    alive: list[weakref.ref[Resident]] = []
    made = Resident.__init__

    def remembered(self: Resident, *arguments: Any, **options: Any) -> None:
        assert not [reference for reference in alive if reference() is not None]  # one base at a time
        alive.append(weakref.ref(self))
        made(self, *arguments, **options)

    monkeypatch.setattr(Resident, "__init__", remembered)
    result = run(write_recipe((STEPS, "  - sft: {max_steps: 1}\n" + LEARN), long, name="student.yaml"), "out")
    assert result.exit_code == 0, result.output
    assert len(alive) == 3  # student, teacher, student
    figures = json.loads(Path("out/02-sample/sample.json").read_text())
    assert figures["model"] == str(workplace / "taught")
    assert figures["kept"] > 0
    rows = [json.loads(line) for line in Path("out/02-sample/sampled.jsonl").read_text().splitlines()]
    assert {row["reference"] for row in rows} == {"Restart the spooler."}  # which the base alone never says
    nodes = {node["name"]: node for node in json.loads(Path("out/lineage.json").read_text())["nodes"]}
    assert nodes["02-sample"]["data"][-1] == str(workplace / "taught")
    again = run(workplace / "student.yaml", "out", "--set", "sample.teacher.model=qreason/tiny")
    assert again.exit_code == 2


def test_draws_of_another_teacher_are_refused_by_name(workplace: Path, write_recipe: RecipeWriter) -> None:
    file = write_recipe((STEPS, LEARN.replace("model: taught", "model: qreason/tiny")))
    first = run(file, "out", "--set", "sampling.max_completion_length=4")
    assert first.exit_code == 1  # the base alone is never right
    assert "none of 2 replies was kept" in first.output
    other = run(file, "out", "--set", "sampling.max_completion_length=4", "--set", "sample.teacher.quantization=nf4")
    assert other.exit_code == 2
    assert "its draws were made with other settings (teacher)" in other.output


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        ("{model: m, retries: 2}", "retries: only for a server; give its endpoint, or leave it out"),
        ("{model: m, endpoint: 'http://x', quantization: nf4}", "quantization: only for a model that is loaded here"),
        ("{endpoint: 'http://x'}", "'steps.0.sample.teacher.model' is missing"),
    ],
)
def test_a_teacher_is_either_here_or_there(write_recipe: RecipeWriter, teacher: str, told: str) -> None:
    result = CliRunner().invoke(main, ["validate", str(write_recipe((STEPS, f"  - sample: {{teacher: {teacher}}}\n")))])
    assert result.exit_code == 2
    assert told in result.output


def test_an_adapter_by_itself_is_no_teacher(workplace: Path, write_recipe: RecipeWriter) -> None:
    Path("alone").mkdir()
    Path("alone/adapter_config.json").write_text("{}")
    result = run(write_recipe((STEPS, LEARN.replace("model: taught", "model: ./alone"))), "out")
    assert result.exit_code == 2
    assert "is an adapter; give its run folder" in result.output
