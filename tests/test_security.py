"""What SECURITY.md promises and no other test holds: nothing that comes with a model or a run is executed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from qreason.cli import main
from qreason.data.examples import read_examples
from qreason.errors import DataError, ModelError, RecipeError, RunFolderError
from qreason.machine.hardware import detect
from qreason.model.load import EMBEDDED, load_tokenizer
from qreason.model.resident import Resident
from qreason.recipe.load import load_recipe
from qreason.recipe.sections import Model
from qreason.training.resuming import read_state

ROOT = Path(__file__).parents[1]
TINY = EMBEDDED["qreason/tiny"]


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once foreign code has run."""
    return tmp_path / "ran"


class Attack:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_the_attack_works_on_a_plain_pickle(mark: Path) -> None:
    pickle.loads(pickle.dumps(Attack(mark)))
    assert mark.exists()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "base"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_weights_that_are_a_pickle_run_nothing(base: Path, mark: Path, name: str) -> None:
    (base / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Attack(mark)}, base / name)
    with pytest.raises(ModelError, match="cannot be loaded as a model"):
        Resident(Model(base=str(base)), detect())
    assert not mark.exists()


def test_an_adapter_that_is_a_pickle_runs_nothing(own_resident: Resident, tmp_path: Path, mark: Path) -> None:
    own_resident.new_adapter(Model(base="qreason/tiny").lora)
    folder = tmp_path / "adapter"
    own_resident.model.save_pretrained(str(folder), save_embedding_layers=False)
    own_resident.remove_adapter()
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"weight": Attack(mark)}, folder / "adapter_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights|pickle"):
        own_resident.load_adapter(folder)
    assert not mark.exists()


def test_the_state_of_a_checkpoint_runs_nothing(tmp_path: Path, mark: Path) -> None:
    torch.save({"optimizer": Attack(mark)}, tmp_path / "state.pt")
    with pytest.raises(RunFolderError, match=r"state\.pt: .*; remove"):
        read_state(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("command", ["chat", "evaluate"])
def test_code_that_comes_with_a_model_is_not_run_whatever_is_answered(base: Path, mark: Path, command: str) -> None:
    # transformers asks whether to run it, and took a `y` on stdin for a yes
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text(f"import os; os.mkdir({str(mark)!r})\nfrom transformers import Qwen2Config as C\n")
    task = base.parent / "task.jsonl"
    task.write_text('{"prompt": "a", "reference": "b"}\n')
    more = ["--task", str(task)] if command == "evaluate" else []
    result = CliRunner().invoke(main, [command, str(base), *more], input="y\n" * 9)
    assert result.exit_code == 2, result.output
    assert "contains custom code" in result.stderr
    assert not mark.exists()


def test_a_data_set_with_a_loading_script_runs_nothing(tmp_path: Path, mark: Path) -> None:
    import datasets

    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "own.py").write_text(f"import os; os.mkdir({str(mark)!r})\n")
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):
        datasets.load_dataset(str(tmp_path / "own" / "own.py"))
    assert not mark.exists()


def test_a_pickle_is_no_data_file(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps([Attack(mark)]))
    with pytest.raises(DataError, match=r"\.jsonl"):
        read_examples(tmp_path / "rows.pkl")
    assert not mark.exists()


@pytest.mark.parametrize(
    "expression",
    [
        "().__class__.__base__.__subclasses__()",
        "cycler.__init__.__globals__.os.mkdir(MARK)",
        "messages.append({'role': 'user', 'content': 'x'})",
        "''.format.__self__.__class__.__mro__",
    ],
)
def test_a_chat_template_cannot_leave_its_sandbox(base: Path, mark: Path, expression: str) -> None:
    template = (TINY / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text(
        "{% set found = " + expression.replace("MARK", repr(str(mark))) + " %}{{ found }}" + template
    )
    with pytest.raises(ModelError, match="its chat template fails"):
        load_tokenizer(str(base))
    assert not mark.exists()


def test_a_recipe_builds_no_objects_of_python(workplace: Path, mark: Path) -> None:
    (workplace / "odd.yaml").write_text(f"name: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(RecipeError):
        load_recipe("odd.yaml")
    assert not mark.exists()


@pytest.mark.parametrize(
    "pattern",
    [
        r"trust_remote_code=(?!False)",
        r"\b(?:c?[Pp]ickle|dill|joblib|shelve)\.(?:load|loads|open)\b|allow_pickle=True",
        r"torch\.load\((?![^\n]*weights_only=True)",
        r"shell=True|os\.system\(",
        r"(?<![\w.])(?:eval|exec)\(",
        r"Auto\w+\.from_pretrained\((?![^\n]*(?:\n[^\n]*)?trust_remote_code=False)",
    ],
)
def test_the_package_has_no_other_way_to_run_what_it_reads(pattern: str) -> None:
    files = (ROOT / "qreason").rglob("*.py")
    assert [file for file in files if re.search(pattern, file.read_text("utf-8"))] == []


TEST = re.compile(r"`tests/((?:slow/)?\w+\.py)::(test_\w+)`")


def is_there(file: str, function: str) -> bool:
    place = ROOT / "tests" / file
    return place.is_file() and f"def {function}(" in place.read_text("utf-8")


@pytest.mark.parametrize("document", ["SECURITY.md", "docs/faults.md"])
def test_every_test_that_a_document_names_exists(document: str) -> None:
    named = TEST.findall((ROOT / document).read_text("utf-8"))
    assert len(named) > 25
    assert [name for name in named if not is_there(*name)] == []


def test_every_fault_names_its_test() -> None:
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text("utf-8").split("\n") if line.startswith("| ")]
    faults = [row for row in rows if not row.endswith("| test |")]
    assert len(faults) >= 40
    assert [row for row in faults if not TEST.search(row.split("|")[-2])] == []
