"""Export: the merged model as GGUF files and a Modelfile, each of them run and compared before it gets its name."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from qreason.errors import RunFolderError
from qreason.export.engine import need_engine
from qreason.export.exporter import PART, REPORT, Exporter
from qreason.machine.files import read_json, write_json
from qreason.machine.records import Origin
from qreason.recipe.settings import Export
from qreason.run.listing import WORK
from qreason.run.lock import alone
from qreason.run.session import Artifact, Session


def stage(settings: Export, run: Session) -> Artifact:
    """The newest merge of the run as GGUF files in the step's folder."""
    merged = find_merged(run)  # before the folder is cleared
    folder = run.stage_folder()
    if (folder / PART).is_file() or (folder / REPORT).is_file():
        run.say(f"{folder.name} was not finished: continuing with what is left")
    else:
        run.clear_stage_folder()
    return export_into(folder, merged, settings, run)


def find_merged(run: Session) -> Path:
    """The merged model of the newest adapter, by a merge step or by `qreason merge`; RunFolderError without one."""
    for entry in reversed(run.disk.manifest["steps"]):
        folder = run.folder / str(entry["folder"])
        if entry["stage"] == "merge" and (folder / "model" / "config.json").is_file():
            return folder / "model"
        if (folder / "adapter").exists():
            for file in sorted(run.folder.glob("merged-*/merge.json")):
                cure = f"remove {file.parent}, then `qreason merge {run.folder}`"
                made_of = read_json(file, Origin, cure)
                if (made_of["base"], made_of["adapters"]) == ("trained", [f"{folder.name}/adapter"]):
                    return file.parent / "model"
            break
    raise RunFolderError(f"{run.folder}: no merged model of the newest adapter; put a merge step before the export")


def export_into(folder: Path, merged: Path, settings: Export, run: Session) -> Artifact:
    """All files of an export in a folder; ExportError for the first one that fails a check, which stays a draft."""
    need_engine()
    with alone(folder):
        for leftover in folder.glob(f"{WORK}*"):  # of an export that was cut off
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=WORK, dir=folder) as work:
            exporter = Exporter(folder, Path(work), merged, settings, run)
            try:
                exporter.make_all()
            finally:
                if exporter.finished or exporter.results.checks:
                    write_json(folder / REPORT, exporter.report())
        (folder / PART).unlink(missing_ok=True)
    return Artifact(folder, exporter.summary)
