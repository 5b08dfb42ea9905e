"""Before GRPO starts: can it learn anything from these rewards, and is the judge any good?"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qreason.data.prompts import demonstrate, render
from qreason.errors import DataError, TrainingError
from qreason.judge.calibration import Label, calibrate, fitness
from qreason.judge.verdict import Judge
from qreason.machine.files import read_json, write_json
from qreason.machine.progress import progress_bar
from qreason.machine.records import Told
from qreason.recipe.training import PREFLIGHT_PROMPTS
from qreason.rewards.registry import FULL_MARKS
from qreason.rewards.scoring import Scorer, applies
from qreason.types import Example, Generator, Reply, Reward, Sampling, Score

JUDGE = "judge.json"
"""What was measured of the judge, in the folder of a step."""
MOST_PROMPTS = 64
"""Prompts that are sampled, as many at a time as PREFLIGHT_PROMPTS, while no replies to one earn different totals."""


def check_gold(
    examples: Sequence[Example], rewards: Mapping[str, Reward], kinds: Mapping[str, str], folder: Path
) -> None:
    """DataError for the first example whose reference, as a reply, does not earn full marks; `kinds`: name -> kind."""
    for name, reward in rewards.items():
        if kinds[name] not in FULL_MARKS:
            continue
        judged, most = [example for example in examples if applies(reward, example)], FULL_MARKS[kinds[name]]
        scores = Scorer({name: reward}, {name: 1.0})([gold(example) for example in judged], judged, folder)
        for example, score in zip(judged, scores, strict=True):
            mark = score.parts[name]
            if mark is None or mark < most:
                cure = "correct the row, or take another reward"
                if example.plain:
                    cure = "a row of data.plain has no tags: give the reward `only: reasoning`"
                raise DataError(
                    f"{example.source}: the reference itself earns {mark} of {most:g} from '{name}', so no "
                    f"reply can be right: '{example.reference[:80]}'; {cure}"
                )


def gold(example: Example) -> Reply:
    """The reference as a reply, with reasoning before it unless the row is plain."""
    reasoning = None if example.plain else example.reasoning or "Looked."
    return Reply(demonstrate(replace(example, reasoning=reasoning)))


def check_rollouts(
    generator: Generator,
    scorer: Scorer,
    examples: Sequence[Example],
    *,
    system: str,
    n: int,
    sampling: Sampling,
    folder: Path,
) -> str | None:
    """Whether GRPO can learn from sampled completions: None if so, or why there is nothing left to learn.

    The first prompts are enough where the replies to one of them earn different totals; otherwise more are sampled.
    TrainingError when they show that GRPO would learn nothing, with the reason and cures.
    """
    order = in_order(examples, sampling.seed)
    made: list[list[Reply]] = []
    scores: list[list[Score]] = []
    while left := order[len(made) : len(made) + PREFLIGHT_PROMPTS]:
        prompts = [render(example, system) for example in left]
        with progress_bar("preflight", total=len(left) * n) as bar:
            made += generator.generate(prompts, n=n, sampling=sampling, fast=True, on_progress=bar.advance)
        check_ends([reply for group in made for reply in group], sampling.max_completion_length)
        replies = [reply for group in made[-len(left) :] for reply in group]
        scored = scorer(replies, [example for example in left for _ in range(n)], folder)
        groups = [scored[start : start + n] for start in range(0, len(scored), n)]
        if any(len(totals(group)) > 1 for group in groups):
            return None
        scores += groups
    right = sum(is_right(scorer, example, group, folder) for example, group in zip(order, scores, strict=True))
    if right == len(scores):
        return f"every reply to {right} sampled prompts earns what the reference earns"
    earned = ", ".join(f"{name} {part}" for name, part in scores[0][0].parts.items())
    already = f"; {right} of the prompts are all right already" if right else ""
    raise TrainingError(
        f"all {n} replies to each of {len(scores)} prompts earn the same ({earned}), so GRPO would learn nothing"
        f"{already}: look at the replies with qreason evaluate, start from a model that is sometimes correct (sft "
        "first), raise sampling.temperature or num_generations, or add a reward that tells replies apart; "
        f"grpo.preflight=false skips this check. The first reply: {show(made[0][0])}"
    )


def check_ends(replies: Sequence[Reply], longest: int) -> None:
    """TrainingError where no reply ends by itself; `longest`: tokens of one that is cut off."""
    if not any(reply.finished for reply in replies):
        raise TrainingError(
            f"none of {len(replies)} sampled replies ends within max_completion_length ({longest}): raise it, or start "
            "from a model that has learnt to stop (sft first); grpo.preflight=false skips this check. The first reply: "
            f"{show(replies[0])}"
        )


def in_order(examples: Sequence[Example], seed: int | None) -> list[Example]:
    """The prompts to sample: the first ones, then others from anywhere, since rows may be sorted by what they ask."""
    start, rest = list(examples[:PREFLIGHT_PROMPTS]), examples[PREFLIGHT_PROMPTS:]
    return start + random.Random(seed).sample(rest, min(len(rest), MOST_PROMPTS - PREFLIGHT_PROMPTS))


def totals(scores: Sequence[Score]) -> set[float]:
    """The different totals of the replies that were judged."""
    return {score.total for score in scores if score.total is not None}


def is_right(scorer: Scorer, example: Example, scores: Sequence[Score], folder: Path) -> bool:
    """Whether replies that earn the same earn what the reference does, and the reference more than no answer."""
    best, worst = (totals([score]) for score in scorer([gold(example), Reply("")], [example, example], folder))
    earned = totals(scores)
    if not (earned and best and worst):
        return False
    return max(best) > max(worst) and max(earned) >= max(best) - 1e-6


def check_judge(judge: Judge, labels: Sequence[Label], weight: float, folder: Path) -> str | None:
    """Measure the judge on labelled pairs (judge.json in the folder); a warning where it is not fit for its weight.

    With `unfit: drop` the file and the warning say that the step trains without it, with `unfit: stop` TrainingError.
    """
    figures, unfit = calibrate(judge, labels), judge.settings.unfit
    fit, message = fitness(figures, weight)
    dropped = not fit and unfit == "drop"
    if dropped:
        message += "; unfit: drop, so its weight is 0 in this step"
    write_json(folder / JUDGE, {**figures, "weight": weight, "fit": fit, "dropped": dropped, "told": message})
    if not fit and unfit == "stop":
        raise TrainingError(f"the judge is {message}; unfit: stop ends the run here, warn and drop let it go on")
    return None if fit else f"warning: the judge is {message}"


def is_dropped(folder: Path) -> bool:
    """Whether the judge's weight was set to 0 when a step began."""
    file = folder / JUDGE
    return file.is_file() and bool(read_json(file, Told).get("dropped"))


def without_judge(scorer: Scorer, kinds: Mapping[str, str]) -> Scorer:
    """The rewards with weight 0 for the judge: it is still measured. TrainingError where no other has a weight."""
    weights = {name: 0.0 if kinds[name] == "judge" else weight for name, weight in scorer.weights.items()}
    if not any(weights.values()):
        raise TrainingError(
            "the judge is unfit for its weight and dropped (unfit: drop), and no other reward has a weight; give the "
            "recipe one, or a better judge (qreason judge calibrate measures it)"
        )
    return Scorer(scorer.rewards, weights)


def show(reply: Reply) -> str:
    text = " ".join(reply.text.split())
    return f"'{text[:200]}{'…' if len(text) > 200 else ''}'"
