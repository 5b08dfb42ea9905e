"""The memory of a run before it starts: which phase peaks on a card, whether it fits, and what to change."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from qreason.errors import InputError, nearest
from qreason.hardware import GIB, free_bytes
from qreason.judge.local import ROWS as QUESTIONS
from qreason.memory_phases import (
    STATES,
    USUAL,
    Asked,
    Card,
    Lengths,
    Phase,
    Shape,
    adapter_sizes,
    backward,
    complete,
    dequantized,
    grpo_batch,
    grpo_logits,
    grpo_prompts,
    judging,
    optimizer_bytes,
    read_shape,
    rollout,
    sft_logits,
    weight_bytes,
    worst,
)
from qreason.merging import BYTES
from qreason.preference import read_adapter
from qreason.recipe import Recipe, Step, stage_folders
from qreason.rewards.judged import JudgeSettings
from qreason.sections import Model, Weighted, preference_models
from qreason.settings import Evaluate, Grpo, Sample, Sft
from qreason.types import Messages

__all__ = [
    "CARDS", "Card", "Change", "Lengths", "Plan", "Shape", "StepPlan",
    "check_disk", "find_card", "fit", "peak_line", "plan", "read_card", "read_lengths", "read_shape",
]  # fmt: skip

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
PLANNED = ("sft", "grpo", "sample", "evaluate")
"""Stages that need more of a GPU than the base itself."""
UNITS = {"gib": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6}


def read_card(text: str) -> Card:
    """A card of CARDS (`t4`, `RTX 3060`), or one of so much memory (`6GiB`, `6GB`, `6144MiB`)."""
    plain = re.sub(r"nvidia|geforce|tesla|[\s_-]", "", text.lower())
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(gib|gb|mib|mb)", plain)
    if size and float(size[1]):
        return Card(text.strip(), int(float(size[1]) * UNITS[size[2]]))
    known = {name.replace("-", ""): name for name in CARDS}
    if plain not in known:
        close = nearest(plain, known)
        raise InputError(f"{text}: no such card{close}; give a size such as 6GiB, or one of {', '.join(CARDS)}")
    return CARDS[known[plain]]


def find_card() -> Card | None:
    """The GPU of this machine with what is free on it now; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    here = Card(torch.cuda.get_device_name(), 0, torch.cuda.get_device_capability())
    return replace(here, free_bytes=torch.cuda.mem_get_info()[0] + here.context_bytes)  # asking made the context


def read_lengths(recipe: Recipe) -> Lengths:
    """The longest texts of a recipe's data in tokens of its base; 0 for what it has no data of."""
    from qreason import data
    from qreason.models import load_tokenizer
    from qreason.prompts import SYSTEM_PROMPTS, demonstrate, render, render_judge

    tokenizer = load_tokenizer(recipe.model.base)
    system = SYSTEM_PROMPTS[recipe.data.prompt]
    read = {use: data.read(source, recipe.data, use) for use, source in recipe.data.sources.items()}
    asked = [example for use in ("prompts", "heldout") for example in read.get(use, [])]
    taught = [
        [*render(example, system), {"role": "assistant", "content": demonstrate(example)}]
        for example in read.get("sft", [])
    ]

    def longest(texts: list[str]) -> int:
        return max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) if texts else 0

    def chats(chats: list[Messages], *, reply: bool) -> int:
        return longest([tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=reply) for c in chats])

    return Lengths(
        prompt=chats([render(example, system) for example in asked], reply=True),
        example=chats(taught, reply=False),
        question=chats([render_judge(example.reference, "") for example in asked], reply=True),
        reference=longest([example.reference for example in asked]),
    )


# --- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepPlan:
    """The phases of one step, each component -> bytes; `name` is its stage, numbered from the second on."""

    position: int
    name: str
    phases: dict[str, Phase]

    @property
    def peak(self) -> tuple[str, int]:
        """The phase that needs most, and its bytes."""
        return max(((name, sum(phase.values())) for name, phase in self.phases.items()), key=lambda found: found[1])


@dataclass(frozen=True)
class Change:
    """A recipe that needs less; `settings` says how it differs, as --set writes it."""

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
    """The models on the card that a step's rewards ask."""
    found = []
    for reward in (reward for name, reward in rewards.items() if reward.kind(name) == "judge"):
        judge = JudgeSettings.model_validate(reward.settings)
        if judge.base:
            own, model = shape_of(judge.base), Model(base=judge.base, quantization=judge.quantization)
            stored = weight_bytes(own, judge.quantization)
            found.append(Asked(own, model, stored, offload=judge.offload, kind=judge.mode))
        elif not judge.endpoint:
            stored = 4 * sum(adapter_sizes(shape, recipe.model.lora)) if judge.adapter else 0
            found.append(Asked(shape, recipe.model, stored, adapter=bool(judge.adapter), kind=judge.mode))
    for name in {model for _, model in preference_models(rewards)}:
        if name in stage_folders(recipe.steps):  # an adapter on the policy's base
            stored = 4 * sum(adapter_sizes(shape, recipe.model.lora))
            found.append(Asked(shape, recipe.model, stored, adapter=True, kind="preference"))
            continue
        if adapter := read_adapter(name):
            name = adapter["base_model_name_or_path"]
        own = shape_of(name)
        found.append(Asked(own, Model(base=name), weight_bytes(own, "none"), kind="preference"))
    return found


def plan_step(step: Step, recipe: Recipe, shape: Shape, card: Card, lengths: Lengths) -> dict[str, Phase]:
    """The phases of an sft, grpo, sample or evaluate step."""
    settings, model, completion = step.settings, recipe.model, recipe.sampling.max_completion_length
    asked, sizes = asked_models(recipe.rewards_of(step), recipe, shape), adapter_sizes(shape, model.lora)
    stored = {"weights": weight_bytes(shape, model.quantization)}
    phases = {"load": complete(card, stored, {"dequantized": dequantized(shape, model)})}
    stored |= {"adapters": 4 * sum(sizes), "judge": sum(one.stored for one in asked if not one.offload)}

    def answering(prompts: int, *numbers: int) -> None:
        moments = [rollout(shape, model, recipe.sampling, prompts, n, lengths) for n in numbers]
        phases["rollout"] = complete(card, stored, worst(moments))

    def judged(replies: int, n: int) -> None:
        if asked:
            moments = [judging(one, replies, n, lengths, completion) for one in asked]
            phases["judge"] = complete(card, stored, worst(moments))

    if isinstance(settings, Sample):
        if settings.teacher is None:
            answering(max(1, recipe.sampling.max_num_seqs // settings.n), settings.n)
        judged(max(QUESTIONS, settings.n), settings.n)
        return phases
    if isinstance(settings, Evaluate):
        rows = settings.rows or recipe.sampling.max_num_seqs
        answering(rows, 1, settings.samples)
        judged(rows, 1)
        return phases
    assert isinstance(settings, (Sft, Grpo))
    stored["optimizer"] = optimizer_bytes(settings.optim, sizes)
    micro = settings.per_device_train_batch_size
    if isinstance(settings, Sft):
        limit = int(settings.trl.get("max_length") or shape.context)
        longest = lengths.prompt + completion if settings.data == "sampled" else lengths.example
        tokens = limit if settings.packing else min(limit, longest)
        logits = sft_logits(shape, settings, micro, tokens)
    else:
        if settings.beta:
            stored["adapters"] *= 2  # TRL keeps a copy as the reference
        if grpo_batch(settings) < micro * settings.gradient_accumulation_steps:
            stored["gradients"] = 4 * sum(sizes)  # replies are made between micro-batches
        prompts, n = grpo_prompts(settings), settings.num_generations
        answering(prompts, n)
        judged(max(prompts * n, QUESTIONS if settings.preflight and recipe.data.labels else 0), n)
        tokens = lengths.prompt + completion
        logits = grpo_logits(shape, micro, completion)
    # recovery.py sets the gradients of earlier micro-batches aside during a backward pass
    stored["gradients"] = 4 * sum(sizes) * (2 if settings.gradient_accumulation_steps > 1 else 1)
    phases["backward"] = complete(card, stored, backward(shape, model, settings, micro, tokens, logits))
    return phases


def measure(recipe: Recipe, shape: Shape, card: Card, lengths: Lengths) -> Plan:
    """The plan without changes: every training step, and one evaluation, since all are alike."""
    stages = [step.stage for step in recipe.steps]
    steps = []
    for position, step in enumerate(recipe.steps):
        earlier = stages[:position].count(step.stage)
        if step.stage in PLANNED and not (step.evaluate and earlier):
            name = f"{step.stage} {earlier + 1}" if earlier else step.stage
            steps.append(StepPlan(position, name, plan_step(step, recipe, shape, card, lengths)))
    if not steps:
        raise InputError(
            f"{recipe.name}: no sft, grpo, sample or evaluate step, so there is nothing to plan; add one to steps"
        )
    return Plan(recipe.name, card, tuple(steps))


def plan(recipe: Recipe, shape: Shape, card: Card, lengths: Lengths = USUAL) -> Plan:
    """What each phase needs at most, and the changes that lower the peak, cheapest first, each planned anew.

    Without read_lengths(recipe) the texts are taken to be as long as USUAL says.
    """
    now = measure(recipe, shape, card, lengths)
    changes = []
    for kind in (*SAME, *COSTLY):
        found = until_it_fits(kind, now, recipe, shape, lengths)
        gained = now.peak[2] - measure(found, shape, card, lengths).peak[2] if found else 0
        if found and gained > 0:
            changes.append(Change(differences(recipe, found), gained, kind in SAME, found))
    unknown = [
        f"{step.stage}.optim: {step.settings.optim} is not known here; its state is taken for AdamW's in float32"
        for step in recipe.steps
        if isinstance(step.settings, (Sft, Grpo)) and step.settings.optim not in STATES
    ]
    return replace(now, changes=tuple(changes), notes=tuple(unknown))


# --- changes -------------------------------------------------------------------------------------

Kind = Callable[[Recipe, int], Recipe | None]
"""A change to a recipe with a step in mind (its position): the recipe a notch smaller, or None at its end."""


def with_step(recipe: Recipe, position: int, **values: Any) -> Recipe:
    """The recipe with other settings of one step."""
    steps, stage = list(recipe.steps), recipe.steps[position].stage
    steps[position] = Step.model_validate({stage: steps[position].settings.model_copy(update=values)})
    return recipe.model_copy(update={"steps": steps})


def training(recipe: Recipe, position: int) -> Sft | Grpo | None:
    settings = recipe.steps[position].settings
    return settings if isinstance(settings, (Sft, Grpo)) else None


def smaller_micro_batch(recipe: Recipe, position: int) -> Recipe | None:
    """The next smaller divisor, with as many more accumulation steps; not for bnpo, which averages over each."""
    settings = training(recipe, position)
    if settings is None or (isinstance(settings, Grpo) and settings.loss_type == "bnpo"):
        return None
    now = settings.per_device_train_batch_size
    micro = next((part for part in range(now - 1, 0, -1) if now % part == 0), None)
    if micro is None:
        return None
    values: dict[str, Any] = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps * now // micro,
    }
    if steps := settings.trl.get("steps_per_generation"):
        values["trl"] = settings.trl | {"steps_per_generation": steps * now // micro}
    return with_step(recipe, position, **values)


def fewer_seqs(recipe: Recipe, position: int) -> Recipe | None:
    """Half as many replies decoded side by side."""
    settings, most = recipe.steps[position].settings, recipe.sampling.max_num_seqs
    if isinstance(settings, Grpo):
        replies = grpo_prompts(settings) * settings.num_generations
    elif isinstance(settings, Evaluate):
        replies = (settings.rows or most) * settings.samples
    else:
        return None
    half = min(most, replies) // 2
    sampling = recipe.sampling.model_copy(update={"max_num_seqs": half})
    return recipe.model_copy(update={"sampling": sampling}) if half else None


def checkpointing(recipe: Recipe, position: int) -> Recipe | None:
    settings = training(recipe, position)
    off = settings is not None and not settings.gradient_checkpointing
    return with_step(recipe, position, gradient_checkpointing=True) if off else None


def judge_aside(recipe: Recipe, position: int) -> Recipe | None:
    """A judge of its own in the CPU's memory while it is not asked."""
    reward = recipe.rewards.get("judge")
    if reward is None or not reward.settings.get("base") or reward.settings.get("offload"):
        return None
    aside = reward.model_copy(update={"settings": reward.settings | {"offload": True}})
    return recipe.model_copy(update={"rewards": recipe.rewards | {"judge": aside}})


def small_optimizer(recipe: Recipe, position: int) -> Recipe | None:
    settings = training(recipe, position)
    large = settings is not None and "8bit" not in settings.optim and STATES.get(settings.optim, 2) > 1
    return with_step(recipe, position, optim="adamw_8bit") if large else None


def fewer_rollouts(recipe: Recipe, position: int) -> Recipe | None:
    """Replies made in more and smaller rounds; losses and rewards are then normalized over each round."""
    settings = recipe.steps[position].grpo
    if settings is None or "generation_batch_size" in settings.trl:
        return None
    micro, steps = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    now = grpo_batch(settings) // micro
    parts = (
        part for part in range(now - 1, 0, -1) if steps % part == 0 and not micro * part % settings.num_generations
    )
    part = next(parts, None)
    return with_step(recipe, position, trl=settings.trl | {"steps_per_generation": part}) if part else None


def four_bit(recipe: Recipe, position: int) -> Recipe | None:
    model = recipe.model.model_copy(update={"quantization": "nf4"})
    return recipe.model_copy(update={"model": model}) if recipe.model.quantization == "none" else None


def lower_rank(recipe: Recipe, position: int) -> Recipe | None:
    lora = recipe.model.lora
    smaller = lora.model_copy(update={"r": lora.r // 2, "alpha": max(1, lora.alpha // 2)})
    model = recipe.model.model_copy(update={"lora": smaller})
    return recipe.model_copy(update={"model": model}) if lora.r >= 8 else None


def shorter_completions(recipe: Recipe, position: int) -> Recipe | None:
    length = recipe.sampling.max_completion_length // 2
    sampling = recipe.sampling.model_copy(update={"max_completion_length": length})
    return recipe.model_copy(update={"sampling": sampling}) if length >= 64 else None


def fewer_samples(recipe: Recipe, position: int) -> Recipe | None:
    settings = recipe.steps[position].evaluate
    samples = settings.samples // 2 if settings else 0
    return with_step(recipe, position, samples=samples) if samples else None


SAME: tuple[Kind, ...] = (fewer_seqs, smaller_micro_batch, checkpointing, judge_aside)
"""Changes that leave the mathematics alone, from what costs least time."""
COSTLY: tuple[Kind, ...] = (
    small_optimizer,
    fewer_rollouts,
    four_bit,
    fewer_samples,
    lower_rank,
    shorter_completions,
)
"""Changes that do not, from what changes results least."""


def until_it_fits(kind: Kind, now: Plan, recipe: Recipe, shape: Shape, lengths: Lengths) -> Recipe | None:
    """A change to the step that peaks: a notch, and more of them until the recipe fits or they gain nothing."""
    position = now.peak[0].position
    found = kind(recipe, position)
    while found:
        reached = measure(found, shape, now.card, lengths)
        further = None if reached.fits else kind(found, position)
        if further is None or measure(further, shape, now.card, lengths).peak[2] >= reached.peak[2]:
            break
        found = further
    return found


def differences(before: Recipe, after: Recipe) -> tuple[str, ...]:
    """What changed, as --set writes it."""

    def flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict):
            yield path, value
            return
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else key)

    old, new = before.dump(), after.dump()
    steps = zip(old.pop("steps"), new.pop("steps"), strict=True)
    found = [
        f"{key}={json.dumps(value) if isinstance(value, bool) else value}"
        for was, now in ((old, new), *steps)
        for key, value in flat(now, "")
        if dict(flat(was, "")).get(key) != value
    ]
    return tuple(dict.fromkeys(found))


def fit(recipe: Recipe, shape: Shape, card: Card, lengths: Lengths = USUAL) -> tuple[Recipe, list[str]]:
    """The recipe so that it fits, with the same effective batches, and a line for each step that was changed.

    Replies are decoded with as many side by side as fit; a training step gets the largest micro-batch that fits, and
    checkpointing where one row alone does not. Raises InputError with the cheapest change of the mathematics that makes
    it fit, where this does not.
    """
    result, lines = fitting_rollouts(recipe, shape, card, lengths), []
    if told := differences(recipe, result):
        lines.append(f"{', '.join(told)}: fewer replies side by side, so that they fit into {gib(card.free_bytes)}")
    for step in measure(recipe, shape, card, lengths).steps:
        chosen = result
        for chosen in gentler(result, step.position):
            plans = measure(chosen, shape, card, lengths).steps
            peak = next(one for one in plans if one.position == step.position).peak[1]
            if peak <= card.free_bytes:
                break
        if told := differences(result, chosen):
            lines.append(f"{', '.join(told)}: the {step.name} step needs {gib(peak)} instead of {gib(step.peak[1])}")
        result = chosen
    now = measure(result, shape, card, lengths)
    if not now.fits:
        step, phase, needed = now.peak
        why = (
            f"{recipe.name}: the {step.name} step needs {gib(needed)} ({phase}), {card.name} has {gib(card.free_bytes)}"
        )
        raise InputError(f"{why}; {cure(now, result, shape, lengths)}")
    return result, lines


def fitting_rollouts(recipe: Recipe, shape: Shape, card: Card, lengths: Lengths) -> Recipe:
    """The recipe with as many replies side by side as fit in every step, or one."""
    result = recipe
    for step in measure(recipe, shape, card, lengths).steps:
        while smaller := fewer_seqs(result, step.position):
            rollout = plan_step(result.steps[step.position], result, shape, card, lengths)["rollout"]
            if sum(rollout.values()) <= card.free_bytes:
                break
            result = smaller
    return result


def gentler(recipe: Recipe, position: int) -> Iterator[Recipe]:
    """The recipe and its SAME variants, from what costs least time."""
    aside = judge_aside(recipe, position)
    starts = [recipe, checkpointing(recipe, position), aside, checkpointing(aside, position) if aside else None]
    for start in starts:
        variant = start
        while variant:
            yield variant
            variant = smaller_micro_batch(variant, position)


def cure(now: Plan, recipe: Recipe, shape: Shape, lengths: Lengths) -> str:
    """The first change of the mathematics that makes a recipe fit, alone or with those before it."""
    for kind in COSTLY:
        found = until_it_fits(kind, now, recipe, shape, lengths)
        if found and measure(found, shape, now.card, lengths).fits:
            return f"it fits with {', '.join(differences(recipe, found))}"
    least = recipe
    for kind in COSTLY:
        least = until_it_fits(kind, measure(least, shape, now.card, lengths), least, shape, lengths) or least
    smallest = measure(least, shape, now.card, lengths)
    if smallest.fits:
        return f"it fits with {', '.join(differences(recipe, least))}"
    return f"nothing makes it fit; take a smaller base, or a card with {gib(smallest.peak[2])}"


def peak_line(recipe: Recipe, shape: Shape, card: Card, lengths: Lengths) -> str:
    """What a recipe needs most memory for."""
    step, phase, needed = measure(recipe, shape, card, lengths).peak
    return (
        f"{gib(needed)} of {gib(card.free_bytes)} on {card.name} at the peak, the {phase} phase of the {step.name} step"
    )


def check_disk(recipe: Recipe, shape: Shape, folder: Path) -> None:
    """InputError where the adapters and merged models of a run would not fit on the disk of its folder."""
    adapter = 4 * sum(adapter_sizes(shape, recipe.model.lora))
    written = [
        BYTES[step.merge.dtype] * shape.parameters if step.merge else adapter
        for step in recipe.steps
        if step.sft or step.grpo or step.merge
    ]
    free = free_bytes(folder)
    if sum(written) > free:
        raise InputError(
            f"{folder}: its adapters and merged models need {gib(sum(written))}, and {gib(free)} are free there; free "
            "some, or take a folder on another disk with --out"
        )


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
