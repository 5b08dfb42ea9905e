"""scripts/bench_peer.py: what it makes of its measurements."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
bench_peer = importlib.import_module("bench_peer")
OURS, FLOAT32, BFLOAT16 = bench_peer.OURS, *bench_peer.TRL


def measured(arm: str, turn: int, seconds: float, peak: int = 2**30) -> dict[str, Any]:
    """A row: a slow first step, then two of so many seconds, half of them rollouts."""
    steps = [
        dict.fromkeys(bench_peer.PHASES, 0.0) | {"rollout": part / 2, "backward": part / 2}
        for part in (99, seconds, seconds)
    ]
    return {"arm": arm, "round": turn, "seed": 1, "steps": steps, "tokens": [1, 60, 60], "peak_bytes": peak}


def test_a_step_is_compared_round_by_round_with_the_faster_of_trls_ways() -> None:
    rows = [measured(OURS, turn, own, 2**29) for turn, own in enumerate((2.0, 4.0, 1.0))]
    rows += [measured(FLOAT32, turn, 8.0) for turn in range(3)] + [measured(BFLOAT16, turn, 9.0) for turn in range(3)]
    found = bench_peer.compare_steps(rows)
    assert (found["against"], found["times_faster"], found["share_of_its_memory"]) == (FLOAT32, 4.0, 0.5)
    assert found["times_faster_by_round"] == [4.0, 2.0, 8.0]
    assert found["ways"][OURS]["step_seconds"] == 2.0
    assert found["ways"][OURS]["tokens_per_second"] == 25.7  # 360 in 14 seconds: the first step does not count


def test_the_time_to_quality_is_the_first_that_reaches_the_target() -> None:
    def curve(arm: str, seed: int, *points: tuple[float, float]) -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "curve": [{"seconds": s, "pass_at_1": p} for s, p in points]}

    rows = [curve(OURS, 1, (10, 0.3), (20, 0.5)), curve(FLOAT32, 1, (60, 0.5)), curve(BFLOAT16, 1, (50, 0.4))]
    rows += [curve(OURS, 2, (10, 0.3)), curve(FLOAT32, 2, (60, 0.5)), curve(BFLOAT16, 2, (50, 0.6))]
    found = bench_peer.compare_quality(rows, 0.45)
    assert found["seconds"] == {OURS: [20, None], FLOAT32: [60, 60], BFLOAT16: [None, 50]}
    assert found["times_faster_by_seed"] == {1: 3.0, 2: None}
