"""Commands that run a recipe, or measure a model: run, one for each stage, evaluate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qreason.cli.base import main, say, show
from qreason.cli.options import json_option, read_settings, recipe_options, settings_options
from qreason.errors import InputError, QReasonError, RunFolderError
from qreason.recipe.schema import STAGES
from qreason.recipe.settings import Evaluate

if TYPE_CHECKING:
    from qreason.recipe.schema import Recipe
    from qreason.run.session import Session
    from qreason.types import Example, Pair


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
    from qreason.data.examples import describe
    from qreason.hub.mirror import open_mirror
    from qreason.machine.progress import written_to
    from qreason.recipe.load import load_recipe
    from qreason.run.folder import is_run_folder
    from qreason.run.session import Session

    loaded = load_recipe(recipe, overrides, seed)
    folder = out or Path("runs") / loaded.name
    copy = open_mirror(mirror, folder, say) if mirror else None
    if copy and not fresh:
        copy.pull()
    starting = fresh or not is_run_folder(folder)
    opened = Session.open(
        loaded, folder, fresh=fresh, say=say, check=partial(check, folder=folder) if starting else None
    )
    opened.mirror = copy
    finished, last = opened.disk.finished, len(loaded.steps)
    if finished:
        say(f"{folder}: {finished} of {last} steps are done, continuing (--fresh starts over)")
    if finished < last:
        if not starting:
            examples = {use: opened.examples(use) for use in loaded.data.sources}
            check(opened.recipe, examples, opened.pairs if loaded.data.pairs else [], folder=folder)
        make_it_fit(opened)
    steps = range(finished, next_step(opened, only) + 1 if only else last)
    for use in loaded.data.sources if starting else ():
        say(f"{use}: {describe(opened.examples(use))}")
    with written_to(folder):
        for step in steps:
            run_and_say(opened, step)
    show_report(opened, as_json)


def check(recipe: Recipe, examples: Mapping[str, Sequence[Example]], pairs: Sequence[Pair], *, folder: Path) -> None:
    """Say what is known before anything is loaded; InputError with all problems."""
    from qreason.model.backends import start

    start(recipe.model.backend, recipe.plain_stage)  # before transformers is imported
    from qreason.planning.checks import examine

    found = examine(recipe, examples, pairs, folder, fetch=True)
    if found.problems:
        raise InputError("\n".join(found.problems))
    for note in found.notes:
        say(f"note: {note}")


def make_it_fit(run: Session) -> None:
    """Look at the GPU before anything is loaded, and cut batches down to what its memory holds."""
    _ = run.backend  # chosen before transformers is imported
    from qreason.planning.fit import fit
    from qreason.planning.memory import find_card, is_planned, measure, peak_line, read_lengths, shape_of

    card = find_card()
    if card is None or run.recipe.fit == "none" or not is_planned(run.recipe):
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
@json_option
def evaluate(
    target: str, task: Path, beam: int | None, out: Path | None, direct: bool, as_json: bool, **settings: Any
) -> None:
    """Measure a run folder, a model folder or a Hub model on a task file with prompts and references."""
    from qreason.report.table import passes_table, reasoning_table, scaling_table
    from qreason.stages.evaluate import evaluate_task

    width = {"beam": {"width": beam, "by": settings["best_by"] or "likelihood"}} if beam else {}
    asked = read_settings(Evaluate, {**settings, **width, "chain_of_thought": not direct})
    numbers = evaluate_task(target, task, asked, out, say)
    if as_json:
        click.echo(json.dumps(numbers, indent=2))
        return
    show(passes_table([numbers]))
    show("", reasoning_table([numbers]))
    if scaled := scaling_table([numbers]):
        show("", scaled)
