"""Replies that are hard to judge: a fix bent so that it is wrong but looks right, or right but looks wrong."""

from __future__ import annotations

import random
from collections.abc import Callable

Twist = Callable[[str, str, random.Random], str]
"""(fix, fix of another cause, source of chance) -> reply"""


def lower(fix: str) -> str:
    return fix[0].lower() + fix[1:]


def negated(fix: str, other: str, rng: random.Random) -> str:
    return rng.choice(("Do not ", "Never ", "There is no need to ")) + lower(fix)


def one_word_changed(fix: str, other: str, rng: random.Random) -> str:
    words, foreign = fix.split(), [word for word in other.split() if len(word) > 4 and word not in fix]
    places = [place for place, word in enumerate(words) if place and len(word) > 4]
    if not places or not foreign:
        return other
    words[rng.choice(places)] = lower(rng.choice(foreign))
    return " ".join(words)


def half_of_each(fix: str, other: str, rng: random.Random) -> str:
    ours, theirs = fix.split(), other.split()
    return " ".join(ours[: len(ours) // 2] + theirs[len(theirs) // 2 :])


def beginning(fix: str, other: str, rng: random.Random) -> str:
    words = fix.split()
    return " ".join(words[: max(2, len(words) // 2)])


def both(fix: str, other: str, rng: random.Random) -> str:
    first, second = rng.sample((fix, other), 2)
    return f"{first}{rng.choice(('. ', ' or ', ' and '))}{second}"


def other_first(fix: str, other: str, rng: random.Random) -> str:
    return f"{other}. {fix}"


def misspelt(fix: str, other: str, rng: random.Random) -> str:
    """Two letters of a long word swapped."""
    words = fix.split()
    places = [place for place, word in enumerate(words) if len(word) > 5 and word.isalpha()]
    if places:
        place = rng.choice(places)
        at = rng.randrange(1, len(words[place]) - 2)
        word = words[place]
        words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def polite(fix: str, other: str, rng: random.Random) -> str:
    return rng.choice(("Please ", "First, ", "You should ", "To fix this, ")) + lower(fix)


def with_a_remark(fix: str, other: str, rng: random.Random) -> str:
    return fix + rng.choice((" and tell the user", ", then close the ticket", ". That should help", ". Try again then"))


WRONG: tuple[Twist, ...] = (negated, one_word_changed, half_of_each, beginning, both, other_first)
RIGHT: tuple[Twist, ...] = (misspelt, polite, with_a_remark)
