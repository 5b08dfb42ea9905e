"""The memory of a run before it starts: the cards, the phases of each step, which of them peaks, whether it fits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path

from qreason.errors import InputError, nearest
from qreason.inference.generate import QUESTIONS
from qreason.machine.hardware import GIB, compiler_trouble, free_bytes, usable_memory
from qreason.model.backends import choose
from qreason.model.classifier import read_adapter
from qreason.model.compat.trl_logprobs import are_few
from qreason.model.load import is_here
from qreason.model.merging import BYTES
from qreason.planning.known import known_config
from qreason.planning.phases import (
    Phase,
    adapter_sizes,
    backward,
    complete,
    dequantized,
    judging,
    loss_logits,
    optimizer_bytes,
    peak_phase,
    rollout,
    row_tokens,
    weight_bytes,
)
from qreason.planning.shapes import Asked, Card, Lengths, Shape, read_shape
from qreason.recipe.schema import STAGES, Recipe, Step, stage_folders
from qreason.recipe.sections import Model, Weighted, preference_models
from qreason.recipe.stage import Stage
from qreason.recipe.training import Training
from qreason.rewards.judged import JudgeSettings
from qreason.types import Messages

ALLOCATABLE: dict[tuple[int, int], dict[str, float]] = {
    (7, 0): {"v100": 15.7, "v100-32gb": 31.7},
    (7, 5): {"gtx1650": 3.8, "rtx2060": 5.8, "rtx2070": 7.8, "rtx2080": 7.8, "rtx2080ti": 10.7, "t4": 14.7},
    (8, 0): {"a100": 39.4, "a100-80gb": 79.1},
    (8, 6): {
        "rtx3050-4gb": 3.8, "rtx3050-6gb": 5.8, "rtx3050": 7.8, "rtx3060-8gb": 7.8, "rtx3060": 11.7, "rtx3070": 7.8,
        "rtx3080": 9.7, "rtx3080-12gb": 11.7, "rtx3090": 23.6, "a10": 22.0,
    },
    (8, 9): {
        "rtx4060": 7.7, "rtx4060ti": 7.7, "rtx4060ti-16gb": 15.6, "rtx4070": 11.7, "rtx4080": 15.6, "rtx4090": 23.6,
        "l4": 22.0,
    },
    (9, 0): {"h100": 79.1},
    (12, 0): {
        "rtx5060": 7.7, "rtx5060ti": 7.7, "rtx5060ti-16gb": 15.5, "rtx5070": 11.6, "rtx5080": 15.5, "rtx5090": 31.3,
    },
}  # fmt: skip
"""Compute capability -> GiB that processes can allocate on an idle card; a desktop on it takes up to 1 GiB of that."""
CARDS = {
    name: Card(name, int(gib * GIB), capability)
    for capability, cards in ALLOCATABLE.items()
    for name, gib in cards.items()
}
STAND_IN = "qreason/tiny"
"""The base whose tokenizer counts in place of one that is not here."""
GGUF_BITS = {
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q5_k_s": 5.5, "q4_k_m": 4.9,
    "q4_k_s": 4.6, "q3_k_m": 3.9, "q2_k": 3.4,
}  # fmt: skip
"""Bits per weight of a GGUF file, the mixture of its types included: approximate, for the room that an export needs."""
UNITS = {"gib": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6}
MOST = 1e9
"""More than any card has, in any of these units."""


def read_card(text: str) -> Card:
    """A card of CARDS (`t4`, `RTX 3060`), or one with so much memory (`6GiB`, `6GB`, `6144MiB`)."""
    plain = re.sub(r"nvidia|geforce|tesla|[\s_-]", "", text.lower())
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(gib|gb|mib|mb)", plain)
    if size and 0 < float(size[1]) < MOST:
        return Card(text.strip(), int(float(size[1]) * UNITS[size[2]]))
    known = {name.replace("-", ""): name for name in CARDS}
    if plain not in known:
        close = nearest(plain, known)
        raise InputError(f"{text}: no such card{close}; give a size such as 6GiB, or one of {', '.join(CARDS)}")
    return CARDS[known[plain]]


def find_card() -> Card:
    """This machine's GPU with the memory that is free now; without a GPU, the machine's own."""
    import torch

    if not torch.cuda.is_available():
        return Card("this machine", usable_memory(), None, compiles=False)
    here = Card(torch.cuda.get_device_name(), 0, torch.cuda.get_device_capability())
    free = torch.cuda.mem_get_info()[0] + here.context_bytes  # the query created the context
    return replace(here, free_bytes=free, compiles=here.compiles and compiler_trouble() is None)


def is_only_known(base: str) -> bool:
    """Whether of a base only its sizes are known, and no file of it is on this machine."""
    return not is_here(base) and known_config(base) is not None


def read_lengths(recipe: Recipe) -> Lengths:
    """The longest texts of a recipe's data in tokens of its base; 0 where it has no such data.

    Of a base of which only the sizes are here, in tokens of the embedded one, which are more.
    """
    from qreason.data.examples import read_examples
    from qreason.data.pairs import read_pairs
    from qreason.data.prompts import lesson, render, render_judge, system_prompt
    from qreason.model.classifier import render_ids
    from qreason.model.load import load_tokenizer

    base = STAND_IN if is_only_known(recipe.model.base) else recipe.model.base
    tokenizer = load_tokenizer(base, thinking=recipe.model.thinking)
    system = system_prompt(recipe.data)
    read = {use: read_examples(source, recipe.data, use) for use, source in recipe.data.sources.items()}
    asked = [example for use in ("prompts", "heldout") for example in read.get(use, [])]
    pairs = read_pairs(recipe.data.pairs, recipe.data) if recipe.data.pairs else []

    def longest(texts: list[str]) -> int:
        return max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) if texts else 0

    def chats(chats: list[Messages], *, reply: bool) -> int:
        return longest([tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=reply) for c in chats])

    return Lengths(
        prompt=chats([render(example, system) for example in asked], reply=True),
        example=chats([lesson(example, system) for example in read.get("sft", [])], reply=False),
        question=chats([render_judge(example.reference, "") for example in asked], reply=True),
        reference=longest([example.reference for example in asked]),
        pair=max(
            (len(render_ids(tokenizer, p.prompt, side)) for p in pairs for side in (p.chosen, p.rejected)), default=0
        ),
    )


# --- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepPlan:
    """The phases of one step: component -> bytes; `name` is its stage, numbered from the second on."""

    position: int
    name: str
    phases: dict[str, Phase]

    @property
    def peak(self) -> tuple[str, int]:
        """The phase that needs most, and its bytes."""
        return max(((name, sum(phase.values())) for name, phase in self.phases.items()), key=lambda found: found[1])


@dataclass(frozen=True)
class Change:
    """A recipe that needs less; `settings` are the differences, as --set writes them."""

    settings: tuple[str, ...]
    gained_bytes: int
    same_mathematics: bool
    recipe: Recipe


@dataclass(frozen=True)
class Plan:
    recipe: str
    card: Card
    steps: tuple[StepPlan, ...]
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> tuple[StepPlan, str, int]:
        """The step and the phase that need most, and their bytes."""
        step = max(self.steps, key=lambda step: step.peak[1])
        return (step, *step.peak)

    @property
    def fits(self) -> bool:
        return self.peak[2] <= self.card.free_bytes


shape_of = cache(read_shape)


def asked_models(rewards: Mapping[str, Weighted], recipe: Recipe, shape: Shape) -> list[Asked]:
    """The models beside the policy that a step's rewards query, and the policy where they query it."""
    found = []
    adapter_bytes = 4 * sum(adapter_sizes(shape, recipe.model.lora))
    for reward in (reward for name, reward in rewards.items() if reward.kind(name) == "judge"):
        judge = JudgeSettings.model_validate(reward.settings)
        if judge.base:
            own, model = shape_as(judge.base, shape), Model(base=judge.base, quantization=judge.quantization)
            stored = weight_bytes(own, judge.quantization)
            found.append(Asked(own, model, stored, offload=judge.offload, kind=judge.mode))
        elif not judge.endpoint:
            stored = adapter_bytes if judge.adapter else 0
            found.append(Asked(shape, recipe.model, stored, adapter=bool(judge.adapter), kind=judge.mode))
    for name in {model for _, model in preference_models(rewards)}:
        if name in stage_folders(recipe.steps):  # an adapter on the policy's base
            found.append(Asked(shape, recipe.model, adapter_bytes, adapter=True, kind="preference"))
            continue
        if adapter := read_adapter(name):
            name = adapter["base_model_name_or_path"]
        own = shape_as(name, shape)
        found.append(Asked(own, Model(base=name), weight_bytes(own, "none"), kind="preference"))
    return found


def shape_as(base: str, other: Shape) -> Shape:
    """The shape of a base whose numbers are as large as those of another one."""
    return replace(shape_of(base), number=other.number)


def uses_unsloth(recipe: Recipe, card: Card) -> bool:
    """Whether a run on this card would use Unsloth, as far as is known: whether it is installed on this machine."""
    wanted = recipe.model.backend
    return wanted == "unsloth" or choose(wanted, card.capability, recipe.plain_stage).name == "unsloth"


def plan_step(step: Step, recipe: Recipe, shape: Shape, card: Card, lengths: Lengths) -> dict[str, Phase]:
    """The phases of a step; none where its memory is not planned."""
    settings, model, completion = step.settings, recipe.model, recipe.sampling.max_completion_length
    work = settings.work(recipe.sampling, recipe.data)
    if work is None:
        return {}
    shape = replace(shape, number=card.number)
    asked, sizes = asked_models(recipe.rewards_of(step), recipe, shape), adapter_sizes(shape, model.lora)
    stored = {"weights": weight_bytes(shape, model.quantization)}
    phases = {"load": complete(card, stored, {"dequantized": dequantized(shape, model)})}
    stored |= {
        "adapters": 4 * sum(sizes) * (2 if work.reference else 1),
        "judge": sum(one.stored for one in asked if not one.offload),
    }
    if isinstance(settings, Training):
        stored["optimizer"] = optimizer_bytes(settings.optim, sizes)
        stored["gradients"] = 4 * sum(sizes) if work.interrupted else 0
    if work.rollouts:
        shared = not uses_unsloth(recipe, card)
        moments = [
            rollout(shape, model, recipe.sampling, prompts, n, lengths, shared=shared) for prompts, n in work.rollouts
        ]
        phases["rollout"] = complete(card, stored, peak_phase(moments))
    if work.judged and asked:
        replies, n = work.judged
        replies = max(replies, QUESTIONS if work.fills_judge else 0)
        moments = [judging(one, replies, n, lengths, completion) for one in asked]
        phases["judge"] = complete(card, stored, peak_phase(moments))
    if isinstance(settings, Training):
        tokens = row_tokens(shape, work, lengths, completion)
        shared = card.on_cpu and work.logits == "completion" and not settings.gradient_checkpointing
        computed, few = None, False
        if shared:  # each prompt is read once (model/compat)
            prompts = ceil(work.rows / work.rollouts[0][1])
            computed = prompts * lengths.prompt + work.rows * completion
            few = are_few(work.rows * completion * shape.vocabulary)
        # The gradients of earlier micro-batches are set aside during a backward pass (training/recovery.py).
        stored["gradients"] = 4 * sum(sizes) * (2 if settings.gradient_accumulation_steps > 1 else 1)
        logits = loss_logits(shape, model, work, tokens, completion, compiles=card.compiles, tiled=not few)
        held = backward(shape, model, settings, work.rows, tokens, logits, computed)
        phases["backward"] = complete(card, stored, held)
    return phases


def measure(recipe: Recipe, shape: Shape, card: Card, lengths: Lengths) -> Plan:
    """The plan without changes: every training step, and the first evaluation, since all are alike."""
    stages = [step.stage for step in recipe.steps]
    steps = []
    for position, step in enumerate(recipe.steps):
        earlier = stages[:position].count(step.stage)
        phases = {} if step.evaluate and earlier else plan_step(step, recipe, shape, card, lengths)
        if phases:
            steps.append(StepPlan(position, f"{step.stage} {earlier + 1}" if earlier else step.stage, phases))
    if not steps:
        planned = ", ".join(name for name, kind in STAGES.items() if kind.work is not Stage.work)
        raise InputError(f"{recipe.name}: nothing to plan; give it one of these steps: {planned}")
    return Plan(recipe.name, card, tuple(steps))


def is_planned(recipe: Recipe) -> bool:
    """Whether a recipe has a step whose memory is planned."""
    return any(step.settings.work(recipe.sampling, recipe.data) for step in recipe.steps)


def peak_line(recipe: Recipe, shape: Shape, card: Card, lengths: Lengths) -> str:
    step, phase, needed = measure(recipe, shape, card, lengths).peak
    used = f"{gib(needed)} of {gib(card.free_bytes)} on {card.name}"
    return f"{used} at the peak, the {phase} phase of the {step.name} step"


def check_disk(recipe: Recipe, shape: Shape, folder: Path) -> None:
    """InputError where adapters, merged models and exported files of a run would not fit on the disk of its folder."""
    adapter = 4 * sum(adapter_sizes(shape, recipe.model.lora))
    written = [
        BYTES[step.merge.dtype] * shape.parameters if step.merge else adapter
        for step in recipe.steps
        if step.merge or isinstance(step.settings, Training)
    ]
    written += [
        int(GGUF_BITS[kind] / 8 * shape.parameters) for step in recipe.steps if step.export for kind in step.export.gguf
    ]
    free = free_bytes(folder)
    if sum(written) > free:
        raise InputError(
            f"{folder}: its adapters, merged models and exported files need {gib(sum(written))}, and {gib(free)} are "
            "free there; free some, or take a folder on another disk with --out"
        )


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
