"""Progress bars: one line each, with the time left."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from qreason.judge.calibration import calibrate
from qreason.machine import progress
from qreason.machine.progress import progress_bar
from qreason.rewards.scoring import Scorer
from qreason.training.preflight import check_rollouts
from qreason.types import Example, Messages, Reply, Sampling

NOTE = "reward 0.812 mean 0.413 entropy 1.02 and more figures than a line has room for"


def draw(monkeypatch: pytest.MonkeyPatch, what: str, total: int | None, steps: int, seconds: float, note: str) -> str:
    """The last line of a bar in a terminal of 80 columns, after steps that took so many seconds each."""
    file, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(progress, "console", Console(file=file, width=80, force_terminal=True, color_system=None))
    monkeypatch.setattr(progress, "Progress", partial(Progress, get_time=lambda: clock[0], auto_refresh=False))
    with progress_bar(what, total=total) as bar:
        for _ in range(steps):
            clock[0] += seconds
            bar.advance(1)
            bar.note(note)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", file.getvalue()))
    return [line for line in lines if line.strip()][-1]


@pytest.mark.parametrize("seconds", [0.5, 70.0])
def test_the_time_left_is_shown_at_80_columns(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    line = draw(monkeypatch, "02-grpo-long-name", 20000, 3, seconds, NOTE)
    left = math.ceil(seconds * 19997)
    assert f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left" in line
    assert "3/20000" in line
    assert len(line) <= 80
    assert "reward 0.8" in line


def test_no_time_is_left_where_all_is_done_or_the_end_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "left" not in draw(monkeypatch, "merge", 3, 3, 1.0, "")
    assert "left" not in draw(monkeypatch, "quantize q4_k_m", None, 1, 1.0, "")


def test_measuring_a_judge_shows_a_bar_that_ends_full(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, width=80, force_terminal=True, color_system=None))
    labels = [(f"fix {i}", f"fix {i}" if right else "another", float(right)) for i in range(9) for right in (1, 0)]
    calibrate(lambda pairs: [float(reference == reply) for reference, reply in pairs], labels)
    done, total = re.findall(r"judge .*?(\d+)/(\d+)", file.getvalue())[-1]
    assert done == total
    assert int(total) > 3 * len(labels)


def test_the_preflight_shows_a_bar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, width=80, force_terminal=True, color_system=None))

    class Speaker:
        def generate(
            self, prompts: Sequence[Messages], *, n: int, on_progress: Callable[[int], None], **_: Any
        ) -> list[list[Reply]]:
            on_progress(n * len(prompts))
            return [[Reply("a" * i) for i in range(n)] for _ in prompts]

    scorer = Scorer({"long": lambda replies, examples: [float(len(reply.text)) for reply in replies]}, {"long": 1.0})
    examples = [Example(str(i), "p", "r") for i in range(3)]
    check_rollouts(Speaker(), scorer, examples, system="", n=4, sampling=Sampling(), folder=tmp_path)  # type: ignore[arg-type]
    assert "12/12" in file.getvalue()
