"""qreason score, qreason judge calibrate, qreason judge train, and what GRPO says about its rewards, for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import RecipeWriter, jsonl

from qreason.cli import main
from qreason.errors import DataError
from qreason.judge.calibration import read_labels
from qreason.recipe.load import load_recipe
from qreason.recipe.sections import Data
from qreason.training.judge import judge_settings

HELPDESK = Path(__file__).parents[1] / "data" / "helpdesk"
GOLD = "<reasoning>Looked.</reasoning>\n<answer>Restart the spooler.</answer>"


@pytest.fixture
def few_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each injection on one wrong reply in place of three."""
    monkeypatch.setattr("qreason.judge.calibration.ATTACKED", 1)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def rows_of(*replies: str) -> str:
    rows = [{"id": f"x{i}", "prompt": "p", "reply": reply, "reference": "Restart the spooler."}
            for i, reply in enumerate(replies)]  # fmt: skip
    return jsonl(rows)  # type: ignore[arg-type]


# --- score -----------------------------------------------------------------------------------------


def test_score_prints_every_part_and_the_total_of_each_reply_in_order(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe()
    (recipe.parent / "replies.jsonl").write_text(rows_of("no", GOLD, "<answer>Restart the spooler.</answer>"))
    result = call("score", str(recipe), "--replies", "replies.jsonl", "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["id"] for row in rows] == ["x0", "x1", "x2"]
    assert [row["parts"] for row in rows] == [
        {"correctness": 0.0, "format": 0.0},
        {"correctness": 2.0, "format": 0.8},
        {"correctness": 2.0, "format": 0.4},
    ]
    assert [row["total"] for row in rows] == pytest.approx([0.0, 0.28, 0.24])
    assert not (recipe.parent / "runs").exists()


def test_score_shows_a_table_that_fits_the_terminal(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe()
    (recipe.parent / "replies.jsonl").write_text(rows_of("no", GOLD))
    result = call("score", str(recipe), "--replies", "replies.jsonl")
    assert result.exit_code == 0
    assert "correctness 0.1" in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no rows"),
        ('{"id": "a", "reply": "b"}', "replies.jsonl:1: 'reference' is missing"),
        ('{"id": "a", "reply": 3, "reference": "c"}', "replies.jsonl:1: 'reply' is missing or not text"),
        ("{", "replies.jsonl:1: not JSON"),
        ('{"id": "a", "reply": "b", "reference": "c", "tests": 3}', "replies.jsonl:1: 'tests' is int, not text"),
    ],
)
def test_replies_that_cannot_be_scored_are_named(write_recipe: RecipeWriter, text: str, said: str) -> None:
    recipe = write_recipe()
    (recipe.parent / "replies.jsonl").write_text(text)
    result = call("score", str(recipe), "--replies", "replies.jsonl")
    assert result.exit_code == 2
    assert said in result.stderr


TABLE = "reply,reference,label\nRestart it.,Restart it.,1\nNo.,Restart it.,0\n"
OBJECTS = (
    '[{"reply": "Restart it.", "reference": "Restart it.", "label": 1}, {"reply": "No.", "reference": "x", "label": 0}]'
)


@pytest.mark.parametrize(
    ("name", "text"), [("r.csv", TABLE), ("r.tsv", TABLE.replace(",", "\t")), ("r.json", OBJECTS), ("r.JSON", OBJECTS)]
)
def test_replies_and_labels_may_be_any_data_file(write_recipe: RecipeWriter, name: str, text: str) -> None:
    recipe = write_recipe()
    (recipe.parent / name).write_text(text)
    result = call("score", str(recipe), "--replies", name, "--json")
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["parts"]["format"] for line in result.stdout.splitlines()] == [0.0, 0.0]
    assert [label for _, _, label in read_labels(recipe.parent / name)] == [1.0, 0.0]


def test_replies_and_labels_are_separated_and_encoded_as_the_recipe_says(write_recipe: RecipeWriter) -> None:
    # Their error named data.separator, which they did not know.
    recipe = write_recipe()
    text = TABLE.replace(",", ";").replace("No.", "Drück es.")
    (recipe.parent / "r.csv").write_text(text, encoding="cp1252")
    options = ("--set", "data.separator=;", "--set", "data.encoding=cp1252")
    result = call("score", str(recipe), "--replies", "r.csv", "--json", *options)
    assert len(result.stdout.splitlines()) == 2, result.output
    labels = read_labels(recipe.parent / "r.csv", Data(separator=";", encoding="cp1252"))
    assert [reply for _, reply, _ in labels] == ["Restart it.", "Drück es."]


@pytest.mark.parametrize("rewards", ["rewards", "grpo.rewards"])
def test_the_judge_that_is_measured_is_that_of_the_recipe_by_any_name(write_recipe: RecipeWriter, rewards: str) -> None:
    # Another one was measured in its place, the default judge.
    strict = f"{rewards}={{strict: {{reward: judge, weight: 0.4, mode: groupwise}}, format: 1}}"
    settings, weight = judge_settings(load_recipe(write_recipe(), [strict]))
    assert (settings.mode, weight) == ("groupwise", 0.4)


def test_labels_that_measure_nothing_are_named_before_a_run(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe()  # was found after sft, at the start of the grpo step
    (recipe.parent / "labels.jsonl").write_text('{"reference": "a", "reply": "b", "label": 1}\n')
    result = call("validate", str(recipe), "--set", "data.labels=labels.jsonl")
    assert result.exit_code == 2
    assert "labels.jsonl: all 1 labels are right" in result.stderr


@pytest.mark.parametrize("cell", ["", "yes", "2", "nan"])
def test_a_label_that_is_no_number_is_named(tmp_path: Path, cell: str) -> None:
    (tmp_path / "r.csv").write_text(f"reply,reference,label\na,b,{cell}\n")
    with pytest.raises(DataError, match=r"r.csv:2: 'label' must be a number from 0"):
        read_labels(tmp_path / "r.csv")


def test_replies_with_another_ending_are_refused(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe()
    (recipe.parent / "replies.txt").write_text("{}")
    result = call("score", str(recipe), "--replies", "replies.txt")
    assert result.exit_code == 2
    assert "replies.txt: a data file ends with .jsonl" in result.stderr


# --- the judge -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_attacks")
def test_calibrate_measures_the_default_judge_and_says_whether_it_is_fit(tmp_path: Path) -> None:
    lines = (HELPDESK / "judge_pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "labels.jsonl").write_text("".join(lines[:10]))
    few = call("judge", "calibrate", "quickstart", "--labels", str(tmp_path / "labels.jsonl"))
    assert "The judge is not shown to be fit for its weight 0.4, too few pairs to say: AUC" in few.stdout
    (tmp_path / "labels.jsonl").write_text("".join(lines[:100]))
    result = call("judge", "calibrate", "quickstart", "--labels", str(tmp_path / "labels.jsonl"), "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["fit"] is True
    assert figures["told"].startswith("fit for its weight 0.4: AUC 0.9")


def test_calibrate_without_labels_says_where_to_give_them(write_recipe: RecipeWriter) -> None:
    result = call("judge", "calibrate", str(write_recipe()))
    assert result.exit_code == 2
    assert "no labelled pairs; give --labels FILE, or data.labels in the recipe" in result.stderr


def write_labels(folder: Path, count: int, *, truthful: bool = True) -> Path:
    lines = (HELPDESK / "judge_training.jsonl").read_text().splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    if not truthful:
        rows = [row | {"label": 1 - row["label"]} for row in rows]
    (folder / "labels.jsonl").write_text(jsonl(rows))
    return folder / "labels.jsonl"


@pytest.mark.usefixtures("few_attacks")
@pytest.mark.slow
def test_train_writes_an_adapter_and_measures_it_beside_the_untrained_judge(write_recipe: RecipeWriter) -> None:
    """Taught the opposite, it learns the opposite: that its labels reach it, and that a worse judge is not praised."""
    recipe = write_recipe(("learning_rate: 1e-5", "learning_rate: 3e-3, per_device_train_batch_size: 8"))
    labels = write_labels(recipe.parent, 48, truthful=False)
    result = call("judge", "train", str(recipe), "--labels", str(labels), "--out", "judge")
    figures = json.loads((recipe.parent / "judge" / "judge.json").read_text())
    assert (recipe.parent / "judge" / "adapter" / "adapter_config.json").exists()
    assert figures["before"]["auc"] < 0.4  # right by nature, wrong by these labels
    assert figures["after"]["auc"] > figures["before"]["auc"] + 0.2
    assert result.exit_code == 0, result.output
    again = call("judge", "train", str(recipe), "--labels", str(labels), "--out", "judge")
    assert again.exit_code == 2
    assert "judge is not empty; choose another folder with --out" in again.stderr


def test_train_needs_enough_references(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe()
    labels = write_labels(recipe.parent, 6)
    result = call("judge", "train", str(recipe), "--labels", str(labels))
    assert result.exit_code == 2
    assert "different references are too few to train a judge" in result.stderr


# --- before and during GRPO ------------------------------------------------------------------------

ONLY_GRPO = """
  - evaluate
  - sft: {learning_rate: 1e-5}
  - evaluate
  - grpo: {num_generations: 4}
  - merge
"""
RULES = "rewards: {correctness: 0.1, format: 0.1}"


def grpo_alone(settings: str) -> tuple[str, str]:
    return ONLY_GRPO, f"\n  - grpo: {{max_steps: 13, per_device_train_batch_size: 8, num_generations: 4, {settings}}}\n"


def test_a_run_whose_rewards_never_differ_stops_before_it_starts(write_recipe: RecipeWriter) -> None:
    longer = ("max_completion_length: 12", "max_completion_length: 48")
    recipe = write_recipe(grpo_alone("rows: 4"), longer, (RULES, "rewards: {correctness: 0.1}"))
    result = call("run", str(recipe))
    assert result.exit_code == 1
    assert "earn the same (correctness 0.0), so GRPO would learn nothing" in result.stderr
    assert not list(recipe.parent.glob("runs/small/*/adapter"))


def test_a_run_whose_replies_never_end_stops_before_it_starts(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe(grpo_alone("rows: 4"), ("max_completion_length: 12", "max_completion_length: 2"))
    result = call("run", str(recipe))
    assert result.exit_code == 1
    assert "sampled replies ends within max_completion_length (2)" in result.stderr


def test_a_reference_that_does_not_earn_full_marks_stops_the_run(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe(grpo_alone("rows: 4"))
    row = {"id": "p0", "issue": "i", "resolution": "Write </answer> at the end."}
    (recipe.parent / "prompts.jsonl").write_text(jsonl([row]))
    result = call("run", str(recipe))
    assert result.exit_code == 2
    assert "prompts.jsonl:1: the reference itself earns" in result.stderr


def test_an_unfit_judge_is_said_before_grpo_and_its_figures_are_kept(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe(
        grpo_alone("rows: 4, max_steps: 1"),
        ("max_steps: 13, ", ""),
        (RULES, "rewards: {rouge_l: 0.1, judge: 0.4, word_count:words: 0.1}"),
        ("heldout: heldout.jsonl", "heldout: heldout.jsonl\n  labels: labels.jsonl"),
        ("max_completion_length: 12", "max_completion_length: 40"),
    )
    write_words(recipe.parent)
    write_labels(recipe.parent, 10, truthful=False)
    result = call("run", str(recipe))
    assert result.exit_code == 0, result.output
    assert "warning: the judge is unfit for any weight" in result.stderr
    figures = json.loads((recipe.parent / "runs" / "small" / "01-grpo" / "judge.json").read_text())
    assert figures["fit"] is False


def unfit(write_recipe: RecipeWriter, action: str, others: str = "rouge_l: 0.1, word_count:words: 0.1") -> Path:
    """A recipe whose judge is unfit by its labels, and what a run does then."""
    recipe = write_recipe(
        grpo_alone("rows: 4, max_steps: 1"),
        ("max_steps: 13, ", ""),
        (RULES, f"rewards: {{{others}, judge: {{weight: 0.4, unfit: {action}}}}}"),
        ("heldout: heldout.jsonl", "heldout: heldout.jsonl\n  labels: labels.jsonl"),
        ("max_completion_length: 12", "max_completion_length: 40"),
    )
    write_words(recipe.parent)
    write_labels(recipe.parent, 10, truthful=False)
    return recipe


@pytest.mark.usefixtures("few_attacks")
def test_an_unfit_judge_is_dropped_where_the_recipe_says_so(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The base writes no tags: its whole replies are judged.
    monkeypatch.setattr("qreason.rewards.judged.answer_of", lambda reply, example: reply.text)
    recipe = unfit(write_recipe, "drop")
    result = call("run", str(recipe))
    assert result.exit_code == 0, result.output
    assert "unfit: drop, so its weight is 0 in this step" in " ".join(result.stderr.split())
    step = recipe.parent / "runs" / "small" / "01-grpo"
    figures = json.loads((step / "judge.json").read_text())
    assert (figures["weight"], figures["fit"], figures["dropped"]) == (0.4, False, True)
    assert "unfit: drop" in figures["told"]
    rows = [json.loads(line) for line in (step / "replies.jsonl").read_text().splitlines()]
    for row in rows:
        parts = row["parts"]
        assert row["total"] == pytest.approx(0.1 * parts["rouge_l"] + 0.1 * parts["word_count:words"])
    assert any(row["parts"]["judge"] for row in rows)  # still measured
    (logged,) = [json.loads(line) for line in (step / "metrics.jsonl").read_text().splitlines() if "reward" in line][:1]
    mean = sum(row["total"] for row in rows) / len(rows)
    assert logged["reward"] == pytest.approx(mean, abs=1e-4)  # what TRL trained on


@pytest.mark.usefixtures("few_attacks")
@pytest.mark.parametrize(
    ("action", "others", "message"),
    [
        ("stop", "rouge_l: 0.1", "unfit: stop ends the run here"),
        ("drop", "rouge_l: 0", "no other reward has a weight"),
    ],
)
def test_an_unfit_judge_ends_the_run(write_recipe: RecipeWriter, action: str, others: str, message: str) -> None:
    recipe = unfit(write_recipe, action, others)
    result = call("run", str(recipe))
    assert result.exit_code == 1
    assert "the judge is unfit for" in result.stderr
    assert message in result.stderr
    step = recipe.parent / "runs" / "small" / "01-grpo"
    assert json.loads((step / "judge.json").read_text())["fit"] is False
    assert not (step / "replies.jsonl").exists()


def write_words(folder: Path) -> None:
    (folder / "word_count.py").write_text(
        "def words(replies, examples):\n    return [len(reply.text.split()) / 10 for reply in replies]\n"
    )


@pytest.mark.slow
def test_metrics_tell_of_distinct_replies_and_of_their_length(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe(
        grpo_alone("rows: 4, max_steps: 1"),
        ("max_steps: 13, ", ""),
        (RULES, "rewards: {word_count:words: 0.1}"),
        ("max_completion_length: 12", "max_completion_length: 40"),
    )
    write_words(recipe.parent)
    result = call("run", str(recipe))
    assert result.exit_code == 0, result.output
    metrics = json.loads((recipe.parent / "runs/small/01-grpo/metrics.jsonl").read_text().splitlines()[0])
    assert 0 < metrics["distinct_replies"] <= 1
    assert metrics["reply_words"] > 1
