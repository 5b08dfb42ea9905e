"""`qreason runs`: the state and size of each run, and what can be removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import RecipeWriter

import qreason
from qreason.cli import main
from qreason.machine.files import hash_files, write_json
from qreason.recipe.load import load_recipe
from qreason.run.listing import list_runs, size
from qreason.run.session import Session


def made(write_recipe: RecipeWriter, name: str, finished: int) -> Path:
    run = Session.open(load_recipe(str(write_recipe())), Path("runs") / name, say=lambda line: None)
    for step in range(finished):
        run.disk.stage(step).mkdir(exist_ok=True)
        run.disk.finish_step(step, 1.0)
    if run.disk.lock:
        run.disk.lock.release(force=True)
    return run.folder


def checkpoint(stage: Path, step: int) -> None:
    folder = stage / "resume" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(b"0" * 1_000_000)
    write_json(folder / "manifest.json", {"state.pt": hash_files([folder / "state.pt"])})


def test_the_state_of_each_run_is_shown(write_recipe: RecipeWriter) -> None:
    made(write_recipe, "whole", 5)
    checkpoint(made(write_recipe, "half", 1) / "01-sft", 40)
    states = {run.path.name: run.state for run in list_runs(Path("runs"))}
    assert states == {"whole": "finished", "half": "1 of 5 steps, 01-sft after its step 40"}
    result = CliRunner().invoke(main, ["runs"])
    assert result.exit_code == 0
    assert "half" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_leftovers_are_removed_and_nothing_else(write_recipe: RecipeWriter) -> None:
    run = made(write_recipe, "half", 2)
    checkpoint(run / "02-grpo", 40)  # of the stage that goes on
    (run / "02-grpo" / "adapter").mkdir()  # written, but not recorded: its checkpoints were removed
    before = {file for file in run.rglob("*") if file.is_file()}
    checkpoint(run / "01-sft", 8)
    (run / "report.json.draft").write_text("{")
    (run / "export" / ".work-x").mkdir(parents=True)
    (run / "export" / ".work-x" / "big").write_bytes(b"0" * 1_000_000)
    result = CliRunner().invoke(main, ["runs", "--clean"])
    assert "2.0 MB of leftovers removed" in result.output
    assert f"kept: {Path('runs/half/02-grpo/resume')} (1.0 MB), from which the run continues" in result.output
    assert {file for file in run.rglob("*") if file.is_file()} == before


def test_a_damaged_run_loses_no_checkpoint(write_recipe: RecipeWriter) -> None:
    run = made(write_recipe, "half", 2)
    checkpoint(run / "01-sft", 8)
    (run / "manifest.json").write_text("{")
    result = CliRunner().invoke(main, ["runs", "--clean"])
    assert "0.0 MB of leftovers removed" in result.output
    assert (run / "01-sft" / "resume" / "step-000008").is_dir()


class Scan:
    """What os.scandir gives, read at once."""

    def __init__(self, entries: Iterator[os.DirEntry[str]]) -> None:
        self.entries = iter(list(entries))

    def __enter__(self) -> Iterator[os.DirEntry[str]]:
        return self.entries

    def __exit__(self, *_: object) -> None: ...

    def __next__(self) -> os.DirEntry[str]:
        return next(self.entries)


@pytest.mark.parametrize("looks", [1, 2])
def test_a_folder_that_a_run_at_work_removes_meanwhile_is_no_error(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    run, scan, left = made(write_recipe, "busy", 1), os.scandir, [looks]  # ended with exit code 1
    before = size(run)
    checkpoint(run / "01-sft", 40)

    def removing(path: str | int) -> Scan:
        found = Scan(scan(path))
        left[0] -= str(path).endswith("resume")
        if not left[0]:
            monkeypatch.setattr(os, "scandir", scan)
            shutil.rmtree(f"{path}/step-000040")
        return found

    monkeypatch.setattr(os, "scandir", removing)
    assert before <= size(run) <= before + 1_000_200


def test_a_run_that_works_is_named_and_left_alone(write_recipe: RecipeWriter) -> None:
    run = made(write_recipe, "busy", 1)
    (run / "report.json.draft").write_text("{")
    script = "import sys; from pathlib import Path; from qreason.run.lock import hold, sign; out = Path(sys.argv[1]); "
    script += "kept = hold(out); sign(out); print('held', flush=True); sys.stdin.read()"
    environment = os.environ | {"PYTHONPATH": str(Path(qreason.__file__).parents[1])}
    command = [sys.executable, "-c", script, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout
        other.stdout.readline()
        (listed,) = list_runs(run)
        other.kill()
    assert listed.state.startswith(f"1 of 5 steps, working (process {other.pid} on ")
    assert listed.leftover == 0


def test_a_folder_without_runs_is_named(workplace: Path) -> None:
    result = CliRunner().invoke(main, ["runs", str(workplace)])
    assert result.exit_code == 2
    assert "no run in it" in result.output
