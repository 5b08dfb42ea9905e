"""Commands about rewards: score, judge calibrate, judge train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qreason.cli.base import main, one_line_errors, say, set_option
from qreason.errors import TrainingError

if TYPE_CHECKING:
    from qreason.run.session import Run


def open_quietly(recipe: str, overrides: tuple[str, ...], folder: Path = Path()) -> Run:
    """A run that reads nothing but the recipe and writes no run folder."""
    from qreason.machine.hardware import prepare_process
    from qreason.recipe.load import load_recipe
    from qreason.run.session import Run

    loaded = load_recipe(recipe, overrides)
    prepare_process()
    run = Run(loaded, folder, say)
    run.read_only = True
    return run


@main.command()
@click.argument("recipe")
@click.option("--replies", type=click.Path(path_type=Path), required=True, help="JSONL: id, prompt, reply, reference.")
@set_option
@click.option("--json", "as_json", is_flag=True, help="Print a line a reply, in order.")
@one_line_errors
def score(recipe: str, replies: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Score a file of replies with RECIPE's rewards."""
    run = open_quietly(recipe, overrides)
    from qreason.cli.score import score_replies

    rows = score_replies(run, replies)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    from rich.console import Console

    from qreason.report.table import parts_table

    Console().print(parts_table(rows, run.recipe.weights))


@main.group()
def judge() -> None:
    """Know the judge of a recipe, or train a better one."""


@judge.command()
@click.argument("recipe")
@click.option(
    "--labels", type=click.Path(path_type=Path), help="JSONL: reference, reply, label [default: data.labels]."
)
@set_option
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@one_line_errors
def calibrate(recipe: str, labels: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Measure RECIPE's judge: agreement with labels, biases, injections, speed."""
    run = open_quietly(recipe, overrides)
    from qreason.judge.calibration import fitness
    from qreason.training.judge import calibrate_judge, judge_settings

    figures = calibrate_judge(run, labels)
    fit, told = fitness(figures, judge_settings(run.recipe)[1])
    if as_json:
        click.echo(json.dumps({**figures, "fit": fit, "told": told}, indent=2))
        return
    show_judges({"judge": figures})
    click.echo(f"The judge is {told}.")


@judge.command()
@click.argument("recipe")
@click.option("--labels", type=click.Path(path_type=Path), required=True, help="JSONL: reference, reply, label.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the adapter [default: runs/NAME-judge].")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True)
@set_option
@one_line_errors
def train(recipe: str, labels: Path, out: Path | None, epochs: float, overrides: tuple[str, ...]) -> None:
    """Train a judge adapter on RECIPE's base, and compare it with the untrained judge."""
    run = open_quietly(recipe, overrides)
    from qreason.training.judge import train_judge

    run.folder = out or Path("runs") / f"{run.recipe.name}-judge"
    figures = train_judge(run, labels, epochs)
    show_judges({"untrained": figures["before"], "trained": figures["after"]})
    if figures["after"]["auc"] <= figures["before"]["auc"]:
        raise TrainingError(
            f"the trained judge is no better on the {figures['after']['pairs']} pairs kept back; do not use "
            f"{figures['adapter']}. More labelled pairs, or other epochs, may help"
        )
    say(f"in a recipe: rewards: {{judge: {{weight: 0.4, adapter: {figures['adapter']}}}}}")


def show_judges(judges: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console

    from qreason.report.table import judges_table

    Console().print(judges_table(judges))
