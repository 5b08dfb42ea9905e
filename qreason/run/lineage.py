"""Where each checkpoint and data set of a run comes from: lineage.json, and a tree for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text
from rich.tree import Tree

from qreason.machine.files import read_json, write_json
from qreason.machine.records import Compared, Figures, Sampled
from qreason.recipe.schema import Step
from qreason.recipe.stage import BASE, NEWEST, Start
from qreason.run.session import Session

Node = dict[str, Any]
"""`name`, `stage`, `from` (the checkpoint it started from), `data`, `numbers`."""


def lineage(run: Session) -> list[Node]:
    """The base, then every finished step except evaluations, each with its sources and figures."""
    base = {"name": BASE, "stage": None, "from": None, "data": [run.recipe.model.base]}
    nodes: list[Node] = [base | {"numbers": figures(run.folder / BASE)}]
    newest, sampled = BASE, ""
    for entry in run.disk.manifest["steps"]:
        step, name = run.recipe.steps[entry["step"]], entry["folder"]
        if step.stage == "evaluate":
            continue
        start = step.settings.start if isinstance(step.settings, Start) else NEWEST
        nodes.append(
            {
                "name": name,
                "stage": step.stage,
                "from": newest if start == NEWEST else start,
                "data": data_of(step, run, sampled),
                "numbers": {"seconds": entry["seconds"]} | figures(run.folder / name),
            }
        )
        if (run.folder / name / "adapter").exists():
            newest = name
        if step.sample:
            sampled = name
    return nodes


def data_of(step: Step, run: Session, sampled: str) -> list[str]:
    """The data a step read: files, Hub ids, or the folder of the sample step."""
    settings = step.settings
    own = [sampled] if settings.reads_sampled else []
    own += [run.recipe.data.all_sources[key] for key in settings.reads() if key != "heldout"]
    return own + ([settings.origin] if settings.origin else [])


def figures(folder: Path) -> dict[str, float]:
    """The figures in a stage's folder: of an evaluation, a sample step or a preference model."""
    found: dict[str, float] = {}
    if (file := folder / "evaluation.json").is_file():
        report = read_json(file, Figures)
        found |= {key: report[key]["mean"] for key in Figures.__annotations__}
    if (file := folder / "sample.json").is_file():
        sample = read_json(file, Sampled)
        found |= {key: sample[key] for key in Sampled.__annotations__}
    if (file := folder / "preference.json").is_file():
        found["heldout_accuracy"] = read_json(file, Compared)["accuracy"]["mean"]
    return found


def write_lineage(run: Session) -> None:
    write_json(run.folder / "lineage.json", {"recipe": run.recipe.name, "nodes": lineage(run)})


def lineage_tree(nodes: list[Node]) -> Tree:
    """Each node below the checkpoint it started from."""
    branches = {BASE: Tree(describe(nodes[0]))}
    for node in nodes[1:]:
        branches[node["name"]] = branches[node["from"]].add(describe(node))
    return branches[BASE]


def describe(node: Node) -> Text:
    """One line: name, data, figures."""
    numbers = node["numbers"]
    titles = {"accuracy": "accuracy", "pass_at_1": "pass@1"}
    described = [f"{title} {numbers[key]:.1%}" for key, title in titles.items() if numbers.get(key) is not None]
    if "kept" in numbers:
        described.append(f"kept {numbers['kept']} of {numbers['replies']}")
    if "heldout_accuracy" in numbers:
        described.append(f"right on {numbers['heldout_accuracy']:.1%} of held-out pairs")
    data = ", ".join(Path(source).name if source.startswith("/") else source for source in node["data"])
    return Text.assemble((node["name"], "bold"), f"  {data}" if data else "", ("  " + ", ".join(described), "green"))
