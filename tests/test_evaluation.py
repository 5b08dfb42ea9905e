"""An evaluation that is cut off goes on where it stopped, and ends as if it had not been."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import RecipeWriter, RunWriter, evaluated_row, jsonl

from qreason.cli import main
from qreason.errors import InputError
from qreason.inference.generate import LocalGenerator
from qreason.inference.journal import Journal, digest, read_kept
from qreason.machine.files import hash_files, write_jsonl
from qreason.machine.shards import join_shards
from qreason.recipe.load import load_recipe
from qreason.recipe.settings import Evaluate
from qreason.run.session import Session
from qreason.stages import evaluate, run_step
from qreason.stages.evaluate import evaluate_task

SETTINGS = "evaluate: {samples: 3, pass_at: [2], best_of: [2], beam: {width: 2, expand: 2}}"


class Cut(BaseException):
    """The power fails."""


@pytest.fixture
def write_small(write_recipe: RecipeWriter) -> Callable[[], Path]:
    """A recipe with an evaluation of several batches."""
    recipe = write_recipe(
        ("max_completion_length: 12", "max_completion_length: 12, max_num_seqs: 4"),
        ("  - evaluate\n", f"  - {SETTINGS}\n"),
    )
    rows: list[dict[str, object]] = [
        {"id": f"h{i}", "issue": f"printer {i} is offline", "resolution": "Restart it."} for i in range(5)
    ]
    Path("heldout.jsonl").write_text(jsonl(rows))
    return lambda: recipe


def measure(recipe: Path, name: str) -> tuple[Session, dict[str, Any]]:
    run = Session.open(load_recipe(str(recipe)), Path(name))
    run_step(run, 0)
    return run, results(Path(name) / "base")


def results(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "evaluation.json").read_text())
    return {"rows": (folder / "evaluation.jsonl").read_text(), **report, "seconds": None}


def cut_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """The power fails once so many more batches are made."""
    add, left = Journal.add, [batches]

    def add_or_end(self: Journal, *given: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Cut
        add(self, *given)

    monkeypatch.setattr(Journal, "add", add_or_end)


def leave_cut_off(recipe: Path, monkeypatch: pytest.MonkeyPatch, batches: int) -> Path:
    """Begin to measure in the folder `cut`, until the power fails; what was kept."""
    with monkeypatch.context() as patch:
        cut_after(patch, batches)
        with pytest.raises(Cut):
            measure(recipe, "cut")
    return Path("cut/base/evaluation.part")


def test_an_evaluation_that_is_cut_off_again_and_again_has_the_rows_of_a_whole_one(
    write_small: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    decode = LocalGenerator.decode

    def counting(self: LocalGenerator, model: Any, ids: Any, n: int, drawing: Any) -> Any:
        made.append(n)
        return decode(self, model, ids, n, drawing)

    monkeypatch.setattr(LocalGenerator, "decode", counting)
    _, whole = measure(write_small(), "whole")
    batches = len(made)
    assert batches > 8
    cuts, part = 0, Path("cut/base/evaluation.part")
    made.clear()
    while True:
        with monkeypatch.context() as patch:
            cut_after(patch, 6)
            try:
                _, cut = measure(write_small(), "cut")
                break
            except Cut:
                cuts += 1
        with part.open("a") as stream:
            stream.write('{"key": "half a li')
    assert cuts > 1
    assert cut == whole
    assert len(made) <= batches + cuts, "a cut costs the batch that it interrupts"
    assert not part.exists()


def add_sum(line: dict[str, Any]) -> dict[str, Any]:
    line.pop("sum")
    return {**line, "sum": digest(line)}


def test_a_damaged_line_is_made_again_and_those_after_it(
    write_small: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = measure(write_small(), "whole")
    part = leave_cut_off(write_small(), monkeypatch, 5)
    first, *lines = [json.loads(line) for line in part.read_text().splitlines()]
    lines[1]["made"] = [3, None]
    part.write_text("".join(json.dumps(line) + "\n" for line in (first, *lines)))
    assert len(read_kept(part)) == 2
    assert measure(write_small(), "cut")[1] == whole


def test_what_another_model_replied_is_not_gone_on_with(
    write_small: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = measure(write_small(), "whole")
    part = leave_cut_off(write_small(), monkeypatch, 4)
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    others = [{**line, "key": "other", "made": line["made"][::-1]} for line in lines]
    part.write_text("".join(json.dumps(add_sum(line)) + "\n" for line in others))
    assert measure(write_small(), "cut")[1] == whole


def test_fewer_rows_at_a_time_after_memory_ran_out_stay_fewer(
    write_small: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    decode = LocalGenerator.decode

    def small_card(self: LocalGenerator, model: Any, ids: Any, n: int, drawing: Any) -> Any:
        if len(ids) * n > 2:
            raise torch.OutOfMemoryError
        return decode(self, model, ids, n, drawing)

    monkeypatch.setattr(LocalGenerator, "decode", small_card)
    _, whole = measure(write_small(), "whole")
    leave_cut_off(write_small(), monkeypatch, 4)
    assert measure(write_small(), "cut")[1] == whole


def test_a_task_with_out_goes_on_and_keeps_its_rows(
    write_small: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small()
    command = ["evaluate", "qreason/tiny", "--task", "heldout.jsonl", "--samples", "2", "--json", "--out"]
    whole = CliRunner().invoke(main, [*command, "whole.jsonl"])
    assert whole.exit_code == 0, whole.output
    with monkeypatch.context() as patch:
        cut_after(patch, 1)
        with pytest.raises(Cut):
            CliRunner().invoke(main, [*command, "cut.jsonl"])
    cut = CliRunner().invoke(main, [*command, "cut.jsonl"])
    assert "continuing after 1 batches" in cut.stderr
    numbers = [{**json.loads(one.stdout), "seconds": None} for one in (whole, cut)]
    assert numbers[0] == numbers[1]
    assert Path("cut.jsonl").read_text() == Path("whole.jsonl").read_text()
    again = CliRunner().invoke(main, [*command, "cut.jsonl"])
    assert again.exit_code == 2
    assert "already exists" in again.stderr


def test_three_shards_of_an_evaluation_join_to_the_rows_of_a_whole_one(write_small: Callable[[], Path]) -> None:
    write_small()
    command = ["evaluate", "qreason/tiny", "--task", "heldout.jsonl", "--samples", "2", "--json", "--out"]
    whole = CliRunner().invoke(main, [*command, "whole.jsonl"])
    assert whole.exit_code == 0, whole.output
    for number in (3, 1):
        done = CliRunner().invoke(main, [*command, "parts.jsonl", "--shard", f"{number}/3"])
        assert (done.exit_code, done.stdout) == (0, ""), done.output
    early = CliRunner().invoke(main, [*command, "parts.jsonl"])
    assert (early.exit_code, "not measured yet: --shard 2/3" in early.stderr) == (2, True)
    CliRunner().invoke(main, [*command, "parts.jsonl", "--shard", "2/3"])
    others = CliRunner().invoke(main, [*command, "parts.jsonl", "--direct"])
    assert (others.exit_code, "made with another settings" in others.stderr) == (2, True)
    joined = CliRunner().invoke(main, [*command, "parts.jsonl"])
    assert joined.exit_code == 0, joined.output
    # the drawn replies come from other random sources
    kept = ("id", "prompt", "reply", "parts", "accurate", "reasoning", "consistent")
    rows = [
        [json.loads(line) for line in Path(name).read_text().splitlines()] for name in ("whole.jsonl", "parts.jsonl")
    ]
    first, second = ([{key: row[key] for key in kept} for row in some] for some in rows)
    assert first == second
    assert json.loads(whole.stdout)["accuracy"] == json.loads(joined.stdout)["accuracy"]
    assert not list(Path().glob("parts.jsonl.*"))


def test_more_shards_than_rows_are_no_trouble(write_small: Callable[[], Path]) -> None:
    write_small()
    command = ["evaluate", "qreason/tiny", "--task", "heldout.jsonl", "--rows", "1", "--samples", "1", "--out", "o"]
    for number in (1, 2):
        assert CliRunner().invoke(main, [*command, "--shard", f"{number}/2"]).exit_code == 0
    assert CliRunner().invoke(main, command).exit_code == 0
    assert len(Path("o").read_text().splitlines()) == 1
    assert "give --out" in CliRunner().invoke(main, [*command[:-2], "--shard", "1/2"]).stderr


@pytest.mark.parametrize(
    ("trained", "earlier"),
    [("same", "01-sft"), ("other", None)],
)
def test_the_same_weights_are_measured_once(
    write_run: RunWriter, monkeypatch: pytest.MonkeyPatch, trained: str, earlier: str | None
) -> None:
    # A grpo step with nothing left to learn was followed by the evaluation before it once more.
    passes = [[evaluated_row(0)], [evaluated_row(0, accurate=True)], [evaluated_row(0)]]
    run = Session.reopen(write_run("run", passes))
    for name, weights in (("01-sft", "same"), ("02-grpo", trained)):
        (run.folder / name / "adapter").mkdir()
        (run.folder / name / "adapter" / "adapter_model.safetensors").write_text(weights)
    run.disk.manifest["steps"].pop()  # the last evaluation
    run.step = 4
    settings = run.recipe.steps[4].evaluate
    assert settings
    monkeypatch.setattr(evaluate, "newest_of", lambda run: pytest.fail("measured"))
    if earlier:
        assert evaluate.stage(settings, run).summary.startswith("accuracy 100.0%")
        files = [run.folder / name / "evaluation.jsonl" for name in ("01-sft", "02-grpo")]
        assert files[0].read_text() == files[1].read_text()
        assert json.loads((run.folder / "02-grpo" / "evaluation.json").read_text())["after"] == "02-grpo"
    else:
        with pytest.raises(pytest.fail.Exception, match="measured"):
            evaluate.stage(settings, run)


def test_shards_of_two_adapters_and_files_that_are_no_shards_are_not_joined(tmp_path: Path) -> None:
    # Rows of a run's earlier and of its newest adapter were joined as those of one model.
    part = tmp_path / "out.1-of-1"
    write_jsonl(part, [{"model": "runs/x", "weights": "of 01-sft", "seconds": 1.0}, {"id": "a"}])
    with pytest.raises(InputError, match="made with another weights; remove it"):
        join_shards([part], {"model": "runs/x", "weights": "of 02-grpo"})
    assert join_shards([part], {"weights": "of 01-sft"}) == ([{"id": "a"}], 1.0)
    for text in ("", '{"id": "a"}\n'):  # were tracebacks
        part.write_text(text)
        with pytest.raises(InputError, match=r"out\.1-of-1: not a shard of an evaluation; remove it"):
            join_shards([part], {})


def test_a_shard_knows_the_adapter_that_replied(write_run: RunWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    folder = write_run("out", [[evaluated_row(0)]] * 3)
    adapter = folder / "02-grpo" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"trained")
    (folder.parent / "task.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (folder.parent / "rows.jsonl.1-of-1").write_text("")
    monkeypatch.setattr("qreason.stages.evaluate.join_shards", lambda parts, made_with: asked.append(made_with))
    with pytest.raises(TypeError):
        evaluate_task(str(folder), folder.parent / "task.jsonl", Evaluate(), folder.parent / "rows.jsonl", print)
    assert asked[0]["weights"] == hash_files([adapter / "adapter_model.safetensors"])
