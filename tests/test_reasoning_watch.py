"""Reasoning is watched during GRPO, with an alarm where it decays while the reward rises."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from test_reasoning_rewards import FIX, ROW, STEPS, TAUGHT, TICKET, Words, reply

from qreason.inference.gain import ReasoningGain
from qreason.recipe.load import load_recipe
from qreason.rewards.reasoned import is_consistent
from qreason.rewards.steps import ReferenceSteps
from qreason.run.session import Session
from qreason.training.alarms import WINDOW, Alarm, Watchdog
from qreason.training.reasoning import EVERY, SAMPLE, Reasoned, ReasoningWatch, reasoning_metrics
from qreason.training.rollouts import Rollouts
from qreason.types import Example, Reply, Score

if TYPE_CHECKING:
    from conftest import RecipeWriter

FIXTURES = Path(__file__).parent / "fixtures"


# --- watching --------------------------------------------------------------------------------------


def test_without_the_reward_a_sample_of_every_few_steps_is_measured() -> None:
    words = Words()
    watch = ReasoningWatch(STEPS, ReasoningGain(lambda: words, "system", 99), rewarded=False)  # type: ignore[arg-type, return-value]
    examples = [Example(str(group), TICKET, FIX) for group in range(SAMPLE) for _ in range(4)]
    texts = [reply(f"Restart {place}") for place in range(len(examples))]
    for step in range(1, EVERY + 2):
        gains = [one.gain_nats for one in watch.look(step, texts, examples)]
        measured = [place for place, gain in enumerate(gains) if gain is not None]
        assert measured == (list(range(0, len(texts), 4)) if step in (1, EVERY + 1) else [])


def test_metrics_leave_out_what_was_not_measured() -> None:
    rollouts = [Reasoned(True, 2.0), Reasoned(False, None), Reasoned(None, -1.0), Reasoned()]
    assert dict(reasoning_metrics(rollouts)) == {"reasoning/consistent": 0.5, "reasoning/gain_nats": 0.5}
    assert dict(reasoning_metrics([Reasoned()])) == {}


def test_a_step_logs_the_gain_that_its_reward_measured_and_how_many_replies_are_consistent(
    write_recipe: RecipeWriter, workplace: Path
) -> None:
    row = {"id": "s0", "issue": TICKET, "resolution": FIX, "steps": TAUGHT.reasoning}
    (workplace / "sft.jsonl").write_text(json.dumps(row) + "\n")
    run = Session.open(load_recipe(write_recipe(("format: 0.1", "reasoning_gain: 0.1"))), workplace / "run")
    words = run.__dict__["generator"] = Words()
    rollouts = Rollouts(run, run.rewards, [ROW], workplace, stop=False)
    rollouts.replies = [
        reply("Jobs wait, so nothing reaches the port. Cause: spooler hangs."),
        reply("Restart the port. Cause: spooler hangs."),
        reply("Restart the"),
        Reply("No tags."),
    ]
    logged: dict[str, float] = {}
    rollouts.score([ROW] * 4, 3, logged.__setitem__)
    assert logged["reasoning/consistent"] == 0.5
    assert logged["reasoning/gain_nats"] == pytest.approx((2.0 + 4.0 + 4.0) / 3)
    assert len(words.calls) == 1  # what the reward measured is not measured again
    assert run.rewards.gain is not None
    assert run.rewards.gain.rows == 8  # a micro-batch


# --- the alarm -------------------------------------------------------------------------------------

WEIGHTS = {"correctness": 0.1, "format": 0.1, "rouge_l": 0.2, "length": 0.2, "judge": 0.4}


def read_fixture(name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(FIXTURES / f"{name}.jsonl.gz", "rt") as file:
        yield from map(json.loads, file)


@pytest.fixture(scope="module")
def recorded() -> list[tuple[list[Reply], list[Example], list[Score], list[Reasoned]]]:
    """Rollouts of steps 1 to 6 and 83 to 88 of the quickstart with seed 1, before its data were remade."""
    steps = ReferenceSteps(Example("", "", "", reasoning=row["reasoning"]) for row in read_fixture("decay_steps"))
    by_step: dict[int, Any] = {}
    for row in read_fixture("decay_rollouts"):
        one, example = Reply(row["reply"]), Example(row["id"], "", row["reference"])
        known = by_step.setdefault(row["step"], ([], [], [], []))
        found = (one, example, Score(row["total"], row["parts"]), Reasoned(is_consistent(steps, one, example)))
        for column, value in zip(known, found, strict=True):
            column.append(value)
    assert len(by_step) == 2 * WINDOW
    return list(by_step.values())


def alarms(steps: Sequence[Any], weights: dict[str, float] = WEIGHTS) -> list[Alarm]:
    dog = Watchdog(weights)
    return [alarm for number, step in enumerate(steps, 1) for alarm in dog.look(number, *step)]


def test_the_alarm_is_raised_on_the_quickstart_whose_steps_became_decoration(recorded: Any) -> None:
    (alarm,) = alarms(recorded)
    assert (alarm.sign, alarm.reward) == ("steps that do not fit", "judge")
    assert "76% of the replies at first, 34% now" in alarm.text
    assert "the reward rises" in alarm.text
    assert len(alarm.replies) == 3


def test_no_alarm_where_the_steps_still_fit(recorded: Any) -> None:
    """The early replies again, with the rewards of the late ones; and rewards that do not rise."""
    early, late = recorded[:WINDOW], recorded[WINDOW:]
    kept = [(*before[:2], after[2], before[3]) for before, after in zip(early, late, strict=True)]
    assert alarms([*early, *kept]) == []
    worse = [(*after[:2], before[2], after[3]) for before, after in zip(early, late, strict=True)]
    assert alarms([*early, *worse]) == []


def windows(early_gain: float, late_gain: float, late_total: float) -> list[Any]:
    """Twelve steps of 8 replies, their gain and total spread a little around these values."""
    steps = []
    for step in range(2 * WINDOW):
        gain, total = (early_gain, 0.5) if step < WINDOW else (late_gain, late_total)
        examples = [Example(f"{step}-{place}", TICKET, FIX) for place in range(8)]
        scores = [Score(total, {"judge": total + 0.01 * place}) for place in range(8)]
        reasoned = [Reasoned(None, gain + 0.1 * place) for place in range(8)]
        steps.append(([reply("a")] * 8, examples, scores, reasoned))
    return steps


def test_an_alarm_where_reasoning_helps_less_while_the_reward_rises() -> None:
    (alarm,) = alarms(windows(5.0, 1.0, 0.9), {"judge": 1.0})
    assert (alarm.sign, alarm.reward) == ("reasoning that does not help", "judge")
    assert "by 5.3 nats at first, 1.4 now" in alarm.text
    assert alarms(windows(5.0, 4.0, 0.9), {"judge": 1.0}) == []  # most of it is still there
    assert alarms(windows(5.0, 1.0, 0.5), {"judge": 1.0}) == []
