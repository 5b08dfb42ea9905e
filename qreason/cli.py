"""The command line: parse, call one stage, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qreason import __version__
from qreason.errors import InputError, QReasonError, RunFolderError

if TYPE_CHECKING:
    from qreason.recipe import Recipe
    from qreason.run import Run


def say(line: str) -> None:
    """A line for the person at the terminal; stdout is kept for results."""
    click.echo(line, err=True)


def one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of ours become one clear line and their exit code, without a traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except QReasonError as error:
            say(f"qreason: {error}")
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            say("qreason: stopped; run the same command again to continue after the last finished stage")
            sys.exit(1)

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__)
def main() -> None:
    """Train, judge and measure a small model that reasons, on one GPU or a laptop."""


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What every command on a recipe takes."""
    for option in reversed(
        (
            click.argument("recipe"),
            click.option("--out", type=click.Path(path_type=Path), help="Run folder [default: runs/NAME]."),
            click.option("--seed", type=click.IntRange(0), help="In place of the recipe's seed."),
            click.option(
                "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field; repeatable."
            ),
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
stage_command("merge", "Run RECIPE up to its next merge step.")


def run_recipe(
    name: str,
    out: Path | None,
    seed: int | None,
    overrides: tuple[str, ...],
    fresh: bool,
    as_json: bool,
    only: str | None,
) -> None:
    from qreason.hardware import prepare_process
    from qreason.recipe import load_recipe
    from qreason.run import Run

    recipe = load_recipe(name, overrides, seed)
    folder = out or Path("runs") / recipe.name
    prepare_process()
    opened = Run.open(recipe, folder, fresh=fresh, say=say)
    if opened.finished:
        say(f"{folder}: {opened.finished} of {len(recipe.steps)} steps are done, continuing (--fresh starts over)")
    if only:
        run_one(opened, only)
    else:
        for step in range(opened.finished, len(recipe.steps)):
            run_step(opened, step)
    show_report(opened, as_json)


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
    from qreason.stages import run_stage

    run.step = step
    start = time.perf_counter()
    artifact = run_stage(run.recipe.steps[step], run)
    seconds = time.perf_counter() - start
    run.finish_step(seconds)
    say(f"{run.recipe.steps[step].stage:<9} {seconds:5.0f} s  {artifact.summary}")


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
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
@one_line_errors
def evaluate(target: str, task: Path, samples: int, rows: int | None, as_json: bool) -> None:
    """Measure a run folder, a model folder or a Hub model on a task file."""
    from qreason.hardware import prepare_process

    prepare_process()
    from qreason.stages.evaluate import evaluate_task

    numbers = evaluate_task(target, task, samples=samples, rows=rows)
    if as_json:
        click.echo(json.dumps(numbers, indent=2))
        return
    from rich.console import Console

    from qreason.report.table import passes_table

    Console().print(passes_table([numbers]))


@main.command()
@one_line_errors
def recipes() -> None:
    """List the recipes that come with qreason."""
    from qreason.recipe import shipped_recipes

    for file in shipped_recipes():
        first = file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        click.echo(f"{file.stem:<16} {first}")


@main.command()
@click.argument("name", default="quickstart")
@click.option("--to", type=click.Path(path_type=Path), default=Path(), help="Folder to copy into [default: here].")
@one_line_errors
def init(name: str, to: Path) -> None:
    """Copy the recipe NAME and its data here, ready to be changed."""
    import yaml

    from qreason.recipe import find_recipe, load_recipe

    source = find_recipe(name)
    load_recipe(source)
    files = [(source, to / source.name)]
    paths = yaml.safe_load(source.read_text(encoding="utf-8"))["data"]
    for path in (paths[key] for key in ("sft", "prompts", "heldout") if paths.get(key)):
        # not the resolved path: that prefers a file of the current folder to the one beside the recipe
        beside = (folder / path for folder in source.resolve().parents)
        files += [(file, to / path) for file in beside if file.is_file()][:1]
    if taken := [new for old, new in files if new.exists() and new.read_bytes() != old.read_bytes()]:
        raise InputError(f"{taken[0]} is there already and differs; choose another folder with --to")
    for origin, target in files:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, target)
        click.echo(target)
    say(f"now: qreason run {files[0][1]}")


def load_all(recipe: Recipe) -> dict[str, int]:
    """Read the local JSONL files of a recipe: data key -> rows."""
    from qreason import data

    return {
        use: len(data.read(source, recipe.data, use))
        for use, source in recipe.data.sources.items()
        if source.endswith(".jsonl")
    }


@main.command()
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field; repeatable.")
@one_line_errors
def validate(recipe: str, overrides: tuple[str, ...]) -> None:
    """Check RECIPE and its JSONL files, without loading any model."""
    from qreason.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    counts = load_all(loaded)
    steps = ", ".join(step.stage for step in loaded.steps)
    rows = ", ".join(f"{use} {count}" for use, count in counts.items())
    click.echo(f"{loaded.name}: {steps}\nbase {loaded.model.base}; rows: {rows or 'not read (Hub)'}\nvalid")


@main.group()
def data() -> None:
    """Look at data as the trainers will see it."""


@data.command()
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field; repeatable.")
@click.option("--rows", type=click.IntRange(1), default=2, show_default=True, help="Rows to show of each source.")
@one_line_errors
def preview(recipe: str, overrides: tuple[str, ...], rows: int) -> None:
    """Show rendered prompts, token lengths, and what the loss covers."""
    from qreason.hardware import prepare_process

    prepare_process()
    from rich.console import Console

    from qreason.preview import preview_source
    from qreason.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    console = Console()
    for use in loaded.data.sources:
        console.print(preview_source(loaded, use, rows))
