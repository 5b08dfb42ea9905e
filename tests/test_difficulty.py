"""Prompts that the policy always or never solves are left out before GRPO; what was drawn for that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import RecipeWriter, jsonl

from qreason.errors import RecipeError, RunFolderError, TrainingError
from qreason.machine.files import read_jsonl
from qreason.recipe.load import load_recipe
from qreason.recipe.schema import Step
from qreason.rewards import registry
from qreason.rewards.registry import REWARDS
from qreason.rewards.scoring import Scorer
from qreason.run.resume import checkpoints
from qreason.run.session import Session
from qreason.stages import grpo, run_step
from qreason.training.difficulty import PassRates, pass_rate
from qreason.training.resuming import Checkpoints
from qreason.types import Example, Messages, Reply, Sampling, Score

RIGHT = "<reasoning>Looked.</reasoning>\n<answer>Restart the spooler.</answer>"
WRONG = RIGHT.replace("Restart", "Remove")
MADE_WITH = {"n": 2, "adapter": "a"}


class Cut(BaseException):
    """The power fails."""


class Replier:
    """Gives the i-th prompt texts[i], over and over; the power fails after so many calls."""

    def __init__(self, texts: Sequence[Sequence[str]], calls: int = 99) -> None:
        self.texts, self.calls = texts, calls
        self.asked: list[tuple[int | None, list[int]]] = []

    def generate(self, prompts: Sequence[Messages], *, n: int, sampling: Sampling, **_: Any) -> list[list[Reply]]:
        if len(self.asked) == self.calls:
            raise Cut
        places = [int(prompt[-1]["content"]) if len(self.texts) > 1 else 0 for prompt in prompts]
        self.asked.append((sampling.seed, places))
        return [[Reply(text, finished=text != "endless") for text in (self.texts[place] * n)[:n]] for place in places]


def draw(replier: Replier, folder: Path, made_with: dict[str, Any] = MADE_WITH, *, preflight: bool = True) -> PassRates:
    rates = PassRates(folder, made_with)
    examples = [Example(f"p{place}", str(place), "Restart the spooler.") for place in range(len(replier.texts))]
    scorer = Scorer({"correctness": REWARDS["correctness"]}, {"correctness": 1.0})
    how = {"system": "s", "n": 2, "at_a_time": 2, "sampling": Sampling(seed=1), "preflight": preflight}
    rates.draw(replier, scorer, examples, **how)  # type: ignore[arg-type]
    return rates


TEXTS = [[RIGHT, WRONG], [RIGHT], [WRONG], [WRONG, RIGHT], [RIGHT]]
ROWS = [{"id": f"p{place}", "pass_rate": rate} for place, rate in enumerate((0.5, 1.0, 0.0, 0.5, 1.0))]


def test_a_row_per_prompt_says_which_share_of_its_replies_is_right(tmp_path: Path) -> None:
    assert draw(Replier(TEXTS), tmp_path).rows == ROWS
    assert read_jsonl(tmp_path / "pass_rates.jsonl") == ROWS


def test_a_pass_that_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    draw(whole := Replier(TEXTS), tmp_path / "whole")
    with pytest.raises(Cut):
        draw(before := Replier(TEXTS, calls=1), tmp_path / "cut")
    with (tmp_path / "cut" / "pass_rates.jsonl").open("a") as file:
        file.write('{"id": "p2", "pass')
    assert draw(after := Replier(TEXTS), tmp_path / "cut").rows == ROWS
    assert before.asked + after.asked == whole.asked
    assert len({seed for seed, _ in whole.asked}) == len(whole.asked)
    draw(again := Replier(TEXTS), tmp_path / "cut")
    assert again.asked == []


def test_what_was_drawn_from_another_policy_is_drawn_anew(tmp_path: Path) -> None:
    draw(Replier([[RIGHT]] * 5), tmp_path)
    assert draw(Replier(TEXTS), tmp_path, MADE_WITH | {"adapter": "b"}).rows == ROWS


def test_rows_of_other_prompts_are_refused(tmp_path: Path) -> None:
    draw(Replier(TEXTS), tmp_path)
    (tmp_path / "pass_rates.jsonl").write_text(jsonl(ROWS[1:] + ROWS[:1]))
    with pytest.raises(RunFolderError, match=r"pass_rates.jsonl: its rows are not the prompts .* to draw anew"):
        PassRates(tmp_path, MADE_WITH).by_example([Example(f"p{place}", "", "") for place in range(5)])


@pytest.mark.parametrize("preflight", [True, False])
def test_the_first_replies_show_whether_any_ends(tmp_path: Path, preflight: bool) -> None:
    replier = Replier([["endless"]] * 5)
    if preflight:
        with pytest.raises(TrainingError, match="none of 4 sampled replies ends within max_completion_length"):
            draw(replier, tmp_path)
        assert len(replier.asked) == 1
    else:
        assert (
            draw(replier, tmp_path, preflight=False).by_example([Example(f"p{place}", "", "") for place in range(5)])
            == [0.0] * 5
        )


@pytest.mark.parametrize(
    ("parts", "rate"),
    [
        ([{"correctness": 2.0}, {"correctness": 1.5}, {"correctness": 0.0}, {"correctness": 0.0}], 0.5),
        ([{"correctness": 0.0, "math": 1.0}, {"correctness": 0.0, "math": None}], 0.5),
        ([{"math": 1.0}, {"math": None}], 1.0),
        ([{"math": None}, {"math": None}], None),
    ],
)
def test_the_pass_rate_is_the_share_of_right_ones_among_those_judged(
    parts: list[dict[str, float | None]], rate: float | None
) -> None:
    assert pass_rate([Score(None, one) for one in parts]) == rate


# --- through the stage -----------------------------------------------------------------------------

SETTINGS = (
    "max_steps: 2, save_steps: 1, per_device_train_batch_size: 4, num_generations: 2, learning_rate: 1e-3, "
    "preflight: false, difficulty_filtering: 4"
)
OWN = "def letters(replies, examples):\n    return [len(set(reply.text)) / 40 for reply in replies]\n"
SOLVED = {"p0": 0, "p1": 4, "p2": 2, "p3": 1}
"""Id of a prompt -> how many of four replies are right."""


def open_run(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch, solved: dict[str, int | None], settings: str = SETTINGS
) -> Session:
    """A grpo step whose prompts are solved as often as that, and whose reward tells any two replies apart."""

    def correctness(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
        limits = [solved[example.id] for example in examples]
        return [None if limit is None else 2.0 * (place % 4 < limit) for place, limit in enumerate(limits)]

    monkeypatch.setitem(registry.REWARDS, "correctness", correctness)
    Path("mine.py").write_text(OWN)
    file = write_recipe(("{correctness: 0.1, format: 0.1}", "{mine:letters: 1.0, correctness: 0}"))
    said: list[str] = []
    run = Session.open(load_recipe(file, [f"steps=[{{grpo: {{{settings}}}}}]"]), Path("run"), say=said.append)
    run.said = said  # type: ignore[attr-defined]
    return run


def test_training_sees_only_prompts_that_are_solved_sometimes_and_goes_on_without_drawing_again(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(write_recipe, monkeypatch, SOLVED)
    done = Checkpoints.step_done

    def stop(self: Checkpoints, trainer: Any) -> None:
        done(self, trainer)
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "step_done", stop)
        with pytest.raises(Cut):
            run_step(run, 0)
    folder = run.stage_folder()
    assert checkpoints(folder)
    assert "01-grpo: 2 of 4 prompts are left out, 1 always and 1 never solved in 4 replies" in run.said  # type: ignore[attr-defined]
    rates = read_jsonl(folder / "pass_rates.jsonl")
    assert rates == [{"id": name, "pass_rate": count / 4} for name, count in SOLVED.items()]
    monkeypatch.setattr(PassRates, "draw", lambda self, *_, **__: None)  # nothing is left to draw
    assert "2 steps" in run_step(open_run(write_recipe, monkeypatch, SOLVED), 0)[0].summary
    assert {row["id"] for row in read_jsonl(folder / "replies.jsonl")} == {"p2", "p3"}
    assert read_jsonl(folder / "pass_rates.jsonl") == rates


def prepare(run: Session, calls: int = 99) -> tuple[list[str], str | None, Replier]:
    """The ids of the examples that are left, why there are none, and who replied, without a model."""
    run.__dict__["generator"] = replier = Replier([["x"]], calls)
    run.disk.manifest["base"] = {"id": "qreason/tiny", "fingerprint": "f"}
    settings, folder = run.recipe.steps[0].grpo, run.clear_stage_folder()
    assert settings
    examples, why = grpo.prepare(settings, run, run.rewards, folder, look=False)
    return [example.id for example in examples], why, replier


@pytest.mark.parametrize(
    ("solved", "left", "why"),
    [
        (SOLVED, ["p2", "p3"], None),
        ({"p0": 4, "p1": None, "p2": 0, "p3": 4}, ["p1"], None),  # what cannot be judged is not known to be hopeless
        (dict.fromkeys(SOLVED, 4), [], "all 4 replies to every prompt are right"),
    ],
)
def test_prompts_that_are_always_or_never_solved_are_left_out(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch, solved: Any, left: list[str], why: str | None
) -> None:
    assert prepare(open_run(write_recipe, monkeypatch, solved))[:2] == (left, why)


def test_an_error_says_where_no_prompt_is_left_to_learn_from(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(write_recipe, monkeypatch, {"p0": 4, "p1": 4, "p2": 0, "p3": 4})
    with pytest.raises(TrainingError, match="of 4, 3 are always and 1 never solved in 4 replies, by correctness; st"):
        prepare(run)


def test_a_stage_that_starts_again_keeps_what_was_drawn(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    # prompts_at_a_time is 2: two calls for four prompts.
    run = open_run(write_recipe, monkeypatch, SOLVED)
    with pytest.raises(Cut):
        prepare(run, calls=1)
    left, _, replier = prepare(run)
    assert (left, len(replier.asked)) == (["p2", "p3"], 1)
    assert any("pass rates of 2 of 4 prompts are there" in line for line in run.said)  # type: ignore[attr-defined]


def test_only_rewards_that_say_what_is_right_are_asked(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(write_recipe, monkeypatch, SOLVED)
    Path("mine.py").unlink()
    run.rewards.scorer.rewards["mine:letters"] = lambda *_: pytest.fail("asked")
    assert prepare(run)[0] == ["p2", "p3"]


def test_the_share_of_plain_rows_is_that_of_the_prompts_that_are_left(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(write_recipe, monkeypatch, SOLVED)
    plain = [Example(f"plain{place}", "hello", "hi", plain=True) for place in range(9)]
    run._examples["plain"] = plain
    settings = run.recipe.steps[0].grpo
    assert settings
    run.recipe = run.recipe.model_copy(update={"steps": [Step(grpo=settings.model_copy(update={"plain_share": 0.5}))]})
    names = prepare(run)[0]
    assert {"p2", "p3"} < set(names)
    assert len(names) == 4


def test_fewer_prompts_than_a_step_takes_are_an_error(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without difficulty_filtering too: they were a traceback.
    settings = SETTINGS.replace("num_generations: 2", "num_generations: 2, gradient_accumulation_steps: 2")
    run = open_run(write_recipe, monkeypatch, SOLVED, settings)
    (step,) = run.recipe.steps
    assert step.grpo
    examples = run.examples("prompts")
    grpo.check_enough(step.grpo, examples)
    with pytest.raises(TrainingError, match="2 prompts that difficulty_filtering leaves are fewer than the 4 that"):
        grpo.check_enough(step.grpo, examples[:2])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="4 prompts are fewer than the 8 that"):
        grpo.check_enough(step.grpo.model_copy(update={"difficulty_filtering": None}), examples)


def test_pass_rates_depend_on_what_draws_and_judges(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for change in ("max_steps: 3", "max_steps: 4", "difficulty_filtering: 8", "rewards: {correctness: 0.5}"):
        key = change.split(":")[0]
        settings = ", ".join(one for one in SETTINGS.split(", ") if not one.startswith(key)) + f", {change}"
        asked.append(len(prepare(open_run(write_recipe, monkeypatch, SOLVED, settings))[2].asked))
    assert asked == [2, 0, 2, 2]


@pytest.mark.parametrize(
    ("rewards", "own", "refused"),
    [
        ("{format: 1}", "", True),
        ("{judge: 1, format: 1}", "", True),
        ("{judge: 1, right: {reward: math, weight: 0}}", "", False),
        ("{correctness: 1}", "rewards: {format: 1}, ", True),
        ("{format: 1}", "rewards: {correctness: 1}, ", False),
    ],
)
def test_open_answers_are_refused(write_recipe: RecipeWriter, rewards: str, own: str, refused: bool) -> None:
    file = write_recipe(
        ("{correctness: 0.1, format: 0.1}", rewards),
        ("num_generations: 4", f"num_generations: 4, {own}difficulty_filtering: 8"),
    )
    if refused:
        with pytest.raises(RecipeError, match=r"steps\.3\.grpo\.difficulty_filtering: no reward .*weight 0 keeps it"):
            load_recipe(file)
    else:
        load_recipe(file)
