"""Before GRPO starts: can it learn anything from these rewards, and is the judge any good?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qreason.data.prompts import demonstrate, render
from qreason.errors import DataError, TrainingError
from qreason.judge.calibration import calibrate, fitness, read_labels
from qreason.judge.verdict import Judge
from qreason.machine.files import write_json
from qreason.recipe.training import PREFLIGHT_PROMPTS
from qreason.rewards.registry import FULL_MARKS
from qreason.rewards.scoring import Scorer, applies
from qreason.types import Example, Generator, Reply, Reward, Sampling


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
) -> None:
    """TrainingError when sampled completions show that GRPO has nothing to learn from, with the reason and cures."""
    chosen = examples[:PREFLIGHT_PROMPTS]
    made = generator.generate([render(example, system) for example in chosen], n=n, sampling=sampling, fast=True)
    replies = [reply for group in made for reply in group]
    scores = scorer(replies, [example for example in chosen for _ in range(n)], folder)
    if not any(reply.finished for reply in replies):
        raise TrainingError(
            f"none of {len(replies)} sampled replies ends within max_completion_length "
            f"({sampling.max_completion_length}): raise it, or start from a model that has learnt to stop (sft first); "
            f"grpo.preflight=false skips this check. The first reply: {show(replies[0])}"
        )
    totals = [{score.total for score in scores[start : start + n]} for start in range(0, len(scores), n)]
    if all(len(group - {None}) < 2 for group in totals):
        earned = ", ".join(f"{name} {part}" for name, part in scores[0].parts.items())
        raise TrainingError(
            f"all {n} replies to each of {len(chosen)} prompts earn the same ({earned}), so GRPO would learn nothing: "
            "look at the replies with qreason evaluate, start from a model that is sometimes correct (sft first), "
            "raise sampling.temperature or num_generations, or add a reward that tells replies apart; "
            f"grpo.preflight=false skips this check. The first reply: {show(replies[0])}"
        )


def check_judge(judge: Judge, labels: Path, weight: float, folder: Path) -> str | None:
    """Measure the judge on labelled pairs (judge.json in the folder); a warning where it is not fit for its weight."""
    figures = calibrate(judge, read_labels(labels))
    fit, message = fitness(figures, weight)
    write_json(folder / "judge.json", {**figures, "weight": weight, "fit": fit, "told": message})
    return None if fit else f"warning: the judge is {message}"


def show(reply: Reply) -> str:
    text = " ".join(reply.text.split())
    return f"'{text[:200]}{'…' if len(text) > 200 else ''}'"
