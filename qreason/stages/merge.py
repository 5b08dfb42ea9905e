"""Merge: adapters folded into their base, as a plain transformers folder that predicts what was trained."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qreason import merging
from qreason.errors import ModelError, RunFolderError, TrainingError
from qreason.generate import LocalGenerator
from qreason.models import Resident
from qreason.progress import Bar, progress_bar
from qreason.prompts import SYSTEM_PROMPTS, render
from qreason.recipe import Merge, Model, Step
from qreason.rewards.tags import read_answer
from qreason.rewards.text import correct
from qreason.run import Artifact, Run, write_json
from qreason.types import Example, Reply

if TYPE_CHECKING:
    import torch

COMPARED_REPLIES = 8
MOST_DIVERGENCE = 1e-4
"""Nats a token that the stored model may be from the trained one, before a merge is refused."""
MOST_DIVERGENCE_16_BIT = 1e-2
"""The same from a model that was trained and asked in 16-bit arithmetic, which itself rounds that much."""
WITHOUT_DATA = ("My printer is offline.", "The disk of the database server is full.", "I cannot log in to my mail.")
"""What a run without data, such as one with an adapter from the Hub, is asked."""


@dataclass(frozen=True)
class Trained:
    """The trained model as it ran: its greedy replies, how many of them are right, what it predicts."""

    rows: Sequence[Example]
    replies: Sequence[Reply]
    right: int | None
    predictions: Sequence[torch.Tensor]


def merge(step: Step, run: Run) -> Artifact:
    """Fold adapters into the base in float32, store it, and compare it with the trained model."""
    settings = step.settings
    assert isinstance(settings, Merge)
    find_adapters(run, settings)
    return fold_into(run.clear_stage_folder(), settings, run)


def merge_again(run: Run, settings: Merge, folder: Path | None = None) -> Artifact:
    """Merge a run folder once more, into `merged-…` of it or the folder given; nothing is overwritten."""
    name = "-".join(
        ["merged", settings.dtype]
        + [settings.base] * (settings.base != "trained")
        + [Path(adapter).name.removesuffix("/adapter") for adapter in settings.adapters]
        + [settings.blend or ""] * bool(settings.blend)
    )
    folder = folder or run.folder / name
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} is there already; remove it, or choose another folder with --out")
    find_adapters(run, settings)
    there = folder.exists()
    try:
        return fold_into(folder, settings, run)
    except BaseException:
        if not there:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def find_adapters(run: Run, settings: Merge) -> list[Path]:
    """The adapters a merge folds: those it names, by stage or folder, or the newest of the run."""
    if not settings.adapters:
        newest = run.adapter()
        if newest is None:
            raise RunFolderError(f"{run.folder}: nothing to merge yet; run sft or grpo first")
        return [newest]
    places = [
        (run.folder / name / "adapter", Path(name).expanduser() / "adapter", Path(name).expanduser())
        for name in settings.adapters
    ]
    found = [next((p for p in place if (p / "adapter_config.json").is_file()), None) for place in places]
    for name, folder in zip(settings.adapters, found, strict=True):
        if folder is None:
            raise ModelError(f"{name}: no adapter there; name a stage of {run.folder}, or the folder of an adapter")
    return [folder for folder in found if folder is not None]


def fold_into(folder: Path, settings: Merge, run: Run) -> Artifact:
    """`model/` and `merge.json` in a folder; neither where the stored model is not the trained one."""
    resident, adapters = run.resident, find_adapters(run, settings)
    four_bit = run.recipe.model.quantization != "none"
    if settings.base == "original" and not four_bit:
        raise RunFolderError(f"{run.folder}: the base was not quantized, so there is no other one; leave out --base")
    for adapter in adapters:
        merging.check_adapter(adapter, run.manifest["base"])
    parameters = resident.model.num_parameters()
    merging.check_room(folder, parameters, settings.dtype, copies=2 if four_bit else 1)
    bases = ("trained", "original") if four_bit else ("trained",)
    with progress_bar("merge", total=3 + 5 * len(bases)) as bar:
        trained = ask_trained(run, settings, bar)
        figures = {}
        for base in bases:
            draft = folder / f"{base}.draft"
            try:
                figures[base] = merge_onto(base, draft, trained, settings, adapters, run, bar)
                if base == settings.base:
                    draft.rename(folder / "model")
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    report = {
        **settings.model_dump(exclude={"rows", "max_shard_size", "adapters"}),
        "adapters": [str(path.relative_to(run.folder) if run.folder in path.parents else path) for path in adapters],
        "rows": len(trained.rows) if trained.right is not None else 0,
        "right": trained.right,
        "compared_tokens": sum(map(len, trained.predictions)),
        "bases": figures,
    }
    write_json(folder / "merge.json", report)
    return Artifact(folder / "model", summary(report))


def ask_trained(run: Run, settings: Merge, bar: Bar) -> Trained:
    """What the run's newest adapter says and predicts on held-out rows, or on what there is."""
    use = next((use for use in ("heldout", "sft", "prompts") if getattr(run.recipe.data, use)), None)
    rows = run.examples(use) if use else [Example(str(i), text, "") for i, text in enumerate(WITHOUT_DATA)]
    rows = rows[: settings.rows if use == "heldout" else COMPARED_REPLIES]
    run.resident.load_adapter(run.adapter())
    replies = greedy(run.resident, rows, run)
    bar.advance(2)
    with run.resident.inference() as model:
        predictions = merging.log_probabilities(model, replies[:COMPARED_REPLIES])
    bar.advance(1)
    return Trained(rows, replies, count_right(rows, replies) if use == "heldout" else None, predictions)


def greedy(resident: Resident, rows: Sequence[Example], run: Run) -> list[Reply]:
    prompts = [render(example, SYSTEM_PROMPTS[run.recipe.data.prompt]) for example in rows]
    replies = LocalGenerator(resident).generate(prompts, n=1, sampling=run.recipe.sampling.sampling(greedy=True))
    return [drawn[0] for drawn in replies]


def count_right(rows: Sequence[Example], replies: Sequence[Reply]) -> int:
    marks = [correct(read_answer(reply.text), row.references) for row, reply in zip(rows, replies, strict=True)]
    return sum(mark > 0 for mark in marks)


def merge_onto(
    base: str, draft: Path, trained: Trained, settings: Merge, adapters: Sequence[Path], run: Run, bar: Bar
) -> dict[str, Any]:
    """Store one base with the adapters folded in, read it back, and compare.

    `kl`: from the trained model as it ran. `rounding`: from the same base with the same adapters, unfolded.
    """
    tokenizer, hardware = run.resident.tokenizer, run.resident.hardware
    copied = merging.float32_copy(run.resident) if base == "trained" else merging.float32_original(run.recipe.model)
    run.release()  # the stored model takes its place: a small GPU cannot hold two
    model = merging.put_on(copied, adapters, settings, run.recipe.seed)
    unfolded = merging.log_probabilities(model, trained.replies[:COMPARED_REPLIES])
    bar.advance(1)
    merging.store(merging.fold(model), tokenizer, draft, settings, run.recipe.model.base)
    del model, copied
    bar.advance(2)
    stored = merging.float32_original(Model(base=str(draft)))
    predictions = merging.log_probabilities(stored, trained.replies[:COMPARED_REPLIES])
    del stored
    bar.advance(1)
    figures = {
        "kl": merging.divergence(trained.predictions, predictions),
        "rounding": merging.divergence(unfolded, predictions),
        "right": None,
    }
    if base == settings.base:
        same = base == "trained" and adapters == [run.adapter()]
        check_divergence(figures, settings, hardware.dtype if same else None)
    if trained.right is not None:
        replies = greedy(Resident(Model(base=str(draft)), hardware), trained.rows, run)
        figures["right"] = count_right(trained.rows, replies)
    bar.advance(1)
    return figures


def check_divergence(figures: dict[str, Any], settings: Merge, arithmetic: str | None) -> None:
    """TrainingError where the stored model is not the one that was trained.

    `arithmetic` is the number format the trained model ran in, None where another base or other adapters are merged.
    """
    bars = {"rounding": MOST_DIVERGENCE}
    if arithmetic is not None:
        bars["kl"] = MOST_DIVERGENCE if arithmetic == "float32" else MOST_DIVERGENCE_16_BIT
    for name, most in bars.items():
        if not figures[name] <= most:
            raise TrainingError(
                f"the merged model is not the trained one: KL {figures[name]:.1e} nats a token, at most {most:.0e} is "
                f"allowed; nothing was kept. {settings.dtype} may be too coarse for these weights: try float32"
            )


def summary(report: dict[str, Any]) -> str:
    """One line: on which base, how far from the trained model, how many held-out rows are right."""
    told = []
    for base, figures in sorted(report["bases"].items(), key=lambda pair: pair[0] != report["base"]):
        what = {"trained": "the base as trained", "original": "the original base"}[base]
        right = "" if figures["right"] is None else f", {figures['right']} of {report['rows']} rows right"
        told.append(f"on {what}{' (not kept)' * (base != report['base'])}: KL {figures['kl']:.1e}{right}")
    trained = "" if report["right"] is None else f"; trained model {report['right']}"
    return f"{report['dtype']} {'; '.join(told)}{trained}"
