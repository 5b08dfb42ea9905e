"""Evaluation: the same rows, the same prompts, before and after every stage; and a task file of one's own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qreason import data
from qreason.errors import ModelError
from qreason.generate import LocalGenerator
from qreason.models import Resident
from qreason.progress import progress_bar
from qreason.prompts import HELPDESK, SYSTEM_PROMPTS, render
from qreason.recipe import Draw, Evaluate, Model, Step
from qreason.report.build import measure, write_report
from qreason.rewards import REWARDS
from qreason.rewards.scoring import Scorer, reply_row
from qreason.rewards.tags import follows_format, read_answer
from qreason.rewards.text import correct
from qreason.run import Artifact, Run, write_json, write_jsonl
from qreason.types import Example

MAIN_WEIGHTS = {"correctness": 0.1, "format": 0.1, "rouge_l": 0.2, "length": 0.2}
"""The rewards of a bare model on a task file: those of the main recipe that need no judge."""


def evaluate(step: Step, run: Run) -> Artifact:
    """Measure the newest adapter of the run (the bare base before the first) on data.heldout."""
    settings = step.settings
    assert isinstance(settings, Evaluate)
    examples = run.examples("heldout")[: settings.rows]
    run.resident.load_adapter(run.adapter())
    folder = run.stage_folder()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows = measure_rows(
        run.resident,
        examples,
        Scorer(run.rewards, run.recipe.weights),
        run.recipe.sampling,
        system=SYSTEM_PROMPTS[run.recipe.data.prompt],
        samples=settings.samples,
        seed=run.recipe.seed,
        label=f"{folder.name} eval",
        folder=folder,
    )
    write_jsonl(folder / "evaluation.jsonl", rows)
    report = measure(rows, folder.name, time.perf_counter() - start)
    write_json(folder / "evaluation.json", report)
    accuracy, form = report["accuracy"]["mean"], report["format"]["mean"]
    return Artifact(
        folder / "evaluation.json",
        f"accuracy {accuracy:.1%}, pass@1 {report['pass_at_1']['mean']:.1%}, format {form:.1%}, "
        f"reward {report['reward']['mean'] or 0:.2f}",
    )


def measure_rows(
    resident: Resident,
    examples: Sequence[Example],
    scorer: Scorer,
    draw: Draw,
    *,
    system: str,
    samples: int,
    seed: int,
    label: str,
    folder: Path,
) -> list[dict[str, Any]]:
    """One greedy reply a row with every reward, and `samples` drawn ones for pass@1."""
    prompts = [render(example, system) for example in examples]
    with progress_bar(label, total=len(prompts) * (1 + samples)) as bar:
        generator = LocalGenerator(resident, on_progress=bar.advance)
        greedy = [replies[0] for replies in generator.generate(prompts, n=1, sampling=draw.sampling(greedy=True))]
        sampled = generator.generate(prompts, n=samples, sampling=draw.sampling(seed=seed))
    rows = []
    for example, reply, score, drawn in zip(examples, greedy, scorer(greedy, examples, folder), sampled, strict=True):
        marks = [correct(read_answer(sample.text), example.references) for sample in drawn]
        rows.append(
            reply_row(reply, example, score)
            | {
                "split": example.split,
                "accurate": correct(read_answer(reply.text), example.references) > 0,
                "well_formed": follows_format(reply.text),
                "words": len(reply.text.split()),
                "finished": reply.finished,
                "pass_at_1": sum(mark > 0 for mark in marks) / len(marks),
                "samples": [sample.text for sample in drawn],
            }
        )
    return rows


def report(run: Run) -> dict[str, Any] | None:
    """report.json and replies.jsonl from all finished evaluations; None when there is none yet."""
    folders = [run.folder / entry["folder"] for entry in run.manifest["steps"] if entry["stage"] == "evaluate"]
    return write_report(run, folders) if folders else None


def evaluate_task(target: str, task: Path, *, samples: int, rows: int | None) -> dict[str, Any]:
    """Measure a run folder's newest adapter, a model folder or a Hub model on a task file; nothing is written."""
    folder = Path(target)
    draw, system, seed = Draw(), HELPDESK, 1
    if (folder / "manifest.json").is_file():
        run = Run.reopen(folder)
        resident, scorer = run.resident, Scorer(run.rewards, run.recipe.weights)
        resident.load_adapter(run.adapter())
        draw, system, seed = run.recipe.sampling, SYSTEM_PROMPTS[run.recipe.data.prompt], run.recipe.seed
        examples = data.read(task, run.recipe.data)
    elif (folder / "adapter_config.json").is_file():
        raise ModelError(f"{target} is an adapter; give its run folder, or the merged model")
    else:
        from qreason.hardware import detect

        examples = data.read(task)
        resident = Resident(Model(base=target), detect())
        scorer = Scorer({name: REWARDS[name] for name in MAIN_WEIGHTS}, MAIN_WEIGHTS)
    start = time.perf_counter()
    measured = measure_rows(
        resident,
        examples[:rows],
        scorer,
        draw,
        system=system,
        samples=samples,
        seed=seed,
        label=task.stem[:14],
        folder=Path.cwd(),
    )
    return {"model": target, "task": str(task)} | measure(measured, task.stem, time.perf_counter() - start)
