"""The helpdesk data: as its generator gives it, held-out rows kept apart, and gold answers worth full marks."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from qreason.data.examples import read_examples
from qreason.data.prompts import render_judge
from qreason.rewards.registry import FULL_MARKS, REWARDS
from qreason.rewards.steps import ReferenceSteps, sentences
from qreason.training.preflight import gold

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import make_helpdesk as helpdesk  # noqa: E402
import tiny_corpus  # noqa: E402

HELPDESK = ROOT / "data" / "helpdesk"
FILES = (
    *("sft.jsonl", "prompts.jsonl", "heldout.jsonl", "dev.jsonl", "plain.jsonl", "pairs.jsonl"),
    *("judge_pairs.jsonl", "judge_training.jsonl", "judge_hard.jsonl"),
)
DOCUMENTS = 2500
FACT = r"((?:room |VLAN )?[\w.-]+(?: GB)?)"
KEPT_BACK = ("heldout.jsonl", "dev.jsonl")
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")

Row = dict[str, Any]


@cache
def rows(name: str) -> list[Row]:
    return [json.loads(line) for line in (HELPDESK / name).read_text("utf-8").split("\n") if line]


@cache
def causes() -> list[helpdesk.Cause]:
    return helpdesk.read_knowledge()


@cache
def documents() -> list[str]:
    """The first documents of the pretraining text, in lower case."""
    corpus = tiny_corpus.Corpus(causes(), 1)
    mixtures = (tiny_corpus.COMPARING, tiny_corpus.EVERYTHING, tiny_corpus.CONSOLIDATING, tiny_corpus.QUOTING)
    return [text.lower() for mixture in mixtures for text in islice(corpus.documents(mixture), DOCUMENTS)]


@cache
def pretraining() -> str:
    return "\n".join(documents())


@cache
def patterns() -> list[tuple[re.Pattern[str], helpdesk.Cause]]:
    """The fixes with any fact in their place."""
    return [
        (re.compile(FACT.join(map(re.escape, re.split(r"\{\w+\}", fix)))), cause)
        for cause in causes()
        for fix in cause.fixes
    ]


def owners(fix: str) -> list[helpdesk.Cause]:
    """The causes that a resolution as written in the files is a fix of."""
    return list({cause: None for pattern, cause in patterns() if pattern.fullmatch(fix.removesuffix("."))})


def owner(fix: str) -> helpdesk.Cause:
    (cause,) = owners(fix)
    return cause


def leaked(texts: Iterable[str]) -> list[str]:
    """Those of the texts that stand in the pretraining text."""
    return [text for text in texts if text.lower() in pretraining()]


# --- the files -----------------------------------------------------------------------------------


def test_files_are_byte_for_byte_what_the_seed_gives() -> None:
    made = helpdesk.make_all()
    assert set(made) == set(FILES)
    for name, expected in made.items():
        assert (HELPDESK / name).read_bytes() == "".join(json.dumps(row) + "\n" for row in expected).encode()


def test_there_are_as_many_rows_as_promised() -> None:
    assert len(rows("sft.jsonl")) == 1500
    assert len(rows("prompts.jsonl")) >= 3000
    assert len(rows("heldout.jsonl")) >= 300
    assert len(rows("judge_pairs.jsonl")) == 200


def test_knowledge_is_as_wide_as_promised() -> None:
    by_family = Counter(cause.family.id for cause in causes())
    assert len(by_family) == 45
    assert set(by_family.values()) == {4}
    assert len({cause.category for cause in causes()}) == 15
    for cause in causes():
        assert (len(cause.cleared_by), len(cause.new_cleared_by), len(cause.fixes)) == (6, 2, 2)


def test_a_fix_takes_one_fact_and_a_family_uses_three() -> None:
    for cause in causes():
        assert cause.label in cause.family.facts
        assert all(f"{{{cause.label}}}" in fix for fix in cause.fixes)
    for family in {cause.family.id for cause in causes()}:
        assert len({cause.label for cause in causes() if cause.family.id == family}) >= 3


def test_no_two_parts_share_a_name() -> None:
    assert [name for name, count in Counter(cause.part for cause in causes()).items() if count > 1] == []


def test_no_two_causes_share_a_sentence() -> None:
    keys = ("cleared_by", "new_cleared_by", "suspicion", "fixes")
    texts = Counter(text.lower() for cause in causes() for key in keys for text in getattr(cause, key))
    assert [text for text, count in texts.items() if count > 1] == []


def test_observations_name_no_other_part_of_their_family() -> None:
    for cause in causes():
        for other in helpdesk.siblings(causes(), cause):
            named = other.part.removeprefix("the ").lower()
            assert not any(named in text.lower() for text in cause.cleared_by + cause.new_cleared_by)


def test_judge_pairs_are_balanced_and_labelled_by_the_knowledge() -> None:
    pairs = rows("judge_pairs.jsonl")
    assert sum(pair["label"] for pair in pairs) == 100
    for pair in pairs:
        same = owner(pair["reference"]) is owner(pair["reply"]) and fact(pair["reference"]) == fact(pair["reply"])
        assert pair["label"] == same, pair["id"]


def fact(fix: str) -> str:
    """The fact in a resolution."""
    return next(match[1] for pattern, _ in patterns() if (match := pattern.fullmatch(fix.removesuffix("."))))


def test_hard_pairs_are_balanced_and_never_the_reference_itself() -> None:
    pairs = rows("judge_hard.jsonl")
    assert sum(pair["label"] for pair in pairs) == 100
    assert all(pair["reply"] != pair["reference"] for pair in pairs if not pair["label"])


def test_no_reference_of_the_training_pairs_is_measured_on() -> None:
    measured = {pair["reference"] for name in ("judge_pairs", "judge_hard") for pair in rows(f"{name}.jsonl")}
    taught = {owner(pair["reference"]) for pair in rows("judge_training.jsonl")}
    assert not taught & {owner(reference) for reference in measured}


@pytest.mark.parametrize("name", FILES[:4])
def test_every_gold_answer_earns_full_marks_from_every_rule_reward(name: str) -> None:
    examples = read_examples(HELPDESK / name, use={"dev.jsonl": "heldout"}.get(name, name.removesuffix(".jsonl")))
    replies = [gold(example) for example in examples]
    for reward in FULL_MARKS.keys() - {"math"}:  # these references are prose
        assert set(REWARDS[reward](replies, examples)) == {FULL_MARKS[reward]}, reward


# --- held-out rows are apart ---------------------------------------------------------------------


def test_ranked_pairs_differ_and_are_of_four_kinds() -> None:
    pairs = rows("pairs.jsonl")
    kinds = {"helpfulness": 300, "harmlessness": 300, "relevance": 2100, "resolution": 2100}
    assert Counter(row["about"] for row in pairs) == kinds
    for row in pairs:
        assert row["chosen"] != row["rejected"]
        bad = [text for text in helpdesk.RUDE + helpdesk.UNSAFE if text in row["chosen"] + row["rejected"]]
        assert len(bad) == (row["about"] == "harmlessness")
        assert not any(text in row["chosen"] for text in bad)


def test_no_heldout_issue_is_in_a_plain_task_or_a_ranked_pair() -> None:
    further = " ".join(row["prompt"] for name in ("plain.jsonl", "pairs.jsonl") for row in rows(name))
    assert [row["id"] for name in KEPT_BACK for row in rows(name) if row["issue"] in further] == []


def test_fixed_rows_hold_both_splits_equally() -> None:
    assert Counter(row["split"] for row in rows("heldout.jsonl")[:30]) == {"seen": 15, "new": 15}
    for name in KEPT_BACK:
        splits = Counter(row["split"] for row in rows(name))
        assert splits["seen"] == splits["new"]


@pytest.mark.parametrize("name", ["sft.jsonl", "prompts.jsonl"])
def test_no_heldout_issue_equals_or_nearly_duplicates_a_training_row(name: str) -> None:
    training = helpdesk.NearDuplicates(row["issue"] for row in rows(name))
    assert [row["id"] for kept in KEPT_BACK for row in rows(kept) if row["issue"] in training] == []


def test_near_duplicates_are_found() -> None:
    index = helpdesk.NearDuplicates([rows("sft.jsonl")[0]["issue"]])
    assert "Hi team, " + rows("sft.jsonl")[0]["issue"] in index
    assert rows("sft.jsonl")[1]["issue"] not in index


def test_no_issue_is_used_twice() -> None:
    issues = [row["issue"] for name in FILES[:4] for row in rows(name)]
    assert len(set(issues)) == len(issues)


def test_splits_are_told_in_their_own_wordings() -> None:
    """Three observations of each ticket, in the wordings that its split may use; those of training may have slips."""
    known = {text.lower() for cause in causes() for text in cause.cleared_by}
    allowed = {
        "sft.jsonl": known,
        "prompts.jsonl": known,
        "heldout.jsonl": {cause.new_cleared_by[0].lower() for cause in causes()},
        "dev.jsonl": {cause.new_cleared_by[1].lower() for cause in causes()},
    }
    everything = known | allowed["heldout.jsonl"] | allowed["dev.jsonl"]
    for name, texts in allowed.items():
        for row in rows(name):
            told = {text for text in everything if text in row["issue"].lower()}
            assert len(told) >= 3 or "split" not in row, row["id"]
            assert told <= (known if row.get("split") == "seen" else texts), row["id"]


def test_a_ticket_shows_all_parts_but_the_one_at_fault_to_work() -> None:
    for name in ("heldout.jsonl", "dev.jsonl"):
        for row in rows(name):
            cause, issue = owner(row["resolution"]), row["issue"].lower()
            others = helpdesk.siblings(causes(), cause)
            assert not any(text.lower() in issue for text in cause.cleared_by + cause.new_cleared_by), row["id"]
            for other in others:
                assert any(text.lower() in issue for text in other.cleared_by + other.new_cleared_by), row["id"]
            assert cause.cause.lower() not in issue


def test_half_of_the_circumstances_in_training_have_a_slip_and_none_elsewhere() -> None:
    known = {text.lower() for cause in causes() for text in (*cause.cleared_by, *cause.suspicion)}
    told = [
        step.rpartition(", so it ")[0].lower() for row in rows("sft.jsonl") for step in sentences(row["steps"])[:-2]
    ]
    assert 0.5 < sum(text in known for text in told) / len(told) < 0.6  # a few slips change nothing
    rng = random.Random(1)
    assert {helpdesk.slip("The fan is free of dust", rng) for _ in range(300)} >= {
        *("The fan free of dust", "The fan is is free of dust", "The is fan free of dust", "The fan is free of dust")
    }


def test_steps_quote_the_ticket_and_leave_its_cause() -> None:
    examples = read_examples(HELPDESK / "sft.jsonl", use="sft")
    steps = ReferenceSteps(examples)
    for example in examples:
        told = sentences(example.reasoning or "")
        cause = owner(example.reference)
        assert told[-2:] == [f"That leaves {cause.part}.", f"Cause: {cause.cause}."]
        assert len(told) == 6
        assert steps.fit(example.reasoning or "", example.prompt) == [True] * 5


def test_training_steps_show_each_part_suspected_for_each_conclusion() -> None:
    """So that a step that suspects any part of the family is known to fit, whatever the ticket ends with."""
    suspected: dict[helpdesk.Cause, set[str]] = {}
    for row in rows("sft.jsonl"):
        found = re.findall(r"so it could be (.*?)\.", row["steps"])
        suspected.setdefault(owner(row["resolution"]), set()).update(found)
    for cause, parts in suspected.items():
        assert parts == {one.part for one in (cause, *helpdesk.siblings(causes(), cause))}


def test_training_covers_every_family() -> None:
    for name in ("sft.jsonl", "prompts.jsonl"):
        assert {owner(row["resolution"]) for row in rows(name)} == set(causes())


# --- the pretraining text knows the matter, not the task -----------------------------------------


def test_pretraining_text_is_drawn_from_its_seed() -> None:
    first, second = (
        list(islice(tiny_corpus.Corpus(causes(), 1).documents(tiny_corpus.EVERYTHING), 20)) for _ in range(2)
    )
    assert first == second
    assert first != list(islice(tiny_corpus.Corpus(causes(), 2).documents(tiny_corpus.EVERYTHING), 20))


def test_pretraining_text_covers_every_family() -> None:
    told_of = {cause.family.id for cause in causes() if cause.cause.lower() in pretraining()}
    assert told_of == {cause.family.id for cause in causes()}


def test_no_document_goes_from_an_observation_to_a_cause_or_fix() -> None:
    """Of one family: what connects them stands in different documents."""
    shown: dict[str, list[str]] = {}
    for cause in causes():
        shown.setdefault(cause.family.id, []).extend(text.lower() for text in cause.cleared_by)
    told = [(re.compile(re.escape(cause.cause.lower())), cause) for cause in causes()]
    mended = [(re.compile(pattern.pattern, re.IGNORECASE), cause) for pattern, cause in patterns()]
    for document in documents():
        if any(sign in document for sign in ("reference:", "same fix?", "text a:", "expected:")):
            continue  # a comparison of fixes with anything
        families = {cause.family.id for pattern, cause in told + mended if pattern.search(document)}
        for family in families:
            assert [text for text in shown[family] if text in document] == [], document


def test_a_hop_of_the_measure_is_answered_by_the_knowledge() -> None:
    corpus = tiny_corpus.Corpus(causes(), 1)
    for name in tiny_corpus.HOPS:
        asked, replies = tiny_corpus.hop(corpus, name)
        assert "<|im_start|>assistant\n" in asked
        assert replies


def test_pretraining_text_has_no_tag_of_the_protocol() -> None:
    assert leaked(TAGS) == []


def test_pretraining_text_has_no_kept_back_wording() -> None:
    assert leaked(text for cause in causes() for text in cause.new_cleared_by) == []
    # A symptom names its system in the middle: its longest part is looked for.
    parts = {
        max(symptom.split("{system}"), key=len).strip() for cause in causes() for symptom in cause.family.new_symptoms
    }
    assert leaked(parts) == []


def test_pretraining_text_has_no_heldout_issue() -> None:
    assert leaked(row["issue"] for name in KEPT_BACK for row in rows(name)) == []


def test_pretraining_text_compares_no_kept_out_pair() -> None:
    asked = [render_judge(pair["reference"], pair["reply"])[1]["content"] for pair in rows("judge_pairs.jsonl")]
    assert leaked(asked) == []
    assert "do they say the same?" in pretraining()


def test_no_comparison_in_the_pretraining_text_has_a_kept_out_fix() -> None:
    kept_out = set(helpdesk.judged_causes(causes()))
    fixes = [re.compile(p.pattern + r"(?![\w,-])", re.IGNORECASE) for p, cause in patterns() if cause in kept_out]
    corpus = tiny_corpus.Corpus(causes(), 1)
    for _ in range(500):
        text = tiny_corpus.judgement(corpus) + tiny_corpus.judgements(corpus)
        assert not any(fix.search(text) for fix in fixes), text
