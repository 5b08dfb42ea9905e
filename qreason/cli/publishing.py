"""Commands that make files of a finished run, publish them, or fetch an adapter: merge, export, push, pull."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qreason.cli.base import main, open_finished, say
from qreason.cli.options import read_settings, recipe_options, settings_options
from qreason.cli.running import run_and_say, run_recipe
from qreason.errors import InputError, RunFolderError
from qreason.recipe.settings import Export, Merge

MERGE_OPTIONS = ("dtype", "base", "max_shard_size", "blend", "weights", "density", "rows")


@main.command()
@recipe_options
@settings_options(Merge, *MERGE_OPTIONS, adapters="adapter")
def merge(
    recipe: str,
    out: Path | None,
    seed: int | None,
    overrides: tuple[str, ...],
    fresh: bool,
    as_json: bool,
    mirror: str | None,
    **settings: Any,
) -> None:
    """Run RECIPE up to its next merge step, or merge a run folder once more.

    A run folder given in place of RECIPE gets a folder merged-… for what is asked; --out names another one.
    """
    wanted = read_settings(Merge, settings, adapters="adapter")
    if not Path(recipe).is_dir():
        given = wanted.model_dump(mode="json", exclude_unset=True)
        overrides += tuple(f"merge.{key}={json.dumps(value)}" for key, value in given.items())
        run_recipe(
            recipe,
            out=out,
            seed=seed,
            overrides=overrides,
            fresh=fresh,
            as_json=as_json,
            mirror=mirror,
            only="merge",
        )
        return
    if overrides or fresh or mirror or seed is not None:
        raise InputError(
            "--set, --seed, --fresh and --mirror are for a recipe; a run folder keeps the settings it was made with"
        )
    opened = open_finished(Path(recipe))
    from qreason.stages.merge import merge_again

    artifact = merge_again(opened, wanted, out)
    say(f"merge     {artifact.summary}")
    click.echo((artifact.path.parent / "merge.json").read_text("utf-8") if as_json else artifact.path)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@settings_options(Export, "gguf", "ollama", "rows", "verify")
def export(run: Path, **given: Any) -> None:
    """Write the newest model of the run folder RUN as GGUF files, into RUN/export."""
    settings = read_settings(Export, given)
    opened = open_finished(run)
    from qreason.stages.export import export_into, find_merged
    from qreason.stages.merge import merge_again

    try:
        merged = find_merged(opened)
    except RunFolderError:
        merged = merge_again(opened, Merge()).path
    artifact = export_into(run / "export", merged, settings, opened)
    say(f"export: {artifact.path}: {artifact.summary}")


@main.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--to", required=True, metavar="USER/NAME", help="The repository on the Hub.")
@click.option(
    "--include", multiple=True, type=click.Choice(["adapter", "merged", "gguf"]), help="Repeatable [default: adapter]."
)
@click.option("--public", is_flag=True, help="Make the repository public; it is private without this.")
@click.option("--yes", is_flag=True, help="Publish without asking.")
@click.option("--dry-run", is_flag=True, help="Print the files and the card, and push nothing.")
def push(run: Path, to: str, include: tuple[str, ...], public: bool, yes: bool, dry_run: bool) -> None:
    """Push a run's adapter, merged model or GGUF files to the Hub, with a card of its own numbers."""
    opened = open_finished(run)
    from qreason.hub.access import check_name
    from qreason.hub.push import Pusher, collect

    files = collect(opened, check_name(to), include or ("adapter",))
    for file in files:
        say(f"{file.upload_info.size:>14,}  {file.path_in_repo}")
    if dry_run:
        click.echo(files[0].path_or_fileobj)  # the card
        return
    pusher = Pusher(to, public=public, say=say)
    how = "PUBLIC, visible to everyone" if public else "private"
    if not yes:
        try:
            click.confirm(f"Push {len(files)} files to {to} ({how})?", abort=True, err=True)
        except click.Abort:
            raise InputError("not pushed: it was not confirmed; --yes pushes without asking") from None
    click.echo(pusher.push(files))
    seen = "public" if pusher.public else "private"
    say(f"pushed {len(files)} files ({seen}); sizes and hashes on the Hub are those of the local files")


@main.command()
@click.argument("repo", metavar="USER/NAME|DIR")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder [default: runs/NAME].")
@click.option("--base", help="The base, where the adapter names none, or where it has another name here.")
@click.option(
    "--heldout",
    type=click.Path(path_type=Path, resolve_path=True),
    help="Held-out rows, which an export needs for its checks.",
)
@click.option("--revision", help="A branch, tag or commit.")
def pull(repo: str, out: Path | None, base: str | None, heldout: Path | None, revision: str | None) -> None:
    """Copy an adapter from the Hub, or from the folder DIR, into a run folder, to merge, measure or export it."""
    from qreason.recipe.load import absolute
    from qreason.run.session import Session
    from qreason.stages.pull import recipe_of

    recipe = recipe_of(absolute(repo), revision, absolute(base) if base else None, heldout, say)
    opened = Session.open(recipe, out or Path("runs") / recipe.name, say=say)
    if not opened.disk.finished:
        run_and_say(opened, 0)
    click.echo(opened.folder)
