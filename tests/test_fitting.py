"""Before a run: what the GPU's memory and the disk hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import RecipeWriter

from qreason.cli import main
from qreason.machine.hardware import GIB
from qreason.machine.rows import take_peak_memory
from qreason.planning.fit import fit, plan
from qreason.planning.shapes import Card, Lengths, read_shape
from qreason.recipe.schema import Recipe


def run(file: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["run", str(file), *arguments])


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> object:
    """Puts a GPU of so many GiB into the machine, as far as the plan is concerned."""

    def put(gib: float) -> None:
        monkeypatch.setattr("qreason.planning.memory.find_card", lambda: Card("a small card", int(gib * GIB), (7, 5)))

    return put


@pytest.fixture
def training(write_recipe: RecipeWriter) -> Path:
    """One SFT step of four rows at a time."""
    file = write_recipe()
    kept = file.read_text().partition("steps:")[0]
    file.write_text(kept + "steps:\n  - sft: {per_device_train_batch_size: 4, max_steps: 1}\n")
    return file


def test_a_run_is_cut_down_to_the_card_says_so_and_continues(training: Path, card) -> None:  # type: ignore[no-untyped-def]
    card(100)
    roomy = run(training, "--out", "roomy")
    assert "GiB on a small card at the peak, the backward phase of the sft step" in roomy.output
    assert "micro" not in roomy.output
    needed = float(roomy.output.partition("memory: ")[2].partition(" GiB")[0])
    recorded = json.loads(Path("roomy/manifest.json").read_text())["memory"]
    assert recorded["planned_bytes"]["0"] / GIB == pytest.approx(needed, abs=0.01)
    card(needed - 0.01)
    small = run(training, "--out", "small")
    assert small.exit_code == 0, small.output
    assert "sft.per_device_train_batch_size=" in small.output
    asked = yaml.safe_load(Path("small/recipe.yaml").read_text())
    assert asked["steps"][0]["sft"]["per_device_train_batch_size"] == 4
    assert run(training, "--out", "small").exit_code == 0


def test_peak_of_each_step_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if not torch.cuda.is_available():
        assert (take_peak_memory() or 0) > 2**27
    peaks = [5 * GIB]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: peaks[-1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peaks.append(1 * GIB))
    assert [take_peak_memory(), take_peak_memory()] == [5 * GIB, 1 * GIB]


def test_a_run_that_cannot_fit_is_refused_before_the_base_is_loaded(training: Path, card) -> None:  # type: ignore[no-untyped-def]
    card(0.31)
    refused = run(training)
    assert refused.exit_code == 2
    assert "loading" not in refused.output
    assert "take a smaller base, or a card with" in refused.output
    unplanned = run(training, "--set", "fit=none")
    assert unplanned.exit_code == 0, unplanned.output


def test_a_full_disk_is_noticed_before_training(training: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qreason.planning.memory.free_bytes", lambda folder: 1000)
    refused = run(training)
    assert refused.exit_code == 2
    assert "are free there; free some, or take a folder on another disk with --out" in refused.output


@pytest.mark.parametrize("size", [1.0, 1.5, 2.0, 3.0])
def test_what_was_cut_down_fits_and_keeps_the_effective_batch(size: float) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "big",
            "model": {"base": "qreason/tiny"},
            "data": {"prompts": "prompts.jsonl", "heldout": "heldout.jsonl"},
            "rewards": {"correctness": 1},
            "sampling": {"max_completion_length": 256, "max_num_seqs": 512},
            "steps": [{"evaluate": {"rows": 512}}, {"grpo": {"per_device_train_batch_size": 64}}],
        }
    )
    shape, small, lengths = read_shape("qreason/tiny"), Card("a card", int(size * GIB), (7, 5)), Lengths()
    before = plan(recipe, shape, small, lengths)
    cut, lines = fit(recipe, shape, small, lengths)
    assert plan(cut, shape, small, lengths).fits
    assert bool(lines) != before.fits
    grpo = cut.steps[1].grpo
    assert grpo
    assert grpo.per_device_train_batch_size * grpo.gradient_accumulation_steps == 64
    assert cut.sampling.max_completion_length == 256
