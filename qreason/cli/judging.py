"""Commands about rewards: score, judge calibrate, judge train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qreason.cli.base import main, say, show
from qreason.cli.options import json_option, set_option
from qreason.errors import DataError, TrainingError

if TYPE_CHECKING:
    from qreason.run.session import Session


def open_unwritten(recipe: str, overrides: tuple[str, ...], out: Path | None = None) -> Session:
    """A run of a recipe that writes no run folder."""
    from qreason.data.examples import choose_prompt
    from qreason.recipe.load import load_recipe
    from qreason.run.folder import RunFolder
    from qreason.run.session import Session

    loaded = load_recipe(recipe, overrides)
    loaded = loaded.model_copy(update={"data": choose_prompt(loaded.data, hub=False)})
    return Session(loaded, RunFolder.unwritten(out or Path("runs") / f"{loaded.name}-judge", loaded), say)


def score_replies(run: Session, file: Path) -> list[dict[str, Any]]:
    """`id`, `parts` and `total` of every row of a file with id, prompt, reply and reference, in order."""
    from qreason.data.examples import read_accepted
    from qreason.data.formats import read_file
    from qreason.types import Example, Reply

    replies, examples = [], []
    for place, row in read_file(file, run.recipe.data):
        for key in ("reply", "reference"):
            if not isinstance(row.get(key), str):
                raise DataError(f"{place}: '{key}' is missing or not text; a row has id, prompt, reply and reference")
        if not isinstance(row.get("tests"), str | None):
            raise DataError(f"{place}: 'tests' is {type(row['tests']).__name__}, not text")
        replies.append(Reply(row["reply"]))
        examples.append(
            Example(
                id=str(place if row.get("id") is None else row["id"]),
                prompt=str(row.get("prompt") or ""),
                reference=row["reference"],
                accepted=read_accepted(row, run.recipe.data.fields, place),
                tests=row.get("tests"),
                source=place,
            )
        )
    if not replies:
        raise DataError(f"{file}: no rows; give one reply per line")
    scores = run.rewards.scorer(replies, examples, Path.cwd())
    return [
        {"id": example.id, "parts": score.parts, "total": score.total}
        for example, score in zip(examples, scores, strict=True)
    ]


@main.command()
@click.argument("recipe")
@click.option(
    "--replies", type=click.Path(path_type=Path), required=True, help="A data file: id, prompt, reply, reference."
)
@set_option
@json_option
def score(recipe: str, replies: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Score a file of replies with RECIPE's rewards."""
    run = open_unwritten(recipe, overrides)
    rows = score_replies(run, replies)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    from qreason.report.table import parts_table

    show(parts_table(rows, run.recipe.weights))


@main.group()
def judge() -> None:
    """Measure the judge of a recipe, or train a better one."""


@judge.command()
@click.argument("recipe")
@click.option(
    "--labels", type=click.Path(path_type=Path), help="A data file: reference, reply, label [default: data.labels]."
)
@set_option
@json_option
def calibrate(recipe: str, labels: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Measure RECIPE's judge: agreement with labels, biases, injections, speed."""
    run = open_unwritten(recipe, overrides)
    from qreason.judge.calibration import fitness
    from qreason.training.judge import calibrate_judge, judge_settings

    figures = calibrate_judge(run, labels)
    fit, message = fitness(figures, judge_settings(run.recipe)[1])
    if as_json:
        click.echo(json.dumps({**figures, "fit": fit, "told": message}, indent=2))
        return
    from qreason.report.table import judges_table

    show(judges_table({"judge": figures}))
    click.echo(f"The judge is {message}.")


@judge.command()
@click.argument("recipe")
@click.option("--labels", type=click.Path(path_type=Path), required=True, help="A data file: reference, reply, label.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the adapter [default: runs/NAME-judge].")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True)
@set_option
def train(recipe: str, labels: Path, out: Path | None, epochs: float, overrides: tuple[str, ...]) -> None:
    """Train a judge adapter on RECIPE's base, and compare it with the untrained judge."""
    run = open_unwritten(recipe, overrides, out)
    from qreason.report.table import judges_table
    from qreason.training.judge import train_judge

    figures = train_judge(run, labels, epochs)
    show(judges_table({"untrained": figures["before"], "trained": figures["after"]}))
    if figures["after"]["auc"] <= figures["before"]["auc"]:
        raise TrainingError(
            f"the trained judge is no better on the {figures['after']['pairs']} held-out pairs; do not use "
            f"{figures['adapter']}. More labelled pairs, or other epochs, may help"
        )
    say(f"in a recipe: rewards: {{judge: {{weight: 0.4, adapter: {figures['adapter']}}}}}")
