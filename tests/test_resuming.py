"""A training stage that is cut off goes on from its newest checkpoint, and ends as if it had not been."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RecipeWriter, jsonl
from safetensors.torch import load_file

from qreason.machine.files import hash_files, write_json
from qreason.recipe.load import load_recipe
from qreason.run.resume import checkpoints, newest_checkpoint, step_of
from qreason.run.session import Session
from qreason.stages import run_step
from qreason.training.resuming import Checkpoints, Terminated
from qreason.training.rollouts import Rollouts
from qreason.training.trainer import Watch

COMMON = "logging_steps: 1, save_steps: 2, max_steps: 7, learning_rate: 1e-3, "
STAGES = {
    "sft": COMMON + "per_device_train_batch_size: 2",
    "sft with sums between logs": COMMON.replace("logging_steps: 1", "logging_steps: 3")
    + "per_device_train_batch_size: 1, gradient_accumulation_steps: 2, trl: {neftune_noise_alpha: 5}",
    "grpo": COMMON + "per_device_train_batch_size: 4, num_generations: 2, preflight: false",
    "grpo with reuse": COMMON.replace("max_steps: 7", "max_steps: 9")
    + "per_device_train_batch_size: 4, num_generations: 2, num_iterations: 2, preflight: false",
    "preference": COMMON + "per_device_train_batch_size: 2, heldout_share: 0.5",
    "distill": COMMON + "per_device_train_batch_size: 2, teacher: {model: qreason/tiny}",
}
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time"}


class Cut(BaseException):
    """The power fails."""


def open_run(write_recipe: RecipeWriter, stage: str, name: str, settings: str | None = None) -> Session:
    kind = stage.split()[0]
    text = f"steps:\n  - {kind}: {{{settings or STAGES[stage]}}}\n"
    recipe = Path(write_recipe(name=f"{name}.yaml")).read_text().split("steps:")[0] + text
    recipe = recipe.replace("{correctness: 0.1, format: 0.1}", "{mine:letters: 1.0}")
    recipe = recipe.replace("heldout:", "pairs: pairs.jsonl\n  heldout:") if kind == "preference" else recipe
    pairs = [
        {"id": f"r{i}", "about": "resolution", "prompt": f"p {i}", "chosen": "a b", "rejected": f"c {i}"}
        for i in range(12)
    ]
    own = "def letters(replies, examples):\n    return [len(set(reply.text)) / 40 for reply in replies]\n"
    Path("mine.py").write_text(own)  # tells any two replies apart
    Path("pairs.jsonl").write_text(jsonl(pairs))
    Path(f"{name}.yaml").write_text(recipe.replace("name: small", f"name: {name}"))
    said: list[str] = []
    run = Session.open(load_recipe(f"{name}.yaml"), Path("runs") / name, say=said.append)
    run.said = said  # type: ignore[attr-defined]
    return run


def finish(run: Session) -> Path:
    run_step(run, 0)
    return run.stage_folder()


def records(folder: Path) -> dict[str, Any]:
    """What a stage wrote, without times; the bytes of its weights."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [
                {key: value for key, value in row.items() if key not in TIMES and not key.startswith("seconds")}
                for row in rows
            ]
        elif file.suffix == ".safetensors":
            found[name] = file.read_bytes()
    return found


@pytest.fixture
def cut_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Sets the step at whose log everything ends, with no time to save."""
    on_log = Watch.on_log
    place: dict[str, int] = {}

    def log(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        on_log(self, args, state, control, logs, **kwargs)
        if state.global_step == place.get("step"):
            raise Cut

    monkeypatch.setattr(Watch, "on_log", log)

    def set_step(step: int | None) -> None:
        place.clear()
        if step:
            place["step"] = step

    return set_step


QUICK = ("sft",)


@pytest.mark.parametrize(
    "stage", [*QUICK, *(pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES if stage not in QUICK)]
)
def test_a_stage_that_was_cut_off_ends_as_if_it_had_not_been(
    write_recipe: RecipeWriter, cut_at: Any, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = records(finish(open_run(write_recipe, stage, "whole")))
    monkeypatch.setattr(Checkpoints, "rescue", lambda self, trainer: None)
    for step in (3, 6):
        run = open_run(write_recipe, stage, "cut")
        cut_at(step)
        with pytest.raises(Cut):
            finish(run)
        assert newest_checkpoint(run.stage_folder()) is not None
    cut_at(None)
    run = open_run(write_recipe, stage, "cut")
    folder = finish(run)
    assert any("continuing after step" in line for line in run.said)  # type: ignore[attr-defined]
    assert records(folder) == whole
    assert checkpoints(folder) == []
    weights = load_file(next(folder.rglob("adapter_model.safetensors")))
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)


@pytest.mark.parametrize("stage", ["sft", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_stage_that_ends_before_its_adapter_is_written_loses_no_step(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    # Its checkpoints were removed before the adapter was there; and one of the last step trained one step more.
    settings = STAGES[stage].replace("save_steps: 2", "save_steps: 7")
    whole = records(finish(open_run(write_recipe, stage, "whole", settings)))

    def fail(*args: Any) -> Path:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr("qreason.training.trainer.write_adapter", fail)
        with pytest.raises(Cut):
            finish(open_run(write_recipe, stage, "cut", settings))
    run = open_run(write_recipe, stage, "cut", settings)
    found = records(finish(run))
    assert f"01-{stage} was not finished: continuing after step 7" in run.said  # type: ignore[attr-defined]
    assert found.keys() == whole.keys()
    assert found["adapter/adapter_model.safetensors"] == whole["adapter/adapter_model.safetensors"]
    assert checkpoints(run.stage_folder()) == []


@pytest.mark.parametrize(
    "moment", [*(pytest.param(one, marks=pytest.mark.slow) for one in ("make", "score")), "report"]
)
def test_a_signal_stops_at_once_and_keeps_the_last_full_step(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """While replies are made, while they are scored, and within an optimizer step, which is finished first."""
    settings = STAGES["grpo"].replace("save_steps: 2", "save_steps: 100")
    whole = records(finish(open_run(write_recipe, "grpo", "whole", settings)))
    calls: list[int] = []

    def interrupting(method: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            made = method(*args, **kwargs)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return made

        return wrapped

    owner, name = (Watch, "on_log") if moment == "report" else (Rollouts, moment)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupting(getattr(owner, name)))
        run = open_run(write_recipe, "grpo", "cut", settings)
        with pytest.raises(Terminated):
            finish(run)
    (kept,) = checkpoints(run.stage_folder())
    assert step_of(kept) == (4 if moment == "report" else 3)
    assert any(f"step {step_of(kept)} is kept" in line for line in run.said)  # type: ignore[attr-defined]
    assert records(finish(open_run(write_recipe, "grpo", "cut", settings))) == whole


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    for step in (2, 4):
        folder = tmp_path / "resume" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.pt").write_bytes(b"whole")
        write_json(folder / "manifest.json", {"state.pt": hash_files([folder / "state.pt"])})
    assert newest_checkpoint(tmp_path) == tmp_path / "resume" / "step-000004"
    for damage in (b"half", None):
        file = tmp_path / "resume" / "step-000004" / "state.pt"
        file.write_bytes(damage) if damage else file.unlink()
        assert newest_checkpoint(tmp_path) == tmp_path / "resume" / "step-000002"


@pytest.mark.slow
def test_a_step_with_other_settings_starts_again_and_keeps_what_was_there(
    write_recipe: RecipeWriter, cut_at: Any
) -> None:
    cut_at(3)
    with pytest.raises(Cut):
        finish(open_run(write_recipe, "sft", "cut"))
    cut_at(None)
    run = open_run(write_recipe, "sft", "cut", STAGES["sft"].replace("1e-3", "1e-4"))
    finish(run)
    assert checkpoints(run.folder / "01-sft.1")
    assert any("its files are kept in" in line for line in run.said)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_checkpoints_that_were_asked_of_trl_stay(write_recipe: RecipeWriter, cut_at: Any) -> None:
    settings = STAGES["sft"].replace("save_steps: 2", "save_steps: 100, trl: {save_strategy: steps, save_steps: 2}")
    cut_at(5)
    with pytest.raises(Cut):
        finish(open_run(write_recipe, "sft", "cut", settings))
    cut_at(None)
    folder = finish(open_run(write_recipe, "sft", "cut", settings))
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6, 7)]


def test_only_so_many_checkpoints_stay(write_recipe: RecipeWriter, cut_at: Any) -> None:
    cut_at(7)
    run = open_run(write_recipe, "sft", "cut", STAGES["sft"].replace("save_steps: 2", "save_steps: 1, keep: 3"))
    with pytest.raises(Cut):
        finish(run)
    assert [step_of(one) for one in checkpoints(run.stage_folder())] == [4, 5, 6]
