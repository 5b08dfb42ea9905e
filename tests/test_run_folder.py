"""Session folders: starting, continuing, refusing, starting over. No model is loaded here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import qreason
from qreason.cli import main
from qreason.data.examples import choose_prompt
from qreason.errors import DataError, RunFolderError
from qreason.machine.files import read_jsonl, write_json, write_jsonl
from qreason.recipe.load import load_recipe
from qreason.recipe.schema import stage_folders
from qreason.report.build import write_report
from qreason.run.folder import RunFolder
from qreason.run.lock import HOLDER, LOCK, alone, describe
from qreason.run.session import Session

RecipeWriter = Callable[..., Path]


def start(file: Path, *overrides: str, finished: int = 0, fresh: bool = False) -> Session:
    """Open the run of a recipe in ./out, and call its next `finished` steps done."""
    run = Session.open(load_recipe(file, overrides), Path("out"), fresh=fresh, say=lambda line: None)
    for _ in range(finished):
        run.step = run.disk.finished
        (run.folder / run.disk.stage_names[run.step]).mkdir(exist_ok=True)
        run.disk.finish_step(run.step, 1.0)
    return run


def content(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in (LOCK, HOLDER)]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def refused(file: Path, *overrides: str, fresh: bool = False) -> str:
    """The message that refuses to open ./out, which must stay as it was."""
    before = content(Path("out"))
    with pytest.raises(RunFolderError) as caught:
        start(file, *overrides, fresh=fresh)
    assert content(Path("out")) == before
    return str(caught.value)


def test_new_run_writes_down_where_it_comes_from(write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/qreason", "run", "my recipe.yaml", "--seed", "7"])
    run = start(write_recipe(), "seed=7")
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert manifest["recipe"] == "small"
    assert manifest["seed"] == 7
    assert manifest["command"] == "qreason run 'my recipe.yaml' --seed 7"
    assert manifest["steps"] == []
    assert {"torch", "transformers", "trl", "peft"} <= manifest["versions"].keys()
    assert {key: len(value) for key, value in manifest["data"].items()} == dict.fromkeys(
        ("sft", "prompts", "heldout"), len("sha256:") + 64
    )


def test_recipe_as_resolved_is_kept_and_reopens_equal(write_recipe: RecipeWriter) -> None:
    run = start(write_recipe(), "sft.learning_rate=3e-4")
    given = load_recipe(write_recipe(), ["sft.learning_rate=3e-4"])
    assert Session.reopen(run.folder).recipe == given.model_copy(update={"data": choose_prompt(given.data)})


def test_empty_folder_is_taken(write_recipe: RecipeWriter, workplace: Path) -> None:
    (workplace / "out").mkdir()
    assert start(write_recipe()).disk.finished == 0


def test_second_run_continues_after_the_finished_steps(write_recipe: RecipeWriter) -> None:
    start(write_recipe(), finished=2)
    again = start(write_recipe())
    assert again.disk.finished == 2
    assert [entry["folder"] for entry in again.disk.manifest["steps"]] == ["base", "01-sft"]


def test_folder_of_another_recipe_is_refused(write_recipe: RecipeWriter) -> None:
    start(write_recipe(), finished=1)
    assert "belongs to the recipe 'small', not 'other'" in refused(write_recipe(("name: small", "name: other")))


@pytest.mark.parametrize(
    ("override", "key"),
    [("seed=9", "seed"), ("model.lora.r=4", "model"), ("rewards.format=0.5", "rewards"), ("sft.rows=2", "steps")],
)
def test_changed_settings_are_refused_by_name(write_recipe: RecipeWriter, override: str, key: str) -> None:
    start(write_recipe(), finished=2)
    assert f"made with other settings ({key})" in refused(write_recipe(), override)


def test_settings_of_a_step_that_has_not_run_may_change(write_recipe: RecipeWriter) -> None:
    start(write_recipe(), finished=2)
    assert start(write_recipe(), "grpo.beta=0.1").disk.finished == 2
    assert Session.reopen(Path("out")).recipe.steps[3].grpo.beta == 0.1  # type: ignore[union-attr]


def test_appended_steps_continue_the_run(write_recipe: RecipeWriter) -> None:
    start(write_recipe(), finished=5)
    longer = start(write_recipe(("- merge", "- merge\n  - sft: {rows: 1}")))
    assert longer.disk.finished == 5
    assert longer.disk.stage_names[5:] == ["04-sft"]


def test_removed_finished_step_is_refused(write_recipe: RecipeWriter) -> None:
    start(write_recipe(), finished=5)
    assert "(steps)" in refused(write_recipe(("  - merge\n", "")))


def test_folder_of_a_finished_step_that_is_gone_is_named(write_recipe: RecipeWriter) -> None:
    start(write_recipe(), finished=3)
    Path("out/01-sft").rmdir()
    assert refused(write_recipe()).startswith(
        "out/01-sft is missing, though its step was finished; restore it, or use --fresh"
    )
    start(write_recipe(), fresh=True)


def test_changed_data_is_refused_by_name(write_recipe: RecipeWriter, workplace: Path) -> None:
    file = write_recipe()
    start(file, finished=1)
    with (workplace / "prompts.jsonl").open("a") as stream:
        stream.write('{"id": "p9", "issue": "x", "resolution": "y"}\n')
    assert "the data changed since this run began (data.prompts)" in refused(file)


def test_data_is_read_before_a_folder_is_touched(write_recipe: RecipeWriter, workplace: Path) -> None:
    # A run on broken data used to leave a folder, which then refused the cured data as changed.
    file = write_recipe()
    cured = (workplace / "sft.jsonl").read_bytes()
    (workplace / "sft.jsonl").write_text("broken\n")
    with pytest.raises(DataError):
        start(file)
    assert not Path("out").exists()
    (workplace / "sft.jsonl").write_bytes(cured)
    start(file, finished=1)
    (workplace / "sft.jsonl").write_text("broken\n")
    with pytest.raises(DataError):
        start(file, fresh=True)
    assert [folder.name for folder in workplace.glob("out*")] == ["out"]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("manifest", [None, "not json", "[]", '{"steps": []}'])
def test_folder_that_is_no_run_is_refused(
    write_recipe: RecipeWriter, workplace: Path, manifest: str | None, fresh: bool
) -> None:
    (workplace / "out").mkdir()
    (workplace / "out" / "thesis.txt").write_text("years of work")
    if manifest is not None:
        (workplace / "out" / "manifest.json").write_text(manifest)
    assert "not a run folder" in refused(write_recipe(), fresh=fresh)


def test_run_folder_without_its_recipe_is_refused(write_recipe: RecipeWriter) -> None:
    start(write_recipe(), finished=1)
    Path("out/recipe.yaml").unlink()
    assert "not a run folder" in refused(write_recipe())


def test_file_in_place_of_the_folder_is_refused(write_recipe: RecipeWriter, workplace: Path) -> None:
    (workplace / "out").write_text("a file")
    assert "is a file" in refused(write_recipe())
    assert (workplace / "out").read_text() == "a file"


def test_fresh_moves_earlier_runs_aside_and_loses_nothing(write_recipe: RecipeWriter, workplace: Path) -> None:
    first = start(write_recipe(), finished=2)
    (first.folder / "01-sft" / "adapter").write_text("weights")
    kept = content(first.folder)
    assert start(write_recipe(), fresh=True).disk.finished == 0
    start(write_recipe(), "seed=5", fresh=True)
    assert content(workplace / "out.1") == kept
    assert sorted(folder.name for folder in workplace.glob("out*")) == ["out", "out.1", "out.2"]
    assert not (workplace / "out" / "01-sft").exists()


def test_folders_are_numbered_by_training_stage_and_evaluations_lie_with_them(write_recipe: RecipeWriter) -> None:
    recipe = load_recipe(write_recipe(("- merge", "- sft\n  - grpo\n  - evaluate\n  - merge")))
    assert stage_folders(recipe.steps) == [
        "base",
        "01-sft",
        "01-sft",
        "02-grpo",
        "03-sft",
        "04-grpo",
        "04-grpo",
        "05-merge",
    ]


def test_stage_that_was_cut_off_starts_again(write_recipe: RecipeWriter) -> None:
    said: list[str] = []
    run = start(write_recipe(), finished=1)
    run.step, run.say = 1, said.append
    leftover = run.clear_stage_folder() / "metrics.jsonl"
    assert said == []
    leftover.write_text('{"step": 1}\n')
    folder = run.clear_stage_folder()
    assert folder == run.folder / "01-sft"
    assert not any(folder.iterdir())
    assert said == ["01-sft was not finished: starting it again"]


def test_newest_adapter_of_the_finished_steps_counts(write_recipe: RecipeWriter) -> None:
    run = start(write_recipe(), finished=1)
    (run.folder / "01-sft" / "adapter").mkdir(parents=True)
    assert run.disk.adapter() is None  # its step is not finished
    for _ in range(2):
        run.step = run.disk.finished
        run.disk.finish_step(run.step, 1.0)
    (run.folder / "02-grpo" / "adapter").mkdir(parents=True)
    assert run.disk.adapter() == run.folder / "01-sft" / "adapter"
    run.step = run.disk.finished
    run.disk.finish_step(run.step, 1.0)
    assert run.disk.adapter() == run.folder / "02-grpo" / "adapter"


def test_an_adapter_that_is_gone_is_not_replaced_by_another_one(write_recipe: RecipeWriter) -> None:
    # Training used to start from an older adapter, or from the base, and to say nothing.
    run = start(write_recipe(), finished=4)
    (run.folder / "01-sft" / "adapter").mkdir(parents=True)
    for start_from in ("newest", "02-grpo"):
        with pytest.raises(RunFolderError, match=r"02-grpo/adapter: the adapter to start from is missing; restore it"):
            run.disk.adapter(start_from)
    assert run.disk.adapter("01-sft") == run.folder / "01-sft" / "adapter"
    assert run.disk.adapter("base") is None


def test_failed_write_leaves_the_earlier_file(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    write_json(file, {"rows": 1})
    with pytest.raises(TypeError):
        write_json(file, {"rows": object()})
    assert json.loads(file.read_text()) == {"rows": 1}
    write_jsonl(file, [{"row": 1}])
    with pytest.raises(TypeError):
        write_jsonl(file, [{"row": 2}, {"row": object()}])
    assert read_jsonl(file) == [{"row": 1}]


def test_rows_read_back_as_written_whatever_their_text(tmp_path: Path) -> None:
    # A line separator that a model wrote used to cut its row in two.
    rows = [{"reply": "one\u2028two\u0085three\x0cfour\r\nfive"}, {"reply": "ü"}]
    write_jsonl(tmp_path / "rows.jsonl", rows[:1])
    write_jsonl(tmp_path / "rows.jsonl", rows[1:], append=True)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


def test_a_folder_that_another_process_merges_or_exports_into_is_left_alone(tmp_path: Path) -> None:
    # A second terminal removed the files that the first one was writing.
    folder = tmp_path / "export"
    script = "import sys; sys.path.insert(0, sys.argv[1]); from qreason.run.lock import alone; "
    script += "from pathlib import Path; work = alone(Path(sys.argv[2])); work.__enter__(); "
    script += "print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(Path(__file__).parents[1]), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(RunFolderError, match=rf"export is in use by another qreason \(process {other.pid} on"):
            alone(folder).__enter__()
        other.kill()
    with alone(folder):
        assert (folder / LOCK).exists()
    assert list(folder.iterdir()) == []


def test_a_run_that_another_process_works_on_is_refused(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe()
    script = "import sys; sys.path.insert(0, sys.argv[1]); from qreason.run.lock import hold, sign; "
    script += "from pathlib import Path; out = Path('out'); kept = hold(out); sign(out); print('held', flush=True); "
    script += "sys.stdin.read()"
    run = start(recipe, finished=1)
    assert run.disk.lock is not None
    run.disk.lock.release(force=True)
    command = [sys.executable, "-c", script, str(Path(qreason.__file__).parents[1])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdout.readline() == b"held\n"
        for fresh in (False, True):
            with pytest.raises(RunFolderError, match=rf"in use by another qreason \(process {other.pid} on .*--out"):
                Session.open(load_recipe(str(recipe)), Path("out"), fresh=fresh)
        other.kill()
    assert Session.open(load_recipe(str(recipe)), Path("out")).disk.finished == 1


def test_a_lock_without_a_holder_says_that_it_has_just_started(tmp_path: Path) -> None:
    assert describe(tmp_path) == "it has just started"


# --- damaged files ---------------------------------------------------------------------------------

ROWS = [
    {"id": i, "prompt": "p", "reply": "r", "reference": "r", "parts": {}, "total": 1.0, "split": None}
    | {"accurate": True, "pass_at_1": 1.0, "well_formed": True, "words": 1, "finished": True}
    for i in range(4)
]


@pytest.fixture
def evaluated(write_recipe: RecipeWriter) -> Path:
    """A run folder with a finished evaluation, a GRPO step and what the commands read of them."""
    run = start(write_recipe(), finished=4)
    mean = {key: {"mean": 0.5} for key in ("accuracy", "pass_at_1", "reward")}
    for name in ("base", "01-sft"):
        write_jsonl(run.folder / name / "evaluation.jsonl", ROWS)
        write_json(run.folder / name / "evaluation.json", {"rows": len(ROWS), **mean})
    (run.folder / "01-sft" / "adapter").mkdir()
    (run.folder / "02-grpo" / "adapter").mkdir()
    write_jsonl(run.folder / "02-grpo" / "metrics.jsonl", [{"step": 1, "reward": 0.5}])
    write_report(run.disk)
    return run.folder


@pytest.mark.parametrize("damage", ["half", "empty", "gone", "other", "binary"])
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("base/evaluation.jsonl", "report"),
        ("01-sft/evaluation.json", "report"),
        ("02-grpo/metrics.jsonl", "report"),
        ("01-sft/evaluation.json", "lineage"),
        ("manifest.json", "lineage"),
        ("manifest.json", "chat"),
        ("manifest.json", "merge"),
        ("manifest.json", "export"),
        ("manifest.json", "push"),
        ("recipe.yaml", "lineage"),
        ("report.json", "push"),
    ],
)
def test_damaged_file_is_named_with_its_cure(evaluated: Path, name: str, command: str, damage: str) -> None:
    file, arguments = evaluated / name, ["--to", "me/x", "--dry-run"] if command == "push" else []
    if command == "push":
        write_json(evaluated / "02-grpo" / "adapter" / "adapter_config.json", {})
    raw = file.read_bytes()
    broken = {"half": raw[: len(raw) // 2 - 3], "empty": b"", "other": b'{"a": 1}', "binary": b"\xff\x00"}
    file.unlink() if damage == "gone" else file.write_bytes(broken[damage])
    if (damage, name, command) in ALLOWED:
        return
    if command == "report":
        with pytest.raises(RunFolderError) as caught:
            write_report(RunFolder.reopen(evaluated))
        said = str(caught.value)
    else:
        result = CliRunner().invoke(main, [command, str(evaluated), *arguments])
        assert result.exit_code == 2, result.output
        said = result.stderr.splitlines()[-1]
    assert (file.name if damage == "gone" else str(file)) in said
    assert any(cure in said for cure in ("restore it", "--fresh", "give the folder of a run", "writes it anew"))


ALLOWED = {
    ("gone", "01-sft/evaluation.json", "lineage"),
    ("gone", "01-sft/evaluation.json", "report"),
    ("gone", "report.json", "push"),
    ("other", "02-grpo/metrics.jsonl", "report"),  # no step was logged
}
"""What a command can do without."""


def put(file: Path, place: str, value: object) -> None:
    """Write another value at a place of a JSON file, or of the first row of a JSONL file."""
    lines = file.read_text().splitlines(keepends=True) if file.suffix == ".jsonl" else [file.read_text()]
    whole = json.loads(lines[0])
    *above, last = place.split(".")
    inner = whole
    for key in above:
        inner = inner[int(key) if isinstance(inner, list) else key]
    inner[int(last) if isinstance(inner, list) else last] = value
    file.write_text(json.dumps(whole) + "\n" + "".join(lines[1:]))


@pytest.mark.parametrize(
    ("name", "place", "value", "command", "said"),
    [
        ("01-sft/evaluation.json", "accuracy", 3, "lineage", "accuracy: Input should be a valid dictionary"),
        ("01-sft/evaluation.json", "reward.mean", "high", "lineage", "reward.mean: Input should be a valid number"),
        ("01-sft/evaluation.json", "rows", "4", "report", "rows: Input should be a valid integer"),
        ("base/evaluation.jsonl", "parts", 3, "report", ":1: parts: Input should be a valid dictionary"),
        ("base/evaluation.jsonl", "parts", {"other": 1.0}, "report", ":2: other rewards or methods than in its first"),
        ("base/evaluation.jsonl", "accurate", "yes", "report", ":1: accurate: Input should be a valid boolean"),
        ("base/evaluation.jsonl", "total", 1e308, "report", ":1: total: Input should be less than"),
        ("base/evaluation.jsonl", "reasoning", {"own": True}, "report", ":1: no reasoning.Tested.direct in it"),
        ("02-grpo/metrics.jsonl", "step", None, "report", ":1: step: Input should be a valid integer"),
        ("02-grpo/metrics.jsonl", "reward", [1], "report", ":1: reward: Input should be a valid number"),
        ("manifest.json", "steps.1.folder", "../..", "lineage", "its step 2 is not that of recipe.yaml"),
        ("manifest.json", "steps.1.stage", "dream", "chat", "its step 2 is not that of recipe.yaml"),
        ("manifest.json", "steps.1.seconds", "1", "merge", "steps.1.seconds: Input should be a valid number"),
        ("manifest.json", "base", "qreason/tiny", "export", "base: Input should be a valid dictionary"),
        ("report.json", "passes.0.accuracy", {"mean": 1.0}, "push", "passes.0.accuracy"),
        ("report.json", "gains", 3, "push", "gains: Input should be a valid list"),
        ("02-grpo/adapter/adapter_config.json", "", [], "push", "Input should be a valid dictionary"),
    ],
)
def test_a_value_of_another_shape_is_named(
    evaluated: Path, name: str, place: str, value: object, command: str, said: str
) -> None:
    # These used to end with a traceback.
    write_json(evaluated / "02-grpo" / "adapter" / "adapter_config.json", {})
    if place:
        put(evaluated / name, place, value)
    else:
        write_json(evaluated / name, value)
    if command == "report":
        with pytest.raises(RunFolderError) as caught:
            write_report(RunFolder.reopen(evaluated))
        found = str(caught.value)
    else:
        arguments = ["--to", "me/x", "--dry-run"] if command == "push" else []
        result = CliRunner().invoke(main, [command, str(evaluated), *arguments])
        assert result.exit_code == 2, result.output
        found = result.stderr.splitlines()[-1]
    assert str(evaluated / name) in found
    assert said in found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_mean_over_nothing_is_a_gap_in_a_curve(evaluated: Path, value: float | None) -> None:
    write_jsonl(evaluated / "02-grpo" / "metrics.jsonl", [{"step": 1, "reward": value}, {"step": 2, "reward": 0.5}])
    assert write_report(RunFolder.reopen(evaluated))["curves"][0]["reward"] == [None, 0.5]


def test_missing_rows_of_an_evaluation_are_counted(evaluated: Path) -> None:
    write_jsonl(evaluated / "base" / "evaluation.jsonl", ROWS[:3])
    with pytest.raises(RunFolderError, match=r"base/evaluation.jsonl: 3 rows of 4; restore it"):
        write_report(RunFolder.reopen(evaluated))
    (evaluated / "base" / "evaluation.json").unlink()
    with pytest.raises(RunFolderError, match=r"different rows \(base 3, 01-sft 4\)"):
        write_report(RunFolder.reopen(evaluated))


def test_an_adapter_that_is_gone_is_not_replaced_by_an_earlier_one(evaluated: Path) -> None:
    (evaluated / "02-grpo" / "adapter").rmdir()
    with pytest.raises(RunFolderError, match=r"02-grpo/adapter: the adapter to start from is missing"):
        RunFolder.reopen(evaluated).adapter()


def test_a_recipe_with_fewer_steps_than_were_finished_is_refused(evaluated: Path) -> None:
    file = evaluated / "recipe.yaml"
    file.write_text(file.read_text().partition("- grpo")[0])
    with pytest.raises(RunFolderError, match=r"recipe.yaml: fewer steps than were finished; restore it"):
        RunFolder.reopen(evaluated)
