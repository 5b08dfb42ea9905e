"""GRPO trains on the rollouts that teach something: the same step as TRL's, on fewer rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from conftest import RecipeWriter, give_weights
from datasets import Dataset
from pydantic import ValidationError

from qreason.errors import RecipeError
from qreason.model.compat.trl import in_pieces, select_rows
from qreason.model.compat.trl_logprobs import frugal
from qreason.model.resident import Resident
from qreason.recipe.load import load_recipe
from qreason.recipe.sections import Lora
from qreason.recipe.training import Grpo
from qreason.training.recovery import Recovery
from qreason.training.selection import Selection, most_varied, variance

GROUP, LONGEST = 6, 8
PROMPTS = ("first", "second", "third", "fourth")
REWARDS = {
    "first": (1.0, 0.0, 0.5, 0.25, 0.0, 2.0),
    "second": (0.5,) * GROUP,
    "third": (0.0, 1.0, None, 0.5, 0.5, 0.0),  # one could not be judged, others are equal
    "fourth": (0.0,) * GROUP,
}
Trained = tuple[torch.Tensor, list[int]]


def reply(prompt: str, number: int) -> list[int]:
    source = torch.Generator().manual_seed(31 * PROMPTS.index(prompt) + number)
    length = 2 + (3 * number + PROMPTS.index(prompt)) % (LONGEST - 1)
    return torch.randint(20, 900, (length,), generator=source).tolist()


@pytest.fixture
def train(own_resident: Resident, tmp_path: Path) -> Callable[..., Trained]:
    """Trains some steps by gradient descent; how far the adapter moved, and the rows of each backward pass."""
    torch.manual_seed(1)
    own_resident.new_adapter(Lora(r=4))
    give_weights(own_resident, 0.05)
    model, tokenizer = own_resident.model, own_resident.tokenizer
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def run(
        trainer_class: type, chosen: Sequence[Sequence[int]] | None = None, rewards: Any = REWARDS, **settings: Any
    ) -> Trained:
        group = len(chosen[0]) if chosen else GROUP
        places = dict(zip(PROMPTS, chosen or [range(GROUP)] * len(PROMPTS), strict=True))

        def roll(prompts: list[Any], trainer: Any) -> dict[str, Any]:
            names = [prompt[-1]["content"] for prompt in prompts]
            made = [reply(name, places[name][at % group]) for at, name in enumerate(names)]
            ended = [ids if len(ids) == LONGEST else [*ids[:-1], tokenizer.eos_token_id] for ids in made]
            rendered = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=True)["input_ids"]
            return {"prompt_ids": rendered, "completion_ids": ended, "logprobs": None}

        def reward(prompts: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
            names = [prompt[-1]["content"] for prompt in prompts]
            return [rewards[name][places[name][at % group]] for at, name in enumerate(names)]

        if "ref" in model.peft_config:  # of an earlier trainer with beta
            model.delete_adapter("ref")
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.data.copy_(start[name])
        arguments = {
            "num_generations": group, "max_completion_length": LONGEST, "learning_rate": 1.0, "optim": "sgd",
            "lr_scheduler_type": "constant", "max_grad_norm": 1e6, "beta": 0.0, "seed": 5, "use_cpu": True,
            "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "per_device_train_batch_size": group, "gradient_accumulation_steps": len(PROMPTS),
            "max_steps": 1, "output_dir": str(tmp_path),
        } | settings  # fmt: skip
        rows: list[int] = []

        class Counting(trainer_class):  # type: ignore[misc, valid-type]
            def _get_per_token_logps_and_entropies(self, model: Any, ids: Any, *rest: Any, **more: Any) -> Any:
                rows.append(len(ids) if torch.is_grad_enabled() else -len(ids))
                return super()._get_per_token_logps_and_entropies(model, ids, *rest, **more)

        trainer = Counting(
            model=model,
            args=trl.GRPOConfig(**arguments),
            reward_funcs=reward,
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": name}]} for name in PROMPTS]),
            processing_class=tokenizer,
            rollout_func=roll,
        )
        trainer.train()
        moved = [(p.detach() - start[name]).flatten() for name, p in model.named_parameters() if name in start]
        return torch.cat(moved), rows

    return run


def ours(pods: int | None = None) -> Any:
    return in_pieces(select_rows(trl.GRPOTrainer, Selection(pods)), Recovery(print))


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.norm() > 1e-3
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


SMALL_STEPS = {"learning_rate": 1e-2}
"""Where a second step follows, that it does not magnify the rounding of the first."""
FAST = [
    {"loss_type": "dapo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dapo", "mask_truncated_completions": True},
    SMALL_STEPS | {"loss_type": "grpo", "num_iterations": 2, "max_steps": 2},
]
FURTHER = [
    {"loss_type": "dr_grpo", "scale_rewards": "none"},
    {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    {"loss_type": "cispo", "epsilon_high": 5.0},
    SMALL_STEPS | {"loss_type": "grpo", "steps_per_generation": 8, "max_steps": 2, "per_device_train_batch_size": 3},
    SMALL_STEPS | {"loss_type": "dapo", "steps_per_generation": 3, "max_steps": 3, "per_device_train_batch_size": 4},
]


@pytest.mark.parametrize(
    "settings", [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in FURTHER)], ids=str
)
def test_rows_that_teach_nothing_are_left_out_of_the_same_step(
    train: Callable[..., Trained], settings: dict[str, Any]
) -> None:
    wanted, all_rows = train(trl.GRPOTrainer, **settings)
    got, rows = train(ours(), **settings)
    assert_same(got, wanted)
    assert sum(row for row in rows if row > 0) <= 0.5 * sum(row for row in all_rows if row > 0)


def test_fewer_micro_batches_are_computed(train: Callable[..., Trained]) -> None:
    assert train(trl.GRPOTrainer)[1] == [6, 6, 6, 6]
    assert train(ours())[1] == [6, 5]  # of the third group one could not be judged
    apart = train(ours(), loss_type="bnpo")[1]  # a mean over the tokens of each micro-batch
    assert (sum(apart), len(apart)) == (11, 4)


@pytest.mark.parametrize("settings", [{"beta": 0.1}, {"entropy_coef": 0.01}, {"top_entropy_quantile": 0.5}], ids=str)
def test_every_row_is_kept_where_the_loss_has_another_term(
    train: Callable[..., Trained], settings: dict[str, Any]
) -> None:
    wanted, all_rows = train(trl.GRPOTrainer, **settings)
    got, rows = train(ours(), **settings)
    assert_same(got, wanted)
    assert sum(rows) == sum(all_rows)


def test_equal_rewards_teach_nothing_whatever_rounding_leaves_of_them(train: Callable[..., Trained]) -> None:
    """The mean of six times 0.9 is not 0.9 in float32; divided by no deviation, advantages were up to a thousandth."""
    flat = dict.fromkeys(PROMPTS, (0.9,) * GROUP)
    assert train(trl.GRPOTrainer, rewards=flat)[0].any()
    moved, rows = train(ours(), rewards=flat)
    assert not moved.any()
    assert rows == []


def test_a_step_without_rows_is_a_step_of_the_optimizer(train: Callable[..., Trained]) -> None:
    """Weight decay, momentum and the schedule go on as with a gradient of zero."""
    flat = dict.fromkeys(PROMPTS, (0.5,) * GROUP)
    settings = {"rewards": flat, "optim": "adamw_torch", "weight_decay": 0.1}
    wanted, _ = train(trl.GRPOTrainer, **settings)
    assert_same(train(ours(), **settings)[0], wanted)


@pytest.mark.parametrize(
    ("loss_type", "scale"),
    [
        ("dapo", "group"),
        ("grpo", "batch"),
        pytest.param("dr_grpo", "none", marks=pytest.mark.slow),
        pytest.param("luspo", "none", marks=pytest.mark.slow),
    ],
)
def test_pods_is_a_step_of_trl_on_the_chosen_replies(train: Callable[..., Trained], loss_type: str, scale: str) -> None:
    rewards = {name: tuple(0.5 if one is None else one for one in marks) for name, marks in REWARDS.items()}
    chosen = [most_varied(rewards[name], 3) for name in PROMPTS]
    settings = {"loss_type": loss_type, "scale_rewards": scale, "rewards": rewards}
    wanted, _ = train(trl.GRPOTrainer, chosen=chosen, **settings)
    got, rows = train(ours(3), **settings)
    assert_same(got, wanted)
    assert rows in ([6], [3], [5], [4])


def test_the_most_varied_replies_are_the_best_of_all_choices() -> None:
    source = torch.Generator().manual_seed(2)
    for _ in range(20):
        totals = (torch.rand(7, generator=source) * 4).round().tolist()
        best = max(variance(choice) for choice in combinations(totals, 4))
        places = most_varied(totals, 4)
        assert len(set(places)) == 4
        assert variance([totals[place] for place in places]) == pytest.approx(best)


def test_replies_without_a_total_are_chosen_last() -> None:
    assert sorted(most_varied([math.nan, 1.0, math.nan, 0.0, 0.5], 2)) == [1, 3]
    assert sorted(most_varied([math.nan, 1.0, math.nan, 0.0], 3)) == [0, 1, 3]


def test_pods_must_leave_replies_out(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe(("- grpo: {num_generations: 4}", "- grpo: {num_generations: 4, pods: 4}"))
    with pytest.raises(RecipeError, match=r"pods: 4 is not less than num_generations \(4\); raise num_generations"):
        load_recipe(recipe)
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        Grpo(pods=1)
    with pytest.raises(ValidationError, match=r"leave trl\.multi_objective_aggregation out, or pods"):
        Grpo(pods=2, trl={"multi_objective_aggregation": "normalize_then_sum"})


@pytest.mark.parametrize(("iterations", "passes"), [(1, 0), (2, 1)])
def test_old_log_probabilities_are_those_of_the_first_pass_on_policy(
    train: Callable[..., Trained], own_resident: Resident, iterations: int, passes: int
) -> None:
    """Only where an optimizer step comes between are they computed apart."""
    trainer = select_rows(frugal(trl.GRPOTrainer, own_resident.model, print), Selection())
    _, rows = train(trainer, num_iterations=iterations, max_steps=iterations)
    assert sum(row < 0 for row in rows) == passes
