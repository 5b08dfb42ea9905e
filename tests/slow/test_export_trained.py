"""The quickstart's SFT, its merge and every kind of export, through the real entry point."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qreason.cli import main

pytestmark = pytest.mark.slow
SFT = "{sft: {rows: 560, num_train_epochs: 1, per_device_train_batch_size: 16, learning_rate: 2e-3}}"
EXPORT = "{export: {gguf: [f32, f16, q8_0, q4_k_m], ollama: true, rows: 100}}"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "quickstart"
    result = call("run", "quickstart", "--out", str(folder), "--set", f"steps=[{SFT}, merge, {EXPORT}]")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def figures(finished: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(file, check) -> its figures."""
    checks = json.loads((finished / "03-export" / "export.json").read_text())["checks"]
    return {(check["file"], check["name"]): check["figures"] for check in checks}


def test_a_trained_model_comes_out_as_it_was_trained(figures: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert figures["merged", "same as the adapter"]["kl"] <= 1e-4
    assert figures["quickstart-f32.gguf", "logits as in transformers"]["kl"] <= 1e-9
    for kind in ("f32", "f16"):
        assert figures[f"quickstart-{kind}.gguf", "tokenization"]["different"] == 0
        assert figures[f"quickstart-{kind}.gguf", "chat template"]["different"] == 0
        assert figures[f"quickstart-{kind}.gguf", "greedy replies"]["lead where not"] <= 0.005
    for kind in ("q8_0", "q4_k_m"):
        assert figures[f"quickstart-{kind}.gguf", "as its own weights"]["kl"] <= 1e-3


def test_no_file_answers_much_worse_than_the_adapter(finished: Path) -> None:
    accuracy = json.loads((finished / "03-export" / "export.json").read_text())["accuracy"]
    assert set(accuracy) == {"adapter", "merged", "f32", "f16", "q8_0", "q4_k_m"}
    assert accuracy["adapter"] > 0.2
    for name in ("merged", "f32", "f16"):
        assert accuracy[name] == pytest.approx(accuracy["adapter"], abs=0.02)
    for name in ("q8_0", "q4_k_m"):
        assert accuracy[name] >= accuracy["adapter"] - 0.1


def test_a_run_without_a_merge_is_merged_first_and_only_once(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["steps"] = manifest["steps"][:1]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for _ in range(2):
        result = call("export", str(folder), "--gguf", "q4_k_m", "--rows", "10")
        assert result.exit_code == 0, result.output
    assert (folder / "merged-float16" / "model" / "config.json").is_file()
    report = json.loads((folder / "export" / "export.json").read_text())
    assert report["verified"]
    assert set(report["files"]) == {"q4_k_m", "adapter"}
