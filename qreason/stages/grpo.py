"""Group relative policy optimization (DeepSeekMath, arXiv 2402.03300) on TRL's trainer.

qreason makes the rollouts and scores them; TRL turns the scores into advantages and the advantages into steps.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qreason.data.prompts import render, system_prompt
from qreason.errors import TrainingError
from qreason.judge.calibration import read_labels
from qreason.machine import ranks
from qreason.recipe.training import Grpo
from qreason.run.session import Artifact, Rewards, Session
from qreason.training.difficulty import filter_prompts
from qreason.training.preflight import check_gold, check_judge, check_rollouts, is_dropped, without_judge
from qreason.training.rollouts import Rollouts
from qreason.types import Example


def stage(settings: Grpo, run: Session) -> Artifact:
    """Train the newest adapter of the run (or another, or a fresh one) against rewards on data.prompts."""
    system = system_prompt(run.recipe.data)

    from trl import GRPOConfig, GRPOTrainer

    from qreason.model.compat.trl import select_rows
    from qreason.model.compat.trl_logprobs import frugal
    from qreason.training.resuming import open_checkpoints
    from qreason.training.selection import Selection
    from qreason.training.trainer import start_adapter, train, trl_config

    start_adapter(run, settings)
    rewards = run.build_rewards(settings.rewards) if settings.rewards else run.rewards
    checkpoints = open_checkpoints(run, settings)
    folder = checkpoints.folder
    look = settings.preflight and not checkpoints.resumed
    examples, why = ranks.from_first(lambda: prepare(settings, run, rewards, folder, look=look))
    if why:
        return Artifact(
            keep_adapter(run, folder), f"0 steps: nothing is left to learn, {why}; the adapter is unchanged"
        )
    check_enough(settings, examples)
    if ranks.from_first(lambda: is_dropped(folder)):
        rewards = replace(rewards, scorer=without_judge(rewards.scorer, kinds_of(run)))
    stop, unjudged = settings.stop_on_reward_hacking, settings.stop_on_unjudged
    rollouts = Rollouts(run, rewards, examples, folder, stop=stop, stop_unjudged=unjudged)
    checkpoints.memory = rollouts
    weights = {"reward_weights": list(rewards.scorer.weights.values())}
    sampling = run.recipe.sampling.model_dump(exclude={"max_num_seqs"})
    trainer = GRPOTrainer
    if is_frugal(run):
        trainer = select_rows(frugal(GRPOTrainer, run.resident.model, run.say), Selection(settings.pods))
    adapter, state = train(
        trainer,
        GRPOConfig(**weights | sampling | trl_config(settings, run, folder)),
        [{"prompt": render(example, system), "example": index} for index, example in enumerate(examples)],
        run,
        folder,
        shown={"reward": "reward", "rewards/correctness/mean": "correctness", "entropy": "entropy"},
        checkpoints=checkpoints,
        reward_funcs=rollouts.reward_functions(),
        rollout_func=rollouts.make,
    )
    return Artifact(adapter, f"{state.global_step} steps, {rollouts.summary}")


def is_frugal(run: Session) -> bool:
    """Whether log-probabilities are ours: Unsloth has its own, and gradients of several processes meet in TRL's."""
    return run.resident.backend == "plain" and ranks.count() == 1


def prepare(
    settings: Grpo, run: Session, rewards: Rewards, folder: Path, *, look: bool
) -> tuple[list[Example], str | None]:
    """The examples to train on, and why there is nothing left to learn, or None.

    With `look`, stops or warns before training that could not learn.
    """
    recipe, scorer, n = run.recipe, rewards.scorer, settings.difficulty_filtering
    kinds = kinds_of(run)
    examples = run.examples("prompts")[: settings.rows]
    if look:
        check_gold(examples, scorer.rewards, kinds, folder)
    if n and not (examples := filter_prompts(settings, run, scorer, examples, folder)):
        return [], f"all {n} replies to every prompt are right"
    if plain := run.plain(settings.plain_share, len(examples)):
        if look:
            check_gold(plain, scorer.rewards, kinds, folder)
        random.Random(recipe.seed).shuffle(examples := examples + plain)
    return examples, preflight(settings, run, rewards, kinds, examples, folder) if look else None


def preflight(
    settings: Grpo,
    run: Session,
    rewards: Rewards,
    kinds: Mapping[str, str],
    examples: Sequence[Example],
    folder: Path,
) -> str | None:
    """Stop or warn before training that could not learn; why it has nothing left to learn, or None."""
    recipe, scorer = run.recipe, rewards.scorer
    # A judge that may end the step or lose its weight is measured first. Otherwise afterwards: which batch a verdict is
    # computed in, and with it its last digit, depends on what was asked before.
    first = rewards.judge is not None and rewards.judge.settings.unfit != "warn"
    if first and measure_judge(run, rewards, kinds, folder):
        scorer = without_judge(scorer, kinds)
    why = check_rollouts(
        run.generator,
        scorer,
        examples,
        system=system_prompt(recipe.data),
        n=settings.num_generations,
        sampling=recipe.sampling.sampling(seed=recipe.seed),
        folder=folder,
    )
    if not first:
        measure_judge(run, rewards, kinds, folder)
    return why


def measure_judge(run: Session, rewards: Rewards, kinds: Mapping[str, str], folder: Path) -> bool:
    """Measure the judge on the recipe's labels, where it has a weight, and report one that is unfit for it.

    Returns whether the step is to train without it.
    """
    data, weights = run.recipe.data, rewards.scorer.weights
    weight = max((weights[name] for name, kind in kinds.items() if kind == "judge"), default=0.0)
    if rewards.judge and weight and data.labels:
        labels = read_labels(Path(data.labels), data)
        if warning := check_judge(rewards.judge, labels, weight, folder):
            run.say(warning)
    return is_dropped(folder)


def kinds_of(run: Session) -> dict[str, str]:
    """The rewards of the current step: name -> kind."""
    return {name: one.kind(name) for name, one in run.recipe.rewards_of(run.recipe.steps[run.step]).items()}


def check_enough(settings: Grpo, examples: Sequence[Example]) -> None:
    """TrainingError for fewer prompts than a step takes, of which TRL makes no step."""
    needed = settings.replies_of_launch(ranks.count()) // settings.num_generations
    if len(examples) < needed:
        left = " that difficulty_filtering leaves" if settings.difficulty_filtering else ""
        raise TrainingError(
            f"grpo: {len(examples)} prompts{left} are fewer than the {needed} that are asked at a time; take more "
            "prompts, or lower per_device_train_batch_size or gradient_accumulation_steps"
        )


def keep_adapter(run: Session, folder: Path) -> Path:
    """The adapter that the step started from, as its own."""
    from qreason.training.trainer import write_adapter

    run.resident.adapter = write_adapter(run.resident.model, run, folder / "adapter")
    return run.resident.adapter
