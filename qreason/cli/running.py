"""Commands that run a recipe, or measure a model: run, sft, grpo, evaluate."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qreason.cli.base import main, one_line_errors, read_settings, say, set_option
from qreason.errors import RunFolderError

if TYPE_CHECKING:
    from qreason.run.session import Run


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What every command on a recipe takes."""
    for option in reversed(
        (
            click.argument("recipe"),
            click.option("--out", type=click.Path(path_type=Path), help="Run folder [default: runs/NAME]."),
            click.option("--seed", type=click.IntRange(0), help="In place of the recipe's seed."),
            set_option,
            click.option("--fresh", is_flag=True, help="Start over; an earlier run is kept beside the folder."),
            click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
        )
    ):
        command = option(command)
    return command


@main.command()
@recipe_options
@one_line_errors
def run(
    recipe: str, out: Path | None, seed: int | None, overrides: tuple[str, ...], fresh: bool, as_json: bool
) -> None:
    """Run all steps of RECIPE, or those that are left."""
    run_recipe(recipe, out, seed, overrides, fresh, as_json, only=None)


def stage_command(stage: str, help_text: str) -> None:
    @main.command(name=stage, help=help_text)
    @recipe_options
    @one_line_errors
    def command(
        recipe: str, out: Path | None, seed: int | None, overrides: tuple[str, ...], fresh: bool, as_json: bool
    ) -> None:
        run_recipe(recipe, out, seed, overrides, fresh, as_json, only=stage)


stage_command("sft", "Run RECIPE up to its next sft step.")
stage_command("grpo", "Run RECIPE up to its next grpo step.")
stage_command("sample", "Run RECIPE up to its next sample step.")
stage_command("distill", "Run RECIPE up to its next distill step.")
stage_command("preference", "Run RECIPE up to its next preference step.")


def run_recipe(
    name: str,
    out: Path | None,
    seed: int | None,
    overrides: tuple[str, ...],
    fresh: bool,
    as_json: bool,
    only: str | None,
) -> None:
    from qreason.machine.hardware import prepare_process
    from qreason.recipe.load import load_recipe
    from qreason.run.session import Run

    recipe = load_recipe(name, overrides, seed)
    folder = out or Path("runs") / recipe.name
    prepare_process()
    opened = Run.open(recipe, folder, fresh=fresh, say=say)
    if opened.finished:
        say(f"{folder}: {opened.finished} of {len(recipe.steps)} steps are done, continuing (--fresh starts over)")
    if opened.finished < len(recipe.steps):
        make_it_fit(opened)
    if only:
        run_one(opened, only)
    else:
        for step in range(opened.finished, len(recipe.steps)):
            run_step(opened, step)
    show_report(opened, as_json)


def make_it_fit(run: Run) -> None:
    """Look at disk and GPU before anything is loaded, and cut batches down to what the GPU's memory holds."""
    _ = run.backend  # chosen before transformers is imported
    from qreason.planning.fit import fit
    from qreason.planning.memory import PLANNED, check_disk, find_card, peak_line, read_lengths
    from qreason.planning.phases import read_shape

    shape = read_shape(run.recipe.model.base)
    check_disk(run.recipe, shape, run.folder)
    card = find_card()
    if card is None or run.recipe.fit == "none" or not any(step.stage in PLANNED for step in run.recipe.steps):
        return
    lengths = read_lengths(run.recipe)
    run.recipe, changes = fit(run.recipe, shape, card, lengths)
    run.manifest["fit"] = changes
    for line in [*changes, peak_line(run.recipe, shape, card, lengths)]:
        say(f"memory: {line}")


def run_one(run: Run, stage: str) -> None:
    """The next step that is no evaluation, and the evaluations before it."""
    left = list(enumerate(run.recipe.steps))[run.finished :]
    following = next(((position, step) for position, step in left if step.stage != "evaluate"), None)
    if following is None:
        raise RunFolderError(f"{run.folder}: no {stage} step is left; --fresh starts over")
    position, step = following
    if step.stage != stage:
        raise RunFolderError(
            f"{run.folder}: the next step is {step.stage}, not {stage}; `qreason run` does them in order"
        )
    for number in range(run.finished, position + 1):
        run_step(run, number)


def run_step(run: Run, step: int) -> None:
    from qreason.run.lineage import write_lineage
    from qreason.stages import run_stage

    run.step = step
    start = time.perf_counter()
    artifact = run_stage(run.recipe.steps[step], run)
    seconds = time.perf_counter() - start
    run.finish_step(seconds)
    write_lineage(run)
    say(f"{run.recipe.steps[step].stage:<10} {seconds:5.0f} s  {artifact.summary}")


def show_report(run: Run, as_json: bool) -> None:
    from qreason.stages.evaluate import report

    numbers = report(run)
    if numbers is None:
        return
    if as_json:
        click.echo(json.dumps(numbers, indent=2))
        return
    from rich.console import Console

    from qreason.report.table import report_table

    Console().print(report_table(numbers))
    say(f"report: {run.folder / 'report.json'}  replies: {run.folder / 'replies.jsonl'}")


@main.command()
@click.argument("target", metavar="DIR|MODEL")
@click.option(
    "--task", type=click.Path(path_type=Path), required=True, help="JSONL, CSV or Parquet with prompts and references."
)
@click.option("--samples", type=click.IntRange(1), default=4, show_default=True, help="Replies a row for pass@1.")
@click.option("--rows", type=click.IntRange(1), help="Use only the first rows.")
@click.option("--pass-at", "pass_at", multiple=True, type=int, metavar="K", help="pass@K; repeatable.")
@click.option("--cons-at", "cons_at", multiple=True, type=int, metavar="K", help="Majority of K; repeatable.")
@click.option("--best-of", "best_of", multiple=True, type=int, metavar="N", help="Best of N; repeatable.")
@click.option("--best-by", default="likelihood", show_default=True, help="likelihood, total or a reward.")
@click.option("--beam", type=click.IntRange(1), metavar="WIDTH", help="Step-wise beam search, ranked by --best-by.")
@click.option("--right-by", default="correctness", show_default=True, help="correctness or math.")
@click.option("--direct", is_flag=True, help="Ask for the answer without reasoning.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
@one_line_errors
def evaluate(target: str, task: Path, beam: int | None, direct: bool, as_json: bool, **settings: Any) -> None:
    """Measure a run folder, a model folder or a Hub model on a task file."""
    from qreason.machine.hardware import prepare_process

    prepare_process()
    from qreason.recipe.settings import Evaluate
    from qreason.stages.evaluate import evaluate_task

    width = {"beam": {"width": beam, "by": settings["best_by"]}} if beam else {}
    asked = read_settings(Evaluate, {**settings, **width, "chain_of_thought": not direct})
    numbers = evaluate_task(target, task, asked)
    if as_json:
        click.echo(json.dumps(numbers, indent=2))
        return
    from rich.console import Console

    from qreason.report.table import passes_table, scaling_table

    console = Console()
    console.print(passes_table([numbers]))
    if scaled := scaling_table([numbers]):
        console.print("", scaled, sep="\n")
