"""Evaluation: the same rows, the same prompts, before and after every stage; and a custom task file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qreason.data.examples import choose_prompt, read_examples
from qreason.data.prompts import render, system_prompt
from qreason.errors import DataError, InputError
from qreason.inference.beam import beam_search
from qreason.inference.journal import Journal
from qreason.inference.reasoning import ASKS_FOR_NONE, NOT_ASKED_FOR, Figures, intervene
from qreason.inference.selection import check_ranking, open_ranking, scale
from qreason.machine.files import hash_files, read_jsonl, write_json, write_jsonl
from qreason.machine.progress import Bar, progress_bar
from qreason.machine.records import Row
from qreason.machine.shards import Shard, find_shards, join_shards
from qreason.model.load import fingerprint
from qreason.recipe.schema import Recipe
from qreason.recipe.sections import Data
from qreason.recipe.settings import Evaluate
from qreason.report.build import measure
from qreason.rewards.reasoned import is_consistent
from qreason.rewards.registry import REWARDS
from qreason.rewards.scoring import reply_row
from qreason.rewards.steps import ReferenceSteps
from qreason.rewards.tags import follows_format
from qreason.rewards.text import ends_with, is_mentioned
from qreason.run.checkpoint import Checkpoint, check_target, newest_of, open_checkpoint
from qreason.run.folder import RunFolder, Say, is_run_folder, weights_of
from qreason.run.session import Artifact, Session
from qreason.types import Example, Messages, Reply

SEEDS = 1_000_003
"""From the seed of one shard to the next."""


def stage(settings: Evaluate, run: Session) -> Artifact:
    """Measure the newest adapter of the run (the bare base before the first) on data.heldout."""
    folder, start = run.stage_folder(), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    if earlier := run.disk.same_evaluation:
        run.say(f"{folder.name}: its weights are those of {earlier.name}, whose evaluation stands for this one")
        return finish(read_jsonl(earlier / "evaluation.jsonl", Row), folder, time.perf_counter() - start)
    examples = run.examples("heldout")[: settings.rows]
    checkpoint = newest_of(run)
    taught = run.examples("sft") if is_taught(run.recipe) else []
    shots = run.examples("sft")[: settings.shots] if settings.shots else []
    label = f"{folder.name} eval"
    journal = open_journal(folder / "evaluation", run.recipe.model.base, run.disk.adapter(), run.say, run.mirror)
    with checkpoint.generator.recording(journal):
        rows = measure_rows(checkpoint, examples, settings, label=label, folder=folder, taught=taught, shots=shots)
    artifact = finish(rows, folder, journal.seconds + time.perf_counter() - start)
    journal.file.unlink(missing_ok=True)  # all was without a reply
    return artifact


def finish(rows: list[dict[str, Any]], folder: Path, seconds: float) -> Artifact:
    """Write the rows of an evaluation and their figures."""
    write_jsonl(folder / "evaluation.jsonl", rows)
    report = measure(rows, folder.name, seconds)
    write_json(folder / "evaluation.json", report)
    accuracy, passed, form, reward = (report[key]["mean"] for key in ("accuracy", "pass_at_1", "format", "reward"))
    summary = f"accuracy {accuracy:.1%}, pass@1 {passed:.1%}, format {form:.1%}, reward {reward or 0:.2f}"
    return Artifact(folder / "evaluation.json", summary)


def open_journal(
    file: Path, base: str, adapter: Path | None, say: Say, mirror: Callable[[], None] | None = None
) -> Journal:
    """FILE.part, which keeps what a model has replied so far; a model with other weights replies anew."""
    journal = Journal(file.with_name(f"{file.name}.part"), f"{fingerprint(base)} {weights_of(adapter)}", mirror)
    if journal.found:
        say(f"{journal.file}: the evaluation was not finished: continuing after {journal.found} batches")
    return journal


def measure_rows(
    checkpoint: Checkpoint,
    examples: Sequence[Example],
    settings: Evaluate,
    *,
    label: str,
    folder: Path,
    taught: Sequence[Example] = (),
    shots: Sequence[Example] = (),
) -> list[dict[str, Any]]:
    """One greedy reply per row with every reward, and `samples` drawn ones for pass@1, votes, best of n and beams.

    The reasoning of the greedy replies is tested by intervention, and compared with the steps of the rows and of those
    that were `taught`.
    """
    system = system_prompt(checkpoint.data, direct=not settings.chain_of_thought)
    prompts = [render(example, system, shots) for example in examples]
    draw, scorer, n = checkpoint.draw, checkpoint.scorer, settings.samples
    repeated = [example for example in examples for _ in range(n)]
    marks: list[float] = []
    beams: list[tuple[Reply, int]] = []
    with progress_bar(label, total=len(prompts) * (1 + n + bool(settings.beam))) as bar:
        generator, drawing = checkpoint.generator, draw.sampling(seed=checkpoint.seed)
        greedily = draw.sampling(greedy=True)
        greedy = flat(generator.generate(prompts, n=1, sampling=greedily, on_progress=bar.advance))
        # as in training
        drawn = flat(generator.generate(prompts, n=n, sampling=drawing, fast=True, on_progress=bar.advance))
        if settings.best_of:
            bar.note(f"ranking by {settings.best_by}")
            marks = open_ranking(settings.best_by, generator, scorer, folder)(drawn, repeated)
        if settings.beam:
            ranking = open_ranking(settings.beam.by, generator, scorer, folder)
            beams = beam_search(generator, prompts, examples, settings.beam, ranking, drawing, bar.advance)
        accurate = find_right(settings, greedy, examples)
        if set(accurate) == {None}:
            raise DataError(
                f"{label}: right_by {settings.right_by} can judge none of the rows; set right_by: correctness"
            )
        reasoning = test_reasoning(checkpoint, settings, prompts, examples, greedy, accurate, bar)
    right, steps = find_right(settings, drawn, repeated), ReferenceSteps([*taught, *examples])
    found = find_right(settings, [reply for reply, _ in beams], examples[: len(beams)])
    anywhere = ends_with if settings.right_by == "math" else is_mentioned
    rows = []
    for place, (reply, score) in enumerate(zip(greedy, scorer(greedy, examples, folder), strict=True)):
        own = slice(place * n, (place + 1) * n)
        judged = [mark for mark in right[own] if mark is not None]
        row = reply_row(reply, examples[place], score) | {
            "well_formed": follows_format(reply.text),
            "words": len(reply.text.split()),
            "finished": reply.finished,
            "pass_at_1": sum(judged) / len(judged) if judged else None,
            "samples": [sample.text for sample in drawn[own]],
            "right": right[own],
            "scaling": scale(settings, drawn[own], judged, marks[own]) if len(judged) == n else {},
        }
        if beams and row["scaling"]:
            row["scaling"]["beam"] = {"value": float(bool(found[place])), "tokens": beams[place][1]}
        rows.append(
            row
            | {
                "split": examples[place].split,
                "accurate": accurate[place],
                "answer_anywhere": anywhere(examples[place].references, reply.text),
                "reasoning": reasoning[place],
                "consistent": is_consistent(steps, reply, examples[place]),
            }
        )
    return rows


def test_reasoning(
    checkpoint: Checkpoint,
    settings: Evaluate,
    prompts: Sequence[Messages],
    examples: Sequence[Example],
    greedy: Sequence[Reply],
    accurate: Sequence[bool | None],
    bar: Bar,
) -> list[Figures]:
    """The interventions on the first `reasoning` rows; what the other rows have is why they were not tested."""
    if not settings.chain_of_thought:
        return [{"why": ASKS_FOR_NONE} for _ in examples]
    first = slice(0, settings.reasoning)
    tested = intervene(
        checkpoint.generator,
        prompts[first],
        examples[first],
        greedy[first],
        accurate[first],
        rule=partial(find_right, settings),
        sampling=checkpoint.draw.sampling(greedy=True),
        bar=bar,
    )
    return [*tested, *({"why": NOT_ASKED_FOR} for _ in examples[len(tested) :])]


def flat(groups: Sequence[Sequence[Reply]]) -> list[Reply]:
    return [reply for group in groups for reply in group]


def find_right(settings: Evaluate, replies: Sequence[Reply], examples: Sequence[Example]) -> list[bool | None]:
    """Whether each answer is right, by the rule of the settings; None where that rule cannot judge."""
    return [None if mark is None else mark > 0 for mark in REWARDS[settings.right_by](replies, examples)]


def is_taught(recipe: Recipe) -> bool:
    """Whether a step of the recipe trains on data.sft, whose rows have reasoning."""
    return any("sft" in step.settings.reads() for step in recipe.steps)


def evaluate_task(
    target: str, task: Path, settings: Evaluate, out: Path | None, say: Say, shard: Shard | None = None
) -> dict[str, Any] | None:
    """Measure a run folder's newest adapter, a model folder or a Hub model on a task file.

    `out` gets its rows; only with it, an evaluation that is cut off goes on. A shard measures a share of the rows and
    writes OUT.i-of-n, without figures; once all are there, a call without a shard joins them.
    """
    check_target(target)
    if shard and not out:
        raise InputError(f"--shard {shard}: give --out, where the rows go")
    if out and (out.exists() or not out.parent.is_dir()):
        raise InputError(f"--out {out}: {'already exists' if out.exists() else 'its folder is missing'}")
    digest = hash_files([task]) if task.is_file() else ""
    folder = Path(target)
    disk = RunFolder.reopen(folder) if is_run_folder(folder) else None
    adapter = disk.adapter() if disk else None
    asked_for = settings.model_dump(mode="json")
    made_with = {"model": target, "weights": weights_of(adapter), "task": digest, "settings": asked_for}
    if out and not shard and (parts := find_shards(out)):
        rows, seconds = join_shards(parts, made_with)
        write_jsonl(out, rows)
        for part in parts:
            part.unlink()
        return {"model": target, "task": str(task)} | measure(rows, task.stem, seconds)
    if out and shard:
        out = out.with_name(f"{out.name}.{shard.name}")
        if out.exists():
            raise InputError(f"{out}: this shard is done; without --shard all are joined")
    recipe = disk.recipe if disk else None
    data = recipe.data if recipe else choose_prompt(Data(heldout=str(task)))
    examples = read_examples(task, data)
    checkpoint = replace(open_checkpoint(target), data=data)
    check_ranking(settings.best_by, checkpoint.scorer)
    if settings.beam:
        check_ranking(settings.beam.by, checkpoint.scorer)
    start = time.perf_counter()
    taught: list[Example] = []
    if recipe and is_taught(recipe) and Path(str(recipe.data.sft)).is_file():
        taught = read_examples(str(recipe.data.sft), recipe.data, "sft")
    asked: Sequence[Example] = examples[: settings.rows]
    label = task.stem[:14]
    if shard:  # other rows, so another random source
        taught = [*taught, *asked]
        tested = len(shard.share(asked[: settings.reasoning]))
        asked, settings = shard.share(asked), settings.model_copy(update={"reasoning": tested})
        checkpoint = replace(checkpoint, seed=checkpoint.seed + SEEDS * (shard.number - 1))
    journal = None
    if out:
        base = recipe.model.base if recipe else target
        journal = open_journal(out, base, adapter, say)
    with checkpoint.generator.recording(journal):
        rows = measure_rows(checkpoint, asked, settings, label=label, folder=Path.cwd(), taught=taught) if asked else []
    seconds = time.perf_counter() - start + (journal.seconds if journal else 0)
    if out and journal:
        write_jsonl(out, [{**made_with, "seconds": seconds}, *rows] if shard else rows)
        journal.file.unlink(missing_ok=True)
    if shard:
        say(f"shard {shard}: {len(rows)} rows in {out}; without --shard all are joined")
        return None
    return {"model": target, "task": str(task)} | measure(rows, task.stem, seconds)
