"""Before GRPO: enough prompts to be sure that nothing can be learnt, and what is wrong where it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qreason.errors import TrainingError
from qreason.recipe.training import PREFLIGHT_PROMPTS
from qreason.rewards.registry import REWARDS
from qreason.rewards.scoring import Scorer
from qreason.training.preflight import MOST_PROMPTS, check_rollouts
from qreason.types import Example, Messages, Reply, Sampling

RIGHT = "<reasoning>Looked.</reasoning>\n<answer>Restart the spooler.</answer>"
WRONG = RIGHT.replace("Restart", "Remove")
RULES = {"correctness": 1.0, "format": 1.0}


class Replier:
    """Replies to the i-th prompt with texts[i], over and over."""

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        self.texts, self.asked = texts, []  # type: ignore[var-annotated]

    def generate(self, prompts: Sequence[Messages], *, n: int, **_: Any) -> list[list[Reply]]:
        self.asked.append(len(prompts))
        places = [int(prompt[-1]["content"]) for prompt in prompts]
        return [[Reply(self.texts[place][i % len(self.texts[place])]) for i in range(n)] for place in places]


def look(
    texts: Sequence[Sequence[str]], folder: Path, rewards: dict[str, Any] | None = None
) -> tuple[str | None, Replier]:
    replier = Replier(texts)
    examples = [Example(f"p{place}", str(place), "Restart the spooler.") for place in range(len(texts))]
    rules = rewards or {name: REWARDS[name] for name in RULES}
    scorer = Scorer(rules, dict.fromkeys(rules, 1.0))
    sampling = Sampling(seed=1)
    return check_rollouts(replier, scorer, examples, system="s", n=2, sampling=sampling, folder=folder), replier  # type: ignore[arg-type]


def test_the_first_prompts_are_enough_where_one_of_them_has_different_rewards(tmp_path: Path) -> None:
    why, replier = look([[RIGHT, WRONG]] + [[RIGHT]] * 99, tmp_path)
    assert why is None
    assert replier.asked == [PREFLIGHT_PROMPTS]


def test_more_prompts_are_sampled_while_none_has_different_rewards(tmp_path: Path) -> None:
    # Eight prompts that were all right already used to stop a run, though others were not.
    why, replier = look([[RIGHT]] * 8 + [[RIGHT, WRONG]] * 92, tmp_path)
    assert why is None
    assert replier.asked == [8, 8]


def test_all_right_already_is_nothing_left_to_learn_and_no_error(tmp_path: Path) -> None:
    why, replier = look([[RIGHT]] * 99, tmp_path)
    assert why == f"every reply to {MOST_PROMPTS} sampled prompts earns what the reference earns"
    assert sum(replier.asked) == MOST_PROMPTS
    assert max(replier.asked) == PREFLIGHT_PROMPTS  # as the memory plan says


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([[WRONG]] * 9, r"all 2 replies to each of 9 prompts earn the same .* learn nothing: look"),
        ([[RIGHT]] * 8 + [[WRONG]], r"each of 9 prompts earn the same .*; 8 of the prompts are all right already"),
    ],
)
def test_all_wrong_is_an_error(tmp_path: Path, texts: Sequence[Sequence[str]], said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        look(texts, tmp_path)


@pytest.mark.parametrize("mark", [1.0, None])
def test_a_reward_that_tells_nothing_apart_is_no_sign_of_being_right(tmp_path: Path, mark: float | None) -> None:
    with pytest.raises(TrainingError, match="earn the same"):
        look([[RIGHT]] * 9, tmp_path, {"own": lambda replies, examples: [mark] * len(replies)})
