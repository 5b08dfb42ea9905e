"""Runs side by side: pairing, tests, and what differs in their recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import RunWriter, evaluated_row

from qreason.cli import main
from qreason.report import statistics
from qreason.report.comparison import adjust, changed_keys, spread_of_seeds
from qreason.report.statistics import mean, sign_test
from qreason.report.table import short_names

Rows = list[dict[str, object]]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 100)


def qreason(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def compared(*folders: Path) -> Any:
    result = qreason("compare", *folders, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def passes(right: set[int], ids: range = range(20), **others: object) -> list[Rows]:
    """Three passes; in the last one these rows are right."""
    last = [evaluated_row(i, accurate=i in right, **others) for i in ids]
    return [[evaluated_row(i) for i in ids], [evaluated_row(i) for i in ids], last]


def test_two_runs_are_paired_on_their_rows(write_run: RunWriter) -> None:
    first = write_run("first", passes(set(range(10))))
    other = write_run("other", passes(set(range(2, 18))), "seed=2", "grpo.beta=0.1")
    found = compared(first, other)
    (difference,) = found["differences"]
    assert (difference["from"], difference["to"], difference["shared_rows"]) == ("first", "other", 20)
    assert difference["accuracy"]["mean"] == 0.3
    assert difference["accuracy"]["p"] == round(sign_test([0] * 8 + [1] * 2, [1] * 8 + [0] * 2), 6)
    assert difference["accuracy"]["p_holm"] == difference["accuracy"]["p"]
    assert difference["changed"] == [
        {"key": "seed", "old": 1, "new": 2},
        {"key": "02-grpo.beta", "old": 0.0, "new": 0.1},
    ]
    assert difference["notes"] == []
    table = qreason("compare", first, other).stdout
    for line in (
        "02-grpo.beta: 0.0 -> 0.1",
        "+30.0 [",
        "50.0% [30–70%]",
        "other: the same data, base, versions, hardware",
    ):
        assert line in table
    assert found["seeds"] == []  # more than the seed differs


def test_order_of_rows_does_not_matter_and_rows_that_only_one_has_are_said(write_run: RunWriter) -> None:
    first = write_run("first", passes({4, 5, 6}, range(8)))
    other = write_run("other", [rows[::-1] for rows in passes({4, 5, 6}, range(4, 20))])
    (difference,) = compared(first, other)["differences"]
    assert difference["shared_rows"] == 4
    assert difference["accuracy"]["mean"] == 0.0
    assert difference["notes"] == ["only 4 rows are in both (8 and 16): the gains are over these"]


def test_runs_without_a_common_row_are_not_compared(write_run: RunWriter) -> None:
    first = write_run("first", passes({1}))
    other = write_run("other", passes({1}, reference="another"))  # the same ids, and another question
    found = compared(first, other)["differences"][0]
    assert found["notes"] == ["no held-out row is in both: nothing is compared"]
    assert found["accuracy"]["mean"] is None
    assert "p_holm" not in found["accuracy"]
    assert qreason("compare", first, other).exit_code == 0


def test_rewards_of_other_weights_are_not_compared(write_run: RunWriter) -> None:
    runs = [write_run("first", passes({1})), write_run("other", passes({1}), "rewards.format=0.5")]
    found = compared(*runs)["differences"][0]
    assert found["reward"]["mean"] is None
    assert found["accuracy"]["mean"] == 0.0
    assert found["notes"] == ["the rewards differ: `reward` is not compared"]


def test_evaluations_that_ask_in_another_way_are_said(write_run: RunWriter) -> None:
    runs = [write_run("first", passes({1})), write_run("other", passes({1}), "evaluate.chain_of_thought=false")]
    (note,) = compared(*runs)["differences"][0]["notes"]
    assert note.startswith("`chain_of_thought` of the evaluation differs")


def test_seeds_of_one_recipe_get_their_mean_and_deviation(write_run: RunWriter) -> None:
    runs = [
        write_run(f"s{seed}", passes(set(range(right))), f"seed={seed}") for seed, right in ((1, 10), (2, 12), (3, 14))
    ]
    found = compared(*runs)
    assert found["seeds"] == [{"seeds": [1, 2, 3], "mean": 0.6, "deviation": 0.1}]
    table = qreason("compare", *runs).stdout
    assert "seeds 1, 2, 3: mean accuracy 60.0%, standard deviation 10.0 points" in " ".join(table.split())
    assert list(spread_of_seeds([], [])) == []


def test_p_is_adjusted_by_holm() -> None:
    # 0.01 x 3, 0.03 x 2, and 0.04 x 1, which may not be below the one before it.
    found: list[dict[str, Any]] = [{"shared_rows": 5, "accuracy": {"p": p}} for p in (0.04, 0.01, 0.03)]
    adjust(found)
    assert [one["accuracy"]["p_holm"] for one in found] == [0.06, 0.03, 0.06]


def test_a_step_that_only_one_recipe_has_is_one_line() -> None:
    old = {
        "seed": 1,
        "02-grpo": "a step",
        "02-grpo.beta": 0.0,
        "02-grpo.evaluate.rows": 2,
        "02-grpo.evaluate": "a step",
    }
    assert changed_keys(old, {"seed": 1}) == [{"key": "02-grpo", "old": "a step", "new": "–"}]


def test_the_same_data_at_another_place_is_no_difference(write_run: RunWriter) -> None:
    first = write_run("first", passes({1}))
    Path("copy.jsonl").write_bytes(Path("prompts.jsonl").read_bytes())
    other = write_run("other", passes({1}), "data.prompts=copy.jsonl")
    assert compared(first, other)["differences"][0]["changed"] == []


def test_one_run_is_no_comparison(write_run: RunWriter) -> None:
    folder = write_run("first", passes({1}))
    for given in ([folder], [folder, f"{folder}/."]):
        result = qreason("compare", *given)
        assert result.exit_code == 2
        assert "two or more different run folders" in result.stderr


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert short_names(["runs/a", "other/b"]) == ["a", "b"]
    assert short_names(["x/runs/a", "y/runs/a"]) == ["x/runs/a", "y/runs/a"]


def test_bootstrap_in_pieces_gives_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(value % 7) for value in range(300)]
    whole = mean(values)
    monkeypatch.setattr(statistics, "DRAWN_AT_ONCE", 1000)
    assert mean(values) == whole
