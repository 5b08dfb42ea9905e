"""Reasoning by intervention: on a model whose answers are known, on the embedded one, and in the report."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qreason.data.prompts import render
from qreason.inference.generate import LocalGenerator
from qreason.inference.reading import render_ids
from qreason.inference.reasoning import (
    ASKS_FOR_NONE,
    NO_REASONING,
    NOT_ASKED_FOR,
    NOT_ENCODED,
    NOT_JUDGED,
    Figures,
    common_opening,
    filler,
    intervene,
    prefixes,
)
from qreason.machine.progress import progress_bar
from qreason.model.resident import Resident
from qreason.recipe.sections import Data, Draw
from qreason.recipe.settings import Evaluate
from qreason.report.build import compare, measure
from qreason.report.reasoning import NO_DONOR, NO_OPENING, NO_STEPS, UNKNOWN, measure_reasoning, verdict
from qreason.report.table import passes_table, reasoning_table, reference_lines
from qreason.rewards.reasoned import is_consistent
from qreason.rewards.registry import REWARDS
from qreason.rewards.scoring import Scorer
from qreason.rewards.steps import ReferenceSteps
from qreason.rewards.text import correctness, is_mentioned
from qreason.run.checkpoint import Checkpoint
from qreason.stages.evaluate import measure_rows
from qreason.types import Example, Messages, Reply, Sampling

Model = Callable[[str, str], str]
"""(prompt, beginning of a reply) -> the rest of it."""

GREEDY = Sampling(temperature=0, max_completion_length=200)
STEPS = "Saw {0}, so part {0}. It is not {1}. Cause: {0}."
EXAMPLES = [
    Example(f"h{i}", f"ticket {i}", f"fix {i}", reasoning=STEPS.format(i, i + 1), category="ab"[i // 2])
    for i in range(4)
]


def write(example: Example) -> str:
    return f"<reasoning>{example.reasoning}</reasoning>\n<answer>{example.reference}</answer>"


class Known:
    """A Generator whose model is a function; a token is a character."""

    def __init__(self, model: Model, known: str = "Cause:") -> None:
        self.model, self.known = model, known
        self.stops: Set[int] = {0}
        self.read = 0

    def prompt_ids(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[int]]:
        assert prompts, "as the tokenizers of transformers, it encodes no empty list"
        return [self.tokens(prompt[-1]["content"] + "\t") for prompt in prompts]

    def generate(self, prompts: Sequence[Messages], *, n: int, sampling: Sampling, **_: Any) -> list[list[Reply]]:
        return [[Reply(self.model(prompt[-1]["content"], ""))] * n for prompt in prompts]

    def extend(
        self, beginnings: Sequence[list[int]], *, n: int, sampling: Sampling, stop_at: Set[int]
    ) -> list[list[list[int]]]:
        self.read = max(self.read, len(beginnings) * max(map(len, beginnings)))
        assert sampling.temperature == 0
        rests = [self.model(*self.text(ids).split("\t")) for ids in beginnings]
        return [[[*self.tokens(rest), 0][: sampling.max_completion_length]] * n for rest in rests]

    def likelihoods(self, replies: Sequence[Reply]) -> list[float]:
        """A nat a token where the reasoning has the known words, otherwise two."""
        return [-1.0 if self.known in self.text(reply.prompt_ids) else -2.0 for reply in replies]

    def tokens(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token) for token in tokens if token)


def by_its_steps(prompt: str, begun: str) -> str:
    """Whatever the ticket, its answer is that of the cause it has named; it finds the cause by its steps alone."""
    if not begun:
        return write(EXAMPLES[int(prompt[-1])])
    if "</reasoning>" not in begun:
        return " 9.</reasoning>\n<answer>fix 9</answer>"
    cause = re.search(r"Cause: (\d)", begun)
    return f"fix {cause[1]}</answer>" if cause else "Restart it.</answer>"


def whatever_its_steps(prompt: str, begun: str) -> str:
    """It knows the answer from the ticket."""
    if not begun:
        return write(EXAMPLES[int(prompt[-1])])
    answer = f"fix {prompt[-1]}</answer>"
    return answer if begun.endswith("<answer>") else f" 9.</reasoning>\n<answer>{answer}"


def is_right(replies: Sequence[Reply], examples: Sequence[Example]) -> list[bool | None]:
    return [mark is not None and mark > 0 for mark in correctness(replies, examples)]


def try_rows(generator: Any, examples: Sequence[Example] = EXAMPLES, replies: Sequence[Reply] = ()) -> list[Figures]:
    replies = replies or [Reply(write(example)) for example in examples]
    prompts = [render(example) for example in examples]
    own = is_right(replies, examples)
    with progress_bar("test", total=0) as bar:
        return intervene(generator, prompts, examples, replies, own, rule=is_right, sampling=GREEDY, bar=bar)


# --- every figure has a right value ----------------------------------------------------------------


def test_a_model_that_reads_its_steps_follows_those_it_is_given() -> None:
    gold = float(len("fix 0</answer>"))
    for row in try_rows(Known(by_its_steps)):
        assert row == {
            "own": True,
            "direct": False,
            "early": [False, False, False, True],
            "conclusion_only": False,
            "foreign": False,
            "foreign_followed": True,
            "filler": False,
            "gain_nats": [0.0, 0.0, gold],
            "reference_nats": -1.0,
        }


def test_a_model_that_ignores_its_steps_is_right_with_any() -> None:
    for row in try_rows(Known(whatever_its_steps, known="ticket")):
        assert row == {
            "own": True,
            "direct": True,
            "early": [True] * 4,
            "conclusion_only": True,
            "foreign": True,
            "foreign_followed": False,
            "filler": True,
            "gain_nats": [0.0] * 3,
            "reference_nats": -1.0,
        }


def test_a_foreign_reasoning_is_of_the_same_category_and_another_reference() -> None:
    seen: list[str] = []

    def model(prompt: str, begun: str) -> str:
        if found := re.search(r"<reasoning>Saw (\d).*Cause: ", begun):
            seen.append(f"{prompt[-1]} reads {found[1]}")
        return by_its_steps(prompt, begun)

    try_rows(Known(model))
    assert {text for text in seen if text[0] != text[-1]} == {"0 reads 1", "1 reads 0", "2 reads 3", "3 reads 2"}
    alike = [Example(f"h{i}", f"ticket {i}", "fix 0", reasoning=f"Cause: {i}.") for i in range(2)]
    assert all(row["foreign"] is row["foreign_followed"] is None for row in try_rows(Known(model), alike))


def test_interventions_read_no_more_tokens_at_a_time_than_the_greedy_pass() -> None:
    generator, start = Known(by_its_steps), "x" * 300
    try_rows(generator, [replace(example, prompt=start + example.prompt) for example in EXAMPLES])
    assert 2 * 309 < generator.read <= 4 * 309  # prompts of 309 tokens


def test_an_answer_may_not_become_a_second_reasoning() -> None:
    def model(prompt: str, begun: str) -> str:
        return "let me think, and think, and think: fix " + prompt[-1] + "</answer>"

    examples = [Example(f"h{i}", f"ticket {i}", f"{i}", reasoning=f"Cause: {i}.") for i in range(2)]
    assert [row["early"] for row in try_rows(Known(model), examples)] == [[False, False]] * 2


# --- what cannot be tested is left out -------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("fix 0", NO_REASONING),
        ("<reasoning> \n</reasoning><answer>fix 0</answer>", NO_REASONING),
        ("<reasoning>Saw 0.</reasoning><answer>fix 0", NO_REASONING),
        ("<answer>fix 0</answer><reasoning>Saw 0.</reasoning>", NO_REASONING),
    ],
)
def test_a_reply_without_reasoning_in_tags_is_not_counted(text: str, why: str) -> None:
    replies = [Reply(text), *(Reply(write(example)) for example in EXAMPLES[1:])]
    first, *others = try_rows(Known(by_its_steps), EXAMPLES, replies)
    assert first == {"why": why}
    assert all(row["own"] for row in others)
    assert others[0]["foreign"] is None  # the only tested row of its category


def test_plain_rows_and_rows_that_nobody_can_judge_are_not_counted() -> None:
    plain = Example("p", "ticket 0", "fix 0", plain=True)
    assert try_rows(Known(by_its_steps), [plain], [Reply(write(EXAMPLES[0]))]) == [{"why": ASKS_FOR_NONE}]
    with progress_bar("test", total=0) as bar:
        rows = intervene(
            Known(by_its_steps),  # type: ignore[arg-type]
            [render(EXAMPLES[0])],
            EXAMPLES[:1],
            [Reply(write(EXAMPLES[0]))],
            [None],
            rule=is_right,
            sampling=GREEDY,
            bar=bar,
        )
    assert rows == [{"why": NOT_JUDGED}]


def test_a_tokenizer_that_does_not_give_the_text_back_is_named() -> None:
    class Lossy(Known):
        def text(self, tokens: Sequence[int]) -> str:
            return super().text(tokens).replace("<reasoning>", "")

    assert try_rows(Lossy(by_its_steps)) == [{"why": NOT_ENCODED}] * 4


def test_the_opening_of_conclusions_is_what_four_in_five_share() -> None:
    causes = ["Cause: disk full.", "Cause: no paper.", "Cause: old key.", "Cause: bad cable."]
    assert common_opening([*causes, "Restart it."]) == "Cause:"
    assert common_opening([*causes[:3], "Restart it."]) is None
    assert common_opening(["So the answer is 4.", "So the answer is 5."]) == "So the answer"
    assert common_opening(causes[:1] * 3) is None  # it would give the answer away


def test_a_reasoning_is_cut_at_its_sentences_and_a_long_one_at_eight_places() -> None:
    assert prefixes("\nRead 3.5 pages. Saw it!\nDone.\n") == [
        "",
        "\nRead 3.5 pages.",
        "\nRead 3.5 pages. Saw it!",
        "\nRead 3.5 pages. Saw it!\nDone.\n",
    ]
    assert prefixes("one") == ["", "one"]
    cut = [text.count("a.") for text in prefixes("a. " * 14)]
    assert cut == [0, 2, 4, 6, 8, 10, 12, 14]


# --- the embedded model ----------------------------------------------------------------------------


def test_answers_and_gains_are_those_of_the_forced_text(resident: Resident) -> None:
    generator, made = LocalGenerator(resident), list[Reply]()

    def rule(replies: Sequence[Reply], examples: Sequence[Example]) -> list[bool | None]:
        made.extend(replies)
        return [True] * len(replies)

    examples, prompts = EXAMPLES[:2], [render(example) for example in EXAMPLES[:2]]
    sampling = Sampling(temperature=0, max_completion_length=12)
    with progress_bar("test", total=0) as bar:
        rows = intervene(
            generator,
            prompts,
            examples,
            [Reply(write(e)) for e in examples],
            [True] * 2,
            rule=rule,
            sampling=sampling,
            bar=bar,
        )
    tokenizer, model = resident.tokenizer, resident.model
    prompt_ids = render_ids(tokenizer, prompts)
    first = "<reasoning>Saw 0, so part 0.</reasoning>\n<answer>"
    for place, text in enumerate(("<reasoning></reasoning>\n<answer>", first)):
        ids = [*prompt_ids[0], *tokenizer.encode(text, add_special_tokens=False)]
        expected = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False
        )
        whole = tokenizer.decode(expected[0, len(prompt_ids[0]) :], skip_special_tokens=True)
        assert made[place].text == whole
        assert whole.startswith(text)
    gold = tokenizer.encode("fix 1</answer>", add_special_tokens=False)
    nats = []
    for reasoning in prefixes(examples[1].reasoning or ""):
        begun = tokenizer.encode(f"<reasoning>{reasoning}</reasoning>\n<answer>", add_special_tokens=False)
        ids = [*prompt_ids[1], *begun, *gold]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats.append(sum(float(logits[at - 1, ids[at]]) for at in range(len(ids) - len(gold), len(ids))))
    assert rows[1]["gain_nats"] == pytest.approx([value - nats[0] for value in nats[1:]], abs=5e-3)
    assert max(map(abs, rows[1]["gain_nats"])) > 0.1
    assert rows[1]["reference_nats"] == pytest.approx(nats[-1] / len(gold), abs=5e-3)


def test_filler_has_as_many_tokens_as_the_reasoning(resident: Resident) -> None:
    generator = LocalGenerator(resident)
    for reasoning in ("Looked.", "Tested the same paper from tray 1, which fed. Cause: worn rollers in tray 2."):
        dots = filler(generator, reasoning)
        assert set(dots) == {" ", "."}
        assert abs(len(generator.tokens(dots)) - len(generator.tokens(reasoning))) <= 2


# --- consistency, and the answer anywhere ----------------------------------------------------------


@pytest.mark.parametrize(
    ("reasoning", "answer", "fits"),
    [
        ("Ticket, so part 0. It is not 1. Cause: 0.", "x", True),
        ("It is not 2. Cause: 0.", "x", False),  # a step of another cause
        ("Elsewhere, so part 0. Cause: 0.", "x", False),  # a clue that is not in the ticket
        ("Ticket, but 0, so part 0. Cause: 0.", "x", True),
        ("Ticket, but elsewhere, so part 0. Cause: 0.", "x", False),  # the second clue is not
        ("Saw it. Cause: unheard of.", "x", None),
        ("3 + 4 = 7. 7 * 2 = 14.", "14", True),
        ("3 + 4 = 8. 8 * 2 = 16.", "16", False),
        ("3 + 4 = 7.", "8", False),
        ("", "7", None),
    ],
)
def test_steps_are_consistent_with_the_datas_or_with_arithmetic(reasoning: str, answer: str, fits: bool | None) -> None:
    reply = Reply(f"<reasoning>{reasoning}</reasoning><answer>{answer}</answer>")
    example = replace(EXAMPLES[0], reference="14") if answer.isdigit() else EXAMPLES[0]
    assert is_consistent(ReferenceSteps(EXAMPLES), reply, example) is fits


def test_steps_outside_of_tags_are_not_compared() -> None:
    assert is_consistent(ReferenceSteps([]), Reply("3 + 4 = 7. <answer>7</answer>"), EXAMPLES[0]) is None


@pytest.mark.parametrize(
    ("references", "text", "found"),
    [
        (("Restart the spooler.",), "I would restart  the Spooler, then print", True),
        (("Restart the spooler.",), "restart the spoolers", False),
        (("Reboot", "Restart the spooler."), "<answer>restart the spooler</answer>", True),
        (("12",), "it is $12.00, no doubt", True),
        (("12",), "port 1234 or 112, 12.5, x12, 3.12", False),
        (("1,000",), "so 1000.", True),
        (("...",), "anything", False),
    ],
)
def test_an_answer_is_found_anywhere_word_for_word(references: tuple[str, ...], text: str, found: bool) -> None:
    assert is_mentioned(references, text) is found


# --- evaluation ------------------------------------------------------------------------------------


def evaluate(
    model: Model, settings: Evaluate, examples: Sequence[Example] = EXAMPLES, taught: Sequence[Example] = ()
) -> list[dict[str, Any]]:
    return measure_rows(open_known(Known(model)), examples, settings, label="test", folder=Path(), taught=taught)


def open_known(generator: Known) -> Checkpoint:
    scorer = Scorer({"correctness": REWARDS["correctness"]}, {"correctness": 1.0})
    return Checkpoint(generator, scorer, Draw(max_completion_length=200), Data(), 1)  # type: ignore[arg-type]


class Listening(Known):
    """Keeps the prompts it is asked."""

    def generate(self, prompts: Sequence[Messages], *, n: int, sampling: Sampling, **_: Any) -> list[list[Reply]]:
        self.asked = list(prompts)
        return super().generate(prompts, n=n, sampling=sampling)


def test_shots_stand_before_the_question_as_they_are_taught() -> None:
    generator, settings = Listening(by_its_steps), Evaluate(samples=1, shots=1, reasoning=0)
    assert settings.reads().keys() == {"heldout", "sft"}
    measure_rows(open_known(generator), EXAMPLES[:2], settings, label="test", folder=Path(), shots=EXAMPLES[3:])
    system, question, answer, asked = generator.asked[1]
    assert (system["role"], question["content"], asked["content"]) == ("system", "ticket 3", "ticket 1")
    assert answer == {"role": "assistant", "content": write(EXAMPLES[3])}


def test_with_right_by_math_the_last_number_of_the_reply_is_lenient_accuracy() -> None:
    examples = [Example("h", "ticket 0", "0"), Example("g", "ticket 1", "6")]
    settings = Evaluate(samples=1, reasoning=0, right_by="math")
    for by, expected in (("math", [True, False]), ("correctness", [True, True])):
        rows = evaluate(lambda *_: "6 or 0", settings.model_copy(update={"right_by": by}), examples)
        assert [row["answer_anywhere"] for row in rows] == expected
        assert [row["accurate"] for row in rows] == [False, False]


def test_the_log_probability_of_the_reference_and_its_paired_gain_are_reported() -> None:
    before, after = evaluate(by_its_steps, Evaluate(samples=1)), evaluate(by_its_steps, Evaluate(samples=1))
    for row in before:
        row["reasoning"]["reference_nats"] = -1.5
    before[0]["reasoning"] = {"why": "no reasoning between its tags"}  # is in no pair
    assert measure(after, "grpo", 1.0)["reference_nats"] == {"mean": -1.0, "low": -1.0, "high": -1.0}
    assert compare(before, after, ("base", "grpo"))["reference_nats"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    passes = [measure(before, "base", 1.0), measure(after, "grpo", 1.0)]
    lines = reference_lines({"passes": passes, "gains": [compare(before, after, ("base", "grpo"))]})
    shown = ["base: -1.50 [-1.50, -1.50]", "grpo: -1.00 [-1.00, -1.00]", "base → grpo: +0.50 [+0.50, +0.50]"]
    assert [line.plain for line in lines[1:]] == shown
    unknown = measure([{**row, "reasoning": {"why": "x"}} for row in after], "x", 1.0)
    assert unknown["reference_nats"]["mean"] is None
    assert reference_lines({"passes": [unknown], "gains": []}) == []


def test_an_evaluation_reports_what_the_steps_are_worth() -> None:
    figures = measure(evaluate(by_its_steps, Evaluate(samples=1)), "base", 1.0)
    assert figures["answer_anywhere"]["mean"] == figures["accuracy"]["mean"] == 1.0
    reasoning = figures["reasoning"]
    assert reasoning["why"] == {}
    assert reasoning["rows"] == 4
    # 1 - 2 * 3.8415 / 7.8415, and 2 / 2**4
    assert reasoning["worth"] == reasoning["worth_of_steps"] == {"mean": 1.0, "low": 0.0202, "high": 1.0, "p": 0.125}
    shares = {name: reasoning[name]["mean"] for name in ("own", "foreign", "foreign_followed", "filler")}
    assert shares == {"own": 1.0, "foreign": 0.0, "foreign_followed": 1.0, "filler": 0.0}
    assert [point["mean"] for point in reasoning["early"]] == [0.0, 0.0, 0.0, 1.0]
    assert reasoning["gain_nats"] == {"mean": 14.0, "low": 14.0, "high": 14.0, "by_sentence": [0.0, 0.0, 14.0]}
    # "Saw 0" is no clue of "ticket 0"
    assert reasoning["consistent"]["mean"] == 0.0
    assert reasoning["consistent"]["right_quoting_another"]["mean"] == 1.0


def test_steps_are_compared_with_those_that_were_taught() -> None:
    bare = [replace(example, reasoning=None) for example in EXAMPLES]
    alone, with_lessons = (evaluate(by_its_steps, Evaluate(samples=1), bare, taught) for taught in ((), EXAMPLES))
    assert [row["consistent"] for row in alone] == [None] * 4
    assert [row["consistent"] for row in with_lessons] == [False] * 4  # "Saw 0" is no clue of "ticket 0"
    (lesson,) = (replace(example, reasoning="Ticket 0, so part 0. Cause: 0.") for example in EXAMPLES[:1])
    (row,) = evaluate(lambda *_: write(lesson), Evaluate(samples=1, reasoning=0), bare[:1], [lesson])
    assert row["consistent"] is True


def test_only_as_many_rows_as_asked_for_are_tested() -> None:
    rows = evaluate(by_its_steps, Evaluate(samples=1, reasoning=2))
    assert [row["reasoning"].get("why") for row in rows] == [None, None, NOT_ASKED_FOR, NOT_ASKED_FOR]
    figures = measure(evaluate(by_its_steps, Evaluate(samples=1, reasoning=0)), "base", 1.0)["reasoning"]
    assert figures["rows"] == 0
    assert figures["why"].keys() == figures.keys() - {"rows", "consistent", "why"}
    assert figures["own"] is figures["early"] is figures["gain_nats"] is None


def test_where_no_reasoning_is_asked_for_none_is_tested() -> None:
    rows = evaluate(by_its_steps, Evaluate(samples=1, chain_of_thought=False))
    figures = measure(rows, "base", 1.0)["reasoning"]
    assert figures["worth"] is None
    assert figures["why"]["worth"] == ASKS_FOR_NONE
    assert verdict(figures) == f"The reasoning was not tested: {ASKS_FOR_NONE}."


def test_an_answer_outside_of_the_tags_is_found() -> None:
    figures = measure(evaluate(lambda prompt, begun: f"Try fix {prompt[-1]}!", Evaluate(samples=1)), "base", 1.0)
    assert figures["accuracy"]["mean"] == 0.0
    assert figures["answer_anywhere"]["mean"] == 1.0
    assert figures["reasoning"]["rows"] == 0
    assert figures["reasoning"]["why"]["own"] == NO_REASONING
    assert figures["reasoning"]["why"]["consistent"] == NO_STEPS
    fewer = measure(evaluate(lambda *_: "No tags.", Evaluate(samples=1, reasoning=1)), "base", 1.0)
    assert fewer["reasoning"]["why"]["own"] == NO_REASONING  # not that the other rows were not asked for


# --- the report ------------------------------------------------------------------------------------


def row(early: list[bool], conclusion_only: bool | None = None, **others: Any) -> dict[str, Any]:
    tested = {
        "own": early[-1],
        "direct": early[0],
        "early": early,
        "conclusion_only": conclusion_only,
        "foreign": None,
        "foreign_followed": None,
        "filler": False,
        "gain_nats": [float(mark) for mark in early[1:]],
    }
    return {"reasoning": tested, "consistent": None, "accurate": early[-1], **others}


def test_shorter_reasonings_keep_their_last_value_along_the_curve() -> None:
    figures = measure_reasoning([row([False, True]), row([False, False, False, True])])
    assert [point["mean"] for point in figures["early"]] == [0.0, 0.5, 0.5, 1.0]
    assert figures["gain_nats"]["by_sentence"] == [0.5, 0.5, 1.0]
    assert figures["gain_nats"]["mean"] == 1.0


def test_what_was_not_measured_is_null_and_says_why() -> None:
    figures = measure_reasoning([row([False, True]), {"reasoning": {"why": NO_REASONING}, "accurate": False}, {}])
    assert figures["rows"] == 1
    assert figures["own"]["mean"] == 1.0
    assert figures["conclusion_only"] is figures["worth_of_steps"] is figures["foreign"] is None
    assert figures["why"] == {
        "conclusion_only": NO_OPENING,
        "worth_of_steps": NO_OPENING,
        "foreign": NO_DONOR,
        "foreign_followed": NO_DONOR,
        "worth_over_foreign": NO_DONOR,
        "consistent": NO_STEPS,
    }
    assert verdict(figures).startswith("It is not established that the reasoning does anything")  # by a single row
    assert measure_reasoning([{}])["why"]["own"] == UNKNOWN


def test_of_right_replies_those_that_quote_another_are_counted() -> None:
    marks = [(True, True), (True, False), (True, None), (False, False)]
    rows = [row([False, accurate]) | {"consistent": fits} for accurate, fits in marks]
    consistent = measure_reasoning(rows)["consistent"]
    assert consistent["mean"] == pytest.approx(1 / 3, abs=1e-4)
    assert consistent["rows"] == 3
    assert consistent["right_quoting_another"]["mean"] == 0.5


def passed(own: float, without: float, low: float, high: float, steps: bool = True) -> dict[str, Any]:
    share = {"mean": without, "low": 0.0, "high": 1.0}
    worth = {"mean": own - without, "low": low, "high": high}
    return {
        "rows": 300,
        "own": {"mean": own, "low": 0.0, "high": 1.0},
        "direct": share,
        "conclusion_only": share if steps else None,
        "foreign": share,
        "filler": None,
        "consistent": share | {"rows": 5},
        "worth": worth,
        "worth_of_steps": worth if steps else None,
        "gain_nats": {"mean": 1.25, "low": 1.0, "high": 1.5},
    }


ALONE = "without them 31 % instead of 58 %, -27 points [-33, -21]."


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        (passed(0.58, 0.31, 0.21, 0.33), f"The steps carry the answer: {ALONE}"),
        (passed(0.58, 0.54, 0.01, 0.07), "The steps help: without them 54 % instead of 58 %, -4 points [-7, -1]."),
        (passed(0.5, 0.5, -0.03, 0.03), "The steps do nothing: without them 50 % instead of 50 %, +0 points [-3, +3]."),
        (passed(0.0, 0.0, 0.0, 0.0), "No answer is right, with the steps or without them."),
        (passed(0.4, 0.6, -0.3, -0.1), "The steps do harm: without them 60 % instead of 40 %, +20 points [+10, +30]."),
        (passed(0.58, 0.31, -0.1, 0.6), "It is not established that the steps do anything: without them 31 % "),
        (
            passed(0.58, 0.31, 0.21, 0.33, steps=False),
            f"The reasoning carries the answer: {ALONE.replace('them', 'it')}",
        ),
    ],
)
def test_the_verdict_says_what_the_interval_allows(figures: dict[str, Any], told: str) -> None:
    assert verdict(figures)[: len(told)] == told


def test_the_tables_fit_into_eighty_columns() -> None:
    share = {"mean": 0.583, "low": 0.526, "high": 0.637}
    numbers = dict.fromkeys(("accuracy", "answer_anywhere", "pass_at_1", "format", "reward", "reply_words"), share)
    row = {"after": "02-grpo", "unjudged": 0, "reasoning": passed(0.58, 0.31, 0.21, 0.33), **numbers}
    stream = StringIO()
    Console(width=80, file=stream).print(passes_table([row]), reasoning_table([row]))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    first, second, reasoned = (line.split() for line in text.splitlines() if line.startswith(("after", "02-grpo ")))
    assert first[:3] == ["after", "accuracy", "anywhere"]
    assert second[3] == "58.3%"
    assert reasoned == ["02-grpo", "300", "58.0%", "31.0%", "31.0%", "31.0%", "–", "31.0%", "+1.2"]
