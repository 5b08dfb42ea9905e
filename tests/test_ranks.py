"""A launch of several processes, as far as one process can see it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from conftest import RecipeWriter

from qreason.errors import ModelError, OutOfMemoryError
from qreason.machine import ranks
from qreason.model.backends import choose
from qreason.planning.checks import launch_problems
from qreason.recipe.load import load_recipe
from qreason.training.recovery import compute_whole


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("steps=[{distill: {teacher: {model: qreason/tiny}}}]", "distill: it runs in one process only"),
        ("steps=[{preference: {}}]", "preference: it runs in one process only"),
    ],
)
def test_what_several_processes_cannot_do_is_a_problem_with_several_only(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch, change: str, problem: str
) -> None:
    recipe = load_recipe(write_recipe(("heldout.jsonl\n", "heldout.jsonl\n  pairs: sft.jsonl\n")), [change])
    assert launch_problems(recipe) == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [one for one in launch_problems(recipe) if problem in one]


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_base_that_is_split_is_refused(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch, two: None, name: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    (problem,) = launch_problems(load_recipe(write_recipe()))
    assert f"accelerate's {name} is not supported" in problem


def test_several_processes_take_the_plain_backend(two: None) -> None:
    assert choose("auto", (9, 0)).name == "plain"
    with pytest.raises(ModelError, match="several processes train on the plain backend only"):
        choose("unsloth", (9, 0))


def test_memory_that_ran_out_in_one_of_several_is_one_line() -> None:
    def attempt(cut: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    trainer = SimpleNamespace(state=SimpleNamespace(global_step=3))
    with pytest.raises(OutOfMemoryError, match="step 4: the GPU has not enough memory; with several processes"):
        compute_whole(trainer, None, attempt)


@pytest.mark.parametrize(
    ("text", "alone"),
    [
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:31457", True),
        ("NCCL communicator was aborted on rank 1", True),
        ("shape mismatch", False),
    ],
)
def test_an_error_of_a_lost_process_is_told_from_others(two: None, text: str, alone: bool) -> None:
    assert ranks.is_alone(RuntimeError(text)) is alone


def test_one_process_is_the_first_and_shares_with_nobody() -> None:
    assert (ranks.number(), ranks.count(), ranks.is_first()) == (0, 1, True)
    assert ranks.gather(3) == [3]
    assert ranks.from_first(lambda: 4) == 4
    assert not ranks.is_alone(RuntimeError("Connection closed by peer"))
