"""Talking to a model: chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from qreason.cli.base import main, one_line_errors, say
from qreason.errors import DataError, InputError


def questions() -> Iterator[str]:
    """Lines of stdin that are not empty; with a prompt at a terminal."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            click.echo("> ", err=True, nl=False)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


@main.command()
@click.argument("target", metavar="DIR|MODEL")
@click.option("--votes", type=click.IntRange(1), metavar="K", help="Answer by the majority of K drawn replies.")
@click.option("--best-of", type=click.IntRange(1), metavar="N", help="The best of N drawn replies.")
@click.option("--by", default="likelihood", show_default=True, help="What ranks them: likelihood or a reward.")
@one_line_errors
def chat(target: str, votes: int | None, best_of: int | None, by: str) -> None:
    """Ask a run folder, a model folder or a Hub model; a line a question."""
    if votes and best_of:
        raise InputError("--votes and --best-of: choose one")
    from qreason.machine.hardware import prepare_process

    prepare_process()
    from qreason.run.checkpoint import open_checkpoint
    from qreason.serve.chat import Talk

    talk = Talk(open_checkpoint(target), votes=votes, best_of=best_of, by=by)
    for question in questions():
        try:
            answer = talk.ask(question)
        except DataError as error:  # too long a question ends the turn, not the talk
            say(str(error))
            continue
        click.echo(answer.reply.text)
        say(f"({answer.how}, {answer.tokens} tokens)")
