"""What a rule decides about reference and response before a model is asked: equal texts, other names or numbers."""

from __future__ import annotations

import re

from qreason.rewards.numbers import unify

WORD = re.compile(r"[^\W_]+(?:[.,:/\\@_+-]+[^\W_]+)*")
"""A word, or several joined without a space: `b.costa`, `HR-Admins`, `10.0.0.1`, `6,5`."""
JOINT = re.compile(r"[./\\@_:]|-(?=[^\W\d_]*[A-Z\d])")
"""What makes joined words an identifier: `b.costa`, `PC-Kite`; but not `built-in`."""
PART = re.compile(r"\d+(?:[.,:]\d+)*|[^\W\d_]+")
"""The numbers and letters of a word: `70GB` is 70 and GB."""
SENTENCE = re.compile(r"(?:^|[.!?:]\s|\n)\W*$")
"""What stands before the first word of a sentence, whose capital letter says nothing."""


def decide(reference: str, response: str) -> float | None:
    """1 for equal texts, 0 for a response with other names or numbers or without words; None: ask a model."""
    reference, response = unify(reference), unify(response)
    if plain(reference) == plain(response):
        return 1.0
    told = words(response)
    if not told or not facts(reference) <= told or not facts(response) <= words(reference):
        return 0.0
    return None


def plain(text: str) -> str:
    """A text without capital letters, runs of spaces and the final period."""
    return " ".join(text.casefold().split()).rstrip(".")


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
        if is_name(word) and not SENTENCE.search(text[: match.start()]):
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
