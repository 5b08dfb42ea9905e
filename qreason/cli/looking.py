"""Commands that look: before a run (recipes, init, validate, plan, data preview) and at what runs left (report, …)."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import click

from qreason.cli.base import main, open_finished, say, show
from qreason.cli.options import json_option, set_option
from qreason.errors import InputError, RunFolderError

WATCHED = 2.0
"""Seconds between two looks at a run."""


@main.command()
def recipes() -> None:
    """List the recipes that come with qreason."""
    from qreason.recipe.load import recipe_name, shipped_recipes

    files = {recipe_name(file): file for file in shipped_recipes()}
    width = max(map(len, files))
    for name, file in files.items():
        first = file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        click.echo(f"{name:<{width}} {first}")


@main.command()
@click.argument("name", default="quickstart")
@click.option(
    "--to",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Folder to write into [default: here].",
)
@click.option("--from", "own", metavar="FILE", help="Write a recipe for a data file, or for a data set on the Hub.")
@click.option("--model", default="qreason/tiny", show_default=True, help="With --from: a Hub id or a model's folder.")
@click.option("--force", is_flag=True, help="With --from: replace an earlier recipe.")
def init(name: str, to: Path, own: str | None, model: str, force: bool) -> None:
    """Copy the recipe NAME and its data here, ready to be changed; or write one for a file of your own."""
    if own:
        from qreason.cli.starting import write_recipe

        written = write_recipe(own, model, to, force=force)
        click.echo(written)
        say(f"now: qreason validate {written}, qreason run {written}")
        return
    import yaml

    from qreason.recipe.load import find_recipe, load_recipe, recipe_name, shipped_recipes

    source = find_recipe(name)
    keys = load_recipe(source).data.files
    files = [(source, to / (f"{recipe_name(source)}.yaml" if source in shipped_recipes() else source.name))]
    paths = yaml.safe_load(source.read_text(encoding="utf-8"))["data"]
    for path in (paths[key] for key in keys):
        # not the resolved path, which may be a file of the current folder in place of the one beside the recipe
        beside = (folder / path for folder in source.resolve().parents)
        files += [(file, to / path) for file in beside if file.is_file()][:1]
    if taken := [new for old, new in files if new.exists() and new.read_bytes() != old.read_bytes()]:
        raise InputError(f"{taken[0]} already exists and differs; choose another folder with --to")
    folder = to.resolve()
    if outside := [new for _, new in files if not new.exists() and not new.resolve().is_relative_to(folder)]:
        raise InputError(
            f"{source}: its data would be written to {outside[0]}, outside of {to}; put them beside the recipe, or "
            "give their whole path in it"
        )
    for origin, target in files:
        if not target.exists():  # else it is the same, perhaps the file itself
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin, target)
        click.echo(target)
    say(f"now: qreason run {files[0][1]}")


@main.command()
@click.argument("recipe")
@set_option
def validate(recipe: str, overrides: tuple[str, ...]) -> None:
    """Check RECIPE, its data, its rewards and what fits its base, without loading any model: all problems at once."""
    from qreason.data.examples import choose_prompt, describe, read_examples
    from qreason.data.pairs import read_pairs
    from qreason.planning.checks import Findings, examine
    from qreason.recipe.load import load_recipe
    from qreason.recipe.sections import is_hub_id
    from qreason.run.session import check_steps

    loaded, found = load_recipe(recipe, overrides), Findings()
    data = found.attempt(partial(choose_prompt, loaded.data, hub=False))
    loaded = loaded.model_copy(update={"data": data}) if data else loaded
    local = {use: source for use, source in loaded.data.all_sources.items() if not is_hub_id(source)}
    read = {
        use: found.attempt(partial(read_pairs, source, loaded.data))
        if use == "pairs"
        else found.attempt(partial(read_examples, source, loaded.data, use))
        for use, source in local.items()
    }
    counts = {use: len(rows) for use, rows in read.items() if rows is not None}
    pairs = read.pop("pairs", None) or []
    examples = {use: rows for use, rows in read.items() if rows is not None}
    if loaded.asks_for("consistent_steps") and examples.keys() == loaded.data.sources.keys():
        found.attempt(partial(check_steps, examples))
    looked = examine(loaded, examples, pairs, Path("runs") / loaded.name, fetch=False)
    if problems := list(dict.fromkeys([*found.problems, *looked.problems])):
        raise InputError("\n".join(problems))
    for note in looked.notes:
        say(f"note: {note}")
    steps = ", ".join(step.stage for step in loaded.steps)
    rows = ", ".join(f"{use} {count}" for use, count in counts.items())
    click.echo(f"{loaded.name}: {steps}\nbase {loaded.model.base}; rows: {rows or 'not read (Hub)'}")
    for use, read_rows in examples.items():
        click.echo(f"{use}: {describe(read_rows)}")
    asked = "your own (data.system)" if loaded.data.system else loaded.data.prompt or "helpdesk"
    with_own = sum(row.system not in (None, loaded.data.system) for one in examples.values() for row in one)
    click.echo(f"system prompt: {asked}{f'; {with_own} rows have their own' if with_own else ''}\nvalid")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN")
def report(folder: Path) -> None:
    """Write RUN/report.html: figures, curves, replies and origin of a run, as one page."""
    from qreason.report.build import write_report
    from qreason.report.page import write_page

    run = open_finished(folder)
    if not run.disk.evaluations():
        raise RunFolderError(f"{folder}: no evaluation is finished yet; `qreason run` continues it")
    click.echo(write_page(run, write_report(run.disk)))


@main.command(name="show")
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN")
def show_again(folder: Path) -> None:
    """Print the table of RUN/report.json again."""
    from qreason.machine.files import read_json
    from qreason.report.records import Shown
    from qreason.report.table import report_table

    cure = f"`qreason report {folder}` writes it anew"
    show(report_table(read_json(open_finished(folder).folder / "report.json", Shown, cure)))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--once", is_flag=True, help="Print it once, also while the run works.")
def watch(folder: Path, once: bool) -> None:
    """Show where RUN is, until it ends: step, phase, time left, newest figures, alarms."""
    from rich.live import Live

    from qreason.report.live import look, watched_view

    open_finished(folder)
    run = look(folder)
    with suppress(KeyboardInterrupt), Live(auto_refresh=False, transient=True) as live:
        while run.working and not once:
            live.update(watched_view(run), refresh=True)
            time.sleep(WATCHED)
            run = look(folder)
    show(watched_view(run))


@main.command()
@click.argument("folders", type=click.Path(path_type=Path), metavar="RUN RUN…", nargs=-1, required=True)
@json_option
def compare(folders: tuple[Path, ...], as_json: bool) -> None:
    """Compare the last evaluations of runs, each against the first, and their recipes."""
    from qreason.report.comparison import compare_runs
    from qreason.report.table import comparison_table

    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise InputError("compare takes two or more different run folders")
    for folder in folders:
        open_finished(folder)
    found = compare_runs(folders)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        show(comparison_table(found))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
def lineage(folder: Path) -> None:
    """Draw where a run's checkpoints and data come from."""
    from qreason.run.lineage import lineage, lineage_tree

    show(lineage_tree(lineage(open_finished(folder))))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False), default=Path("runs"))
@click.option("--clean", is_flag=True, help="Remove what is left over from work that was cut off.")
def runs(folder: Path, clean: bool) -> None:
    """List the runs in FOLDER [default: runs]: state and size."""
    from qreason.report.table import runs_table
    from qreason.run import listing

    found = listing.list_runs(folder)
    if not found:
        raise InputError(f"{folder}: no run in it")
    if clean:
        for run in found:
            listing.clean(run.path)
        say(f"{sum(run.leftover for run in found) / 1e6:.1f} MB of leftovers removed")
        for kept in (folder for run in found for folder in listing.unfinished(run.path)):
            say(f"kept: {kept} ({listing.size(kept) / 1e6:.1f} MB), from which the run continues")
        found = listing.list_runs(folder)
    show(runs_table(found))


@main.command()
def doctor() -> None:
    """Check whether this machine can train, what a run will use, and what to fix."""
    from qreason.cli.doctor import examine, findings_table, healthy

    findings = examine()
    show(findings_table(findings))
    if not healthy(findings):
        raise InputError("training cannot work here yet; the findings above say what to do")


@main.command()
@click.argument("recipe")
@click.option("--gpu", help="A card by name (t4, rtx3060) or its memory (6GiB) [default: what is here].")
@set_option
def plan(recipe: str, gpu: str | None, overrides: tuple[str, ...]) -> None:
    """Plan the memory of RECIPE on a GPU, or on this machine where it has none, phase by phase, without loading it."""
    from qreason.data.examples import choose_prompt
    from qreason.planning.chart import plan_table
    from qreason.planning.checks import check_export
    from qreason.planning.fit import plan
    from qreason.planning.memory import STAND_IN, find_card, is_only_known, read_card, read_lengths
    from qreason.planning.shapes import read_shape
    from qreason.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    card = read_card(gpu) if gpu else find_card()
    loaded = loaded.model_copy(update={"data": choose_prompt(loaded.data)})
    base = loaded.model.base
    show(plan_table(plan(loaded, read_shape(base), card, read_lengths(loaded))))
    if is_only_known(base):  # all of these can be exported
        say(f"{base} is not on this machine: its sizes are known, lengths are counted with {STAND_IN}'s vocabulary")
    else:
        check_export(loaded)


@main.group()
def data() -> None:
    """Look at data as the trainers will see it."""


@data.command()
@click.argument("recipe")
@set_option
@click.option("--rows", type=click.IntRange(1), default=2, show_default=True, help="Rows to show per source.")
def preview(recipe: str, overrides: tuple[str, ...], rows: int) -> None:
    """Show rendered prompts, token lengths, and what the loss covers."""
    from qreason.cli.preview import preview_source
    from qreason.data.examples import choose_prompt
    from qreason.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    loaded = loaded.model_copy(update={"data": choose_prompt(loaded.data)})
    for use in loaded.data.sources:
        show(preview_source(loaded, use, rows))
