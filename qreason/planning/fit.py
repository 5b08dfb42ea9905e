"""Making a recipe fit a card: the changes that save memory, and which of them are enough."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from qreason.errors import InputError
from qreason.planning.memory import Change, Plan, gib, measure, plan_step
from qreason.planning.phases import STATES
from qreason.planning.shapes import USUAL, Card, Lengths, Shape
from qreason.recipe.schema import Recipe, Step
from qreason.recipe.settings import Evaluate
from qreason.recipe.training import Grpo, Training

Kind = Callable[[Recipe, int], Recipe | None]
"""A change to a recipe for the step at a position: a recipe that needs a little less, or None at its limit."""


def plan(recipe: Recipe, shape: Shape, card: Card, lengths: Lengths = USUAL) -> Plan:
    """What each phase needs at most, and the changes that lower the peak, cheapest first, each planned again.

    `lengths` are read_lengths(recipe), or USUAL where they are not known.
    """
    now = measure(recipe, shape, card, lengths)
    changes = []
    for kind in (*SAME, *COSTLY):
        found = until_it_fits(kind, now, recipe, shape, lengths)
        gained = now.peak[2] - measure(found, shape, card, lengths).peak[2] if found else 0
        if found and gained > 0:
            changes.append(Change(differences(recipe, found), gained, kind in SAME, found))
    notes = []
    for step in recipe.steps:
        if isinstance(step.settings, Training) and step.settings.optim not in STATES:
            optim = f"{step.stage}.optim: {step.settings.optim}"
            notes.append(f"{optim} is not known here; its state is taken for AdamW's in float32")
        if step.distill:
            notes.append("distill: this step's memory is not planned; the teacher's weights are added to an sft step's")
    return replace(now, changes=tuple(changes), notes=tuple(notes))


def fit(recipe: Recipe, shape: Shape, card: Card, lengths: Lengths = USUAL) -> tuple[Recipe, list[str]]:
    """The recipe changed so that it fits, with the same effective batches, and a line for each step that was changed.

    As many replies are decoded side by side as fit; a training step gets the largest micro-batch that fits, and
    checkpointing where one row alone does not. Where this is not enough, raises InputError with the cheapest change of
    the mathematics that is.
    """
    result, lines = fitting_rollouts(recipe, shape, card, lengths), []
    if changed := differences(recipe, result):
        lines.append(f"{', '.join(changed)}: fewer replies side by side, so that they fit into {gib(card.free_bytes)}")
    for step in measure(recipe, shape, card, lengths).steps:
        chosen = result
        for chosen in same_variants(result, step.position):
            plans = measure(chosen, shape, card, lengths).steps
            peak = next(one for one in plans if one.position == step.position).peak[1]
            if peak <= card.free_bytes:
                break
        if changed := differences(result, chosen):
            lines.append(f"{', '.join(changed)}: the {step.name} step needs {gib(peak)} instead of {gib(step.peak[1])}")
        result = chosen
    now = measure(result, shape, card, lengths)
    if not now.fits:
        step, phase, needed = now.peak
        raise InputError(
            f"{recipe.name}: the {step.name} step needs {gib(needed)} ({phase}), {card.name} has "
            f"{gib(card.free_bytes)}; {cure(now, result, shape, lengths)}"
        )
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


def same_variants(recipe: Recipe, position: int) -> Iterator[Recipe]:
    """The recipe and variants with the same mathematics, from what costs least time."""
    offloaded = offload_judge(recipe, position)
    starts = [recipe, checkpointing(recipe, position), offloaded]
    starts.append(checkpointing(offloaded, position) if offloaded else None)
    for variant in starts:
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
    larger = "machine" if now.card.on_cpu else "card"
    return f"nothing makes it fit; take a smaller base, or a {larger} with {gib(smallest.peak[2])}"


def until_it_fits(kind: Kind, now: Plan, recipe: Recipe, shape: Shape, lengths: Lengths) -> Recipe | None:
    """A change to the step that peaks, repeated until the recipe fits or nothing more is gained."""
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


# --- changes --------------------------------------------------------------------------------------


def with_step(recipe: Recipe, position: int, **values: Any) -> Recipe:
    """The recipe with other settings of one step."""
    steps, stage = list(recipe.steps), recipe.steps[position].stage
    steps[position] = Step.model_validate({stage: steps[position].settings.model_copy(update=values)})
    return recipe.model_copy(update={"steps": steps})


def training(recipe: Recipe, position: int) -> Training | None:
    settings = recipe.steps[position].settings
    return settings if isinstance(settings, Training) else None


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
        replies = settings.prompts_at_a_time * settings.num_generations
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


def offload_judge(recipe: Recipe, position: int) -> Recipe | None:
    """A judge with its own base, kept in CPU memory while it is not in use."""
    reward = recipe.rewards.get("judge")
    if reward is None or not reward.settings.get("base") or reward.settings.get("offload"):
        return None
    judge = reward.model_copy(update={"settings": reward.settings | {"offload": True}})
    return recipe.model_copy(update={"rewards": recipe.rewards | {"judge": judge}})


def small_optimizer(recipe: Recipe, position: int) -> Recipe | None:
    settings = training(recipe, position)
    large = settings is not None and "8bit" not in settings.optim and STATES.get(settings.optim, 2) > 1
    return with_step(recipe, position, optim="adamw_8bit") if large else None


def fewer_rollouts(recipe: Recipe, position: int) -> Recipe | None:
    """Replies generated in more and smaller rounds; losses and rewards are then normalized over each round."""
    settings = recipe.steps[position].grpo
    if settings is None or "generation_batch_size" in settings.trl:
        return None
    micro, steps = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    now = settings.replies_at_a_time // micro
    for part in range(now - 1, 0, -1):
        if steps % part == 0 and not micro * part % settings.num_generations:
            return with_step(recipe, position, trl=settings.trl | {"steps_per_generation": part})
    return None


def four_bit(recipe: Recipe, position: int) -> Recipe | None:
    model = recipe.model.model_copy(update={"quantization": "nf4"})
    return recipe.model_copy(update={"model": model}) if recipe.model.quantization == "none" else None


def fewer_samples(recipe: Recipe, position: int) -> Recipe | None:
    settings = recipe.steps[position].evaluate
    samples = settings.samples // 2 if settings else 0
    return with_step(recipe, position, samples=samples) if samples else None


def lower_rank(recipe: Recipe, position: int) -> Recipe | None:
    lora = recipe.model.lora
    smaller = lora.model_copy(update={"r": lora.r // 2, "alpha": max(1, lora.alpha // 2)})
    model = recipe.model.model_copy(update={"lora": smaller})
    return recipe.model_copy(update={"model": model}) if lora.r >= 8 else None


def shorter_completions(recipe: Recipe, position: int) -> Recipe | None:
    length = recipe.sampling.max_completion_length // 2
    sampling = recipe.sampling.model_copy(update={"max_completion_length": length})
    return recipe.model_copy(update={"sampling": sampling}) if length >= 64 else None


SAME: tuple[Kind, ...] = (fewer_seqs, smaller_micro_batch, checkpointing, offload_judge)
"""Changes that keep the mathematics, from what costs least time."""
COSTLY: tuple[Kind, ...] = (small_optimizer, fewer_rollouts, four_bit, fewer_samples, lower_rank, shorter_completions)
"""Changes that alter it, from what changes results least."""
