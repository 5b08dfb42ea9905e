"""Rejection sampling (DeepSeek-R1, arXiv 2501.12948, section 2.3.3): replies drawn, the good ones kept as SFT data."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qreason.data.prompts import render, system_prompt
from qreason.errors import RunFolderError, TrainingError, redact
from qreason.machine import ranks
from qreason.machine.files import write_json, write_jsonl, write_text
from qreason.machine.progress import note, progress_bar
from qreason.machine.rows import free_memory
from qreason.machine.shards import Shard
from qreason.recipe.settings import Sample
from qreason.run.checkpoint import open_teacher
from qreason.run.lock import hold, is_held
from qreason.run.session import Artifact, Session
from qreason.sampling.draws import SAMPLED, SHARDS, Drawn, Journal, Row, Sieve, to_sft_row
from qreason.sampling.teacher import ask_teacher
from qreason.types import Example, Generator

DRAWS = 128
"""Replies that are drawn from one seed, scored and stored together."""


def stage(settings: Sample, run: Session) -> Artifact:
    """Draw n replies to each of data.prompts, and keep those that pass; an interrupted stage goes on.

    Each process of a launch draws a shard.
    """
    if ranks.count() > 1:
        draw_shard(settings, run, Shard(ranks.number() + 1, ranks.count()))
        ranks.gather(None)  # all have let go of their shards
    return ranks.from_first(partial(join, settings, run))


def join(settings: Sample, run: Session) -> Artifact:
    """Put together what shards have drawn, draw what is left, and keep what passes."""
    examples = run.examples("prompts")[: settings.rows]
    folder = run.stage_folder()
    journal = Journal(folder, made_with(settings, run))
    for part in sorted((folder / SHARDS).glob("*-of-*")):
        if is_held(part):
            raise RunFolderError(f"{part}: this shard is still being drawn; wait for it, or stop it")
        journal.join(Journal(part, made_with(settings, run)))
    kept, sieve = folder / SAMPLED, Sieve(settings)
    write_jsonl(kept, [to_sft_row(row) for row in journal.rows if sieve.reason(row) is None])
    for rows in collect(settings, run, examples, examples, journal):
        write_jsonl(kept, [to_sft_row(row) for row in rows if sieve.reason(row) is None], append=True)
        note(f"kept {sieve.kept.total()}")
    artifact = finish(settings, run, examples, journal, folder)
    shutil.rmtree(folder / SHARDS, ignore_errors=True)
    return artifact


def draw_shard(settings: Sample, run: Session, shard: Shard) -> Artifact:
    """Draw and score a share of the replies, in a folder of its own; `stage` joins all shards.

    Raises RunFolderError where another process draws the same shard.
    """
    examples = run.examples("prompts")[: settings.rows]
    folder = run.stage_folder() / SHARDS / shard.name
    folder.mkdir(parents=True, exist_ok=True)
    lock = hold(folder)
    journal = Journal(folder, made_with(settings, run))
    size = batch_size(settings)
    starts = shard.share(range(0, len(examples), size))
    mine = [example for start in starts for example in examples[start : start + size]]
    for _ in collect(settings, run, examples, mine, journal):
        pass
    if lock:
        lock.release(force=True)
    return Artifact(journal.file, f"shard {shard}: {len(journal.rows)} draws; without --shard all are joined")


def collect(
    settings: Sample, run: Session, examples: Sequence[Example], mine: Sequence[Example], journal: Journal
) -> Iterator[list[Row]]:
    """Draw and score what the journal lacks of the replies to `mine`, of all examples; new rows as they come."""
    folder, done = journal.file.parent, journal.done
    wanted = [(e, number) for e in mine for number in range(settings.n) if (e.id, number) not in done]
    if done and wanted:
        run.say(f"{folder.name}: {len(done)} draws are there, going on with {len(wanted)}")
    if settings.teacher and not settings.teacher.endpoint and wanted:
        run.release()  # to make room for the teacher's weights
    scorer = run.rewards.scorer
    with progress_bar(folder.name, total=len(done) + len(wanted)) as bar:
        bar.advance(len(done))
        for draws in draw(settings, run, examples, wanted):
            scores = scorer([drawn.reply for drawn in draws], [drawn.example for drawn in draws], folder)
            rows = journal.add(draws, scores)
            yield rows
            bar.advance(len(rows))


def batch_size(settings: Sample) -> int:
    """Prompts whose replies are drawn from one seed; with whole batches a shard draws as one process does."""
    return max(1, DRAWS // settings.n)


def made_with(settings: Sample, run: Session) -> dict[str, Any]:
    """What the draws depend on; the sieve's settings are not part of it and may change."""
    recipe = run.recipe
    common = {
        "prompt": recipe.data.system or recipe.data.prompt,
        "sampling": recipe.sampling.model_dump(exclude={"max_num_seqs"}),
        "rewards": recipe.dump()["rewards"],
    }
    if settings.teacher and settings.teacher.endpoint:
        return common | {"teacher": redact(settings.teacher.endpoint), "model": settings.teacher.model}
    adapter = run.disk.adapter(settings.start)
    model = str(adapter.relative_to(run.folder)) if adapter else "base"
    if settings.teacher:
        model, common["teacher"] = settings.teacher.model, settings.teacher.quantization
    return common | {"model": model, "n": settings.n, "rows": settings.rows, "seed": recipe.seed}


def draw(
    settings: Sample, run: Session, examples: Sequence[Example], wanted: Sequence[tuple[Example, int]]
) -> Iterator[list[Drawn]]:
    """Draws the wanted (example, number), in batches."""
    system = system_prompt(run.recipe.data)
    if settings.teacher and settings.teacher.endpoint:
        yield from ask_teacher(settings.teacher, wanted, system, run.recipe.sampling)
        return
    missing = {(example.id, number) for example, number in wanted}
    if not missing:
        return
    if settings.teacher:
        generator: Generator = open_teacher(settings.teacher, run.say)
    else:
        run.load_adapter(settings.start)
        generator = run.generator
    size = batch_size(settings)
    for start in range(0, len(examples), size):
        batch = examples[start : start + size]
        if not any((example.id, number) in missing for example in batch for number in range(settings.n)):
            continue
        # One seed per batch: an interrupted stage draws the rest as it would have.
        sampling = run.recipe.sampling.sampling(seed=run.recipe.seed * 1_000_003 + start)
        prompts = [render(example, system) for example in batch]
        made = generator.generate(prompts, n=settings.n, sampling=sampling, fast=True)
        yield [
            Drawn(example, number, reply, 0 if number else len(reply.prompt_ids), len(reply.token_ids))
            for example, replies in zip(batch, made, strict=True)
            for number, reply in enumerate(replies)
            if (example.id, number) in missing
        ]
    if settings.teacher:
        del generator
        free_memory()


def finish(settings: Sample, run: Session, examples: Sequence[Example], journal: Journal, folder: Path) -> Artifact:
    """Filter all draws in the order of the data, mix in rows without reasoning, write data, figures and card."""
    places = {example.id: place for place, example in enumerate(examples)}
    rows = [row for row in journal.rows if row["id"] in places and row["number"] < settings.n]
    rows.sort(key=lambda row: (places[row["id"]], row["number"]))
    sieve = Sieve(settings)
    rows = [row | {"rejected": sieve.reason(row)} for row in rows]
    kept = [to_sft_row(row) for row in rows if row["rejected"] is None]
    reasons = Counter(row["rejected"] for row in rows if row["rejected"])
    if not kept:
        reasons_text = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise TrainingError(
            f"none of {len(rows)} replies was kept: {reasons_text}; look at them in {journal.file}, then lower what "
            "sample.keep asks, or sample from a better model. The draws stay: with other bounds nothing is drawn again"
        )
    plain = [
        {"id": f"plain:{one.id}", "prompt": one.prompt, "reference": one.reference}
        for one in run.plain(settings.plain_share, len(kept))
    ]
    figures = measure(settings, run, rows, reasons, plain)
    if plain:
        random.Random(run.recipe.seed).shuffle(kept := kept + plain)
    write_jsonl(folder / SAMPLED, kept)
    write_jsonl(journal.file, rows)
    write_json(folder / "sample.json", figures)
    write_text(folder / "README.md", redact(card(run, settings, figures)))
    kept_text = f"{figures['kept']} of {len(rows)} replies kept ({figures['acceptance']:.0%})"
    summary = f"{kept_text}, to {figures['prompts_kept']} of {figures['prompts']} prompts"
    return Artifact(folder / SAMPLED, summary + (f", {len(plain)} rows mixed in" if plain else ""))


def measure(
    settings: Sample, run: Session, rows: Sequence[Row], reasons: Counter[str], plain: Sequence[Row]
) -> dict[str, Any]:
    """sample.json: which model replied, what was kept, and the cost."""
    if teacher := settings.teacher:
        model = f"{teacher.model} at {teacher.endpoint}" if teacher.endpoint else teacher.model
    else:
        adapter = run.disk.adapter(settings.start)
        model = f"{run.recipe.model.base}, {adapter.parent.name}" if adapter else run.recipe.model.base
    kept = [row for row in rows if row["rejected"] is None]
    return {
        "model": model,
        "prompts": len({row["id"] for row in rows}),
        "prompts_kept": len({row["id"] for row in kept}),
        "replies": len(rows),
        "kept": len(kept),
        "acceptance": round(len(kept) / len(rows), 4),
        "rejected": dict(reasons.most_common()),
        "plain": len(plain),
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
        "completion_tokens": sum(row["completion_tokens"] for row in rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
    }


def card(run: Session, settings: Sample, figures: dict[str, Any]) -> str:
    """The data card: README.md of the stage's folder."""
    tokens = figures["completion_tokens"]
    asked = ", ".join(f"{name} at least {least:g}" for name, least in settings.keep.items()) or "no rewards"
    rejected = "".join(f"| {reason.replace('|', '/')} | {count} |\n" for reason, count in figures["rejected"].items())
    sampling = run.recipe.sampling.model_dump(exclude={"max_num_seqs"})
    draw = ", ".join(f"{key} {value:g}" for key, value in sampling.items())
    each = f", {tokens / figures['kept']:.0f} per kept row" if tokens else " (0: the server did not count)"
    return f"""# Sampled data of {run.recipe.name}

SFT data by rejection sampling, in `{SAMPLED}`: `id`, `prompt`, `reasoning`, `reference` (the reply's own answer).

| | |
|---|---|
| replies by | {figures["model"]} |
| prompts | {figures["prompts"]}, {settings.n} replies each; {figures["prompts_kept"]} have a kept one |
| drawn with | {draw}; seed {run.recipe.seed} |
| kept | {figures["kept"]} of {figures["replies"]} replies ({figures["acceptance"]:.1%}) |
| mixed in | {figures["plain"]} rows without reasoning |
| cost | {figures["prompt_tokens"]} prompt and {tokens} completion tokens{each}; {figures["seconds"]} s |
| asked for | {asked}; language {settings.language or "any"} |

| rejected because | replies |
|---|---|
{rejected}
Every draw, kept or not, is in `draws.jsonl`, the reason in `rejected`.
"""
