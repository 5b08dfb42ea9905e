"""The helpdesk data: as its generator gives it, held-out rows kept apart, and gold answers worth full marks."""

from __future__ import annotations

import json
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
from qreason.training.preflight import gold

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import make_helpdesk as helpdesk  # noqa: E402
import tiny_corpus  # noqa: E402

HELPDESK = ROOT / "data" / "helpdesk"
FILES = (
    *("sft.jsonl", "prompts.jsonl", "heldout.jsonl", "plain.jsonl", "pairs.jsonl"),
    *("judge_pairs.jsonl", "judge_training.jsonl", "judge_hard.jsonl"),
)
DOCUMENTS = 3000
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")

Row = dict[str, Any]


@cache
def rows(name: str) -> list[Row]:
    return [json.loads(line) for line in (HELPDESK / name).read_text("utf-8").split("\n") if line]


@cache
def causes() -> list[helpdesk.Cause]:
    return helpdesk.read_knowledge()


@cache
def pretraining() -> str:
    """The first documents of the pretraining text, in lower case."""
    corpus = tiny_corpus.Corpus(causes(), 1)
    mixtures = (tiny_corpus.COMPARING, tiny_corpus.EVERYTHING, tiny_corpus.CONSOLIDATING)
    return "\n".join(text for mixture in mixtures for text in islice(corpus.documents(mixture), DOCUMENTS)).lower()


@cache
def known_fixes() -> dict[str, list[helpdesk.Cause]]:
    """Resolution as written in the files -> the causes it is a fix of."""
    known: dict[str, list[helpdesk.Cause]] = {}
    for cause in causes():
        for fix in cause.fixes:
            known.setdefault(helpdesk.sentence(fix), []).append(cause)
    return known


@cache
def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def overlap(text: str, issue: str) -> float:
    """The share of a wording's words that an issue holds; a typo costs one word."""
    own = words(text.replace("{system}", ""))
    return len(own & words(issue)) / len(own)


def told(row: Row) -> tuple[helpdesk.Cause, int, int]:
    """The cause behind a row and the numbers of the symptom and the clue its issue is made of."""
    readings = [
        (overlap(symptom, row["issue"]) + overlap(clue, row["issue"]), cause, s, c)
        for cause in known_fixes()[row["resolution"]]
        for s, symptom in enumerate(cause.symptoms)
        for c, clue in enumerate(cause.clues)
    ]
    _, cause, symptom, clue = max(readings, key=lambda reading: reading[0])
    return cause, symptom, clue


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
    by_family = Counter(cause.family for cause in causes())
    assert len(by_family) >= 80
    assert min(by_family.values()) >= 4
    assert len({cause.category for cause in causes()}) >= 12
    assert all(len(cause.clues) >= 3 and len(cause.steps) >= 3 and len(cause.fixes) >= 2 for cause in causes())


def test_no_two_causes_share_a_fix() -> None:
    assert [fix for fix, owners in known_fixes().items() if len(owners) > 1] == []


def test_judge_pairs_are_balanced_and_labelled_by_the_knowledge() -> None:
    pairs = rows("judge_pairs.jsonl")
    assert sum(pair["label"] for pair in pairs) == 100
    for pair in pairs:
        (cause,) = known_fixes()[pair["reference"]]
        assert pair["label"] == (cause in known_fixes()[pair["reply"]]), pair["id"]


def test_hard_pairs_are_balanced_and_never_the_reference_itself() -> None:
    pairs = rows("judge_hard.jsonl")
    assert sum(pair["label"] for pair in pairs) == 100
    assert all(pair["reply"] != pair["reference"] for pair in pairs if not pair["label"])


def test_no_reference_of_the_training_pairs_is_measured_on() -> None:
    measured = {pair["reference"] for name in ("judge_pairs", "judge_hard") for pair in rows(f"{name}.jsonl")}
    assert not measured & {pair["reference"] for pair in rows("judge_training.jsonl")}


@pytest.mark.parametrize("name", FILES[:3])
def test_every_gold_answer_earns_full_marks_from_every_rule_reward(name: str) -> None:
    examples = read_examples(HELPDESK / name, use=name.removesuffix(".jsonl"))
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
    assert [row["id"] for row in rows("heldout.jsonl") if row["issue"] in further] == []


def test_fixed_rows_hold_both_splits_equally() -> None:
    assert Counter(row["split"] for row in rows("heldout.jsonl")[:30]) == {"seen": 15, "new": 15}
    splits = Counter(row["split"] for row in rows("heldout.jsonl"))
    assert splits["seen"] == splits["new"]


@pytest.mark.parametrize("name", ["sft.jsonl", "prompts.jsonl"])
def test_no_heldout_issue_equals_or_nearly_duplicates_a_training_row(name: str) -> None:
    training = helpdesk.NearDuplicates(row["issue"] for row in rows(name))
    assert [row["id"] for row in rows("heldout.jsonl") if row["issue"] in training] == []


def test_near_duplicates_are_found() -> None:
    index = helpdesk.NearDuplicates([rows("sft.jsonl")[0]["issue"]])
    assert "Hi team, " + rows("sft.jsonl")[0]["issue"] in index
    assert rows("sft.jsonl")[1]["issue"] not in index


def test_no_issue_is_used_twice() -> None:
    issues = [row["issue"] for name in FILES[:3] for row in rows(name)]
    assert len(set(issues)) == len(issues)


def test_seen_split_combines_only_reserved_pairs() -> None:
    seen = [row for row in rows("heldout.jsonl") if row["split"] == "seen"]
    assert [row["id"] for row in seen if (reading := told(row))[1:] not in reading[0].reserved] == []


@pytest.mark.parametrize("name", ["sft.jsonl", "prompts.jsonl"])
def test_training_never_combines_a_reserved_pair(name: str) -> None:
    assert [row["id"] for row in rows(name) if (reading := told(row))[1:] in reading[0].reserved] == []


def test_new_split_tells_its_issues_in_kept_back_words() -> None:
    for row in rows("heldout.jsonl"):
        (cause,) = known_fixes()[row["resolution"]]
        if row["split"] == "new":
            assert overlap(cause.new_clue, row["issue"]) > max(overlap(clue, row["issue"]) for clue in cause.clues)


def test_prompts_cover_families_that_incidents_do_not() -> None:
    written_up, asked = (
        {cause.family for row in rows(name) for cause in known_fixes()[row["resolution"]]}
        for name in ("sft.jsonl", "prompts.jsonl")
    )
    assert asked == {cause.family for cause in causes()}
    assert written_up == {cause.family for cause in causes() if cause.written_up}
    assert len(asked - written_up) >= 40


# --- the pretraining text knows the matter, not the task -----------------------------------------


def test_pretraining_text_is_drawn_from_its_seed() -> None:
    first, second = (
        list(islice(tiny_corpus.Corpus(causes(), 1).documents(tiny_corpus.EVERYTHING), 20)) for _ in range(2)
    )
    assert first == second
    assert first != list(islice(tiny_corpus.Corpus(causes(), 2).documents(tiny_corpus.EVERYTHING), 20))


def test_pretraining_text_covers_every_family() -> None:
    told_of = {cause.family for cause in causes() if cause.cause.lower() in pretraining()}
    assert told_of == {cause.family for cause in causes()}


def test_pretraining_text_has_no_tag_of_the_protocol() -> None:
    assert leaked(TAGS) == []


def test_pretraining_text_has_no_kept_back_wording() -> None:
    assert leaked(cause.new_clue for cause in causes()) == []
    # A symptom names its system in the middle: its longest part is looked for.
    parts = {max(symptom.split("{system}"), key=len).strip() for cause in causes() for symptom in cause.new_symptoms}
    assert leaked(parts) == []


def test_pretraining_text_has_no_heldout_issue() -> None:
    assert leaked(row["issue"] for row in rows("heldout.jsonl")) == []


def test_pretraining_text_compares_no_kept_out_pair() -> None:
    asked = [render_judge(pair["reference"], pair["reply"])[1]["content"] for pair in rows("judge_pairs.jsonl")]
    assert leaked(asked) == []
    assert "do they say the same?" in pretraining()


def test_no_comparison_in_the_pretraining_text_has_a_kept_out_fix() -> None:
    fixes = {fix.lower() for cause in helpdesk.judged_causes(causes()) for fix in cause.fixes}
    corpus = tiny_corpus.Corpus(causes(), 1)
    for _ in range(500):
        text = (tiny_corpus.judgement(corpus) + tiny_corpus.judgements(corpus)).lower()
        assert not any(fix in text for fix in fixes)
