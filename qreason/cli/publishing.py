"""Commands that bring a result out of its run folder: merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qreason.cli.base import main, one_line_errors, say
from qreason.cli.running import recipe_options, run_recipe
from qreason.errors import InputError, RunFolderError


def merge_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Settings of a merge; None where they are not given."""
    for option in reversed(
        (
            click.option("--dtype", help="float16 (default), bfloat16 or float32."),
            click.option("--base", help="Of a 4-bit run: trained (default: dequantized) or original."),
            click.option("--max-shard-size", help="Size of a weight file [default: 5GB]."),
            click.option("--adapter", "adapters", multiple=True, metavar="STAGE|DIR", help="Repeatable, in order."),
            click.option("--blend", help="Make the adapters one: linear, ties, dare_linear, dare_ties or cat."),
            click.option("--weights", metavar="W,W", help="Of the adapters in a blend."),
            click.option("--density", type=float, help="Share that ties and dare keep."),
            click.option("--rows", type=int, help="Held-out rows to compare on [default: 32]."),
        )
    ):
        command = option(command)
    return command


@main.command()
@recipe_options
@merge_options
@one_line_errors
def merge(
    recipe: str,
    out: Path | None,
    seed: int | None,
    overrides: tuple[str, ...],
    fresh: bool,
    as_json: bool,
    adapters: tuple[str, ...],
    weights: str | None,
    **settings: Any,
) -> None:
    """Run RECIPE up to its next merge step, or merge a run folder once more.

    A run folder given in place of RECIPE gets a folder merged-… for what is asked; --out names another one.
    """
    wanted = {key: value for key, value in settings.items() if value is not None}
    wanted |= {"adapters": list(adapters)} if adapters else {}
    wanted |= {"weights": read_weights(weights)} if weights else {}
    if not Path(recipe).is_dir():
        overrides += tuple(f"merge.{key}={json.dumps(value)}" for key, value in wanted.items())
        run_recipe(recipe, out, seed, overrides, fresh, as_json, only="merge")
        return
    if overrides or fresh or seed is not None:
        raise InputError("--set, --seed and --fresh are for a recipe; a run folder keeps the settings it was made with")
    merge_folder(Path(recipe), wanted, out, as_json)


def read_weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--weights {text}: write them as numbers with commas, for example 0.7,0.3") from None


def merge_folder(folder: Path, wanted: dict[str, Any], out: Path | None, as_json: bool) -> None:
    from pydantic import ValidationError

    from qreason.recipe import Merge

    try:
        merge_settings = Merge.model_validate(wanted)
    except ValidationError as error:
        problem = error.errors()[0]
        key = f"--{problem['loc'][0]}: ".replace("_", "-") if problem["loc"] else ""
        raise InputError(f"{key}{problem['msg'].removeprefix('Value error, ')}") from None
    opened = open_finished(folder)
    from qreason.stages.merge import merge_again

    artifact = merge_again(opened, merge_settings, out)
    say(f"merge     {artifact.summary}")
    click.echo((artifact.path.parent / "merge.json").read_text("utf-8") if as_json else artifact.path)


def open_finished(folder: Path) -> Any:
    """The run of a folder, to take from; RunFolderError where there is none."""
    from qreason.hardware import prepare_process
    from qreason.run import Run

    if not (folder / "manifest.json").is_file():
        raise RunFolderError(f"{folder}: not a run folder (no manifest.json); give the folder of a run")
    prepare_process()
    return Run.reopen(folder, say)
