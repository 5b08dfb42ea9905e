"""Shared fixtures: a small recipe with its data in a folder of its own."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from qreason.machine.hardware import collect_less

collect_less()
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes would import torch's compiler: seconds a process

if TYPE_CHECKING:
    from qreason.model.resident import Resident
    from qreason.types import Example, Reply

SMALL = """\
name: small
model: {base: qreason/tiny}
data:
  sft: sft.jsonl
  prompts: prompts.jsonl
  heldout: heldout.jsonl
rewards: {correctness: 0.1, format: 0.1}
sampling: {temperature: 0.9, max_completion_length: 12}
steps:
  - evaluate
  - sft: {learning_rate: 1e-5}
  - evaluate
  - grpo: {num_generations: 4}
  - merge
"""

RecipeWriter = Callable[..., Path]


def jsonl(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def load_script(name: str) -> ModuleType:
    """A file of scripts/ without an ending, as a module; nothing is written beside it."""
    folder = str(Path(__file__).parents[1] / "scripts")
    if folder not in sys.path:  # as where the script itself is started
        sys.path.insert(0, folder)
    loader = SourceFileLoader(name, f"{folder}/{name}")
    spec = spec_from_loader(loader.name, loader)
    assert spec
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
    return module


@cache
def leave_out_libraries() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def short_collections() -> None:
    """The objects of the large libraries are left out of garbage collections, which trainers ask for often."""
    if "trl.trainer.base_trainer" in sys.modules:
        leave_out_libraries()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with the data of the small recipe."""
    monkeypatch.chdir(tmp_path)
    row = {"issue": "printer is offline", "resolution": "Restart the spooler."}
    (tmp_path / "sft.jsonl").write_text(jsonl([{"id": f"s{i}", **row, "steps": "Looked."} for i in range(3)]))
    (tmp_path / "prompts.jsonl").write_text(jsonl([{"id": f"p{i}", **row} for i in range(4)]))
    (tmp_path / "heldout.jsonl").write_text(jsonl([{"id": f"h{i}", **row} for i in range(2)]))
    return tmp_path


@pytest.fixture
def write_recipe(workplace: Path) -> RecipeWriter:
    """Writes small.yaml, with (old, new) replacements in its text; returns the file."""

    def write(*replacements: tuple[str, str], name: str = "small.yaml") -> Path:
        text = SMALL
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        (workplace / name).write_text(text)
        return workplace / name

    return write


def evaluated_row(number: int, reply: str = "no", accurate: bool | None = False, **others: object) -> dict[str, object]:
    """A line of evaluation.jsonl."""
    asked = {"id": f"h{number}", "prompt": f"issue {number}", "reference": "Restart the spooler.", "split": None}
    marks = {"accurate": accurate, "pass_at_1": float(bool(accurate)), "total": 0.2 if accurate else 0.1}
    shape = {"parts": {"correctness": 1.0, "format": None}, "well_formed": True, "words": 3, "finished": True}
    return {**asked, "reply": reply, **marks, **shape, "answer_anywhere": True, **others}


RunWriter = Callable[..., Path]


@pytest.fixture
def write_run(write_recipe: RecipeWriter) -> RunWriter:
    """Writes a finished run of base, SFT and GRPO that was never trained, with these rows of its three passes."""

    def write(out: str, passes: list[list[dict[str, object]]], *overrides: str, steps: int = 3) -> Path:
        from qreason.recipe.load import load_recipe
        from qreason.run.session import Session

        recipe = load_recipe(write_recipe(("  - merge\n", "  - evaluate\n")), overrides)
        run = Session.open(recipe, Path(out), say=lambda line: None)
        for place, name in enumerate(run.disk.stage_names):
            (run.folder / name).mkdir(exist_ok=True)
            run.disk.finish_step(place, 1.0)
        for folder, rows in zip(run.disk.evaluations(), passes, strict=True):
            (folder / "evaluation.jsonl").write_text(jsonl(rows))
        reward = {"rewards/format/mean": 0.5, "rewards/format/std": 0.1, "reward_std": 0.1, "learning_rate": 1e-5}
        logged = [{"step": step, "reward": 0.3 + step / steps / 2, **reward} for step in range(1, steps + 1)]
        (run.folder / "02-grpo" / "metrics.jsonl").write_text(jsonl(logged))
        assert run.disk.lock
        run.disk.lock.release(force=True)
        return run.folder

    return write


@pytest.fixture(scope="session")
def resident() -> Resident:
    """The embedded base, shared by all tests that only read it."""
    return load_resident()


@pytest.fixture
def own_resident() -> Resident:
    """The embedded base, for a test that puts adapters on it."""
    return load_resident()


def load_resident() -> Resident:
    from qreason.machine.hardware import detect
    from qreason.model.resident import Resident
    from qreason.recipe.sections import Model

    return Resident(Model(base="qreason/tiny"), detect())


def give_weights(resident: Resident, std: float) -> None:
    """Random weights for the fresh adapter on a base, so that it changes what the base says."""
    import torch

    for name, parameter in resident.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


def gold_replies() -> tuple[list[Reply], list[Example]]:
    """What SFT teaches for each row of the helpdesk data, and the rows."""
    from qreason.data.prompts import demonstrate
    from qreason.types import Example, Reply

    file = Path(__file__).parents[1] / "data" / "helpdesk" / "sft.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    examples = [Example(row["id"], row["issue"], row["resolution"], reasoning=row["steps"]) for row in rows]
    return [Reply(demonstrate(example)) for example in examples], examples
