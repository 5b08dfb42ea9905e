"""The rule rewards, the protocol they read, and how rewards combine."""

from __future__ import annotations

import random
import time

import pytest
from rouge_score.rouge_scorer import RougeScorer

from qreason.rewards import registry
from qreason.rewards.judged import PreferenceSettings
from qreason.rewards.scoring import combine
from qreason.rewards.tags import follows_format, read_answer
from qreason.rewards.text import ends_with, is_mentioned, normalize, read_number
from qreason.types import Example, Reply

GOLD = "<reasoning>Read the log.</reasoning>\n<answer>Restart the spooler.</answer>"


def mark(name: str, text: str, reference: str = "Restart the spooler.", *accepted: str) -> float | None:
    """What one reply earns from one rule reward."""
    (value,) = registry.REWARDS[name]([Reply(text)], [Example("x", "issue", reference, accepted)])
    return value


def marked(answer: str, reference: str, *accepted: str) -> float | None:
    return mark("correctness", f"<answer>{answer}</answer>", reference, *accepted)


# --- the protocol --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "earned"),
    [
        ("", 0.0),
        ("<answer>", 0.2),
        ("<answer>x</answer>", 0.4),
        ("<reasoning>y<answer>x</answer>", 0.6),
        (GOLD, 0.8),
        ("</answer><answer></reasoning><reasoning>", 0.8),  # the order is no matter of this reward
    ],
)
def test_each_present_tag_earns_a_fifth(text: str, earned: float) -> None:
    assert mark("format", text) == earned


def test_tags_in_another_case_earn_nothing() -> None:
    assert mark("format", GOLD.upper()) == 0.0


def test_repeated_tags_are_counted_once() -> None:
    assert mark("format", "<answer>a</answer><answer>b</answer>") == 0.4


def test_tags_with_attributes_or_spaces_are_other_tags() -> None:
    assert mark("format", "<answer type=x>a</ answer>") == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (GOLD, "Restart the spooler."),
        ("<answer>\n two words \n</answer>", "two words"),
        ("<answer>first</answer><answer>last</answer>", ""),
        # GRPO learnt to go on after the first answer, because that cost nothing.
        ("<answer>first</answer> first</answer>", ""),
        ("<answer>a</answer> and <answer>b", ""),
        ("</answer>a<answer>", ""),
        ("<Answer>a</Answer>", ""),
        ("Restart the spooler.", ""),
    ],
)
def test_answer_is_what_the_only_pair_of_tags_encloses(text: str, answer: str) -> None:
    assert read_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "<answer>a</answer><reasoning>r</reasoning>",
        "<reasoning>r<answer>a</reasoning></answer>",
        GOLD + "<answer>again</answer>",
        "<reasoning>r</reasoning><answer>a",
        GOLD.upper(),
        "",
    ],
)
def test_wrong_order_missing_or_repeated_tags_break_the_format(text: str) -> None:
    assert not follows_format(text)


def test_each_tag_once_in_order_follows_the_format() -> None:
    assert follows_format(GOLD)
    assert follows_format(f"Sure. {GOLD} Bye.")


# --- correctness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Restart the spooler", " restart  THE\nspooler. ", "'Restart the spooler!'"])
def test_normalize_forgets_case_spacing_and_outer_punctuation(text: str) -> None:
    assert normalize(text) == "restart the spooler"


def test_normalize_keeps_inner_punctuation() -> None:
    assert normalize("Use smb://nas-1, not C:\\x.") == "use smb://nas-1, not c:\\x"


def test_exact_answer_earns_two() -> None:
    assert marked("restart the Spooler", "Restart the spooler.") == 2.0


def test_every_accepted_wording_earns_two() -> None:
    assert marked("bounce the spooler", "Restart the spooler.", "Bounce the spooler.") == 2.0


def test_wrong_answer_earns_nothing() -> None:
    assert marked("Reboot the printer.", "Restart the spooler.") == 0.0


def test_answer_outside_the_tags_earns_nothing() -> None:
    assert mark("correctness", "Restart the spooler.") == 0.0


def test_empty_answer_equals_no_reference() -> None:
    assert marked("", "...") == 0.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("$1,234", "1234"),
        ("1234.0", "1,234"),
        ("It costs $18.", "18"),
        ("12 + 6 = 18", "$18"),
        ("18 dollars", "18"),
        ("50", "50 %"),
        ("about 16", "16 GB"),
        ("-3", "-3.0"),
        ("0.5", ".5"),
    ],
)
def test_right_number_in_other_words_earns_one_and_a_half(answer: str, reference: str) -> None:
    assert marked(answer, reference) == 1.5


def test_number_of_an_accepted_wording_counts() -> None:
    assert marked("it is 7", "seven", "7") == 1.5


@pytest.mark.parametrize(("answer", "reference"), [("17", "18"), ("18, so 19", "18"), ("1.8", "18"), ("none", "18")])
def test_wrong_number_earns_nothing(answer: str, reference: str) -> None:
    assert marked(answer, reference) == 0.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("−5", "-5"), ("–5", "-5"), ("-$5", "-5"), ("minus 5", "-5"), ("(−5)", "-5"),
        ("70 000", "70000"), ("70\u202f000", "70000"), ("1'234'567", "1234567"), ("1.234,56", "1234.56"),
        ("2,50 €", "2.5"), ("0,125", ".125"), ("٣٫٥", "3.5"), ("２０", "20"),
        ("½", "0.5"), ("1½", "1.5"), ("3/4", "0.75"), ("2 1/2", "2.5"), (r"\boxed{-\frac{3}{4}}", "-0.75"),
        ("3e8", "300000000"), ("3 × 10⁸", "3e8"), ("20 thousand", "20000"), ("5 m²", "5"),
        ("Straße", "STRASSE"), ("cafe\u0301", "café"), ("„Größe“", "größe"),
    ],
)  # fmt: skip
def test_right_answer_in_any_script_earns(answer: str, reference: str) -> None:
    assert marked(answer, reference) in (1.5, 2.0)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("−5", "5"), ("-$5", "5"), ("minus 5", "5"), ("20-5", "-5"), ("20-5", "5"), ("3–5", "5"), ("±5", "5"),
        ("1/2", "2"), ("½", "2"), (r"\boxed{\frac{3}{4}}", "4"), ("2 1/2", "0.5"), ("1/0", "0"),
        ("10^18", "18"), ("10²", "102"), ("3e8", "8"), (r"\sqrt{2}", "2"), ("2π", "2"), ("5x", "5"), ("12 + 6", "6"),
        ("2,50 €", "50"), ("20 thousand", "20"), ("12:30", "30"), ("10.0.0.1", "1"), ("x²", "x2"), ("Böse", "Büse"),
        ("9" * 5000, "9" * 4999),
    ],
)  # fmt: skip
def test_wrong_sign_fraction_or_part_of_an_expression_earns_nothing(answer: str, reference: str) -> None:
    assert marked(answer, reference) == 0.0


def test_port_number_inside_a_sentence_is_no_numeric_match() -> None:
    assert marked("Close port 10000.", "Allow port 10000 on the firewall.") == 0.0
    assert marked("10000", "Allow port 10000 on the firewall.") == 0.0


@pytest.mark.parametrize("text", ["port 443", "443, 80", "10.0.0.1", "12:30", "3 of 4", "two", ""])
def test_only_a_number_with_its_unit_reads_as_number(text: str) -> None:
    assert read_number(text) is None


# --- rouge_l and length --------------------------------------------------------------------------


def test_rouge_l_is_the_value_of_rouge_score() -> None:
    reference, answer = "Restart the print spooler on the server.", "Restart the spooler."
    expected = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert 0 < expected < 1
    assert mark("rouge_l", f"<answer>{answer}</answer>", reference) == expected


@pytest.mark.parametrize(
    "text",
    [
        "重启打印服务",
        "Перезапустите службу печати",
        "再起動してください",
        "Επανεκκίνηση",
        "إعادة التشغيل",
        "सेवा पुनः आरंभ करें",
        "รีสตาร์ท",
        "다시 시작",
    ],
)
def test_reference_in_any_script_earns_full_marks(text: str) -> None:
    assert mark("rouge_l", f"<answer>{text}</answer>", text) == 1.0
    assert mark("length", f"<answer>{text}</answer>", text) == 1.0
    assert mark("rouge_l", "<answer>Restart it</answer>", text) == 0.0
    assert is_mentioned((text,), f"1. {text}!")


@pytest.mark.parametrize(
    ("reference", "text", "right"),
    [
        ("12", "3 + 9 makes 12, so it is $12.00, no doubt", True),
        ("12", "first 12, then 13", False),
        ("1,000", "<reasoning>7</reasoning>\n<answer>1000</answer>", True),
        ("5", "it is 20-5", False),
        ("5", "none", False),
        ("x + 1", "so x + 1 it is, 3", True),
    ],
)
def test_the_last_number_of_a_reply_is_its_answer_anywhere(reference: str, text: str, right: bool) -> None:
    assert ends_with((reference,), text) is right


def test_rouge_l_is_that_of_rouge_score_for_any_words_and_quick_for_many() -> None:
    # Ten thousand words used to take half a minute.
    draw, scorer = random.Random(1), RougeScorer(["rougeL"])
    for _ in range(300):
        reference, answer = (" ".join(draw.choices("abcdef", k=draw.randint(1, 40))) for _ in range(2))
        expected = scorer.score(reference, answer)["rougeL"].fmeasure
        assert mark("rouge_l", f"<answer>{answer}</answer>", reference) == expected
    start = time.process_time()
    assert mark("rouge_l", f"<answer>{'a b c ' * 5000}</answer>", "c a b " * 5000) == pytest.approx(1.0, abs=1e-3)
    assert time.process_time() - start < 5


def test_rouge_l_compares_letters_not_their_encoding() -> None:
    assert mark("rouge_l", "<answer>Bo\u0308se</answer>", "Böse") == 1.0
    assert mark("rouge_l", "<answer>Böse</answer>", "Büse") == 0.0
    assert mark("rouge_l", "<answer>重启服务</answer>", "重启打印服务") == pytest.approx(0.8)
    assert mark("length", "<answer>重启</answer>", "重启打印服务") == pytest.approx(1 / 3)


def test_rouge_l_takes_the_best_accepted_wording() -> None:
    assert mark("rouge_l", "<answer>bounce it</answer>", "Restart the spooler.", "Bounce it.") == 1.0


@pytest.mark.parametrize(
    ("answer", "similarity"),
    [("a b c d", 1.0), ("a b c", 0.75), ("a b c d e", 0.75), ("a", 0.25), ("a b c d e f g h", 0.0), ("a " * 40, 0.0)],
)
def test_length_falls_from_one_at_equal_words_to_nothing(answer: str, similarity: float) -> None:
    assert mark("length", f"<answer>{answer}</answer>", "one two three four") == similarity


@pytest.mark.parametrize("name", ["correctness", "rouge_l", "length"])
def test_reply_without_answer_earns_nothing(name: str) -> None:
    assert mark(name, "Restart the spooler.") == 0.0


@pytest.mark.parametrize("name", sorted(registry.FULL_MARKS.keys() - {"math"}))
def test_gold_reply_earns_full_marks(name: str) -> None:
    assert mark(name, GOLD) == registry.FULL_MARKS[name]


# --- the judge, and all together -----------------------------------------------------------------


def no_model(settings: object) -> None:
    raise AssertionError("no model is needed")


def words_shared(pairs: object) -> list[float]:
    return [0.25 for _ in pairs]  # type: ignore[attr-defined]


def test_judge_is_not_asked_about_a_reply_without_answer() -> None:
    asked: list[tuple[str, str]] = []

    def judge(pairs: object) -> list[float]:
        asked.extend(pairs)  # type: ignore[arg-type]
        return words_shared(pairs)

    example = Example("x", "issue", "Restart the spooler.")
    marks = registry.build({"judge": {}}, lambda settings: judge, 96)["judge"](
        [Reply("no tags"), Reply(GOLD)], [example, example]
    )
    assert marks == [0.0, 0.25]
    assert asked == [("Restart the spooler.", "Restart the spooler.")]


def test_main_recipe_combines_with_its_exact_weights() -> None:
    weights = {"correctness": 0.1, "format": 0.1, "rouge_l": 0.2, "length": 0.2, "judge": 0.4}
    built = registry.build({name: {} for name in weights}, lambda settings: words_shared, 96)
    (score,) = combine(built, weights, [Reply(GOLD)], [Example("x", "issue", "Restart the spooler.")])
    assert score.parts == {"correctness": 2.0, "format": 0.8, "rouge_l": 1.0, "length": 1.0, "judge": 0.25}
    assert score.total == pytest.approx(0.1 * 2.0 + 0.1 * 0.8 + 0.2 * 1.0 + 0.2 * 1.0 + 0.4 * 0.25)


def test_scores_stay_in_the_order_of_the_replies() -> None:
    replies, example = [Reply("none"), Reply(GOLD), Reply("none")], Example("x", "issue", "Restart the spooler.")
    scores = combine(registry.build({"format": {}}, no_model, 96), {"format": 1.0}, replies, [example] * 3)
    assert [score.total for score in scores] == [0.0, 0.8, 0.0]


def test_unjudged_part_leaves_no_total_and_keeps_the_other_parts() -> None:
    def unjudged(replies: object, examples: object) -> list[float | None]:
        return [None]

    built = registry.build({"format": {}}, no_model, 96) | {"judge": unjudged}
    (score,) = combine(built, {"format": 0.1, "judge": 0.0}, [Reply(GOLD)], [Example("x", "i", "r")])
    assert score.total is None
    assert score.parts == {"format": 0.8, "judge": None}


def test_a_limit_follows_the_sampling_unless_it_is_given() -> None:
    long = Reply("word " * 90)
    for settings, expected in (({}, -1.0), ({"max_completion_length": 1000}, 0.0)):
        built = registry.build({"soft_overlong": settings}, no_model, 90)
        assert built["soft_overlong"]([long], [Example("x", "p", "r")]) == [expected]


def test_a_preference_model_is_opened_with_its_settings() -> None:
    opened: list[object] = []

    def open_model(settings: object) -> object:
        opened.append(settings)
        return lambda pairs: [0.75 for _ in pairs]

    built = registry.build({"preference": {"model": "org/likes"}}, open_model, 96)
    assert built["preference"]([Reply("hi")], [Example("x", "p", "r")]) == [0.75]
    assert opened == [PreferenceSettings(model="org/likes")]
