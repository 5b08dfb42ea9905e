"""Inference-time scaling: pass@k against its definition, votes and their ties, rankings, beam search; on the model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import RecipeWriter

from qreason.cli import main
from qreason.errors import RecipeError
from qreason.inference.beam import STEP_ENDS, beam_search
from qreason.inference.generate import LocalGenerator
from qreason.inference.selection import ballot, best, pass_at, scale, vote, votes_for
from qreason.model.resident import Resident
from qreason.recipe.load import load_recipe
from qreason.recipe.settings import Beam, Evaluate
from qreason.types import Example, Reply, Sampling

PROMPTS = [
    [{"role": "user", "content": "Repeat this: backup job"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which fix helps when the disk is full?"}],
    [{"role": "user", "content": "Sort: 9 4 7"}],
]
EXAMPLES = [Example(id=str(i), prompt=p[-1]["content"], reference="x") for i, p in enumerate(PROMPTS)]


def replies(*answers: str) -> list[Reply]:
    return [Reply(f"<reasoning>r</reasoning><answer>{text}</answer>", (1,) * (i + 1)) for i, text in enumerate(answers)]


# --- pass@k ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_groups_of_k_that_hold_a_right_reply(n: int) -> None:
    for right in range(n + 1):
        marks = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            groups = list(combinations(marks, k))
            assert pass_at(n, right, k) == pytest.approx(sum(map(any, groups)) / len(groups))


def test_pass_at_k_follows_the_closed_formula_for_many_samples() -> None:
    # 1 - prod_{i=n-c+1..n} (1 - k/i), the form in which Chen et al. compute it
    for n, right, k in ((200, 3, 100), (64, 1, 64), (64, 40, 16), (1000, 10, 1)):
        product = torch.tensor([1 - k / i for i in range(n - right + 1, n + 1)], dtype=torch.float64).prod()
        assert pass_at(n, right, k) == pytest.approx(float(1 - product), abs=1e-12)


def test_pass_at_k_of_fewer_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@5 needs 5 samples, there are 4"):
        pass_at(4, 2, 5)


# --- votes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["b", "a", "a"], 1),
        (["18", "18.0", "$18", "17", "17"], 0),
        (["1,000", "1000 km", "3"], 0),
        (["Restart it.", "reboot", "restart  it"], 0),
        (["", "x", ""], 1),
        (["", ""], None),
        (["a", "b", "b", "a"], 0),  # a tie: what was given first
        (["b", "a", "a", "b", "c"], 0),
    ],
)
def test_the_majority_of_the_normalized_answers_wins_and_no_answer_is_no_vote(
    answers: list[str], winner: int | None
) -> None:
    assert vote(replies(*answers)) == winner


def test_ties_are_broken_the_same_way_each_time() -> None:
    source = random.Random(1)
    for _ in range(200):
        answers = [source.choice("abc") for _ in range(6)]
        won = {ballot(answers[place]) for place in (vote(replies(*answers)) for _ in range(3)) if place is not None}
        most = max(map(answers.count, answers))
        assert won == {next(answer for answer in answers if answers.count(answer) == most)}


def test_votes_for_a_reply_are_those_for_its_answer() -> None:
    assert votes_for(replies("18", "17", "18.0"), 0) == 2


def test_scaling_counts_tokens_and_uses_all_groups_of_k() -> None:
    settings = Evaluate(samples=4, pass_at=(2,), cons_at=(2, 3), best_of=(2,))
    right = [True, False, False, True]
    row = scale(settings, replies("a", "b", "b", "a"), right, [0.0, 1.0, 2.0, 3.0])
    assert {name: figures["value"] for name, figures in row.items()} == {
        "pass@1": 0.5,
        "pass@2": pytest.approx(1 - 1 / 6),
        "cons@2": 0.5,  # a and b tie, then b and a: the first of each
        "cons@3": 0.0,
        "best-of-2": 0.5,
    }
    assert row["pass@1"]["tokens"] == 2.5
    assert row["cons@3"]["tokens"] == 7.5


def test_nothing_is_scaled_unless_asked() -> None:
    assert scale(Evaluate(samples=2), replies("a", "b"), [True, False], []) == {}


# --- rankings --------------------------------------------------------------------------------------


def test_the_likelihood_of_a_reply_is_the_mean_log_probability_of_its_tokens(resident: Resident) -> None:
    drawn = LocalGenerator(resident).generate(PROMPTS, n=2, sampling=Sampling(max_completion_length=9, seed=1))
    flat = [reply for group in drawn for reply in group]
    for reply, mark in zip(flat, LocalGenerator(resident).likelihoods(flat), strict=True):
        ids = [*reply.prompt_ids, *reply.token_ids]
        with torch.no_grad():
            logits = resident.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        start = len(reply.prompt_ids)
        expected = sum(float(logits[at - 1, ids[at]]) for at in range(start, len(ids))) / len(reply.token_ids)
        assert mark == pytest.approx(expected, abs=1e-3)


def test_a_greedy_reply_is_likelier_than_most_drawn_ones_and_none_at_all_ranks_last(resident: Resident) -> None:
    generator = LocalGenerator(resident)
    (greedy,) = generator.generate(PROMPTS[1:2], n=1, sampling=Sampling(temperature=0, max_completion_length=12))
    (drawn,) = generator.generate(PROMPTS[1:2], n=7, sampling=Sampling(temperature=2, max_completion_length=12, seed=3))
    marks = LocalGenerator(resident).likelihoods([Reply("", (), greedy[0].prompt_ids), *drawn, *greedy])
    assert marks[-1] == pytest.approx(max(marks), abs=1e-4)
    assert len(set(marks)) > 2
    assert best([1.0, 2.0, 2.0]) == 1  # of equal ones, the first
    assert marks[0] == float("-inf")


# --- beam search -----------------------------------------------------------------------------------


def by_likelihood(resident: Resident) -> object:
    return lambda replies, examples: LocalGenerator(resident).likelihoods(replies)


def test_a_beam_of_one_without_temperature_is_greedy_decoding(resident: Resident) -> None:
    generator = LocalGenerator(resident)
    greedy = Sampling(temperature=0, max_completion_length=24)
    found = beam_search(generator, PROMPTS, EXAMPLES, Beam(width=1, expand=1), by_likelihood(resident), greedy)  # type: ignore[arg-type]
    plain = generator.generate(PROMPTS, n=1, sampling=greedy)
    assert [reply for reply, _ in found] == [group[0] for group in plain]
    assert [drawn for _, drawn in found] == [len(group[0].token_ids) for group in plain]


@pytest.mark.slow
def test_a_beam_goes_where_its_scorer_leads_and_pays_for_every_branch(resident: Resident) -> None:
    def es(replies: Sequence[Reply]) -> list[float]:
        return [float(reply.text.lower().count("e")) for reply in replies]

    generator, beam = LocalGenerator(resident), Beam(width=2, expand=3)
    reached = {1: 0.0, -1: 0.0}
    for seed, sign in product((1, 2, 3), reached):  # over several seeds: single draws differ between processors
        sampling = Sampling(max_completion_length=24, seed=seed)
        found = beam_search(
            generator, PROMPTS, EXAMPLES, beam, lambda replies, _, sign=sign: [sign * n for n in es(replies)], sampling
        )
        reached[sign] += sum(es([reply for reply, _ in found]))
        for reply, drawn in found:
            assert len(reply.token_ids) <= 24
            assert drawn > len(reply.token_ids)
    assert reached[1] > reached[-1]


def test_steps_end_with_a_sentence_or_a_line(resident: Resident) -> None:
    texts = {resident.tokenizer.decode([token]) for token in LocalGenerator(resident).step_tokens(STEP_ENDS)}
    assert "." in texts
    assert all(text.rstrip(" ").endswith((".", "!", "?", "\n")) for text in texts)


# --- the command and the recipe --------------------------------------------------------------------


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.slow
def test_evaluate_prints_every_method_with_its_interval_gain_and_tokens(workplace: Path) -> None:
    asked = [
        "--samples=4",
        "--pass-at=4",
        "--cons-at=2",
        "--cons-at=4",
        "--best-of=4",
        "--beam=2",
        "--direct",
        "--json",
    ]
    result = call("evaluate", "qreason/tiny", "--task", "heldout.jsonl", *asked)
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)
    assert list(numbers["scaling"]) == ["pass@1", "pass@4", "cons@2", "cons@4", "best-of-4", "beam"]
    for figures in numbers["scaling"].values():
        assert set(figures) == {"mean", "low", "high", "tokens", "gain"}
    tokens = {name: figures["tokens"] for name, figures in numbers["scaling"].items()}
    assert tokens["cons@4"] == pytest.approx(4 * tokens["pass@1"], rel=0.01)
    assert tokens["beam"] > 0
    shown = call("evaluate", "qreason/tiny", "--task", "heldout.jsonl", "--samples", "2", "--cons-at", "2")
    assert "over pass@1" in shown.stdout


def test_right_replies_are_counted_row_by_row_and_drawn_from_the_seed(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sampling] = []

    def made(self: LocalGenerator, prompts: object, *, n: int, sampling: Sampling, **_: object) -> list[list[Reply]]:
        asked.append(sampling)
        right, wrong = replies("Restart the spooler.", "Buy another one.")
        return [[wrong] * n, [right, *[wrong] * (n - 1)]]

    monkeypatch.setattr(LocalGenerator, "generate", made)
    numbers = json.loads(call("evaluate", "qreason/tiny", "--task", "heldout.jsonl", "--samples", "4", "--json").stdout)
    assert [sampling.temperature for sampling in asked] == [0.0, 1.0]
    assert asked[1].seed == 1
    assert numbers["accuracy"]["mean"] == 0.5
    assert numbers["pass_at_1"]["mean"] == 0.125
    assert numbers["format"]["mean"] == 1.0
    assert numbers["parts"]["correctness"]["mean"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--cons-at", "16"), "cons_at: 16 is more than the 4 samples per row; raise samples to 16"),
        (("--samples", "2", "--pass-at", "3"), "pass_at: 3 is more than the 2 samples per row"),
        (("--best-of", "2", "--best-by", "likelyhood"), "(did you mean 'likelihood'?)"),
        (("--pass-at", "0"), "--pass-at: Input should be greater than 0"),
    ],
)
def test_more_than_there_are_samples_and_unknown_rankings_are_bad_input(
    workplace: Path, arguments: tuple[str, ...], told: str
) -> None:
    result = call("evaluate", "qreason/tiny", "--task", "heldout.jsonl", *arguments)
    assert result.exit_code == 2
    assert told in result.stderr


def test_a_recipe_that_ranks_by_an_unknown_reward_is_refused(write_recipe: RecipeWriter) -> None:
    file = write_recipe(
        ("- evaluate\n  - sft", "- evaluate: {beam: {by: judge}}\n  - sft"), ("  - evaluate\n  - grpo", "  - grpo")
    )
    with pytest.raises(
        RecipeError, match=r"evaluate\.beam\.by: 'judge' is none of total, correctness, format, likelihood"
    ):
        load_recipe(file)
