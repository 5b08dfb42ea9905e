"""A run in memory: which judge goes with which rewards, what outlives a step, whose replies are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qreason.data.prompts import render
from qreason.errors import TrainingError
from qreason.inference.generate import LocalGenerator
from qreason.machine.files import read_jsonl
from qreason.model.resident import Resident
from qreason.recipe.load import load_recipe
from qreason.recipe.sections import Weighted
from qreason.rewards.scoring import Scorer
from qreason.run.folder import RunFolder
from qreason.run.session import Rewards, Session
from qreason.training.rollouts import Rollouts
from qreason.types import Example, Reply

RecipeWriter = Callable[..., Path]


@pytest.fixture
def run(write_recipe: RecipeWriter, resident: Resident, workplace: Path) -> Session:
    """The small recipe with a judge, on the shared base, with no folder."""
    recipe = load_recipe(write_recipe(("format: 0.1", "format: 0.1, judge: 0.4")))
    session = Session(recipe, RunFolder.unwritten(workplace, recipe))
    session.__dict__["resident"] = resident
    return session


def test_a_judge_comes_with_the_rewards_that_ask_it(run: Session) -> None:
    # A step with a judge of its own used to leave it for the next step's preflight.
    own = {"judge": Weighted.model_validate({"weight": 1.0, "mode": "groupwise"})}
    recipes, steps = run.rewards.judge, run.build_rewards(own).judge
    assert recipes is not None
    assert steps is not recipes
    assert run.rewards.judge is recipes
    assert run.build_rewards({"format": Weighted(weight=1.0)}).judge is None
    assert run.build_rewards(run.recipe.rewards).judge is recipes


def test_verdicts_do_not_outlive_a_step(run: Session) -> None:
    # A resumed run asks anew, in other batches: an undisturbed one used to remember, and became another run.
    judge = run.rewards.judge
    assert judge is not None
    judge([("Restart the spooler.", "Restart it.")])
    assert judge.verdicts
    run.begin_step(3)
    assert not judge.verdicts


def test_null_is_kept_where_it_is_not_the_default(write_recipe: RecipeWriter, workplace: Path) -> None:
    # `language: null` used to come back as `en`, and the run could not be continued.
    file = write_recipe(("- grpo: {num_generations: 4}", "- sample: {language: null}"))
    first = Session.open(load_recipe(file), workplace / "out")
    for step in range(4):
        first.disk.stage(step).mkdir(exist_ok=True)
        first.disk.finish_step(step, 1.0)
    again = Session.open(load_recipe(file), workplace / "out")
    assert again.disk.finished == 4
    assert again.disk.recipe.dump()["steps"][3]["sample"]["language"] is None
    assert "rows" not in again.disk.recipe.dump()["steps"][1]["sft"]


class Trainer:
    num_generations = 2


def first_half(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
    return [float(index) for index, _ in enumerate(replies)]


def test_replies_that_come_back_in_another_order_stop_the_run(run: Session, workplace: Path) -> None:
    run.__dict__["rewards"] = Rewards(Scorer({"format": first_half}, {"format": 1.0}), None)
    examples = run.examples("prompts")[:2]
    rollouts = Rollouts(run, run.rewards, examples, workplace, stop=False)
    prompts = [render(example) for example in examples for _ in range(2)]
    made = rollouts.make(prompts, Trainer())["completion_ids"]
    (score,) = rollouts.reward_functions()

    class State:
        global_step = 0

    asked = {"example": [0, 0, 1, 1], "trainer_state": State(), "log_metric": lambda name, value: None}
    with pytest.raises(TrainingError, match="in another order"):
        score(completion_ids=made[::-1], **asked)
    assert score(completion_ids=made, **asked) == [0.0, 1.0, 2.0, 3.0]
    assert [row["id"] for row in read_jsonl(workplace / "replies.jsonl")] == ["p0", "p0", "p1", "p1"]


@pytest.mark.parametrize("stop", [True, False])
def test_steps_that_are_mostly_unjudged_stop_the_run(run: Session, workplace: Path, stop: bool) -> None:
    # A judge whose server was down used to train on nothing to the end, and to leave an adapter.
    judged = iter([0, 1, 3, 1, 0, 1])
    rewards = {"judge": lambda replies, examples: [1.0] * (now := next(judged)) + [None] * (len(replies) - now)}
    rollouts = Rollouts(
        run, Rewards(Scorer(rewards, {"judge": 1.0}), None), [], workplace, stop=False, stop_unjudged=stop
    )
    rollouts.replies = [Reply("x")] * 4
    for step in range(1, 6):
        rollouts.score(run.examples("prompts")[:4], step, lambda name, value: None)
    if stop:
        with pytest.raises(TrainingError, match=r"step 6: 3 of 4 .*'judge': None for 3.*stop_on_unjudged"):
            rollouts.score(run.examples("prompts")[:4], 6, lambda name, value: None)
    else:
        rollouts.score(run.examples("prompts")[:4], 6, lambda name, value: None)
        assert rollouts.summary.endswith("18 replies could not be judged")


def test_one_generator_serves_the_whole_session(run: Session) -> None:
    assert run.generator is run.generator
    judge = run.rewards.judge
    assert judge is not None
    assert judge.answerer.generator is run.generator  # type: ignore[attr-defined]
    assert isinstance(run.generator, LocalGenerator)
