"""A page in the browser, for this machine alone: the stages of a run side by side, each with the same messages."""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from qreason.errors import DataError, InputError, MissingExtra
from qreason.serve.chat import Talk
from qreason.serve.paint import as_html, escape, settled

if TYPE_CHECKING:
    import gradio

HOST = "127.0.0.1"
LOOK = """
.prose.turns {white-space: pre-wrap; overflow-wrap: anywhere; max-height: 65vh; overflow-y: auto}
.turns .asked {font-weight: 600; margin: 1em 0 .3em} .turns .dim, .turns details {opacity: .65}
"""


def need_page() -> None:
    """MissingExtra without the extra `web`."""
    if importlib.util.find_spec("gradio") is None:
        raise MissingExtra("gradio is missing: pip install 'qreason[web]'")
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}


@dataclass
class Side:
    """A conversation, and the finished turns that are shown of it."""

    talk: Talk
    turns: str = ""

    def ask(self, question: str) -> Iterator[str]:
        """What is shown of the conversation, each time there is more of the reply; Talk.stop() ends it."""
        asked, texts = f'<div class="asked">{escape(question)}</div>', SimpleQueue[str]()
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(self.talk.ask, question, texts.put)
            try:
                while not made.done():
                    with suppress(Empty):
                        yield self.turns + asked + as_html(settled(texts.get(timeout=0.1)))
            finally:  # also where the page was closed
                self.talk.stop()
        try:
            answer = made.result()
            reply, note = as_html(answer.reply.text), answer.note
        except (DataError, InputError) as error:  # ends the turn, not the page
            reply, note = "", escape(str(error))
        self.turns += f'{asked}{reply}<div class="dim">({note})</div>'
        yield self.turns


@dataclass
class Desk:
    """The sides of every open page; they share one model, which makes one reply at a time."""

    open_talk: Callable[[], Talk]
    stages: Sequence[str]
    """Those that are shown first, from left to right; one empty name for a model without stages."""
    pages: dict[str, list[Side]] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)

    def restart(self, page: str, *stages: str) -> list[str]:
        """A new conversation on every side, after these stages: what each side shows."""
        self.stop(page)
        self.pages[page] = [Side(self.open_talk()) for _ in stages]
        for side, stage in zip(self.pages[page], stages, strict=True):
            if stage:
                side.talk.go_to(stage)
        return [""] * len(stages)

    def send(self, page: str, question: str) -> Iterator[list[str]]:
        """What the sides show, while they answer one after the other."""
        if page not in self.pages:
            self.restart(page, *self.stages)
        sides = self.pages[page]
        self.stopped.discard(page)
        shown = [side.turns for side in sides]
        for number, side in enumerate(sides):
            if question.strip() and page not in self.stopped:
                for shown[number] in side.ask(question.strip()):
                    if self.pages.get(page) is sides:  # and no new conversation
                        yield [*shown]

    def stop(self, page: str) -> None:
        """End the reply that is being made, and make no further one."""
        self.stopped.add(page)
        for side in self.pages.get(page, ()):
            side.talk.stop()

    def leave(self, page: str) -> None:
        self.stop(page)
        self.pages.pop(page, None)


def build_page(desk: Desk, title: str, stages: list[str]) -> gradio.Blocks:
    """A column per side, one message for all."""
    import gradio as gr

    with gr.Blocks(title=f"{title} – qreason", analytics_enabled=False, fill_width=True) as page:
        name, asked = gr.State(lambda: secrets.token_hex(8), delete_callback=desk.leave), gr.State("")
        gr.HTML(f"<b>{escape(title)}</b>: one message, every side answers; another stage begins a new conversation")
        chosen, shown = [], []
        with gr.Row():
            for stage in desk.stages:
                with gr.Column(min_width=280):
                    chosen.append(gr.Radio(stages, value=stage, label="stage", visible=bool(stages)))
                    shown.append(gr.HTML(elem_classes="turns", autoscroll=True))
        message = gr.Textbox(label="message", placeholder="Enter sends it", autofocus=True)
        with gr.Row():
            send, stop, new = gr.Button("Send", variant="primary"), gr.Button("Stop"), gr.Button("New conversation")

        def show(texts: Sequence[str]) -> dict[gr.HTML, str]:
            return dict(zip(shown, texts, strict=True))

        own: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([message.submit, send.click], lambda text: ("", text), message, [message, asked], **own).then(
            lambda *given: (yield from map(show, desk.send(*given))), [name, asked], shown, **own
        )
        stop.click(desk.stop, name, queue=False, **own)
        restarts = [new.click, *(one.input for one in chosen)]
        gr.on(restarts, lambda *given: show(desk.restart(*given)), [name, *chosen], shown, queue=False, **own)
    return page


def serve_page(page: gradio.Blocks, listening: socket.socket) -> None:
    """Answer browsers on this machine until Ctrl-C; requests by another name than this machine's are refused."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])  # no other name that leads here
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    gr.mount_gradio_app(app, page, "/", server_name=HOST, footer_links=[], ssr_mode=False, theme=theme, css=LOOK)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run([listening])
