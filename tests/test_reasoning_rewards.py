"""Rewards for reasoning that does the work: steps that fit, and the gain in nats."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from qreason.cli import main
from qreason.errors import DataError
from qreason.inference.gain import ReasoningGain
from qreason.inference.generate import LocalGenerator
from qreason.recipe.load import load_recipe
from qreason.rewards import registry
from qreason.rewards.reasoned import GainSettings, StepsSettings, is_consistent
from qreason.rewards.scoring import combine
from qreason.rewards.steps import ReferenceSteps, equations_fit
from qreason.run.session import Session
from qreason.types import Example, Reply, Sampling, Score

if TYPE_CHECKING:
    from conftest import RecipeWriter

    from qreason.model.resident import Resident

FIXTURES = Path(__file__).parent / "fixtures"
TICKET = "Jobs wait in the queue. The test page prints."
FIX = "Restart the spooler."
ROW = Example("p", TICKET, FIX)
TAUGHT = Example(
    "s",
    "another ticket",
    FIX,
    reasoning="The test page prints, so the driver is fine. Jobs wait, so nothing reaches the port. "
    "Cause: spooler hangs.",
)
OTHER = Example(
    "t", "a third", "Replace the toner.", reasoning="Pages are pale, so toner is low. Cause: toner is empty."
)
STEPS = ReferenceSteps([TAUGHT, OTHER])


def reply(reasoning: str, answer: str = FIX) -> Reply:
    return Reply(f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>")


def built(name: str, opened: object, settings: dict[str, Any] | None = None) -> Any:
    return registry.build({name: settings or {}}, lambda settings: opened, 96)[name]


# --- steps that fit --------------------------------------------------------------------------------


def steps_mark(text: Reply, example: Example = ROW, references: ReferenceSteps = STEPS) -> float | None:
    (mark,) = built("consistent_steps", references)([text], [example])
    return mark  # type: ignore[no-any-return]


def test_steps_earn_the_share_that_belongs_to_the_conclusion() -> None:
    assert steps_mark(reply("The test page prints, so the driver is fine. Cause: spooler hangs.")) == 1.0
    assert steps_mark(reply("The test page prints, so toner is low. The driver is fine. Cause: spooler hangs.")) == 0.5
    assert steps_mark(reply("Pages are pale, so toner is low. Cause: spooler hangs.")) == 0.0


def test_a_clue_that_is_not_in_the_ticket_makes_a_step_wrong() -> None:
    assert steps_mark(reply("The cable is new, so the driver is fine. Cause: spooler hangs.")) == 0.0
    assert steps_mark(reply("The test page prints, so the driver is fine. Cause: spooler hangs."), OTHER) == 0.0


def test_a_clue_that_shows_something_else_makes_a_step_wrong() -> None:
    assert steps_mark(reply("The test page prints, so nothing reaches the port. Cause: spooler hangs.")) == 0.0
    assert steps_mark(reply("Jobs wait in the queue, so nothing reaches the port. Cause: spooler hangs.")) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        reply("Cause: spooler hangs."),
        reply(""),
        reply("The driver is fine. Cause: gremlins."),
        Reply(f"The driver is fine. Cause: spooler hangs. {FIX}"),
        Reply(f"<reasoning>The driver is fine. Cause: spooler hangs. <answer>{FIX}</answer>"),
    ],
    ids=["no step", "empty", "unknown conclusion", "no tags", "not closed"],
)
def test_a_reply_that_cannot_be_checked_does_not_evade_the_reward(text: Reply) -> None:
    assert steps_mark(text) == 0.0
    assert is_consistent(STEPS, text, ROW) is None  # but the metric leaves it out


def test_without_reference_steps_equations_are_checked_where_the_reference_is_a_number() -> None:
    none, row = ReferenceSteps([ROW]), Example("n", "3 bags of 4, 2 more", "14")
    assert steps_mark(reply("3 * 4 = 12 and 12 + 2 = 14", "14"), row, none) == 1.0
    assert steps_mark(reply("3 * 4 = 13 and 12 + 2 = 14", "14"), row, none) == pytest.approx(2 / 3)
    assert steps_mark(reply("It is clearly so.", "14"), row, none) == 0.0
    assert steps_mark(reply("3 * 4 = 12"), ROW, none) is None


def test_rows_that_are_not_asked_for_reasoning_are_left_out_of_the_total() -> None:
    asked: list[Example] = []

    def gain(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
        asked.extend(examples)
        return [None for _ in replies]

    opened = {StepsSettings(): STEPS, GainSettings(): gain}
    rewards = registry.build(
        {"format": {}, "consistent_steps": {}, "reasoning_gain": {}}, lambda settings: opened[settings], 96
    )
    weights = dict.fromkeys(rewards, 1.0)
    (score,) = combine(rewards, weights, [Reply("Hello.")], [Example("c", "hi", "Hello.", plain=True)])
    assert score == Score(0.0, {"format": 0.0, "consistent_steps": None, "reasoning_gain": None})
    assert asked == []


def test_a_recipe_without_anything_to_fit_is_refused_with_the_key_and_the_cure(write_recipe: RecipeWriter) -> None:
    file = write_recipe(("format: 0.1", "consistent_steps: 0.1"))
    cure = r"rewards\.consistent_steps: no row of data\.sft .* give data\.sft rows with reasoning of two sentences"
    with pytest.raises(DataError, match=cure):
        Session.open(load_recipe(file), file.parent / "run")
    assert not (file.parent / "run").exists()
    result = CliRunner().invoke(main, ["validate", str(file)])
    assert result.exit_code == 2
    assert "rewards.consistent_steps: no row of data.sft" in result.output


def test_steps_of_the_data_are_the_references(write_recipe: RecipeWriter, workplace: Path) -> None:
    row = {"id": "s0", "issue": TICKET, "resolution": FIX, "steps": TAUGHT.reasoning}
    (workplace / "sft.jsonl").write_text(json.dumps(row) + "\n")
    run = Session.open(load_recipe(write_recipe(("format: 0.1", "consistent_steps: 0.1"))), workplace / "run")
    right, wrong = (
        reply("Jobs wait, so nothing reaches the port. Cause: spooler hangs."),
        reply("No. Cause: spooler hangs."),
    )
    scores = run.rewards.scorer([right, wrong], [ROW, ROW], workplace)
    assert [score.parts["consistent_steps"] for score in scores] == [1.0, 0.0]


# --- the gain in nats ------------------------------------------------------------------------------


class Words:
    """A generator whose tokens are words and tags; a reference word is likely once the reasoning has it."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.calls: list[list[tuple[str, str]]] = []

    def tokens(self, text: str) -> list[int]:
        for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"):
            text = text.replace(tag, f" {tag} ")
        self.words += [word for word in dict.fromkeys(text.split()) if word not in self.words]
        return [self.words.index(word) for word in text.split()]

    def prompt_ids(self, prompts: Sequence[Any], sampling: Sampling) -> list[list[int]]:
        return [self.tokens(prompt[-1]["content"]) for prompt in prompts]

    def likelihoods(self, replies: Sequence[Reply], *, last: Sequence[int], fast: bool) -> list[float]:
        assert fast
        self.calls.append([])
        means = []
        for one, count in zip(replies, last, strict=True):
            words = [self.words[token] for token in one.token_ids]
            start, counted = words[:-count], words[-count:]
            self.calls[-1].append((" ".join(start), " ".join(counted)))
            means.append(sum(-1.0 if word in start else -3.0 for word in counted) / count)
        return means


def measure(*texts: Reply, rows: int = 100) -> tuple[list[float | None], Words]:
    words = Words()
    return ReasoningGain(lambda: words, "system", rows)(texts, [ROW] * len(texts)), words  # type: ignore[arg-type, return-value]


def test_the_gain_is_the_sum_over_the_tokens_of_the_reference_and_the_end_of_the_answer() -> None:
    gains, words = measure(reply("Restart it"), reply("Restart the spooler."), reply("No idea"))
    assert gains == pytest.approx([2.0, 6.0, 0.0])
    (call,) = words.calls
    assert call[0] == ("<reasoning> </reasoning> <answer>", f"{FIX} </answer>")
    assert len(call) == 4  # the empty reasoning once, for all replies to the prompt


def test_what_the_reply_answers_does_not_matter() -> None:
    assert measure(reply("Restart it", "Nothing."))[0] == measure(reply("Restart it"))[0]


def test_equal_reasonings_are_read_once_and_no_more_rows_at_a_time_than_given() -> None:
    gains, words = measure(*[reply("Restart it")] * 5, reply("the"), reply("spooler."), rows=2)
    assert gains == pytest.approx([2.0] * 7)
    assert [len(call) for call in words.calls] == [2, 2]


def test_the_reward_is_bounded_rises_with_the_gain_and_is_0_for_reasoning_that_misleads() -> None:
    texts, nats = [reply(str(number)) for number in range(5)], [-9.0, 0.0, 2.0, 4.0, 400.0]
    marks = built("reasoning_gain", lambda replies, examples: nats)(texts, [ROW] * 5)
    assert marks == pytest.approx([0.0, 0.0, 1 - math.exp(-1), 1 - math.exp(-2), 1.0])
    wider = built("reasoning_gain", lambda replies, examples: nats, {"scale": 4})(texts, [ROW] * 5)
    assert wider[3] == pytest.approx(1 - math.exp(-1))


def test_a_reply_without_reasoning_earns_nothing_and_a_row_without_a_reference_is_not_judged() -> None:
    words = Words()
    reward = built("reasoning_gain", ReasoningGain(lambda: words, "system", 8))  # type: ignore[arg-type, return-value]
    texts = [Reply(FIX), reply(" "), Reply("<reasoning>a"), reply("Restart it")]
    marks = reward(texts, [ROW, ROW, ROW, Example("q", TICKET, "")])
    assert marks == [0.0, 0.0, 0.0, None]
    assert words.calls == []


def test_several_answers_in_the_reasoning_earn_nothing() -> None:
    """What RL alone found at step 40: full tags, and every fix that might be meant between them."""
    whole = reply("Cause: toner is empty.")
    listed = Reply(f"<{whole.text}{FIX}</answer><answer>{FIX}</answer>")
    swapped = Reply("<answer>a</answer><reasoning>Cause: toner is empty.</reasoning>")
    marks = built("reasoning_gain", lambda replies, examples: [9.0] * 3)([whole, listed, swapped], [ROW] * 3)
    assert marks == [pytest.approx(1 - math.exp(-4.5)), 0.0, 0.0]


def test_the_gain_is_that_of_the_resident_model(resident: Resident) -> None:
    """The same by whole rows, one at a time, without shared prompts."""
    import torch

    generator = LocalGenerator(resident)
    texts = [reply("Read the log. Cause: spooler service hangs."), reply("Cause: toner is empty.")]
    gain = ReasoningGain(lambda: generator, "You are an IT helpdesk assistant.", 8)
    (first, second), tokenizer = gain(texts, [ROW, ROW]), resident.tokenizer

    def log_probability(reasoning: str) -> float:
        chat = [{"role": "system", "content": gain.system}, {"role": "user", "content": TICKET}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        start = tokenizer(f"{prompt}<reasoning>{reasoning}</reasoning>\n<answer>")["input_ids"]
        ids = start + tokenizer(f"{FIX}</answer>")["input_ids"]
        with torch.no_grad():
            logits = resident.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(logits[at - 1, ids[at]]) for at in range(len(start), len(ids)))

    none = log_probability("")
    for text, found in zip(texts, (first, second), strict=True):
        reasoning = text.text.partition("</reasoning>")[0].removeprefix("<reasoning>")
        assert found == pytest.approx(log_probability(reasoning) - none, abs=0.5)  # bfloat16 where steps have it
    assert first != second


def test_likelihoods_of_last_tokens_share_their_prompt(resident: Resident) -> None:
    """Two prompts of different lengths, replies of different lengths, two of them to one prompt."""
    generator = LocalGenerator(resident)
    short, long = (
        tuple(generator.tokens(text)) for text in ("the printer is", "the mail server of the branch does not")
    )
    ends = [tuple(generator.tokens(text)) for text in (" offline again today", " answer", " respond to the client")]
    rows = [Reply("", ends[0], short), Reply("", ends[1], long), Reply("", ends[2], long)]
    counts = [2, 1, 3]
    alone = [generator.likelihoods([row], last=[count])[0] for row, count in zip(rows, counts, strict=True)]
    assert generator.likelihoods(rows, last=counts) == pytest.approx(alone, abs=1e-4)
    assert generator.likelihoods(rows) == pytest.approx([generator.likelihoods([row])[0] for row in rows], abs=1e-4)


@pytest.mark.parametrize(
    ("reasoning", "marks"),
    [
        ("12 + 3 = 15", [True, True]),
        ("1.2.3 + 4 = 6.3", [True, False]),  # 2.3 + 4
        ("So 9-2 + 17 = 15", [True, True]),  # -2 + 17
        ("7" * 100_000, None),
        ("1,000" * 20_000 + " + 1 = 2", [False, False]),
    ],
)
def test_equations_are_read_in_linear_time(reasoning: str, marks: list[bool] | None) -> None:
    # Thousands of digits without an equation used to take minutes.
    assert equations_fit(reasoning, "15") == marks
