"""A reply while it grows, in a terminal or a page: reasoning dim or folded, no control character, no markup."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

from qreason.errors import visible
from qreason.rewards.tags import TAGS

OPENING, CLOSING = ("<reasoning>", "<think>"), ("</reasoning>", "</think>")
MARKS = (*TAGS, "<think>", "</think>")
MARK = re.compile(f"({'|'.join(map(re.escape, MARKS))})")
Write = Callable[[str, bool], None]
"""Gets a piece of text, and whether it is dim."""


class Painter:
    """Writes what is new of a reply each time it is shown."""

    def __init__(self, write: Write, *, fold: bool) -> None:
        self.write, self.fold = write, fold
        self.shown, self.thinking = "", False
        self.hidden = ""
        """The reasoning that was not written."""

    def show(self, text: str, *, last: bool = False) -> None:
        """The reply as far as it is there; what may still change at its end waits, unless it is the `last` time."""
        ready = text if last else settled(text)
        if not ready.startswith(self.shown):
            return
        for piece in MARK.split(ready[len(self.shown) :]):
            if piece:
                self.paint(piece)
        self.shown = ready
        if last:
            self.unfold()

    def paint(self, piece: str) -> None:
        if piece in OPENING:
            self.thinking = True
        if self.fold and (self.thinking or piece in CLOSING):
            self.hidden += "" if piece in MARKS else piece
        else:
            self.write(visible(piece), self.thinking or piece in MARKS)
        if piece in CLOSING:
            self.thinking = False
            self.unfold()

    def unfold(self) -> None:
        """Say how much reasoning was hidden."""
        if self.hidden:
            self.write(f"[reasoning: {len(self.hidden.split())} words]", True)
            self.hidden = ""


def settled(text: str) -> str:
    """Without characters that are not complete, and without the start of a tag, at the end."""
    text = text.rstrip("\ufffd")
    start = text.rfind("<")
    return text[:start] if start >= 0 and any(mark.startswith(text[start:]) for mark in MARKS) else text


def as_html(reply: str) -> str:
    """A reply for a page, in which none of its characters is markup: its reasoning folded, its tags dim."""
    parts, reasoning = list[str](), None
    for piece in filter(None, MARK.split(reply)):
        if piece in OPENING and reasoning is None:
            reasoning = ""
        elif piece in CLOSING and reasoning is not None:
            parts.append(folded(reasoning))
            reasoning = None
        elif reasoning is not None:
            reasoning += piece
        else:
            parts.append(f'<span class="dim">{escape(piece)}</span>' if piece in MARKS else escape(piece))
    parts += [] if reasoning is None else [folded(reasoning)]
    return "".join(parts).replace("</details>\n", "</details>")


def folded(reasoning: str) -> str:
    words = len(reasoning.split())
    return f"<details><summary>reasoning: {words} words</summary>{escape(reasoning.strip())}</details>"


def escape(text: str) -> str:
    return html.escape(visible(text))
