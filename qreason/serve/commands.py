"""What a line of a chat that begins with a slash does."""

from __future__ import annotations

import re

from qreason.errors import InputError, nearest
from qreason.serve.chat import Talk

COMMANDS = {
    "stage": ("NAME", "answer as after another stage of the run (base, 01-sft, …), in a new conversation"),
    "votes": ("K", "the majority of K drawn replies; 1: one greedy reply again"),
    "best": ("N", "the best of N drawn replies; 1: one greedy reply again"),
    "system": ("TEXT", "another system prompt, in a new conversation; without TEXT that of training"),
    "fold": ("", "hide the reasoning, or show it again"),
    "new": ("", "a new conversation"),
    "help": ("", "this list"),
    "quit": ("", "end, as Ctrl-D does; Ctrl-C stops a reply"),
}
"""Name -> what follows it, and what it does."""
LINE = re.compile(r"/(\w*)(?:\s+(.*))?", re.DOTALL)
"""A path, such as /etc/hosts, is no command."""
MOST_REPLIES = 1000


class Ended(Exception):  # noqa: N818
    """The chat is over; the message says why."""


def is_command(line: str) -> bool:
    return LINE.fullmatch(line) is not None or line.lower() in ("quit", "exit")


def obey(talk: Talk, line: str) -> str:
    """Do what a command says, and what to tell about it; Ended, or InputError for what is no command."""
    if not (found := LINE.fullmatch(line)):
        raise Ended(f"ended: '{line}' by itself is taken for a command")
    name, value = found[1], (found[2] or "").strip()
    match name:
        case "stage":
            if not value:
                return f"stage {talk.stage or '-'}; there are {', '.join(talk.checkpoint.stages) or 'none'}"
            talk.go_to(value)
            return f"stage {value}, a new conversation"
        case "votes" | "best":
            number = read_count(name, value)
            count = number if number > 1 else None
            talk.draw(**{"votes" if name == "votes" else "best_of": count})
            return "one greedy reply" if count is None else f"{'vote' if name == 'votes' else 'best'} of {number}"
        case "system":
            talk.instruct(value or None)
            return f"a new conversation; system prompt: {talk.system or 'none'}"
        case "fold":
            talk.fold = not talk.fold
            return f"reasoning is {'hidden' if talk.fold else 'shown'}"
        case "new":
            talk.forget()
            return "a new conversation"
        case "help":
            width = max(len(f"/{one} {more}") for one, (more, _) in COMMANDS.items())
            return "\n".join(f"{f'/{one} {more}':<{width}}  {what}" for one, (more, what) in COMMANDS.items())
        case "quit":
            raise Ended("ended")
    close = nearest(f"/{name}", [f"/{one}" for one in COMMANDS])
    raise InputError(f"/{name}: no such command{close}; /help lists them")


def read_count(name: str, value: str) -> int:
    if not value.isascii() or not value.isdecimal() or not 1 <= int(value[:9]) <= MOST_REPLIES:
        raise InputError(f"/{name} takes a number of replies from 1 to {MOST_REPLIES}, as in /{name} 8")
    return int(value)
