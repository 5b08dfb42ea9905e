"""The page of a run: what it shows, what it escapes, and how large it grows."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import RunWriter, evaluated_row, jsonl

from qreason.cli import main
from qreason.report import statistics
from qreason.report.curves import POINTS, thin
from qreason.report.headline import headline, remarks
from qreason.report.page import signs
from qreason.report.replies import MOST_BYTES, MOST_ROWS, MOST_TEXT, clip, sample_rollouts, side_by_side, split_answer

SCRIPT = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)> & \"quoted\""
Rows = list[dict[str, object]]


def qreason(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def make_passes(count: int = 4, reply: str = "<reasoning>Looked.</reasoning><answer>Restart.</answer>") -> list[Rows]:
    """Three passes: nothing right, all right, all but the first right."""
    right: list[Callable[[int], bool]] = [lambda i: False, lambda i: True, lambda i: i > 0]
    return [[evaluated_row(i, reply, is_right(i), split="new") for i in range(count)] for is_right in right]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 100)


@pytest.fixture
def page(write_run: RunWriter) -> str:
    return write_page(write_run("out", make_passes()))


def write_page(folder: Path) -> str:
    result = qreason("report", folder)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    return re.sub(r"<[^>]*>", "", re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.S))


def test_page_and_table_have_the_log_probability_of_the_reference_where_it_was_measured(
    write_run: RunWriter, page: str
) -> None:
    assert "log p of the reference" not in page
    names = ("own", "direct", "conclusion_only", "foreign", "foreign_followed", "filler")
    passes = make_passes()
    for nats, rows in zip((-1.5, -1.25, -1.0), passes, strict=True):
        tested = dict.fromkeys(names, True) | {"early": [True], "gain_nats": [0.5], "reference_nats": nats}
        rows[:] = [row | {"reasoning": tested} for row in rows]
    folder = write_run("measured", passes)
    found = re.search(r"<p>log p of the reference.*?</p>", write_page(folder))
    assert found
    assert all(value in found[0] for value in ("1.50", "1.25", "1.00", "0.25", "0.50"))


def test_page_begins_with_the_verdict_its_interval_and_the_reasoning(page: str, write_run: RunWriter) -> None:
    assert "It is not established that accuracy changed: 0.0\u00a0% and 75.0\u00a0% of 4 held-out rows" in page
    page = write_page(write_run("longer", make_passes(8)))
    found = re.search(r'<p class="headline">(.*?)</p>', page)
    assert found
    assert re.fullmatch(
        r"Accuracy rose from 0\.0\u00a0% to 87\.5\u00a0% of 8 held-out rows, \+87\.5 points \[[^]]*\]; "
        r"the reasoning was not tested: measured before qreason tested reasoning\.",
        found[1],
    )


def test_page_asks_for_nothing_from_elsewhere(page: str) -> None:
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert re.findall(r"""(?:src|href)=["'](?!#)[^"']*""", page) == []
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)


def test_every_reward_has_a_curve_and_alarms_are_marked_at_their_steps(write_run: RunWriter) -> None:
    folder = write_run("out", make_passes(), steps=30)
    plain = write_page(folder)
    for title in ("reward", "format", "learning rate"):
        assert f"<b>{title}</b>" in plain
    assert plain.count("<svg ") == 4  # these, and the passes
    assert "var(--line)" in plain
    assert 'stroke="var(--alarm)"' not in plain
    alarm = {"step": 7, "text": f"the length grows {SCRIPT}", "sign": "s", "reward": "format", "replies": []}
    (folder / "02-grpo" / "alarms.jsonl").write_text(jsonl([alarm]))
    page = write_page(folder)
    assert page.count('stroke="var(--alarm)"') == 3  # one in each curve
    assert "Alarm at step 7 of 02-grpo:" in page
    assert SCRIPT not in page


def test_whatever_a_reply_says_is_text(write_run: RunWriter) -> None:
    passes = make_passes(reply=f"{SCRIPT}<answer>{SCRIPT}</answer>")
    for rows in passes:
        rows[0] |= {"prompt": SCRIPT, "reference": SCRIPT, "id": SCRIPT, "split": SCRIPT}
    folder = write_run("out", passes)
    rollout = {"step": 1, "id": SCRIPT, "prompt": SCRIPT, "reply": SCRIPT, "parts": {SCRIPT: 1.0}, "total": 1.0}
    (folder / "02-grpo" / "replies.jsonl").write_text(jsonl([rollout]))
    (folder / "02-grpo" / "judge.json").write_text(json.dumps({"told": SCRIPT, "fit": True}))
    page = write_page(folder)
    assert page.count("<script>") == page.count("</script>") == 1
    assert "<img" not in page
    assert "&lt;/script&gt;&lt;script&gt;document.title" in page


def test_only_the_script_of_the_page_may_run(page: str) -> None:
    import base64
    import hashlib

    found = re.search(r"script-src 'sha256-([^']*)'", page)
    script = re.search(r"<script>(.*?)</script>", page, re.S)
    assert found
    assert script
    assert base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode() == found[1]


def test_rows_carry_what_the_filter_reads(page: str) -> None:
    assert re.findall(r'<article data-marks="([^"]*)" data-split="([^"]*)">', page) == [("010", "new")] + 3 * [
        ("011", "new")
    ]
    for wanted in ("right before, wrong now", "Search issues and replies", "<option>new</option>"):
        assert wanted in page


def test_page_has_splits_parts_lineage_recipe_versions_and_command(page: str) -> None:
    text = text_of(page)
    for wanted in ("By split", "correctness 1.00 · format – · total 0.20", "prompts.jsonl", "num_generations: 4"):
        assert wanted in text
    for wanted in ("transformers", "sha256:", "qreason ", "McNemar", "Not measured: the recipe has no labels"):
        assert wanted in text


def test_judge_and_memory_are_shown_where_they_were_measured(write_run: RunWriter) -> None:
    folder = write_run("out", make_passes())
    bins = [
        {"from": 0.0, "pairs": 3, "verdict": 0.1, "right": 0.0},
        {"from": 0.8, "pairs": 5, "verdict": 0.9, "right": 1},
    ]
    judge = {"told": "fit for its weight", "auc": 0.987654, "injections": {"attempts": 9, "successes": 2}}
    (folder / "02-grpo" / "judge.json").write_text(json.dumps(judge | {"calibration_curve": bins}))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["memory"] = {"planned_bytes": {"3": 3 << 30}, "peak_bytes": {"3": 5 << 29, "0": 1 << 30}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    text = text_of(write_page(folder))
    for wanted in (
        "fit for its weight",
        "0.988",
        "2 of 9",
        "share right",
        "02-grpo grpo3.002.50",
        "base evaluate–1.00",
    ):
        assert wanted in text


def test_large_run_stays_small_and_says_what_it_leaves_out(write_run: RunWriter) -> None:
    long = f"<reasoning>{'Looked at <everything>. ' * 40}</reasoning><answer>Restart.</answer>"
    folder = write_run("out", make_passes(700, long), steps=2000)
    with (folder / "02-grpo" / "replies.jsonl").open("w") as stream:
        for step in range(1, 2001):
            row = {"step": step, "id": f"p{step}", "prompt": "issue", "reply": long, "parts": {"format": 1.0}}
            stream.writelines(json.dumps(row | {"total": number / 30}) + "\n" for number in range(30))
    page = write_page(folder)
    assert len(page.encode()) < 3_000_000
    text = text_of(page)
    assert "12 prompts of 60,000 replies" in text
    assert "each point is the mean of up to 10 of 2,000 logged steps" in text
    shown = page.count("<article ")
    assert 50 < shown < 700
    assert f"{shown} of 700 rows, drawn at random; the others are in replies.jsonl" in text


def test_chosen_rows_fit_whatever_their_length() -> None:
    rows = [evaluated_row(i, "<" * 50_000) for i in range(600)]
    chosen = side_by_side(["base"], [rows])
    assert 0 < len(chosen) < MOST_ROWS
    assert sum(len(json.dumps(row)) for row in chosen) * 4 < 1.2 * MOST_BYTES
    ids = [int(row["id"][1:]) for row in chosen]
    assert ids == sorted(ids)
    assert ids[-1] > 300  # not the first ones
    assert len(side_by_side(["base"], [[evaluated_row(i) for i in range(600)]])) == MOST_ROWS


def test_long_text_is_cut_and_says_so() -> None:
    assert clip("a" * MOST_TEXT) == "a" * MOST_TEXT
    assert clip("a" * (MOST_TEXT + 1500)).endswith("a […1,500 more characters]")


@pytest.mark.parametrize("text", ["", "no tags", "<answer>a</answer>", "x<answer>a</answer> and <answer>b"])
def test_a_reply_is_shown_whole(text: str) -> None:
    reasoning, answer = split_answer(text)
    assert reasoning + answer == text
    assert "<answer>" not in reasoning


def test_rollouts_are_the_best_and_the_worst_of_a_group(tmp_path: Path) -> None:
    row = {"prompt": "p", "parts": {}}
    rows = [{"step": 1, "id": "a", "reply": f"{total}", "total": total, **row} for total in (0.5, None, 0.9, 0.1)]
    rows += [
        {"step": 1, "id": "other", "reply": "x", "total": 2.0, **row},
        {"step": 2, "id": "b", "reply": "y", "total": None, **row},
    ]
    (tmp_path / "replies.jsonl").write_text(jsonl(rows))
    ((group,), count) = sample_rollouts(tmp_path / "replies.jsonl")
    assert [one["total"] for one in group["replies"]] == [0.9, 0.1]
    assert (group["step"], count) == (1, 6)


def test_thinned_curve_keeps_the_mean_and_leaves_out_what_is_no_number() -> None:
    rows = [{"step": step, "reward": float(step), "odd": None if step % 2 else 1.0} for step in range(1, 1001)]
    thinned = thin(rows)
    assert len(thinned) == POINTS
    assert sum(row["reward"] for row in thinned) / POINTS == 500.5
    assert thin([{"step": 1, "reward": float("nan"), "x": "text"}]) == [{"step": 1}]
    assert thin([]) == []


def share(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            share(0.1, 0.02, 0.18),
            "Accuracy rose from 40.0 % to 50.0 % of 90 held-out rows, +10.0 points [+2.0, +18.0]; the",
        ),
        (share(-0.1, -0.18, -0.02), "Accuracy fell from 40.0 % to 50.0 %"),
        (share(0.1, 0.02, 0.18) | {"p": 0.25}, "It is not established that accuracy changed: 40.0 % and 50.0 %"),
        (share(0.1, 0.02, 0.18) | {"p": 0.04}, "Accuracy rose from 40.0 % to 50.0 %"),
        (share(0.1, -0.02, 0.2), "It is not established that accuracy changed: 40.0 % and 50.0 %"),
        (
            None,
            "Accuracy is 50.0 % [40–60] of 90 held-out rows; the steps carry the answer: without them 20 % instead of",
        ),
    ],
)
def test_headline_claims_no_more_than_the_interval(change: dict[str, float] | None, words: str) -> None:
    worth = {
        "own": share(0.5, 0.4, 0.6),
        "conclusion_only": share(0.2, 0.1, 0.3),
        "worth_of_steps": share(0.3, 0.2, 0.4),
    }
    last = {"after": "x", "accuracy": share(0.5, 0.4, 0.6), "unjudged": 10, "reasoning": worth | {"worth": None}}
    base = last | {"accuracy": share(0.4, 0.3, 0.5), "answer_anywhere": share(0.45, 0.4, 0.5)}
    passes = [base, last] if change else [last | {"answer_anywhere": share(0.9, 0.8, 1.0)}]
    report = {"rows": 100, "passes": passes, "gains": [{"accuracy": change}] if change else []}
    assert headline(report).startswith(words)
    assert list(remarks(report)) == ["Up to 10 rows of a pass could not be judged; accuracy and pass@1 leave them out."]


def test_format_in_a_gain_is_said() -> None:
    one = {"after": "base", "accuracy": share(0.0, 0.0, 0.01), "answer_anywhere": share(0.4, 0.3, 0.5), "unjudged": 0}
    (remark,) = remarks({"passes": [one, one]})
    assert remark.startswith("Part of this change is format: 40.0 % [30–50] of the replies of base contain")


def test_minus_signs_and_percent_signs_are_typeset() -> None:
    assert signs("-7 points [-15, +1] of 02-grpo, 54 %, 1e-5") == "−7 points [−15, +1] of 02-grpo, 54\u00a0%, 1e-5"


def test_without_the_extra_the_page_names_it_and_a_run_ends_well(
    write_run: RunWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run("out", make_passes())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vl_convert" else find(name))
    cure = "vl-convert-python, which draws the charts, is missing: pip install 'qreason[report]'"
    refused = qreason("report", folder)
    assert refused.exit_code == 2
    assert refused.stderr.strip() == f"qreason: {cure}"
    ended = qreason("run", "small.yaml", "--out", folder)
    assert ended.exit_code == 0
    assert f"no page: {cure}" in ended.stderr
    assert not (folder / "report.html").exists()


def test_run_writes_its_page_at_its_end(write_run: RunWriter) -> None:
    folder = write_run("out", make_passes(8))
    ended = qreason("run", "small.yaml", "--out", folder)
    assert ended.exit_code == 0
    assert f"page: {folder / 'report.html'}" in ended.stderr
    assert "Accuracy rose" in (folder / "report.html").read_text()


def test_show_prints_the_table_of_the_report_again(write_run: RunWriter) -> None:
    folder = write_run("out", make_passes())
    missing = qreason("show", folder)
    assert missing.exit_code == 2
    assert missing.stderr.strip().endswith("`qreason report out` writes it anew")
    table = qreason("run", "small.yaml", "--out", folder).stdout
    again = qreason("show", folder)
    assert again.exit_code == 0
    assert again.stdout == table
    assert "01-sft → 02-grpo" in table


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"passes": []}, "passes: List should have at least 1 item"),
        ({"gains": [{"from": "a"}]}, "no gains.0.to in it"),
        ({"curves": [{"folder": "x", "reward": ["much"], "parts": {}}]}, "curves.0.reward.0"),
    ],
)
def test_show_names_what_is_wrong_with_a_report(write_run: RunWriter, change: dict[str, object], problem: str) -> None:
    folder = write_run("out", make_passes())
    write_page(folder)
    file = folder / "report.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    result = qreason("show", folder)
    assert result.exit_code == 2
    assert problem in result.stderr


@pytest.mark.parametrize("command", ["report", "show", "compare"])
def test_folder_that_is_no_run_is_refused(workplace: Path, command: str) -> None:
    result = qreason(command, *(["."] if command != "compare" else [".", "other"]))
    assert result.exit_code == 2
    assert "not a run folder" in result.stderr
