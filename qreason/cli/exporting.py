"""The command that makes files for other programs of a finished run: export."""

from __future__ import annotations

from pathlib import Path

import click

from qreason.cli.base import main, one_line_errors, open_finished, say
from qreason.errors import InputError, RunFolderError, nearest
from qreason.recipe.settings import GGUF_TYPES, Export, Merge


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--gguf", default="f16,q8_0,q4_k_m", show_default=True, help="Types, separated by commas.")
@click.option("--ollama", is_flag=True, help="Write a Modelfile for the last of the types.")
@click.option("--rows", type=click.IntRange(1), default=100, show_default=True, help="Held-out rows for accuracy.")
@click.option("--no-verify", is_flag=True, help="Do not run the files in llama.cpp before they get their names.")
@one_line_errors
def export(run: Path, gguf: str, ollama: bool, rows: int, no_verify: bool) -> None:
    """Write the newest model of the run folder RUN as GGUF files, into RUN/export."""
    kinds = [kind.strip().lower() for kind in gguf.split(",") if kind.strip()]
    for kind in kinds or [gguf]:
        if kind not in GGUF_TYPES:
            raise InputError(
                f"--gguf {kind}: unknown type{nearest(kind, GGUF_TYPES)}; there are {', '.join(GGUF_TYPES)}"
            )
    settings = Export(gguf=kinds, ollama=ollama, verify=not no_verify, rows=rows)
    opened = open_finished(run)
    from qreason.stages.export import export_into, find_merged
    from qreason.stages.merge import merge_again

    try:
        merged = find_merged(opened)
    except RunFolderError:
        merged = merge_again(opened, Merge()).path
    artifact = export_into(run / "export", merged, settings, opened)
    say(f"export: {artifact.path}: {artifact.summary}")
