"""A run seen from outside: while it works, cut off, finished; and what its own line shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from conftest import RunWriter, evaluated_row, jsonl

import qreason
from qreason.cli import main
from qreason.machine.progress import LIVE, phase, progress_bar, written_to
from qreason.training.trainer import Watch

OWN = os.environ | {"PYTHONPATH": str(Path(qreason.__file__).parents[1])}
ALARM = {"step": 2, "text": "replies grow", "replies": []}


def watch(folder: Path, *arguments: str) -> str:
    result = CliRunner().invoke(main, ["watch", str(folder), *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def cut(write_run: RunWriter) -> Path:
    """A run whose GRPO step is at its third step."""
    folder = write_run("runs/one", [[evaluated_row(0, accurate=True)]] * 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"steps": manifest["steps"][:3]}))
    (folder / "01-sft" / "evaluation.json").write_text(
        json.dumps({key: {"mean": 0.25} for key in ("accuracy", "pass_at_1", "reward")})
    )
    (folder / "02-grpo" / "alarms.jsonl").write_text(jsonl([ALARM]))
    state = {"phase": "02-grpo rewards", "done": 3, "total": 40, "left": 750.0, "at": time.time()}
    (folder / LIVE).write_text(json.dumps(state))
    return folder


@contextmanager
def working(folder: Path) -> Iterator[None]:
    """Within it, another process holds the run."""
    script = (
        "import sys; from pathlib import Path; from qreason.run.lock import hold, sign; out = Path(sys.argv[1]); "
        "lock = hold(out); sign(out); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=OWN) as held:
        assert held.stdout
        held.stdout.readline()
        yield
        held.terminate()


def test_a_run_that_works_shows_its_phase_time_left_figures_and_alarms(cut: Path) -> None:
    with (cut / "02-grpo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # being written
    with working(cut):
        shown = watch(cut, "--once")
    assert "3 of 5 steps, working (process" in shown
    assert "02-grpo rewards, 3 of 40, about 0:12:" in shown
    figures = [" ".join(line.split()) for line in shown.splitlines()]
    assert "evaluate 01-sft 0:00:01, accuracy 25.0%" in figures
    assert {"step 3", "reward 0.8", "format 0.5", "learning rate 1e-05", "02-grpo now"} <= set(figures)
    assert "alarm: 02-grpo, step 2: replies grow" in shown


def test_watching_a_run_ends_with_it(cut: Path) -> None:
    command = [sys.executable, "-m", "qreason", "watch", str(cut)]
    with working(cut):
        watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=OWN)
        with pytest.raises(subprocess.TimeoutExpired):
            watcher.wait(4)
    out, _ = watcher.communicate(timeout=60)
    assert watcher.returncode == 0
    assert "02-grpo was cut off" in " ".join(out.split())
    assert "02-grpo rewards, 3 of 40, last seen" in out


def test_a_run_that_was_cut_off_or_is_damaged_in_places_is_shown_as_far_as_it_goes(cut: Path) -> None:
    (cut / LIVE).write_text("{")
    (cut / "02-grpo" / "alarms.jsonl").write_text("no JSON\n" + jsonl([ALARM]))
    (cut / "02-grpo" / "metrics.jsonl").unlink()
    shown = watch(cut)
    assert "was cut off" in shown
    assert "last seen" not in shown
    assert "replies grow" in shown


def test_a_finished_run_is_shown_at_once(write_run: RunWriter) -> None:
    folder = write_run("runs/one", [[evaluated_row(0)]] * 3)
    for name in ("base", "01-sft", "02-grpo"):
        assert not (folder / name / "evaluation.json").exists()
    assert "one: finished" in watch(folder)


def test_the_line_of_a_run_is_written_down_for_others(tmp_path: Path) -> None:
    with written_to(tmp_path), progress_bar("02-grpo", total=4) as bar:
        phase("replies")
        bar.written = 0
        bar.advance(1)
        live = json.loads((tmp_path / LIVE).read_text())
        assert (live["phase"], live["done"], live["total"]) == ("02-grpo replies", 1, 4)
        assert abs(live["at"] - time.time()) < 60
        with progress_bar("judge"):
            phase("inner")
        phase("rewards")
        assert bar.task.description == "02-grpo rewards"
    phase("nothing is shown, nothing happens")
    (tmp_path / LIVE).unlink()
    with progress_bar("merge", total=1) as bar:
        bar.advance(1)
    assert not (tmp_path / LIVE).exists()


def test_what_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    with written_to(tmp_path / "gone"), progress_bar("merge", total=1) as bar:
        bar.advance(1)


def test_the_live_line_names_its_numbers_in_plain_words(tmp_path: Path) -> None:
    notes: list[str] = []
    names = {"reward": "reward", "rewards/correctness/mean": "correctness", "entropy": "entropy"}
    watcher = Watch(tmp_path, SimpleNamespace(note=notes.append), names)  # type: ignore[arg-type]
    logs = {"reward": 0.8123, "rewards/correctness/mean": 0.4, "rewards/format/mean": 0.7}
    state = SimpleNamespace(global_step=1)
    watcher.on_log(SimpleNamespace(fp16=False), state, None, logs)
    assert notes == ["reward 0.812, correctness 0.4"]
