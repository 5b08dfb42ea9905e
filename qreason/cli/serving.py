"""Commands that answer: a chat in the terminal, and an endpoint for other programs."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qreason.cli.base import main, open_finished, say
from qreason.errors import DataError, InputError

if TYPE_CHECKING:
    from qreason.serve.chat import Talk


@main.command()
@click.argument("target", metavar="DIR|MODEL")
@click.option("--votes", type=click.IntRange(1), metavar="K", help="Answer by the majority of K drawn replies.")
@click.option("--best-of", type=click.IntRange(1), metavar="N", help="The best of N drawn replies.")
@click.option("--by", default="likelihood", show_default=True, help="What ranks them: likelihood or a reward.")
@click.option("--single", is_flag=True, help="Each question by itself: the model does not see earlier ones.")
@click.option("--fold", is_flag=True, help="Hide the reasoning.")
@click.option("--web", is_flag=True, help="In a browser on this machine, two stages side by side.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="Of --web; 0: a free one.")
def chat(target: str, web: bool, port: int, fold: bool, **options: Any) -> None:
    """Talk to a run folder, a model folder or a Hub model; one question per line, /help lists commands."""
    if options["votes"] and options["best_of"]:
        raise InputError("--votes and --best-of: choose one")
    if web:
        chat_in_browser(target, port, options)
        return
    from qreason.run.checkpoint import open_checkpoint
    from qreason.serve.chat import Talk
    from qreason.serve.commands import Ended, is_command, obey

    try:
        talk = Talk(open_checkpoint(target), fold=fold, **options)
    except KeyboardInterrupt:
        say("qreason: stopped")
        sys.exit(1)
    if sys.stdin.isatty():
        say(f"{target}{talk.stage and f', stage {talk.stage}'}: /help lists commands, /quit or Ctrl-D ends")
    for line in lines():
        try:
            if is_command(line):
                say(obey(talk, line))
            else:
                answer(talk, line)
        except Ended as end:
            say(str(end))
            return
        except (DataError, InputError) as error:  # ends the turn, not the chat
            say(str(error))


def chat_in_browser(target: str, port: int, options: dict[str, Any]) -> None:
    """Show a page until Ctrl-C: the newest two stages of a run side by side, or a model alone."""
    from qreason.run.checkpoint import open_checkpoint
    from qreason.serve.chat import Talk
    from qreason.serve.endpoint import listen
    from qreason.serve.web import HOST, Desk, build_page, need_page, serve_page

    need_page()
    with suppress(KeyboardInterrupt), listen(HOST, port) as listening:
        checkpoint = open_checkpoint(target)
        stages = list(checkpoint.stages)
        desk = Desk(lambda: Talk(checkpoint, **options), stages[-2:] or [""])
        desk.open_talk()  # what it refuses, it refuses before there is a page
        page = build_page(desk, target, stages)
        click.echo(f"http://{HOST}:{listening.getsockname()[1]}")
        say("the page is on this machine alone; Ctrl-C ends it")
        serve_page(page, listening)
        for name in [*desk.pages]:
            desk.leave(name)


def answer(talk: Talk, question: str) -> None:
    """Ask and print: a terminal shows the reply as it grows, anything else gets its text."""
    from qreason.serve.paint import Painter

    terminal = sys.stdout.isatty()
    painter = Painter(lambda text, dim: click.secho(text, nl=False, dim=dim or None, reset=dim), fold=talk.fold)
    with stopped_by_ctrl_c(talk) if sys.stdin.isatty() else nullcontext():
        found = talk.ask(question, painter.show if terminal else lambda text: None)
    if terminal:
        painter.show(found.reply.text, last=True)
        click.echo()
    else:
        click.echo(found.reply.text)
    click.secho(f"({found.note})", err=True, dim=True)


@contextmanager
def stopped_by_ctrl_c(talk: Talk) -> Iterator[None]:
    """Within it, Ctrl-C stops the reply, between two tokens so that the model is left as it was."""
    earlier = signal.signal(signal.SIGINT, lambda number, frame: talk.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


def lines() -> Iterator[str]:
    """The non-empty lines of stdin; at a terminal with a prompt, editing and the earlier lines (by the arrow keys)."""
    if terminal := sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            if terminal:
                line = input("> ") + "\n"
            else:
                if sys.stdin.isatty():
                    click.echo("> ", err=True, nl=False)
                line = sys.stdin.readline()
        except EOFError:
            line = ""
        except KeyboardInterrupt:
            say("\n(/quit or Ctrl-D ends)")
            continue
        if not line:
            return
        if line.strip():
            yield line.strip()


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: from other machines too.")
@click.option("--token", envvar="QREASON_TOKEN", help="What clients must send [default: a new one]; or QREASON_TOKEN.")
@click.option("--gguf", "kind", metavar="TYPE", help="Which file of the export [default: the recommended].")
def serve(folder: Path, port: int, host: str, token: str | None, kind: str | None) -> None:
    """Answer OpenAI's clients with the exported model of RUN, until the command ends."""
    import secrets

    from qreason.export.engine import need_engine
    from qreason.serve.endpoint import find_export, open_endpoint

    run = open_finished(folder).disk
    need_engine()
    served, token = find_export(run, kind), token or secrets.token_urlsafe(24)
    if not served.verified:
        say(f"note: {served.file} was not verified when it was exported")
    with suppress(KeyboardInterrupt):
        server = open_endpoint(served, run.recipe, host=host, port=port, token=token)
        click.echo(f"base_url  {server.listening_address}/v1\napi_key   {token}\nmodel     {served.stage}")
        say(f"serving {served.file}; Ctrl-C ends it")
        threading.Event().wait()
