"""A run folder -> report.html: one file without network access, made from the files of the run."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from qreason.machine.files import read_json, read_jsonl, write_text
from qreason.machine.hardware import GIB
from qreason.machine.records import Log
from qreason.report.build import read_pass
from qreason.report.curves import POINTS, draw_calibration, draw_passes, draw_stage, need_charts
from qreason.report.headline import headline, remarks
from qreason.report.reasoning import verdict
from qreason.report.records import Calibrated, Raised
from qreason.report.replies import sample_rollouts, side_by_side
from qreason.report.table import JUDGE, REASONING, judge_figure
from qreason.run.folder import RunFolder
from qreason.run.lineage import lineage
from qreason.run.session import Session

PAGE = "report.html"
HERE = Path(__file__).parent


def write_page(run: Session, report: dict[str, Any]) -> Path:
    """Write report.html of a run whose figures are in `report`; MissingExtra without the extra `report`."""
    need_charts()
    file = run.folder / PAGE
    write_text(file, render(run, report))
    return file


def render(run: Session, report: dict[str, Any]) -> str:
    """The page. Jinja escapes whatever it is given; only our own style, our script and drawn charts are Markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["signs"] = signs
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    passes, disk = report["passes"], run.disk
    names = [one["after"] for one in passes]
    page = environment.get_template("page.html.j2").render(
        report=report,
        headline=headline(report),
        remarks=list(remarks(report)),
        names=names,
        chart=draw_passes(passes),
        splits=sorted({split for one in passes for split in one["splits"]}),
        columns=REASONING,
        sentences=[(one["after"], verdict(one["reasoning"])) for one in passes],
        stages=[read_stage(folder) for folder in training_folders(disk)],
        judges=[(file.parent.name, read_judge(file)) for file in sorted(run.folder.glob("*/judge.json"))],
        memory=read_memory(disk),
        shown=side_by_side(names, [read_pass(folder) for folder in disk.evaluations()]),
        nodes=lineage(run),
        manifest=disk.manifest,
        recipe=(run.folder / "recipe.yaml").read_text(encoding="utf-8"),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        drawn=Markup,
    )
    return page.encode("utf-8", "replace").decode("utf-8")


def signs(text: str) -> str:
    """A text with minus signs in place of hyphens, and no line break before a percent sign."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text).replace(" %", "\u00a0%")


def training_folders(run: RunFolder) -> list[Path]:
    """The folders of finished steps that logged metrics, each once."""
    folders = dict.fromkeys(run.path / entry["folder"] for entry in run.manifest["steps"])
    return [folder for folder in folders if (folder / "metrics.jsonl").is_file()]


def read_stage(folder: Path) -> dict[str, Any]:
    """The curves of a training stage, its alarms, and a few of its rollouts."""
    logged = read_jsonl(folder / "metrics.jsonl", Log)
    alarms = read_jsonl(file, Raised) if (file := folder / "alarms.jsonl").is_file() else []
    rollouts, count = sample_rollouts(file) if (file := folder / "replies.jsonl").is_file() else ([], 0)
    return {
        "name": folder.name,
        "steps": max((row["step"] for row in logged), default=0),
        "logged": len(logged),
        "charts": draw_stage(logged, [alarm["step"] for alarm in alarms]),
        "averaged": -(-len(logged) // POINTS),
        "alarms": alarms,
        "rollouts": rollouts,
        "replies": count,
    }


def read_judge(file: Path) -> dict[str, Any]:
    judge: dict[str, Any] = read_json(file, Calibrated)
    known = [row for row in judge.get("calibration_curve", []) if None not in (row["verdict"], row["right"])]
    figures = [(what, judge_figure(judge, key)) for what, key in JUDGE.items() if judge.get(key) is not None]
    return judge | {"chart": draw_calibration(known) if known else "", "figures": figures}


def read_memory(run: RunFolder) -> list[dict[str, Any]]:
    """GiB of each step, planned and reached; None where one of them is not known."""
    memory = run.manifest.get("memory", {})
    columns = {name: memory.get(f"{name}_bytes", {}) for name in ("planned", "peak")}
    return [
        {"folder": entry["folder"], "stage": entry["stage"]}
        | {name: column[step] / GIB if step in column else None for name, column in columns.items()}
        for entry in run.manifest["steps"]
        if any((step := str(entry["step"])) in column for column in columns.values())
    ]
