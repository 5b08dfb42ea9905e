"""The command that makes files for other programs of a finished run: export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qreason.cli.base import main, one_line_errors, open_finished, say
from qreason.cli.options import read_settings, settings_options
from qreason.errors import RunFolderError
from qreason.recipe.settings import Export, Merge


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@settings_options(Export, "gguf", "ollama", "rows", "verify")
@one_line_errors
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
