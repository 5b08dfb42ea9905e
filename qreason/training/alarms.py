"""Is a reward being gamed? What rollouts of the first and of the last steps show.

The policy is trained on the reward, so the reward rises in any case; it is gamed when what we want does not rise with
it. Signs, each from equally many early and late rollouts: a part of the reward rises while correctness falls; a part
is given up while the others do not fall; replies grow while correctness does not; a phrase that the references do not
have spreads over the replies while correctness does not rise; reasoning decays while the reward rises: its steps no
longer fit what it concludes, or it helps less to predict the reference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qreason.training.reasoning import Reasoned
from qreason.training.traits import (
    Rollout,
    Trait,
    average,
    centred,
    change,
    consistency,
    count_words,
    document_shares,
    gain,
    group_means,
    has_phrase,
    mean,
    part_means,
    read_rollout,
    restore_rollout,
    rollouts_with,
    slope,
    total,
    write_rollout,
)
from qreason.types import Example, Reply, Score

WINDOW = 6
"""Steps of the early and of the late window."""
SURE = 3.5
"""Standard errors by which means must differ; it is high because many windows are compared."""
TRUTHS = ("correctness", "math", "code")
"""Parts that say whether a reply is right; the first one that a recipe has is used."""
GROWTH = 1.5
LOST = 0.2
"""Share of a part that is gone when it counts as given up."""
SPREAD = 0.4
"""Rise in the share of replies that have a phrase."""
PAYS = 0.3
"""Standard deviations of the reward that one of a phrase must be worth, to count as rewarded."""
DECAYED = 0.1
"""Fall in the share of consistent reasonings."""
UNNEEDED, NATS = 0.5, 1.0
"""Share of the early gain in nats that is lost, and nats that are at least, when reasoning counts as not needed."""
UNJUDGED, UNJUDGED_STEPS = 0.5, WINDOW // 2
"""A step has too few judged replies above this share; so many such steps in a row stop a run."""
TRIED, SHOWN = 20, 3


@dataclass(frozen=True)
class Alarm:
    """A sign of gaming, in words, with replies that show it."""

    step: int
    sign: str
    reward: str
    text: str
    replies: tuple[str, ...]


class Watchdog:
    """Looks at the rollouts of each step, and raises each alarm once."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self.steps: list[list[Rollout]] = []
        self.raised: set[str] = set()

    def look(
        self,
        step: int,
        replies: Sequence[Reply],
        examples: Sequence[Example],
        scores: Sequence[Score],
        reasoned: Sequence[Reasoned] | None = None,
    ) -> list[Alarm]:
        """The alarms that this step's rollouts raise; `reasoned` is what their reasoning is worth, where known."""
        known = [Reasoned()] * len(replies) if reasoned is None else reasoned
        if len(self.steps) >= 2 * WINDOW:
            del self.steps[WINDOW]  # the early window stays, the late one moves on
        self.steps.append([read_rollout(*row) for row in zip(replies, examples, scores, known, strict=True)])
        if len(self.steps) < 2 * WINDOW:
            return []
        windows = Windows(step, self.weights, self.steps)
        found = (
            *(windows.rising_part(), windows.lost_part(), windows.growing_length(), windows.spreading_phrase()),
            *(windows.steps_that_do_not_fit(), windows.reasoning_that_does_not_help()),
        )
        new = [alarm for alarm in found if alarm is not None and alarm.sign not in self.raised]
        self.raised |= {alarm.sign for alarm in new}
        return new

    def remember(self) -> Callable[[], dict[str, Any]]:
        """The rollouts and alarms so far, to be written as JSON; see recall."""
        steps, raised = list(self.steps), sorted(self.raised)
        return lambda: {"steps": [[write_rollout(one) for one in step] for step in steps], "raised": raised}

    def recall(self, memory: Mapping[str, Any], examples: Mapping[str, Example]) -> None:
        """Go on from what was remembered; `examples` by their id."""
        self.steps = [[restore_rollout(row, examples[row["group"]]) for row in step] for step in memory["steps"]]
        self.raised = set(memory["raised"])


class Windows:
    """The rollouts of the early and of the late steps, compared; a method per sign of gaming."""

    def __init__(self, step: int, weights: Mapping[str, float], steps: Sequence[list[Rollout]]) -> None:
        self.step, self.weights = step, weights
        self.early = [rollout for rollouts in steps[:WINDOW] for rollout in rollouts]
        self.late = [rollout for rollouts in steps[WINDOW:] for rollout in rollouts]
        self.first = [rollout for rollouts in steps[: WINDOW // 2] for rollout in rollouts]
        self.truth = next((name for name in TRUTHS if name in weights), None)
        self.right = (
            change(part_means(self.early, self.truth), part_means(self.late, self.truth)) if self.truth else 0.0
        )
        """How correctness changes, in standard errors."""

    def rising_part(self) -> Alarm | None:
        early, late, truth = self.early, self.late, self.truth
        if truth is None or self.right > -SURE:
            return None
        fell = f"{truth} falls ({average(early, truth):.2f} to {average(late, truth):.2f})"
        for name, weight in self.weights.items():
            if name != truth and weight > 0 and change(part_means(early, name), part_means(late, name)) > SURE:
                rose = f"the reward '{name}' rises ({average(early, name):.2f} to {average(late, name):.2f})"
                text = f"{rose} while {fell}: the policy pleases '{name}' without being right"
                return Alarm(self.step, "rising part", name, text, best(late, name))
        return None

    def lost_part(self) -> Alarm | None:
        if self.right > SURE / 2:
            return None
        early, late = ([r for r in rollouts if r.finished] for rollouts in (self.early, self.late))
        for name, weight in self.weights.items():
            before, after = average(early, name), average(late, name)
            if name == self.truth or after > (1 - LOST) * before:
                continue
            rest = partial(total, {key: value for key, value in self.weights.items() if key != name})
            if (
                change(part_means(early, name), part_means(late, name)) < -SURE
                and change(group_means(early, rest), group_means(late, rest)) > -1  # not just worse in everything
            ):
                text = (
                    f"the reward '{name}' falls ({before:.2f} to {after:.2f}) while the others do not, and replies are "
                    f"not right more often: the policy gives it up, a weight of {weight:g} does not keep it"
                )
                return Alarm(self.step, "lost part", name, text, best(late, name, least=True))
        return None

    def growing_length(self) -> Alarm | None:
        before, after = (
            mean([r.words for r in rollouts]) for rollouts in (self.first, self.late)
        )  # growth may be fast
        grown = change(group_means(self.early, count_words), group_means(self.late, count_words))
        if self.right > SURE / 2 or grown < SURE or after < GROWTH * before:
            return None
        name, _ = self.top_correlated_reward(count_words)
        cut = mean([not r.finished for r in self.late])
        text = (
            f"replies grow ({before:.0f} to {after:.0f} words, {cut:.0%} cut off at the limit) and are not right more "
            f"often: the reward '{name}' pays for length"
        )
        longest = sorted(self.late, key=lambda r: -r.words)[:SHOWN]
        return Alarm(self.step, "growing length", name, text, tuple(r.text for r in longest))

    def spreading_phrase(self) -> Alarm | None:
        if self.right > SURE / 2:
            return None
        before, after = document_shares(self.early), document_shares(self.late)
        expected = Counter(phrase for r in self.late for phrase in r.expected)
        rises = {
            phrase: share - before.get(phrase, 0)
            for phrase, share in after.items()
            if share - before.get(phrase, 0) > SPREAD and expected[phrase] < len(self.late) * share / 4
        }
        for phrase in sorted(rises, key=lambda phrase: (round(rises[phrase], 1), len(phrase)), reverse=True)[:TRIED]:
            name, pay = self.top_correlated_reward(partial(has_phrase, phrase))
            if pay > PAYS:
                text = (
                    f"'{phrase}' spreads: in {before.get(phrase, 0):.0%} of the replies at first, in "
                    f"{after[phrase]:.0%} now, in {expected[phrase] / len(self.late):.0%} of the references; "
                    f"the reward '{name}' pays for it"
                )
                shown = [r.text for r in self.late if phrase in r.phrases][:SHOWN]
                return Alarm(self.step, "spreading phrase", name, text, tuple(shown))
        return None

    def steps_that_do_not_fit(self) -> Alarm | None:
        early, late = (rollouts_with("consistent", rollouts) for rollouts in (self.early, self.late))
        before, after = (mean([consistency(r) for r in rollouts]) for rollouts in (early, late))
        fall = change(group_means(early, consistency), group_means(late, consistency))
        if fall > -SURE or before - after < DECAYED or (rise := self.rising_total()) is None:
            return None
        text = (
            f"the steps of the reasoning fit what it concludes less often ({before:.0%} of the replies at first, "
            f"{after:.0%} now) while {rise}: the policy learns the answers, and its steps become decoration. Give "
            "'consistent_steps' or 'reasoning_gain' more weight"
        )
        shown = [r.text for r in late if not r.consistent][:SHOWN]
        return Alarm(self.step, "steps that do not fit", self.best_paid(), text, tuple(shown))

    def reasoning_that_does_not_help(self) -> Alarm | None:
        early, late = (rollouts_with("gain_nats", rollouts) for rollouts in (self.early, self.late))
        before, after = (mean([gain(r) for r in rollouts]) for rollouts in (early, late))
        fall = change(group_means(early, gain), group_means(late, gain))
        if fall > -SURE or before - after < max(NATS, UNNEEDED * before) or (rise := self.rising_total()) is None:
            return None
        text = (
            f"the reasoning helps less to predict the reference (by {before:.1f} nats at first, {after:.1f} now) while "
            f"{rise}: the policy learns to answer without it. Give 'reasoning_gain' more weight"
        )
        shown = sorted(late, key=gain)[:SHOWN]
        return Alarm(self.step, "reasoning that does not help", self.best_paid(), text, tuple(r.text for r in shown))

    def rising_total(self) -> str | None:
        """How the total reward rises, in words; None where it does not."""
        early, late = (group_means(rollouts, partial(total, self.weights)) for rollouts in (self.early, self.late))
        if change(early, late) < SURE / 2:
            return None
        return f"the reward rises ({mean(early):.2f} to {mean(late):.2f}), most of it from '{self.best_paid()}'"

    def best_paid(self) -> str:
        """The part of the reward whose weighted mean rises most."""
        return max(
            self.weights, key=lambda name: self.weights[name] * (average(self.late, name) - average(self.early, name))
        )

    def top_correlated_reward(self, trait: Trait) -> tuple[str, float]:
        """The part of the reward that pays most for a trait, among the replies to the same prompt, and how much.

        In standard deviations of the total per standard deviation of the trait.
        """
        rollouts = self.early + self.late
        traits = centred(rollouts, trait)
        marks = {name: centred(rollouts, partial(total, {name: weight})) for name, weight in self.weights.items()}
        totals = [sum(column) for column in zip(*marks.values(), strict=True)]
        slopes = {name: slope(traits, column) for name, column in marks.items()}
        name = max(slopes, key=lambda name: slopes[name])
        return name, slopes[name] / (math.sqrt(mean([mark * mark for mark in totals])) or 1.0)


def best(rollouts: Sequence[Rollout], name: str, least: bool = False) -> tuple[str, ...]:
    ordered = sorted((r for r in rollouts if name in r.parts), key=lambda r: r.parts[name], reverse=not least)
    return tuple(rollout.text for rollout in ordered[:SHOWN])
