"""recipes/colab.ipynb, top to bottom, on the embedded base."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def prepared(notebook: Any) -> Any:
    """Without what only Colab has; a command that fails stops it, which `!` alone does not."""
    notebook.cells = [cell for cell in notebook.cells if "colab" not in cell.metadata.get("tags", ())]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            checked = [[line, "assert _exit_code == 0"] if line.startswith("!") else [line] for line in lines]
            cell.source = "\n".join(line for pair in checked for line in pair)
    return notebook


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    file = ROOT / "recipes" / "colab.ipynb"
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    command = tmp_path / "bin" / "qreason"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m qreason "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("QREASON_RECIPE", "recipes/smoke.yaml")
    monkeypatch.setenv("QREASON_CHANGES", "--set evaluate.reasoning=0 --set sampling.max_completion_length=8")
    monkeypatch.setenv("QREASON_RUN", str(tmp_path / "run"))
    client = nbclient.NotebookClient(prepared(notebook), timeout=1800, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    texts = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in client.nb.cells]
    printed = "\n".join(texts)
    assert "This machine can train." in printed
    assert "README.md" in printed  # of what would be pushed
    assert "license:" in printed  # its card
    assert (tmp_path / "run" / "report.html").is_file()
    assert list((tmp_path / "run").rglob("*.gguf"))
