"""What rules decide about reference and response before a model is asked: equal texts, other names, another form."""

from __future__ import annotations

import re

from qreason.rewards.numbers import unify

WORD = re.compile(r"[^\W_]+(?:[.,:/\\@_+-]+[^\W_]+)*")
"""A word, or several joined without a space: `b.costa`, `HR-Admins`, `10.0.0.1`, `6,5`."""
JOINT = re.compile(r"[./\\@_:]|-(?=[^\W\d_]*[A-Z\d])")
"""What makes joined words an identifier: `b.costa`, `PC-Kite`; but not `built-in`."""
PART = re.compile(r"\d+(?:[.,:]\d+)*|[^\W\d_]+")
"""The numbers and letters of a word: `70GB` is 70 and GB."""
START = re.compile(r"(?:^|[.!?:]\s|\n)\W*$")
"""What stands before the first word of a sentence, whose capital letter says nothing."""
END = re.compile(r"[.!?…]+(?=\s|$)|[。！？]|\n")
MARKS = re.compile(r"[<>{}\[\]|=#*`~^$\\]")
"""Marks of tags, code and headings."""
LONG = 2
"""A response of more than so many times the reference's words is no wording of it, short references aside."""
SPARE = 6
"""Words that a response may have beyond that."""


def decide(reference: str, response: str) -> float | None:
    """1 for equal texts, 0 for a response with other names or numbers, or of another form; None: ask a model."""
    reference, response = unify(reference), unify(response)
    if plain(reference) == plain(response):
        return 1.0
    same = facts(reference) <= words(response) and facts(response) <= words(reference)
    return None if same and has_form(reference, response) else 0.0


def plain(text: str) -> str:
    """A text without capital letters, runs of spaces and the final period."""
    return " ".join(text.casefold().split()).rstrip(".")


def has_form(reference: str, response: str) -> bool:
    """Whether a response looks like another wording: words, no more sentences, no new marks, not much longer."""
    return (
        0 < len(sentences(response)) <= max(1, len(sentences(reference)))
        and set(MARKS.findall(response)) <= set(MARKS.findall(reference))
        and len(response.split()) <= LONG * len(reference.split()) + SPARE
    )


def sentences(text: str) -> list[str]:
    return [part for part in END.split(text) if WORD.search(part)]


def facts(text: str) -> set[str]:
    """Numbers, identifiers and names: what cannot be said in other words. Names are capitalised within a sentence."""
    found = set()
    for match in WORD.finditer(text):
        word = match[0]
        if JOINT.search(word) and not number(word):
            found.add(word.casefold())
            continue
        parts = PART.findall(word)
        found.update(part for part in parts if number(part))
        if is_name(word) and not START.search(text[: match.start()]):
            found.update(part.casefold() for part in parts)
    return found


def words(text: str) -> set[str]:
    """All that a text names: its words, and the numbers and letters of each."""
    found = [match[0].casefold() for match in WORD.finditer(text)]
    return {*found, *(part for word in found for part in PART.findall(word))}


def number(word: str) -> bool:
    return word[0].isdigit() and PART.fullmatch(word) is not None


def is_name(word: str) -> bool:
    """A capital letter and a small one: `Bremen`, `ConfigMap`; an abbreviation such as VPN may be left out."""
    return word[0].isupper() and any(letter.islower() for letter in word)
