"""The model card, from a run's own files; its text is in card.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qreason.data.prompts import system_prompt
from qreason.errors import redact
from qreason.export.exporter import REPORT
from qreason.export.quality import original_accuracy
from qreason.machine.files import read_json
from qreason.machine.records import Exported, Merged, Report, Told
from qreason.model.load import EMBEDDED
from qreason.report.reasoning import verdict
from qreason.report.table import REASONING
from qreason.run.session import Session

METHODS = {"sft": "SFT", "grpo": "GRPO", "distill": "distillation"}
"""Stages that train the policy -> their names in the card."""
PARTS = {"adapter": "a LoRA adapter", "merged": "the merged model", "gguf": "GGUF files"}
LISTED = {"learning_rate", "num_train_epochs", "max_steps", "num_generations", "difficulty_filtering", "rows"}
"""Settings of a stage that the card lists."""


def model_card(run: Session, repo: str, parts: Sequence[str], files: Sequence[str]) -> str:
    """README.md of a repository with these parts (keys of PARTS) and files."""
    from huggingface_hub import ModelCard, ModelCardData

    file, again = run.folder / "report.json", "`qreason run RECIPE` writes it anew"
    report = read_json(file, Report, again) if file.is_file() else None
    stages = list(dict.fromkeys(e["stage"] for e in run.disk.manifest["steps"] if e["stage"] in METHODS))
    parts_text = " and ".join(text for part, text in PARTS.items() if part in parts)
    newest, licence = newest_merge(run), base_licence(run)
    export = recommendation(run) if "gguf" in parts else None
    accuracy = report["passes"][-1]["accuracy"]["mean"] if report else None
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers" if "merged" in parts else "peft",
            license=licence,
            base_model=run.recipe.model.base if on_the_hub(run) else None,
            pipeline_tag="text-generation",
            tags=["qreason", "reasoning", *stages],
        ),
        template_str=Path(__file__).with_suffix(".md").read_text(encoding="utf-8"),
        repo=repo,
        name=repo.partition("/")[2],
        manifest=run.disk.manifest,
        parts=parts_text[0].upper() + parts_text[1:],
        merged="merged" in parts,
        adapter="adapter" in parts,
        gguf=preferred_file(export, files) if "gguf" in parts else None,
        export=export,
        original=original_accuracy(export["accuracy"], export["rows"]) if export else None,
        modelfile="Modelfile" in files,
        base=public_base(run),
        embedded=run.recipe.model.base in EMBEDDED,
        quantized=run.recipe.model.quantization == "nf4",
        licence=licence,
        taught_by=" and ".join(METHODS[stage] for stage in stages),
        training=list(training(run, stages)),
        report=report,
        reasoned=[row for row in report["passes"] if row.get("reasoning")] if report else [],
        columns=REASONING,
        verdict=verdict,
        gain=report["gains"][-1] if report and report["gains"] else None,
        wrong=None if accuracy is None else 1 - accuracy,
        interval=interval,
        percent=lambda measure: interval(measure, 100, "%", 1),
        points=lambda measure: interval(measure, 100, "", 1),
        judge=judge(run),
        merge=read_json(newest.parent / "merge.json", Merged) if newest and "merged" in parts else None,
        system=(system := system_prompt(run.recipe.data)),
        quoted=json.dumps(system, ensure_ascii=False),
        tokens=run.recipe.sampling.max_completion_length,
    )
    return redact(f"{card}\n")


def public_base(run: Session) -> str:
    """The base's public name: of a local folder its name without the path."""
    base = run.recipe.model.base
    return Path(base).name if Path(base).is_absolute() else base


def on_the_hub(run: Session) -> bool:
    """Whether others can load the base by its name from the Hub."""
    return not Path(run.recipe.model.base).is_absolute() and run.recipe.model.base not in EMBEDDED


def base_licence(run: Session) -> str | None:
    """The licence that the base's card declares; None where there is no local card."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    base = run.recipe.model.base
    if base in EMBEDDED:
        return "apache-2.0"
    card = try_to_load_from_cache(base, "README.md") if on_the_hub(run) else Path(base) / "README.md"
    try:
        declared = ModelCard.load(card, ignore_metadata_errors=True).data.license if Path(card).is_file() else None
    except Exception:  # the front matter of another's card may be anything
        return None
    return str(declared) if declared else None


def training(run: Session, stages: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The rows of the card's training table: (name, value)."""
    recipe = run.recipe
    for key, source in recipe.data.sources.items():
        known = run.disk.manifest["data"].get(key, "")
        local = known.startswith("sha256:")
        yield f"data, {key}", f"`{Path(source).name}` ({known[:23]}…)" if local else f"`{source}`"
    lora = recipe.model.lora
    yield "LoRA", f"r {lora.r}, alpha {lora.alpha}, dropout {lora.dropout:g}"
    if "grpo" in stages:
        yield "rewards", ", ".join(f"{name} {weight:g}" for name, weight in recipe.weights.items())
    for step in recipe.steps[: run.disk.finished]:
        if step.stage in METHODS:
            settings = step.settings.model_dump(include=LISTED, exclude_none=True)
            listed = {name: value for name, value in settings.items() if name != "max_steps" or value > 0}
            yield step.stage, ", ".join(f"{name} {value:g}" for name, value in listed.items())
    yield "seed", str(recipe.seed)
    hardware = run.disk.manifest.get("hardware", {})
    versions = ", ".join(f"{name} {number}" for name, number in run.disk.manifest.get("versions", {}).items())
    yield "machine", f"{hardware.get('name') or hardware.get('device', 'unknown')}; {versions}"


def interval(measure: dict[str, Any] | None, scale: float = 1, unit: str = "", digits: int = 2) -> str:
    if measure is None or measure["mean"] is None:
        return "–"
    mean, low, high = (measure[key] * scale for key in ("mean", "low", "high"))
    return f"{mean:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def judge(run: Session) -> str | None:
    """The fitness of the judge behind the rewards, where it was measured."""
    steps = [run.folder / entry["folder"] for entry in run.disk.manifest["steps"] if entry["stage"] == "grpo"]
    files = [file for folder in steps if (file := folder / "judge.json").is_file()]
    return read_json(files[-1], Told)["told"] if files else None


def newest_merge(run: Session) -> Path | None:
    """The newest merged model, of a merge step or of `qreason merge RUN`."""
    made = [file for file in run.folder.glob("*/merge.json") if (file.parent / "model" / "config.json").is_file()]
    return max(made, key=lambda file: file.stat().st_mtime).parent / "model" if made else None


def newest_export(run: Session) -> Path | None:
    """The folder of the newest GGUF files."""
    made = [file.parent for file in run.folder.glob("*/*.gguf")]
    return max(made, key=lambda folder: folder.stat().st_mtime) if made else None


def recommendation(run: Session) -> Exported | None:
    """What the newest export measured, where it recommends one of its files."""
    folder = newest_export(run)
    if folder is None or not (folder / REPORT).is_file():
        return None
    found: Exported = read_json(folder / REPORT, Exported, f"`qreason export {run.folder}` writes it anew")
    measured = found.get("rows") and "adapter" in found["accuracy"] and found.get("recommended") in found["files"]
    return found if measured else None


def preferred_file(export: Exported | None, files: Sequence[str]) -> str | None:
    """The name of the recommended file, or of the first one that is a whole model."""
    if export and export["recommended"]:
        return export["files"][export["recommended"]]["file"]
    return next((file for file in files if file.endswith(".gguf") and not file.endswith("-adapter.gguf")), None)
