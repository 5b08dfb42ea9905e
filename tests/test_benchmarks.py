"""The benchmark recipes: their field maps on rows of the data sets' own shape, and one of them run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import jsonl

from qreason.cli import main
from qreason.data.examples import read_examples
from qreason.data.prompts import SYSTEM_PROMPTS
from qreason.errors import DataError
from qreason.recipe.load import load_recipe
from qreason.recipe.sections import Data
from qreason.report.statistics import share
from qreason.rewards.text import correct

GSM8K = Path(__file__).parents[2] / "shared" / "benchmarks" / "gsm8k" / "test.jsonl"
GPQA = {
    "Question": "Which is heaviest?",
    "Correct Answer": "lead\n",
    "Incorrect Answer 1": "air",
    "Incorrect Answer 2": "wood",
    "Incorrect Answer 3": "ice",
    "Record ID": "r1",
}
SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "gsm8k": ({"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}, "4"),
    "math500": (
        {"problem": "2 + 2?", "solution": "s", "answer": "4", "subject": "A", "level": 1, "unique_id": "a"},
        "4",
    ),
    "aime24": ({"id": 60, "problem": "p", "solution": "s", "answer": "204", "url": "u", "year": "2024"}, "204"),
    "gpqa": (GPQA, "letter"),
    "mmlu_stem": ({"question": "2 + 2?", "subject": "anatomy", "choices": ["3", "4", "5", "6"], "answer": 1}, "B"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_field_maps_read_rows_of_the_data_set(name: str, tmp_path: Path) -> None:
    row, reference = SHAPES[name]
    recipe = load_recipe(f"bench/{name}")
    (tmp_path / "rows.jsonl").write_text(jsonl([row]))
    (example,) = read_examples(tmp_path / "rows.jsonl", recipe.data)
    assert example.reference == (reference if name != "gpqa" else example.reference)
    assert recipe.data.prompt in SYSTEM_PROMPTS
    assert [step.stage for step in recipe.steps] == ["evaluate"]


def test_choices_stand_under_the_question_and_the_right_one_is_found_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(jsonl([GPQA | {"Question": f"Question {i}?"} for i in range(40)]))
    given = load_recipe("bench/gpqa").data
    examples = read_examples(file, given)
    for example in examples:
        assert f"\n{example.reference}) lead" in example.prompt
        assert correct(f"({example.reference})", example.references)
        assert not any(correct(letter, example.references) for letter in set("ABCD") - {example.reference})
    assert {example.reference for example in examples} == set("ABCD")  # not always in the same place
    assert read_examples(file, given) == examples


def test_only_rows_of_the_asked_subjects_are_read(tmp_path: Path) -> None:
    file, row = tmp_path / "rows.jsonl", SHAPES["mmlu_stem"][0]
    file.write_text(jsonl([row, row | {"subject": "philosophy"}]))
    recipe = load_recipe("bench/mmlu_stem")
    assert [example.category for example in read_examples(file, recipe.data)] == ["anatomy"]
    file.write_text(jsonl([row | {"subject": "philosophy"}]))
    with pytest.raises(DataError, match=r"no rows with subject as in data\.where"):
        read_examples(file, recipe.data)
    file.write_text(jsonl([{"question": "x", "choices": ["a", "b"], "answer": 0}]))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no column 'subject'"):
        read_examples(file, recipe.data)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "x", "choices": "a, b", "answer": 0}, ":1: 'choices' must be a list of choices"),
        ({"question": "x", "choices": ["a", "b"], "answer": 2}, ":1: 'answer' names none of the 2 choices: 2"),
        ({"question": "x", "choices": ["a", "b"], "answer": "c"}, "names none of the 2 choices: 'c'"),
        # The first two were asked with the word None in place of a text, the third was a traceback.
        ({"question": None, "choices": ["a", "b"], "answer": 0}, ":1: 'question' is empty"),
        ({"question": "x", "choices": ["a", None], "answer": 0}, ":1: 'choices' must be a list of choices, 2 to 26"),
        ({"question": "x", "choices": list("abcdefghijklmnopqrstuvwxyz!"), "answer": 26}, ":1: 'choices' must be a"),
        ({"question": ["x"], "choices": ["a", "b"], "answer": 0}, ":1: 'question' is list, not text"),
    ],
)
def test_a_row_without_its_choices_is_named(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    (tmp_path / "rows.jsonl").write_text(jsonl([row]))
    with pytest.raises(DataError) as caught:
        read_examples(tmp_path / "rows.jsonl", Data(choices="choices"))
    assert told in str(caught.value)


def test_the_gsm8k_benchmark_runs_and_votes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in (2, 3, 4)]
    if not GSM8K.exists():  # it lies beside the checkout of the authors only
        (tmp_path / "test.jsonl").write_text(jsonl(rows))  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    small = [
        f"data.heldout={GSM8K if GSM8K.exists() else 'test.jsonl'}",
        "model.base=qreason/tiny",
        "sampling.max_completion_length=12",
        "evaluate={rows: 3, samples: 4, cons_at: [4], pass_at: [4]}",
    ]
    result = CliRunner().invoke(main, ["run", "bench/gsm8k", "--json", *(part for s in small for part in ("--set", s))])
    assert result.exit_code == 2
    assert "write it as key=value" in result.stderr  # a stage is set field by field
    small[-1:] = ["evaluate.rows=3", "evaluate.samples=4", "evaluate.cons_at=[4]", "evaluate.pass_at=[4]"]
    result = CliRunner().invoke(main, ["run", "bench/gsm8k", "--json", *(part for s in small for part in ("--set", s))])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["passes"]
    assert list(row["scaling"]) == ["pass@1", "pass@4", "cons@4"]
    assert row["rows"] == 3
    assert Path("runs/bench-gsm8k/report.json").is_file()


def test_rows_that_math_cannot_judge_are_counted_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"id": text, "prompt": "Which?", "reference": text} for text in ("4", "5", "Restart the spooler.")]
    settings = ["data.heldout=rows.jsonl", "model.base=qreason/tiny", "sampling.max_completion_length=12"]
    settings += ["evaluate.samples=2", "evaluate.pass_at=[2]", "evaluate.cons_at=[]", "evaluate.right_by=math"]
    given = ["run", "bench/gsm8k", "--out", "out", *(part for setting in settings for part in ("--set", setting))]
    Path("rows.jsonl").write_text(jsonl(rows))  # type: ignore[arg-type]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 0, result.output
    assert "rows not judged, left out of accuracy and pass@1: 1" in " ".join(result.stdout.split())
    (measured,) = json.loads(Path("out/report.json").read_text())["passes"]
    assert (measured["rows"], measured["unjudged"]) == (3, 1)
    assert measured["accuracy"] == share([False, False])  # not of three
    assert measured["pass_at_1"]["mean"] == measured["scaling"]["pass@2"]["mean"] == 0.0
    *judged, other = [json.loads(line) for line in Path("out/base/evaluation.jsonl").read_text().splitlines()]
    assert [row["accurate"] for row in judged] == [False, False]
    assert (other["accurate"], other["pass_at_1"], other["right"], other["scaling"]) == (None, None, [None, None], {})

    Path("rows.jsonl").write_text(jsonl(rows[2:]))  # type: ignore[arg-type]
    result = CliRunner().invoke(main, [*given, "--fresh"])
    assert result.exit_code == 2
    assert "right_by math can judge none of the rows" in result.stderr
