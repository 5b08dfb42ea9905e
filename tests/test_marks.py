"""What a reward of one's own returns, raises or never returns: checked where rewards are called."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import RecipeWriter, jsonl

from qreason.cli import main
from qreason.errors import RecipeError, RunFolderError, TrainingError
from qreason.recipe.load import load_recipe
from qreason.rewards.marks import Own
from qreason.rewards.scoring import Restricted, Scorer, combine
from qreason.run.session import Session
from qreason.types import Example, Reply

REPLIES = [Reply("one"), Reply("two")]
ROWS = [Example("a", "p", "r"), Example("b", "p", "r", plain=True)]


def returning(value: Any) -> Callable[..., Any]:
    return lambda replies, examples: value() if callable(value) else value


@pytest.mark.parametrize(
    "value",
    [
        [1, None], (1.0, None), iter([1, None]), lambda: (mark for mark in (True, None)), [np.float32(1), None],
        [torch.tensor(1.0), None], [Fraction(1), None], [np.array([1.0]), None],
    ],
)  # fmt: skip
def test_one_number_or_none_for_each_reply_is_taken(value: Any) -> None:
    scores = combine({"own": returning(value)}, {"own": 1.0}, REPLIES, ROWS)
    assert [(type(s.total), s.total) for s in scores] == [(float, 1.0), (type(None), None)]


@pytest.mark.parametrize("value", [torch.ones(2), np.ones(2), torch.ones(2, dtype=torch.bfloat16)])
def test_tensors_and_arrays_are_taken_as_plain_numbers(value: Any) -> None:
    scores = combine({"own": returning(value)}, {"own": 1.0}, REPLIES, ROWS)
    assert json.dumps([score.parts for score in scores]) == '[{"own": 1.0}, {"own": 1.0}]'


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "returned nothing (None)"),
        (1.0, "returned float"),
        ("11", "returned str"),
        (b"11", "returned bytes"),
        ({"a": 1.0, "b": 1.0}, "returned dict"),
        ({1.0, 2.0}, "returned set"),
        (torch.tensor(1.0), "returned float"),
        ([1.0], "returned 1 values"),
        ([], "returned 0 values"),
        ([1.0] * 3, "returned more than 2 values"),
        (lambda: iter(int, 1), "returned more than 2 values"),
        ([1.0, "1.0"], "returned a str for the reply to b"),
        ([1.0, [1.0]], "returned a list for the reply to b"),
        ([1.0, 1j], "returned a complex for the reply to b"),
        ([1.0, Decimal(1)], "returned a Decimal for the reply to b"),
        ([math.nan, 1.0], "returned nan for the reply to a"),
        ([1.0, -math.inf], "returned -inf for the reply to b"),
        ([1.0, np.float32("nan")], "returned nan for the reply to b"),
        ([1.0, 10**400], "returned inf for the reply to b"),
        (torch.tensor([1.0, math.nan]), "returned nan for the reply to b"),
        (torch.ones(2, 2), "returned a list for the reply to a"),
    ],
)
def test_anything_else_is_refused_with_the_reward_and_the_reply(value: Any, said: str) -> None:
    with pytest.raises(TrainingError) as caught:
        combine({"mine:own": returning(value)}, {"mine:own": 1.0}, REPLIES, ROWS)
    assert f"reward 'mine:own' {said}; a reward returns a list" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reward_for_some_rows_is_checked_too() -> None:
    limited = {"own": Restricted(Own("own", returning([]), 9.0), plain=True)}
    with pytest.raises(TrainingError, match=r"returned 0 values; .* of the 1 replies"):
        combine(limited, {"own": 1.0}, REPLIES, ROWS)


def test_a_call_that_hangs_is_named_with_the_line_it_hangs_at(tmp_path: Path) -> None:
    def hangs(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float]:
        time.sleep(60)
        return []

    start = time.monotonic()
    with pytest.raises(
        TrainingError, match=r"'slow' did not end within 0.2 seconds; it was at .*test_marks.py:\d+"
    ) as e:
        Scorer({"slow": Own("slow", hangs, 0.2)}, {"slow": 1.0})(REPLIES, ROWS, tmp_path)
    assert time.monotonic() - start < 20
    assert "call_timeout" in str(e.value)


def test_an_error_only_of_the_whole_batch_is_one_line_too(tmp_path: Path) -> None:
    def pairs_only(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float]:
        return [1 / (2 - len(replies))] * len(replies)

    with pytest.raises(
        TrainingError, match=r"'own' raised ZeroDivisionError: .*test_marks.py:\d+\) on 2 replies together"
    ):
        Scorer({"own": pairs_only}, {"own": 1.0})(REPLIES, ROWS, tmp_path)


# --- through the command -----------------------------------------------------------------------------

BODIES = {
    "raises": "raise KeyError('steps')",
    "leaves": "import sys; sys.exit(0)",
    "nan": "return [float('nan')] * len(replies)",
    "yields": "yield 1.0",
}


@pytest.mark.parametrize("command", ["score", "validate"])
@pytest.mark.parametrize("name", BODIES)
def test_a_bad_reward_ends_in_one_line_that_names_it(write_recipe: RecipeWriter, command: str, name: str) -> None:
    recipe = write_recipe(("format: 0.1", f"own_{name}_{command}:reward: 0.1"))
    module = recipe.parent / f"own_{name}_{command}.py"
    module.write_text(f"def reward(replies, examples):\n    {BODIES[name]}\n")
    row = {"reply": "a", "reference": "b"}
    (recipe.parent / "replies.jsonl").write_text(jsonl([row, row]))
    arguments = [command, str(recipe)] + (["--replies", "replies.jsonl"] if command == "score" else [])
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == (1 if command == "score" else 2)
    (line,) = result.stderr.splitlines()
    assert f"reward 'own_{name}_{command}:reward' " in line
    if name in ("raises", "leaves"):
        assert f"{module}:2" in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def reward(replies, examples:\n", "raises SyntaxError"),
        ("1 / 0\n", "raises ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit()\n", "raises SystemExit"),
        ("import nothing_of_this_name\n", "No module named 'nothing_of_this_name'"),
        ("import os\nos.no_such_thing\n", "raises AttributeError"),
        ("reward = 3\n", "not a function"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(write_recipe: RecipeWriter, text: str, said: str) -> None:
    name = f"own_{abs(hash(text))}"
    recipe = write_recipe(("format: 0.1", f"{name}:reward: 0.1"))
    (recipe.parent / f"{name}.py").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert said in str(caught.value)
    assert f"{name}:reward" in str(caught.value)


def test_a_run_is_looked_at_without_the_module_and_scored_where_it_lies(
    write_recipe: RecipeWriter, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From another folder than the module's no command opened the run: it was said to be of another version.
    (workplace / "beside").mkdir()
    (workplace / "beside" / "own_far.py").write_text(
        "def reward(replies, examples):\n    return [1.0] * len(replies)\n"
    )
    recipe = write_recipe(("format: 0.1", "own_far:reward: {weight: 0.1}"), name="beside/small.yaml")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        folder = Session.open(load_recipe(recipe), workplace / "out").folder
    monkeypatch.delitem(sys.modules, "own_far")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for command in (["lineage", "out"], ["watch", "out", "--once"]):
        assert CliRunner().invoke(main, command).exit_code == 0
    with pytest.raises(RunFolderError, match=r"own_far:reward: No module named 'own_far'; .*; run the command where"):
        _ = Session.reopen(folder).rewards
    monkeypatch.chdir(workplace / "beside")
    assert Session.reopen(folder).rewards.scorer.weights["own_far:reward"] == 0.1


def test_settings_need_no_annotation(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe(("format: 0.1", "own_scale:reward: {weight: 0.1, scale: 2.0}"))
    (recipe.parent / "own_scale.py").write_text(
        "def reward(replies, examples, *, scale=1.0, other=None):\n    return [scale] * len(replies)\n"
    )
    (recipe.parent / "replies.jsonl").write_text(jsonl([{"reply": "a", "reference": "b"}]))
    result = CliRunner().invoke(main, ["score", str(recipe), "--replies", "replies.jsonl", "--json"])
    assert json.loads(result.stdout)["parts"]["own_scale:reward"] == 2.0


def test_the_limit_of_a_call_is_set_in_the_recipe_and_only_for_ones_own(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe(("format: 0.1", "own_slow:reward: {weight: 0.1, call_timeout: 0.2}"))
    (recipe.parent / "own_slow.py").write_text("import time\ndef reward(replies, examples):\n    time.sleep(60)\n")
    result = CliRunner().invoke(main, ["validate", str(recipe)])
    assert "'own_slow:reward' did not end within 0.2 seconds" in result.stderr
    assert "own_slow.py:3" in result.stderr
    again = load_recipe(recipe).dump()["rewards"]["own_slow:reward"]
    assert again == {"weight": 0.1, "call_timeout": 0.2}
    with pytest.raises(RecipeError, match="format: call_timeout is for rewards of your own"):
        load_recipe(write_recipe(("format: 0.1", "format: {weight: 0.1, call_timeout: 2}")))
