"""scripts/bench_gpu.py: what it runs in which order, what its tables and bars say, and a real measurement."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import bench_contenders
import bench_gpu
from bench_tables import CONTENDERS, ENOUGH, TIGHT, Setting, bars, collect, document

from qreason.machine.hardware import GIB

GRPO = Setting("qreason plain", "1.5b", "grpo", 4)
SMALL = Setting("qreason plain", "qreason/tiny", "grpo", 2, tokens=8, quantization="none")


def result(setting: Setting, *, step: float = 4.0, rewards: float = 0.5, turn: int = 0, **more: Any) -> dict[str, Any]:
    """A measured row: two steps, half of the rest rollouts, and a peak of 2 GiB that was planned as such."""
    rest = (step - rewards) / 2
    return {
        "setting": asdict(setting),
        "round": turn,
        "outcome": "measured",
        "steps": [{"rollout": rest, "rewards": rewards, "training": rest}] * 2,
        "tokens": [1024.0] * 2,
        "peak_bytes": {"load": GIB, "training": 2 * GIB},
        "reserved_bytes": 2 * GIB,
        "context_bytes": GIB // 2,
        "plan": {"load": {"allocated": GIB, "all": GIB}, "backward": {"allocated": 2 * GIB, "all": 3 * GIB}},
        **more,
    }


def verdict(rows: list[dict[str, Any]], words: str) -> bool | None:
    (met,) = {met for what, _, met in bars(rows) if words in what}
    return met


# --- bars ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "met"), [(3.9, True), (4.0, True), (4.1, False)])
def test_a_step_must_be_no_slower_than_stock_trl(own: float, met: bool) -> None:
    rows = [result(GRPO, step=own), result(replace(GRPO, contender="TRL"), step=4.0)]
    assert verdict(rows, "than TRL's") is met


@pytest.mark.parametrize(("own", "met"), [(3.4, True), (3.6, False)])
def test_a_step_must_beat_stock_unsloth_by_what_its_judge_takes_longer(own: float, met: bool) -> None:
    ours, stock = replace(GRPO, contender="qreason unsloth"), replace(GRPO, contender="Unsloth")
    assert verdict([result(ours, step=own, rewards=0.1), result(stock, step=4.0, rewards=0.6)], "than Unsloth's") is met


@pytest.mark.parametrize("count", [ENOUGH - 1, ENOUGH])
def test_a_plan_must_be_close_in_enough_settings(count: int) -> None:
    close = [
        result(replace(GRPO, rows=n), plan={"backward": {"allocated": 2.1 * GIB, "all": GIB}}) for n in range(count)
    ]
    far = result(replace(GRPO, rows=100), plan={"backward": {"allocated": 2.3 * GIB, "all": GIB}})
    assert verdict([*close, far], "plan's peak") is (count == ENOUGH)


@pytest.mark.parametrize(
    ("more", "met"),
    [
        ({}, True),
        ({"reserved_bytes": 4.6 * GIB}, False),  # with the context it holds more than the 5 GiB
        ({"outcome": "out of memory", "why": ""}, False),
        ({"peak_bytes": {}}, None),  # as on a CPU
    ],
)
def test_a_cap_holds_for_torch_and_the_context_together(more: dict[str, Any], met: bool | None) -> None:
    assert verdict([result(replace(GRPO, cap=TIGHT["1.5b"]), **more)], "1.5b nf4, with the judge") is met


def test_what_was_not_measured_is_not_met() -> None:
    assert {met for _, _, met in bars([])} == {None}


# --- tables --------------------------------------------------------------------------------------


def test_times_are_medians_over_the_steps_of_all_rounds() -> None:
    rows = [result(GRPO, step=step, turn=turn) for turn, step in enumerate((3.0, 4.0, 50.0))]
    found = collect(rows)[GRPO]
    assert (found.step, found.rounds) == (4.0, 3)
    assert found.tokens_per_second == pytest.approx(6 * 1024 / (2 * 57.0))


def test_the_document_names_machine_command_and_everything_that_is_missing() -> None:
    machine = {"name": "A card", "memory_bytes": 24 * GIB, "versions": {"torch": "2.13.0"}}
    trl = replace(GRPO, contender="TRL")
    rows = [
        result(GRPO, machine=machine),
        result(trl),
        result(replace(GRPO, cap=6.0), changes=["per_device_train_batch_size=2"]),
        {"setting": asdict(replace(trl, cap=6.0)), "round": 0, "outcome": "out of memory", "why": "tried 2 GiB"},
    ]
    text = document(
        rows, {"Unsloth": "Unsloth is not installed"}, [replace(GRPO, rows=8)], "python bench.py --rounds 1"
    )
    assert "A card, 24.00 GiB; torch 2.13.0" in text
    assert "python bench.py --rounds 1" in text
    assert f"| {GRPO.task} | TRL | out of memory |" in text
    assert f"- {replace(GRPO, cap=6.0).name}: per_device_train_batch_size=2" in text
    assert f"| {GRPO.name} | 2.00 | 2.00 | +0.0% |" in text
    for line in (
        "- Unsloth: Unsloth is not installed",
        f"- {replace(trl, cap=6.0).name}: tried 2 GiB",
        f"- {replace(GRPO, rows=8).name}: not run",
    ):
        assert line in text


# --- order, budget, resuming ---------------------------------------------------------------------


def test_the_bars_come_first_contenders_take_turns_and_nothing_is_left_out() -> None:
    order = bench_gpu.arrange(["1.5b", "0.5b"], tokens=256, rounds=2)
    assert len(order) == len(set(order))
    assert [setting.cap for setting, _ in order[:2]] == [5.0, 3.0]
    turns = [(setting.contender, turn) for setting, turn in order[2:10]]
    assert turns == [(one, 0) for one in CONTENDERS] + [(one, 1) for one in reversed(CONTENDERS)]
    settings = {setting for setting, _ in order}
    for contender in CONTENDERS:
        for base in ("0.5b", "1.5b"):
            for stage, rows in (("sft", 2), ("grpo", 4), ("grpo", 8)):
                for cap in (None, 4.0, 6.0, 8.0, 12.0, 16.0):
                    assert Setting(contender, base, stage, rows, cap=cap) in settings
    assert sum(one.contender == "qreason plain" and not one.cap for one in settings) >= ENOUGH


def test_a_quick_look_meets_every_contender_and_number_format_in_few_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [setting for setting, _ in bench_gpu.arrange_quick(["1.5b", "0.5b"], tokens=256)]
    assert len(order) == len(set(order)) == 24
    for stage in ("sft", "grpo"):
        for base in ("1.5b", "0.5b"):
            met = {(one.contender, one.quantization) for one in order if (one.stage, one.base) == (stage, base)}
            assert met == {(one, "nf4") for one in CONTENDERS} | {("qreason plain", "none"), ("TRL", "none")}
    given: list[Any] = []

    def run_one(*setting: Any, steps: Any = None) -> dict[str, Any]:
        given.append(steps)
        return result(SMALL)

    monkeypatch.setattr(bench_gpu, "run_one", run_one)
    for quick in (True, False):
        args = argparse.Namespace(**vars(budget()) | {"quick": quick})
        bench_gpu.measure_all([(SMALL, 0)], tmp_path / f"{quick}.jsonl", args)
    assert given == [bench_gpu.QUICK, None]
    assert bench_gpu.QUICK.keys() == bench_contenders.STEPS.keys()


@pytest.mark.parametrize(("cap", "room"), [(16.0, False), (12.0, True), (None, True)])
def test_a_cap_above_the_cards_memory_is_left_out(cap: float | None, room: bool) -> None:
    """The largest caps used to end the script on every card under 16 GB."""
    assert bench_gpu.has_room(replace(GRPO, cap=cap), int(14.7 * GIB)) is room
    assert bench_gpu.has_room(replace(GRPO, cap=cap), None)
    assert bench_contenders.share(16 * GIB, int(14.7 * GIB)) == 1.0
    assert bench_contenders.share(-GIB, int(14.7 * GIB)) == 0.0


def budget(minutes: float = 60.0) -> argparse.Namespace:
    return argparse.Namespace(minutes=minutes, limit=60.0, device="cpu", models=Path("unused"), quick=False)


def test_a_run_that_was_cut_off_goes_on_and_tries_failures_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, ran = tmp_path / "results.jsonl", []

    def run_one(setting: Setting, base: str, device: str, limit: float) -> dict[str, Any]:
        ran.append(setting.rows)
        more = {"outcome": "failed", "why": "died"} if setting.rows == 4 and ran.count(4) == 1 else {}
        return result(setting) | more

    monkeypatch.setattr(bench_gpu, "run_one", run_one)
    order = [(replace(SMALL, rows=rows), 0) for rows in (2, 4, 6)]
    bench_gpu.measure_all(order, file, budget(minutes=0))
    assert ran == []
    bench_gpu.measure_all(order[:2], file, budget())
    bench_gpu.measure_all(order, file, budget())
    assert ran == [2, 4, 4, 6]
    assert [row["outcome"] for row in bench_gpu.read_rows(file)] == ["measured"] * 3


def test_results_of_two_machines_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = iter(("one card", "another card"))
    monkeypatch.setattr(bench_gpu, "run_one", lambda setting, *args: result(setting, machine={"name": next(cards)}))
    with pytest.raises(SystemExit, match="another machine"):
        bench_gpu.measure_all([(SMALL, 0), (replace(SMALL, rows=4), 0)], tmp_path / "results.jsonl", budget())


def test_a_process_that_hangs_is_a_failure() -> None:
    assert bench_gpu.run_one(SMALL, "qreason/tiny", "cpu", limit=0.01)["outcome"] == "failed"


def test_contenders_that_cannot_run_are_named_with_the_reason() -> None:
    assert bench_gpu.hindrances("cpu") == {
        "qreason unsloth": "Unsloth's kernels need a GPU",
        "Unsloth": "Unsloth's kernels need a GPU",
    }


# --- real measurements ---------------------------------------------------------------------------


@pytest.fixture
def unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement patches trl and the judge's reward for good; here they come back."""
    import trl

    judged = importlib.import_module("qreason.rewards.judged")
    monkeypatch.setattr(bench_contenders, "STEPS", {"sft": 1, "grpo": 1})
    for module, name in ((trl, "SFTTrainer"), (trl, "GRPOTrainer"), (judged, "read_answer")):
        monkeypatch.setattr(module, name, getattr(module, name))


@pytest.mark.usefixtures("unpatched")
@pytest.mark.parametrize("contender", ["TRL", pytest.param("qreason plain", marks=pytest.mark.slow)])
def test_every_phase_is_timed_and_every_reply_is_judged(contender: str, tmp_path: Path) -> None:
    row = bench_contenders.measure(replace(SMALL, contender=contender), "qreason/tiny", tmp_path)
    assert row["outcome"] == "measured"
    (step,) = row["steps"]
    assert set(step) == {"rollout", "rewards", "training"}
    assert min(step.values()) > 0
    assert row["judgements"] == 2 * SMALL.rows  # two steps, the first of which is not counted
    assert 0 < row["tokens"][0] <= SMALL.rows * SMALL.tokens
    assert json.loads(json.dumps(row)) == row
    if contender == "qreason plain":  # the run's own metrics say the same
        logged = json.loads((tmp_path / "run" / "01-grpo" / "metrics.jsonl").read_text().splitlines()[1])
        for phase in ("rollout", "rewards"):
            assert 0.5 * step[phase] < logged[f"seconds/{phase}"] <= step[phase]
        assert set(row["plan"]) == {"load", "rollout", "judge", "backward"}


@pytest.mark.usefixtures("unpatched")
def test_a_cap_that_nothing_fits_into_is_a_result(tmp_path: Path) -> None:
    row = bench_contenders.measure(replace(SMALL, cap=0.1), "qreason/tiny", tmp_path)
    assert row["outcome"] == "does not fit"
    assert "0.1 GiB" in row["why"]


@pytest.mark.slow
def test_training_rows_are_the_longest_there_are(tmp_path: Path) -> None:
    from qreason.planning.memory import read_lengths
    from qreason.recipe.load import load_recipe

    chosen = read_lengths(bench_contenders.write_recipe(SMALL, "qreason/tiny", tmp_path))
    whole = load_recipe(
        "helpdesk", ["model.base=qreason/tiny", "data.heldout=null", "data.labels=null", "steps=[grpo]"]
    )
    assert chosen.prompt == read_lengths(whole).prompt
