"""The rewards for the shape of a reply: length, repetition, steps and tags."""

from __future__ import annotations

import pytest
from conftest import gold_replies
from pydantic import ValidationError

from qreason.rewards import registry
from qreason.types import Example, Reply

REFERENCE = "Restart the spooler."
GOLD = f"<reasoning>Read the log.</reasoning>\n<answer>{REFERENCE}</answer>"
WRONG = GOLD.replace("Restart", "Ignore")


def mark(name: str, text: str, tokens: int = 0, **settings: float) -> float:
    """What one reply earns; its length is its tokens, if there are any."""
    reply, example = Reply(text, token_ids=(7,) * tokens), Example("x", "issue", REFERENCE)
    (value,) = registry.REWARDS[name]([reply], [example], **settings)
    assert value is not None
    return value


def steps(reasoning: str) -> float:
    return mark("step_count", f"<reasoning>{reasoning}</reasoning><answer>It works.</answer>", least=100) * 100


# --- length --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "earned"), [(1, 0.0), (192, 0.0), (193, -1 / 64), (224, -0.5), (255, -63 / 64), (256, -1.0), (999, -1.0)]
)
def test_soft_overlong_falls_from_the_cache_to_the_limit(tokens: int, earned: float) -> None:
    assert mark("soft_overlong", GOLD, tokens) == pytest.approx(earned)


def test_limit_and_cache_of_soft_overlong_are_settings() -> None:
    assert mark("soft_overlong", GOLD, 95, max_completion_length=100, cache=10) == pytest.approx(-0.5)


@pytest.mark.parametrize("name", ["soft_overlong", "cosine_length"])
def test_reply_without_tokens_is_measured_in_words(name: str) -> None:
    text = "word " * 30
    assert mark(name, text, max_completion_length=40) == mark(name, text, 30, max_completion_length=40)
    assert mark(name, text, max_completion_length=40) != mark(name, text, 20, max_completion_length=40)


@pytest.mark.parametrize(("tokens", "earned"), [(64, 1.5 + 0.25 * 2**0.5), (128, 1.5), (256, -1.0), (300, -1.0)])
def test_right_answer_earns_less_the_longer_the_reply(tokens: int, earned: float) -> None:
    assert mark("cosine_length", GOLD, tokens) == pytest.approx(earned)


@pytest.mark.parametrize("text", [WRONG, REFERENCE])
def test_wrong_or_untagged_answer_loses_less_the_longer_the_reply(text: str) -> None:
    earned = [mark("cosine_length", text, tokens) for tokens in (1, 64, 128, 255, 256)]
    assert earned == pytest.approx([-1.0, -0.5 - 0.25 * 2**0.5, -0.5, 0.0, -1.0], abs=1e-3)


def test_values_of_the_paper_can_be_set() -> None:
    paper = {"wrong_short": -10.0, "overlong": -10.0}
    assert mark("cosine_length", WRONG, 128, **paper) == pytest.approx(-5.0)
    assert mark("cosine_length", GOLD, 256, **paper) == -10.0
    assert mark("cosine_length", GOLD, 128, right_short=4.0, right_long=2.0) == pytest.approx(3.0)


def test_accepted_wording_is_a_right_answer_of_cosine_length() -> None:
    example = Example("x", "issue", "Bounce it.", (REFERENCE,))
    (earned,) = registry.REWARDS["cosine_length"]([Reply(GOLD)], [example])
    assert earned is not None
    assert earned > 1.9


# --- repetition ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "earned"),
    [
        ("one two three four five", 0.0),
        ("a b c a b c", -1 / 4),
        ("A b c, a B c.", -1 / 4),
        ("again " * 12, -9 / 10),
        ("again again", 0.0),
        ("", 0.0),
        ("<reasoning>a b</reasoning><answer>a b</answer>", 0.0),
        ("<reasoning>a b c</reasoning><answer>a b c</answer>", -1 / 4),
        ("Ping 10.0.0.1, ping 10.0.0.2, ping 10.0.0.3", 0.0),
    ],
)
def test_repetition_is_the_share_of_repeated_trigrams(text: str, earned: float) -> None:
    assert mark("repetition", text) == pytest.approx(earned)


def test_longer_ngrams_repeat_less() -> None:
    text = "check the log then check the log again"
    assert mark("repetition", text, n=2) < mark("repetition", text, n=3) < mark("repetition", text, n=4) == 0.0


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reasoning", "count"),
    [
        ("", 0),
        ("Read the log.", 1),
        ("Read the log. Pinged the host. Cause: cable is loose.", 3),
        ("read the log\nping the host\n\nswap the cable", 3),
        ("1. Read the log.\n2. Ping the host\n3) Swap the cable", 3),
        ("- Read the log\n* Ping the host\n• Swap the cable", 3),
        ("Step 1: read the log\nStep 2. Ping the host", 2),
        ("First, read the log, then, ping the host, finally, swap the cable", 3),
        ("First, read the log. Second, ping the host. Next, swap the cable.", 3),
        ("Ping the host, e.g. the file server, i.e. nas.local at 10.0.0.1.", 1),
        ("Then the host answered and then the log was read.", 1),
        ("a. b. c. d.", 0),
        ("1.\n2.\n3.", 0),
        ("Read the log. " * 5, 1),
        ("1. Read the log\n2. Read the log\n3. Read the LOG!", 1),
    ],
)
def test_steps_are_different_lines_sentences_and_announced_parts(reasoning: str, count: int) -> None:
    assert steps(reasoning) == pytest.approx(count)


@pytest.mark.parametrize(("least", "earned"), [(1, 1.0), (2, 1.0), (3, 2 / 3), (4, 0.5)])
def test_steps_count_as_share_of_the_least_wanted(least: int, earned: float) -> None:
    text = "<reasoning>Read the log. Ping the host.</reasoning>"
    assert mark("step_count", text, least=least) == pytest.approx(earned)


@pytest.mark.parametrize(
    "text",
    [
        "Read the log. Ping the host. Swap the cable.",
        "<answer>Read the log. Ping the host. Swap the cable.</answer>",
        "<reasoning>Read the log. Ping the host. Swap the cable.",
        "</reasoning>Read the log. Ping the host. Swap the cable.<reasoning>",
        "<reasoning>Read the log. Ping the host. Swap it.</reasoning><reasoning>Swap the cable.</reasoning>",
    ],
)
def test_steps_outside_one_pair_of_reasoning_tags_earn_nothing(text: str) -> None:
    assert mark("step_count", text) == 0.0


# --- tags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "earned"),
    [
        ("", 0.0),
        ("<answer>x", 0.25),
        ("<answer>a</answer><answer>", 0.25),
        ("<answer>a</answer><answer>b</answer>", 0.0),
        ("<reasoning>y<answer>x</answer>", 0.75),
        ("</answer><answer></reasoning><reasoning>", 1.0),
        (GOLD, 1.0),
        (GOLD.upper(), 0.0),
    ],
)
def test_each_tag_that_is_there_once_earns_a_quarter(text: str, earned: float) -> None:
    assert mark("tag_count", text) == earned


@pytest.mark.parametrize(
    "text", [GOLD, f"\n {GOLD}\n", GOLD.replace("\n", ""), GOLD.replace("log.", "log,\nagain <b>.")]
)
def test_nothing_but_reasoning_and_answer_is_strictly_in_format(text: str) -> None:
    assert mark("format_strict", text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"Sure. {GOLD}",
        f"{GOLD} Bye.",
        GOLD.replace("\n", " so "),
        GOLD + GOLD,
        GOLD.replace("Read the log.", " \n"),
        GOLD.replace(REFERENCE, ""),
        GOLD.replace("log", "<answer>log"),
        GOLD.replace("</answer>", ""),
        "<answer>a</answer><reasoning>r</reasoning>",
        "<reasoning>r<answer>a</reasoning></answer>",
        GOLD.upper(),
    ],
)
def test_anything_else_is_not_strictly_in_format(text: str) -> None:
    assert mark("format_strict", text) == 0.0


# --- all of them ---------------------------------------------------------------------------------


def test_gold_replies_are_in_shape() -> None:
    replies, examples = gold_replies()
    for name, best in {"step_count": 1.0, "tag_count": 1.0, "format_strict": 1.0, "soft_overlong": 0.0}.items():
        assert set(registry.REWARDS[name](replies, examples)) == {best}, name
    repeated = [value or 0.0 for value in registry.REWARDS["repetition"](replies, examples)]
    assert sum(repeated) / len(repeated) > -0.12  # each step ends with "so it is not the"
    assert min(value or 0.0 for value in registry.REWARDS["cosine_length"](replies, examples)) > 1.5


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("soft_overlong", "cache"),
        ("soft_overlong", "max_completion_length"),
        ("cosine_length", "max_completion_length"),
        ("repetition", "n"),
        ("step_count", "least"),
    ],
)
def test_counts_below_one_are_refused_in_a_recipe(name: str, setting: str) -> None:
    with pytest.raises(ValidationError, match=setting):
        registry.settings_model(name).model_validate({setting: 0})


@pytest.mark.parametrize(
    "name", ["soft_overlong", "cosine_length", "repetition", "step_count", "tag_count", "format_strict"]
)
def test_marks_stay_in_the_order_of_the_replies(name: str) -> None:
    texts = [GOLD, "word word word word word " * 80, WRONG, ""]
    example = Example("x", "issue", REFERENCE)
    together = registry.REWARDS[name]([Reply(text) for text in texts], [example] * len(texts))
    assert together == [mark(name, text) for text in texts]
    assert len(set(together)) > 1
