"""The copy of a run folder elsewhere: kept up to date, never ahead of itself, and enough to go on from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import RunWriter, evaluated_row

from qreason.cli import main
from qreason.errors import InputError
from qreason.hub.mirror import open_mirror
from qreason.run.lock import HOLDER, LOCK


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in its first stage, with a checkpoint and one that is being written."""
    folder = tmp_path / "runs" / "small"
    for name in ("manifest.json", "01-sft/metrics.jsonl", "01-sft/resume/step-000002/manifest.json", "recipe.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in (LOCK, HOLDER, "01-sft/resume/draft/state.pt", "report.json.draft"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of this machine")
    return folder


def test_the_copy_has_what_the_run_has_and_no_more(run: Path, tmp_path: Path) -> None:
    mirror = open_mirror(str(tmp_path / "drive"), run, print)
    mirror()
    here = {name: text for name, text in content(run).items() if text != b"of this machine"}
    assert content(tmp_path / "drive" / "small") == here
    shutil.rmtree(run / "01-sft" / "resume" / "step-000002")
    (run / "01-sft" / "metrics.jsonl").write_text("longer than before")
    mirror()
    here = {name: text for name, text in content(run).items() if text != b"of this machine"}
    assert content(tmp_path / "drive" / "small") == here


def test_a_new_machine_starts_from_the_copy_and_an_old_one_does_not(run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    open_mirror(str(tmp_path / "drive"), run, said.append)()
    (run / "01-sft" / "metrics.jsonl").write_text("ahead of the copy")
    open_mirror(str(tmp_path / "drive"), run, said.append).pull()
    assert (run / "01-sft" / "metrics.jsonl").read_text() == "ahead of the copy"
    shutil.rmtree(run)
    open_mirror(str(tmp_path / "drive"), run, said.append).pull()
    assert content(run) == content(tmp_path / "drive" / "small")
    assert said == [f"{run}: fetched from {tmp_path / 'drive' / 'small'}"]


def test_a_fetch_that_is_cut_off_leaves_no_half_of_a_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The half was taken for the run, whose adapter was then missing.
    open_mirror(str(tmp_path / "drive"), run, print)()
    shutil.rmtree(run)

    def cut(source: Path, to: Path, **_: object) -> None:
        to.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / "manifest.json", to / "manifest.json")
        raise KeyboardInterrupt

    mirror = open_mirror(str(tmp_path / "drive"), run, print)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", cut)
        with pytest.raises(KeyboardInterrupt):
            mirror.pull()
    assert not run.exists()
    mirror.pull()
    assert content(run) == content(tmp_path / "drive" / "small")
    assert [path.name for path in run.parent.iterdir()] == ["small"]


def test_without_a_copy_there_is_nothing_to_fetch(tmp_path: Path) -> None:
    open_mirror(str(tmp_path / "drive"), tmp_path / "runs" / "small", print).pull()
    assert not (tmp_path / "runs").exists()


def test_records_are_copied_before_checkpoints_and_the_manifest_last(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is cut off anywhere is one to go on from: no checkpoint is ahead of its records."""
    order: list[str] = []
    monkeypatch.setattr("qreason.hub.mirror.copy_changed", lambda file, copy: order.append(str(file.relative_to(run))))
    open_mirror(str(tmp_path / "drive"), run, print).push()
    assert order.index("01-sft/metrics.jsonl") < order.index("01-sft/resume/step-000002/manifest.json")
    assert order.index("recipe.yaml") < order.index("manifest.json")


def test_a_copy_that_fails_is_reported_once_and_costs_nothing(run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "drive").write_text("a file in the way")
    mirror = open_mirror(str(tmp_path / "drive"), run, said.append)
    mirror()
    mirror()
    assert len(said) == 1
    assert "out of date" in said[0]
    (tmp_path / "drive").unlink()
    mirror()
    assert (tmp_path / "drive" / "small" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("target", "message"), [("hf://me", "USER/NAME"), ("{runs}", "the run folder itself"), ("{run}", "or in it")]
)
def test_a_wrong_target_is_refused(run: Path, target: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_mirror(target.format(runs=run.parent, run=run), run, print)


def test_the_report_of_a_finished_run_is_in_the_copy(write_run: RunWriter) -> None:
    write_run("out", [[evaluated_row(0)]] * 3)  # it was written after the last copy
    done = CliRunner().invoke(main, ["run", "small.yaml", "--out", "out", "--mirror", "drive"])
    assert done.exit_code == 0, done.output
    assert {file.name for file in Path("drive/out").iterdir()} >= {"report.json", "replies.jsonl"}
