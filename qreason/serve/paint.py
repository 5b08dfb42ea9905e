"""A reply in a terminal while it grows: its reasoning dim or folded, and never a control character."""

from __future__ import annotations

import re
from collections.abc import Callable

from qreason.rewards.tags import TAGS

OPENING, CLOSING = ("<reasoning>", "<think>"), ("</reasoning>", "</think>")
MARKS = (*TAGS, "<think>", "</think>")
MARK = re.compile(f"({'|'.join(map(re.escape, MARKS))})")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Such as the start of an escape sequence, by which a reply could change the terminal."""
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
            self.write(CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", piece), self.thinking or piece in MARKS)
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
