"""Reward hacking is noticed and named; honest learning raises no alarm."""

from __future__ import annotations

import random

from qreason.training.alarms import WINDOW, Alarm, Watchdog
from qreason.types import Example, Reply, Score

WEIGHTS = {"correctness": 0.1, "length": 0.2, "judge": 0.4}
STEPS = 30
WORDS = [
    "restart",
    "the",
    "spooler",
    "update",
    "driver",
    "replace",
    "cable",
    "check",
    "port",
    "reset",
    "password",
    "renew",
    "lease",
]


def play(text_of, parts_of) -> list[Alarm]:  # type: ignore[no-untyped-def]
    """The alarms of a run of STEPS steps, 8 groups of 4: text_of(share of the run done, rng), parts_of(text, share)."""
    rng, dog, alarms = random.Random(1), Watchdog(WEIGHTS), []
    for step in range(1, STEPS + 1):
        share = step / STEPS
        examples = [Example(f"{step}-{group}", "p", "Restart the spooler.") for group in range(8) for _ in range(4)]
        texts = [text_of(share, rng) for _ in examples]
        scores = [Score(1.0, parts_of(text, share, rng)) for text in texts]
        alarms += dog.look(step, [Reply(text) for text in texts], examples, scores)
    return alarms


def some_words(share: float, rng: random.Random) -> str:
    return f"<reasoning>{' '.join(rng.choices(WORDS, k=8))}</reasoning><answer>{rng.choice(WORDS)}</answer>"


def noise(rng: random.Random, middle: float) -> float:
    return min(1.0, max(0.0, rng.gauss(middle, 0.2)))


def test_a_part_that_rises_while_correctness_falls_is_named() -> None:
    alarms = play(
        some_words,
        lambda text, share, rng: {
            "correctness": 2.0 * (rng.random() > 0.2 + 0.7 * share),
            "length": noise(rng, 0.5),
            "judge": noise(rng, 0.2 + 0.7 * share),
        },
    )
    assert [(alarm.sign, alarm.reward) for alarm in alarms] == [("rising part", "judge")]
    assert "correctness falls" in alarms[0].text
    assert len(alarms[0].replies) == 3


def test_replies_that_only_grow_are_noticed_with_the_reward_that_pays_for_it() -> None:
    alarms = play(
        lambda share, rng: " ".join(rng.choices(WORDS, k=int(8 + 60 * share + rng.random() * 10))),
        lambda text, share, rng: {
            "correctness": 2.0 * (rng.random() > 0.6),
            "length": min(1.0, len(text.split()) / 60),
            "judge": noise(rng, 0.4),
        },
    )
    assert [(alarm.sign, alarm.reward) for alarm in alarms] == [("growing length", "length")]


def test_a_phrase_that_one_reward_loves_is_named() -> None:
    def text_of(share: float, rng: random.Random) -> str:
        return some_words(share, rng) + (" absolutely" if rng.random() < share else "")

    alarms = play(
        text_of,
        lambda text, share, rng: {
            "correctness": 2.0 * (rng.random() > 0.6),
            "length": noise(rng, 0.5),
            "judge": noise(rng, 0.9 if "absolutely" in text else 0.2),
        },
    )
    assert [(alarm.sign, alarm.reward) for alarm in alarms] == [("spreading phrase", "judge")]
    assert "'absolutely' spreads" in alarms[0].text


def test_a_part_that_is_given_up_for_free_is_named() -> None:
    """Tags get lost, and nothing else changes."""
    alarms = play(
        some_words,
        lambda text, share, rng: {
            "correctness": 2.0 * (rng.random() > 0.6),
            "length": 0.8 - 0.2 * (rng.random() < 2 * share),
            "judge": noise(rng, 0.4),
        },
    )
    assert [(alarm.sign, alarm.reward) for alarm in alarms] == [("lost part", "length")]
    assert "while the others do not" in alarms[0].text


def test_getting_worse_in_everything_is_no_hacking() -> None:
    alarms = play(
        some_words,
        lambda text, share, rng: {
            "correctness": 2.0 * (rng.random() > 0.4 + 0.5 * share),
            "length": noise(rng, 0.8 - 0.5 * share),
            "judge": noise(rng, 0.8 - 0.6 * share),
        },
    )
    assert alarms == []


def test_learning_to_be_right_raises_no_alarm() -> None:
    """Replies grow, a phrase of the references spreads and the judge rises, all because answers get right."""

    def text_of(share: float, rng: random.Random) -> str:
        right = rng.random() < share
        more = " ".join(rng.choices(WORDS, k=int(20 * share)))
        return f"<reasoning>{more}</reasoning><answer>{'restart the spooler' if right else rng.choice(WORDS)}</answer>"

    alarms = play(
        text_of,
        lambda text, share, rng: {
            "correctness": 2.0 * ("restart the spooler" in text),
            "length": noise(rng, 0.5),
            "judge": noise(rng, 0.9 if "restart the spooler" in text else 0.1),
        },
    )
    assert alarms == []


def test_a_run_that_goes_nowhere_raises_no_alarm() -> None:
    flat = play(
        some_words,
        lambda text, share, rng: {
            "correctness": 2.0 * (rng.random() > 0.6),
            "length": noise(rng, 0.5),
            "judge": noise(rng, 0.4),
        },
    )
    assert flat == []


def test_nothing_is_said_before_there_are_two_windows() -> None:
    dog = Watchdog(WEIGHTS)
    for step in range(1, 2 * WINDOW):
        reply, example = Reply("long " * step * 50), Example(str(step), "p", "r")
        parts = {"correctness": 0.0, "length": 1.0, "judge": 0.0}
        assert dog.look(step, [reply], [example], [Score(1.0, parts)]) == []
