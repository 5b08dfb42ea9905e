"""Commands that run a recipe, or measure a model: run, one for each stage, evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qreason.cli.base import main, say, show
from qreason.cli.options import json_option, read_settings, recipe_options, settings_options, shard_option
from qreason.errors import InputError, QReasonError, RunFolderError
from qreason.machine import ranks
from qreason.machine.shards import Shard, parse_shard
from qreason.recipe.schema import STAGES
from qreason.recipe.settings import Evaluate

if TYPE_CHECKING:
    from qreason.recipe.schema import Recipe
    from qreason.run.session import Session
    from qreason.types import Example, Pair


OPENING = 120.0
"""Seconds that a shard waits for others to open the run folder."""


@main.command()
@recipe_options
def run(**given: Any) -> None:
    """Run all steps of RECIPE, or those that are left."""
    run_recipe(**given)


def add_stage_commands() -> None:
    """A command for each stage that has none of its own."""
    for stage in STAGES:
        if stage not in main.commands:

            @main.command(name=stage, help=f"Run RECIPE up to its next {stage} step.")
            @recipe_options
            def command(only: str = stage, **given: Any) -> None:
                run_recipe(**given, only=only)


@main.command()
@recipe_options
@shard_option
def sample(recipe: str, shard: str | None, **given: Any) -> None:
    """Run RECIPE up to its next sample step."""
    if shard:
        sample_shard(recipe, parse_shard(shard), **given)
    else:
        run_recipe(recipe, only="sample", **given)


def sample_shard(
    recipe: str,
    shard: Shard,
    *,
    out: Path | None,
    seed: int | None,
    overrides: tuple[str, ...],
    **others: Any,
) -> None:
    """Draw one shard of the next sample step, beside other processes that draw the others."""
    from qreason.recipe.load import load_recipe
    from qreason.run.session import Session
    from qreason.stages.sample import draw_shard

    if any(others.values()):
        raise InputError("--shard cannot be combined with --fresh, --mirror or --json")
    loaded = load_recipe(recipe, overrides, seed)
    folder = out or Path("runs") / loaded.name
    notes: list[str] = []
    opened = Session.open(loaded, folder, say=say, check=partial(check, folder=folder, notes=notes), wait=OPENING)
    opened.disk.leave()
    step = next_step(opened, "sample")
    settings = opened.recipe.steps[step].sample
    assert settings
    make_it_fit(opened)
    for note in notes:
        say(f"note: {note}")
    opened.begin_step(step)
    say(draw_shard(settings, opened, shard).summary)


def run_recipe(
    recipe: str,
    *,
    out: Path | None,
    seed: int | None,
    overrides: tuple[str, ...],
    fresh: bool,
    as_json: bool,
    mirror: str | None = None,
    only: str | None = None,
) -> None:
    """Run what is left of a recipe, or its steps up to the next one of the stage `only`; then print the report."""
    from qreason.machine.progress import written_to
    from qreason.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides, seed)
    folder = out or Path("runs") / loaded.name
    ranks.connect()
    opened = open_on_all(partial(open_run, loaded, folder, fresh=fresh, mirror=mirror, only=only), folder)
    steps = range(opened.disk.finished, next_step(opened, only) + 1 if only else len(loaded.steps))
    with written_to(folder) if ranks.is_first() else nullcontext():
        for step in steps:
            run_and_say(opened, step)
    ranks.disconnect()
    if ranks.is_first():
        show_report(opened, as_json)
        if opened.mirror:  # the report too
            opened.mirror()


def open_run(recipe: Recipe, folder: Path, *, fresh: bool, mirror: str | None, only: str | None) -> Session:
    """Open the run folder, look at everything that is known before the base is loaded, and make the recipe fit."""
    from qreason.data.examples import describe
    from qreason.hub.mirror import open_mirror
    from qreason.run.folder import is_run_folder
    from qreason.run.session import Session

    copy = open_mirror(mirror, folder, say) if mirror else None
    if copy and not fresh:
        copy.pull()
    starting = fresh or not is_run_folder(folder)
    notes: list[str] = []
    look = partial(check, folder=folder, notes=notes)
    opened = Session.open(recipe, folder, fresh=fresh, say=say, check=look if starting else None)
    opened.mirror = copy
    finished, last = opened.disk.finished, len(recipe.steps)
    if finished:
        say(f"{folder}: {finished} of {last} steps are done, continuing (--fresh starts over)")
    if finished < last:
        if not starting:
            examples = {use: opened.examples(use) for use in recipe.data.sources}
            look(opened.recipe, examples, opened.pairs if recipe.data.pairs else [])
        make_it_fit(opened)
    if only:
        next_step(opened, only)
    for note in notes:
        say(f"note: {note}")
    for use in recipe.data.sources if starting else ():
        say(f"{use}: {describe(opened.examples(use))}")
    return opened


def open_on_all(work: Callable[[], Session], folder: Path) -> Session:
    """A run that the first process of a launch opens; the others read along."""
    from qreason.run.folder import RunFolder
    from qreason.run.session import Session

    opened: list[Session] = []

    def on_first() -> tuple[Recipe, dict[str, Any]]:
        opened.append(work())
        return opened[0].recipe, opened[0].disk.manifest

    recipe, manifest = ranks.from_first(on_first)
    return opened[0] if opened else Session(recipe, RunFolder(folder, recipe, manifest, read_only=True))


def check(
    recipe: Recipe,
    examples: Mapping[str, Sequence[Example]],
    pairs: Sequence[Pair],
    *,
    folder: Path,
    notes: list[str],
) -> None:
    """Find what is known before anything is loaded; InputError with all problems, and more `notes`."""
    from qreason.model.backends import start

    start(recipe.model.backend, recipe.plain_stage)  # before transformers is imported
    from qreason.planning.checks import examine

    found = examine(recipe, examples, pairs, folder, fetch=True)
    if found.problems:
        raise InputError("\n".join(found.problems))
    notes += found.notes


def make_it_fit(run: Session) -> None:
    """Look at the memory before anything is loaded, and cut batches down to what it holds.

    Of an embedded base on a CPU no plan is made: reading all rows takes longer than its memory matters.
    """
    _ = run.backend  # chosen before transformers is imported
    from qreason.model.load import EMBEDDED
    from qreason.planning.fit import fit
    from qreason.planning.memory import find_card, is_planned, measure, peak_line, read_lengths, shape_of

    card = find_card()
    small = card.on_cpu and run.recipe.model.base in EMBEDDED
    if small or run.recipe.fit == "none" or not is_planned(run.recipe):
        return
    shape = shape_of(run.recipe.model.base)
    lengths = read_lengths(run.recipe)
    run.recipe, changes = fit(run.recipe, shape, card, lengths)
    run.disk.manifest["fit"] = changes
    planned = {str(step.position): step.peak[1] for step in measure(run.recipe, shape, card, lengths).steps}
    run.disk.manifest.setdefault("memory", {})["planned_bytes"] = planned
    for line in [*changes, peak_line(run.recipe, shape, card, lengths)]:
        say(f"memory: {line}")


def next_step(run: Session, stage: str) -> int:
    """The place of the next step that is no evaluation; RunFolderError where it is of another stage."""
    left = list(enumerate(run.recipe.steps))[run.disk.finished :]
    following = next(((position, step) for position, step in left if step.stage != "evaluate"), None)
    if following is None:
        raise RunFolderError(f"{run.folder}: no {stage} step is left; --fresh starts over")
    position, step = following
    if step.stage != stage:
        raise RunFolderError(
            f"{run.folder}: the next step is {step.stage}, not {stage}; `qreason run` does them in order"
        )
    return position


def run_and_say(run: Session, step: int) -> None:
    from qreason.stages import run_step

    artifact, seconds = run_step(run, step)
    say(f"{run.recipe.steps[step].stage:<10} {seconds:5.0f} s  {artifact.summary}")


def show_report(run: Session, as_json: bool) -> None:
    """report.json of all finished evaluations, as a table or as JSON, and its page; nothing where there is none yet."""
    from qreason.report.build import write_report
    from qreason.report.page import write_page
    from qreason.report.table import report_table

    if not run.disk.evaluations():
        return
    numbers = write_report(run.disk)
    if as_json:
        click.echo(json.dumps(numbers, indent=2))
    else:
        show(report_table(numbers))
    try:
        page = write_page(run, numbers)
    except QReasonError as error:  # the run is done, with or without its page
        say(f"no page: {error}")
    else:
        say(f"page: {page}  figures: {page.with_name('report.json')}  replies: {page.with_name('replies.jsonl')}")


@main.command()
@click.argument("target", metavar="DIR|MODEL")
@click.option("--task", type=click.Path(path_type=Path), required=True, help="JSONL, JSON, CSV, TSV or Parquet.")
@settings_options(Evaluate, "samples", "rows", "reasoning")
@settings_options(Evaluate, pass_at="pass-at", cons_at="cons-at", best_of="best-of")
@settings_options(Evaluate, "best_by", "right_by")
@click.option("--beam", type=click.IntRange(1), metavar="WIDTH", help="Step-wise beam search, ranked by --best-by.")
@click.option("--out", type=click.Path(path_type=Path), help="JSONL file for the rows; with it, it goes on if cut off.")
@click.option("--direct", is_flag=True, help="Ask for the answer without reasoning.")
@shard_option
@json_option
def evaluate(
    target: str,
    task: Path,
    beam: int | None,
    out: Path | None,
    direct: bool,
    shard: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure a run folder, a model folder or a Hub model on a task file with prompts and references."""
    from qreason.report.table import passes_table, reasoning_table, scaling_table
    from qreason.stages.evaluate import evaluate_task

    width = {"beam": {"width": beam, "by": settings["best_by"] or "likelihood"}} if beam else {}
    asked = read_settings(Evaluate, {**settings, **width, "chain_of_thought": not direct})
    numbers = evaluate_task(target, task, asked, out, say, parse_shard(shard) if shard else None)
    if numbers is None:
        return
    if as_json:
        click.echo(json.dumps(numbers, indent=2))
        return
    show(passes_table([numbers]))
    show("", reasoning_table([numbers]))
    if scaled := scaling_table([numbers]):
        show("", scaled)
