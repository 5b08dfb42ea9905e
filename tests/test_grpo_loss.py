"""GRPO by the book: TRL's loss and gradient, as the grpo stage configures it, against the papers' formulas in float64.

The objective is written out below a sequence at a time, without padding, from the probabilities alone:
- DeepSeekMath (arXiv 2402.03300): equation 3, the clipped surrogate, mean over tokens, then over replies; equation 4,
  the KL estimator; section 4.1.2, the advantage. DeepSeek-R1 (arXiv 2501.12948) has the same as equations 1 to 3.
- DAPO (arXiv 2503.14476), equation 8: one mean over all tokens of the step; a wider upper clip.
- Dr. GRPO (arXiv 2503.20783), section 3.2: no division by the standard deviation, and a constant in place of lengths.
- GSPO (arXiv 2507.18071), equation 7: one ratio a sequence, the geometric mean of its tokens' ratios.
- DeepSeek-V3.2 (arXiv 2512.02556): the divergence times the ratio, off unless use_bias_correction_kl is set.
bnpo, TRL's name, is the mean over all tokens of a micro-batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from conftest import RecipeWriter, give_weights

from qreason.inference.generate import LocalGenerator, render_ids
from qreason.model.resident import Resident
from qreason.recipe.load import load_recipe
from qreason.recipe.sections import Lora
from qreason.run.session import Run
from qreason.stages.grpo import grpo
from qreason.types import Example, Messages, Reply, Sampling

TEMPERATURE, LONGEST, GROUP = 0.8, 8, 4
LENGTHS = {"p0": (3, 5, 8, 4), "p1": (6, 2, 7, 5)}
REWARDS = {"p0": (1.0, 0.0, 0.5, 0.25), "p1": (0.0, 0.0, 2.0, 1.0)}
WEIGHTS = {"correctness": 0.7, "format": 0.3}
DEFAULTS: dict[str, Any] = {
    "beta": 0.0,
    "use_bias_correction_kl": False,
    "epsilon": 0.2,
    "epsilon_high": None,
    "loss_type": "grpo",
    "scale_rewards": "group",
    "importance_sampling_level": "token",
}

Tokens = tuple[int, ...]


def toy_reply(prompt: str, number: int) -> Tokens:
    """A completion of no meaning; the same each time, and no two alike."""
    source = torch.Generator().manual_seed(17 * number + len(prompt) + ord(prompt[-1]))
    return tuple(torch.randint(20, 900, (LENGTHS[prompt][number],), generator=source).tolist())


REPLIES = {toy_reply(prompt, number): (prompt, number) for prompt in LENGTHS for number in range(GROUP)}


def total(prompt: str, number: int) -> float:
    """The weighted sum of both toy rewards."""
    first = REWARDS[prompt][number]
    return WEIGHTS["correctness"] * first + WEIGHTS["format"] * (1 - first) ** 2


# --- the papers ------------------------------------------------------------------------------------


def advantage(tokens: Tokens, scale: str) -> float:
    """(r - mean(r)) / std(r) over the group; TRL adds 1e-4 to the standard deviation, of a sample."""
    prompt, number = REPLIES[tokens]
    group = torch.tensor([total(prompt, other) for other in range(GROUP)], dtype=torch.float64)
    every = torch.tensor([total(*place) for place in REPLIES.values()], dtype=torch.float64)
    spread = {"group": group.std() + 1e-4, "batch": every.std() + 1e-4, "none": 1.0}[scale]
    return float((group[number] - group.mean()) / spread)


def log_probabilities(model: Any, prompt: Tokens, completion: Tokens) -> torch.Tensor:
    """log pi(o_t | q, o_<t) of each token, at the sampling temperature."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1).gather(-1, torch.tensor([completion]).T).squeeze(-1)


def token_losses(
    policy: torch.Tensor, old: torch.Tensor, reference: torch.Tensor, advantage: float, settings: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what each token of a reply adds to the loss, where clipping took the gradient away)"""
    log_ratio = policy - old
    ratio = (
        log_ratio.exp()
        if settings["importance_sampling_level"] == "token"
        else log_ratio.mean().exp().expand(len(policy))
    )
    high = settings["epsilon_high"] or settings["epsilon"]
    clipped = ratio.clamp(1 - settings["epsilon"], 1 + high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    gone = (reference - policy).exp() - (reference - policy) - 1
    if settings["use_bias_correction_kl"]:
        gone = gone * ratio
    return -(surrogate - settings["beta"] * gone), (clipped * advantage < ratio * advantage).detach()


def book_loss(replies: Sequence[torch.Tensor], settings: dict[str, Any], accumulation: int) -> torch.Tensor:
    """The loss of a micro-batch from the token losses of its replies, as its share of a step's mean."""
    summed = torch.stack([reply.sum() for reply in replies]).sum()
    match settings["loss_type"]:
        case "grpo":
            return torch.stack([reply.mean() for reply in replies]).mean() / accumulation
        case "bnpo":
            return summed / sum(map(len, replies)) / accumulation
        case "dr_grpo":
            return summed / (len(replies) * LONGEST) / accumulation
        case "dapo":
            return summed / sum(map(len, REPLIES))
    raise AssertionError(settings["loss_type"])


# --- TRL -------------------------------------------------------------------------------------------


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def in_float64(model: Any) -> Any:
    copied = copy.deepcopy(model)
    for module in copied.modules():  # one that a trainer put on leads back to the original
        module.__dict__.pop("forward", None)
    return copied.double().eval()


class Recorder(trl.GRPOTrainer):  # type: ignore[misc, name-defined]
    """TRL's trainer; beside each micro-batch's loss and gradient, those of the papers."""

    settings: dict[str, Any]
    records: list[dict[str, Any]]

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        exact = in_float64(model)
        calls, period = len(self.records), self.args.steps_per_generation * self.num_iterations
        if calls == 0:
            self.first = exact
        if calls % period == 0:
            self.old = exact
        losses, clipped = [], []
        for row in range(len(inputs["completion_ids"])):
            prompt = tuple(inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist())
            reply = tuple(inputs["completion_ids"][row][inputs["completion_mask"][row].bool()].tolist())
            policy = log_probabilities(exact, prompt, reply)
            with torch.no_grad():
                old, reference = (log_probabilities(one, prompt, reply) for one in (self.old, self.first))
            gain = advantage(reply, self.settings["scale_rewards"])
            found = token_losses(policy, old, reference, gain, self.settings)
            losses.append(found[0])
            clipped.append(found[1])
        expected = book_loss(losses, self.settings, self.args.gradient_accumulation_steps)
        names = list(trainable(exact))
        wanted = torch.autograd.grad(expected, list(trainable(exact).values()))
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        got = torch.autograd.grad(loss, list(trainable(model).values()), retain_graph=True)
        self.records.append(
            {
                "loss": (float(loss), float(expected)),
                "gradients": {name: (g.double(), w) for name, g, w in zip(names, got, wanted, strict=True)},
                "clipped": int(torch.cat(clipped).sum()),
            }
        )
        return loss


@pytest.fixture
def train(
    own_resident: Resident, write_recipe: RecipeWriter, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """Runs the grpo stage on the toy batch from an adapter that is not zero; returns what was recorded."""

    def generate(self: Any, prompts: Sequence[Messages], *, n: int, sampling: Sampling) -> list[list[Reply]]:
        ids = render_ids(own_resident.tokenizer, prompts)
        names = [prompt[-1]["content"] for prompt in prompts]
        return [
            [Reply(f"{name} {i}", toy_reply(name, i), tuple(row)) for i in range(n)]
            for name, row in zip(names, ids, strict=True)
        ]

    def first(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
        return [REWARDS[prompt][number] for prompt, number in (REPLIES[reply.token_ids] for reply in replies)]

    def second(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
        return [(1 - mark) ** 2 for mark in first(replies, examples) if mark is not None]

    def run_stage(settings: dict[str, Any], accumulation: int) -> list[dict[str, Any]]:
        (workplace / "prompts.jsonl").write_text(
            "".join(f'{{"id": "{p}", "issue": "{p}", "resolution": "x"}}\n' for p in LENGTHS)
        )
        recipe = load_recipe(write_recipe(("- grpo: {num_generations: 4}", "- grpo")), ["grpo.preflight=false"])
        draw = recipe.sampling.model_copy(update={"temperature": TEMPERATURE, "max_completion_length": LONGEST})
        weights = {name: recipe.rewards[name].model_copy(update={"weight": w}) for name, w in WEIGHTS.items()}
        run = Run(recipe.model_copy(update={"sampling": draw, "rewards": weights}), workplace / "out")
        run.step, run.manifest, run.read_only = 3, {"steps": []}, True
        run.__dict__["resident"], run.__dict__["rewards"] = own_resident, {"correctness": first, "format": second}
        own_resident.hardware = replace(own_resident.hardware, autocast="none")
        torch.manual_seed(1)
        own_resident.new_adapter(Lora(r=4))
        give_weights(own_resident, 0.05)
        own_resident.model.save_pretrained(str(workplace / "start"))
        monkeypatch.setattr(Run, "adapter", lambda self, start: workplace / "start")
        monkeypatch.setattr(LocalGenerator, "generate", generate)
        monkeypatch.setattr(trl, "GRPOTrainer", type("Kept", (Recorder,), {"settings": settings, "records": []}))
        given = settings | {
            "num_generations": GROUP,
            "per_device_train_batch_size": 8 // accumulation,
            "gradient_accumulation_steps": accumulation,
            "num_iterations": 2,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "preflight": False,
        }
        step = recipe.steps[3].model_copy(update={"grpo": type(recipe.steps[3].settings).model_validate(given)})
        grpo(step, run)
        records: list[dict[str, Any]] = trl.GRPOTrainer.records
        return records

    return run_stage


FAST = [
    ({"beta": 0.1, "loss_type": "dapo", "scale_rewards": "group", "epsilon_high": 0.28}, 2),
]
FURTHER = [
    ({"beta": 0.0, "loss_type": "grpo", "scale_rewards": "group"}, 1),
    ({"beta": 0.04, "loss_type": "dr_grpo", "scale_rewards": "none", "epsilon": 0.1}, 1),
    ({"beta": 0.04, "loss_type": "grpo", "scale_rewards": "none"}, 2),
    ({"beta": 0.0, "loss_type": "bnpo", "scale_rewards": "group", "epsilon_high": 0.4}, 1),
    ({"beta": 0.1, "loss_type": "bnpo", "scale_rewards": "none", "use_bias_correction_kl": True}, 2),
    ({"beta": 0.0, "loss_type": "dr_grpo", "scale_rewards": "group"}, 2),
    ({"beta": 0.0, "loss_type": "dapo", "scale_rewards": "batch"}, 1),
    ({"beta": 0.04, "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01}, 1),
]


def label(case: Any) -> str:
    return ", ".join(f"{key}={value}" for key, value in case.items()) if isinstance(case, dict) else f"x{case}"


@pytest.mark.parametrize(
    ("settings", "accumulation"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in FURTHER)], ids=label
)
def test_loss_and_gradient_are_those_of_the_papers(
    train: Callable[..., list[dict[str, Any]]], settings: dict[str, Any], accumulation: int
) -> None:
    records = train(DEFAULTS | settings, accumulation)
    assert len(records) == 2 * accumulation  # two optimizer steps on the same rollouts
    for record in records:
        loss, expected = record["loss"]
        assert loss == pytest.approx(expected, rel=1e-4, abs=1e-5)
        got, wanted = (torch.cat([pair[i].flatten() for pair in record["gradients"].values()]) for i in (0, 1))
        assert wanted.norm() > 0
        assert float((got - wanted).norm() / wanted.norm()) < 1e-3
    assert all(record["clipped"] == 0 for record in records[:accumulation])
    assert sum(record["clipped"] for record in records[accumulation:]) > 0  # the ratio has left the clip range


def test_the_kl_estimator_is_never_negative_and_is_zero_for_equal_policies() -> None:
    same = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    settings = DEFAULTS | {"beta": 1.0}
    for shift in (-1.0, 0.0, 0.3):
        loss, _ = token_losses(same, same, same + shift, 0.0, settings)
        assert torch.allclose(loss, torch.full((2,), math.exp(shift) - shift - 1, dtype=torch.float64))
