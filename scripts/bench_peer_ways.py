"""One measurement of bench_peer.py in this process: qreason or plain TRL trains, with a meter in its trainer."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_contenders import Meter, machine, metered, rule_rewards
from bench_tables import Row

from qreason.machine.hardware import prepare_process

if TYPE_CHECKING:
    from qreason.machine.hardware import Hardware
    from qreason.recipe.schema import Recipe
    from qreason.types import Example

OURS, TRL = "qreason", ("TRL float32", "TRL bfloat16")
PHASES = ("rollout", "judge", "rewards", "log-probs", "backward", "rest")
UNCOUNTED = "uncounted"
GROUP, REPLY_TOKENS = 8, 96


def phased(trainer: Any, meter: Meter) -> Any:
    """A metered GRPO trainer class whose meter also sees log-probabilities and the backward pass."""

    class Phased(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            backward = self.accelerator.backward

            def timed(*args: Any, **kwargs: Any) -> None:
                with meter.during("backward"):
                    backward(*args, **kwargs)

            self.accelerator.backward = timed

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            with meter.during("log-probs"):
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    return Phased


def measure(given: Row, folder: Path) -> Row:
    """Train as `given` says; its steps by phase in seconds, tokens, peak in bytes, and the curve of pass@1."""
    prepare_process()
    import torch
    import trl

    from qreason.data.examples import read_examples
    from qreason.machine.hardware import detect
    from qreason.model.resident import Resident

    recipe, hardware = write_recipe(given), detect()
    meter = Meter(hardware.device == "cuda")
    trl.GRPOTrainer = phased(metered(trl.GRPOTrainer, meter, given["replies"]), meter)
    callbacks: list[Any] = []
    curve: list[Row] = []
    if given["quality"]:
        assert recipe.data.heldout
        rows = read_examples(recipe.data.heldout, use="heldout")[: given["rows"]]
        measured = Resident(recipe.model, hardware)
        callbacks = [pass_at_one(given, recipe, measured, rows, meter, curve, folder)]
        trl.GRPOTrainer = with_callbacks(trl.GRPOTrainer, callbacks)
    adapter = Path(given["adapter"])
    if given["arm"] == OURS:
        train_qreason(recipe, adapter, meter, folder)
    else:
        train_trl(given, recipe, hardware, adapter, meter, folder)
    steps = [{("rest" if key == "training" else key): value for key, value in step.items()} for step in meter.steps]
    peak = max(meter.peaks.values(), default=0) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **{key: given[key] for key in ("arm", "round", "seed")},
        "machine": machine(hardware) | {"threads": torch.get_num_threads()},
        "steps": [{phase: round(step.get(phase, 0.0), 4) for phase in PHASES} for step in steps],
        "tokens": meter.tokens,
        "peak_bytes": peak,
        "curve": curve,
    }


def write_recipe(given: Row) -> Recipe:
    """The quickstart with its GRPO step alone, for this base and so many replies per step."""
    from qreason.recipe.load import load_recipe

    quickstart = load_recipe("quickstart")
    step = next(step.grpo for step in quickstart.steps if step.grpo).model_dump(exclude_unset=True)
    micro = min(given["micro"], given["replies"])
    step |= {
        "max_steps": given["steps"],
        "num_generations": GROUP,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": given["replies"] // micro,
        "preflight": False,
    }
    settings = {
        "model.base": given["base"],
        "data.labels": None,
        "sampling.max_completion_length": REPLY_TOKENS,
        "steps": [{"grpo": step}],
    }
    return load_recipe("quickstart", [f"{key}={json.dumps(value)}" for key, value in settings.items()], given["seed"])


def train_qreason(recipe: Recipe, adapter: Path, meter: Meter, folder: Path) -> None:
    from qreason.judge.verdict import Judge
    from qreason.run.folder import RunFolder
    from qreason.run.session import Session
    from qreason.stages import run_stage

    judge = Judge.__call__

    def judged(self: Judge, *args: Any, **kwargs: Any) -> Any:
        with meter.during("judge"):
            return judge(self, *args, **kwargs)

    Judge.__call__ = judged  # type: ignore[method-assign]
    RunFolder.adapter = lambda self, start: adapter  # type: ignore[method-assign, assignment, misc]
    run = Session.open(recipe, folder / "run")
    _ = run.backend  # before transformers is imported
    run_stage(run.recipe.steps[0], run)


def train_trl(given: Row, recipe: Recipe, hardware: Hardware, adapter: Path, meter: Meter, folder: Path) -> None:
    import trl
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from qreason.data.examples import read_examples
    from qreason.data.prompts import HELPDESK, render
    from qreason.model.compat.noise import quiet
    from qreason.model.load import load_tokenizer, locate
    from qreason.training.arguments import trl_arguments

    quiet()
    settings = recipe.steps[0].grpo
    assert settings
    assert recipe.data.prompts
    examples = read_examples(recipe.data.prompts, use="prompts")[: settings.rows]
    rounded = given["arm"].endswith("bfloat16")
    base = AutoModelForCausalLM.from_pretrained(locate(recipe.model.base), dtype=hardware.dtype)
    options = trl_arguments(settings, recipe.seed, hardware, folder / "trl") | {"bf16": rounded, "fp16": False}
    options |= recipe.sampling.model_dump(exclude={"max_num_seqs"})
    rules = rule_rewards(recipe, examples, REPLY_TOKENS) | {"judge": written_scores(recipe, hardware, examples, meter)}
    trl.GRPOTrainer(
        model=PeftModel.from_pretrained(base.to(hardware.device), str(adapter), is_trainable=True),
        args=trl.GRPOConfig(**options, reward_weights=list(recipe.weights.values())),
        reward_funcs=[rules[name] for name in recipe.weights],
        train_dataset=Dataset.from_list(
            [{"prompt": render(e, HELPDESK), "example": i} for i, e in enumerate(examples)]
        ),
        processing_class=load_tokenizer(recipe.model.base),
    ).train()


def written_scores(recipe: Recipe, hardware: Hardware, examples: Sequence[Example], meter: Meter) -> Any:
    """TRL's judge: a second copy of the base writes a score for every reply that has an answer."""
    from bench_judge import write_scores

    from qreason.inference.generate import LocalGenerator
    from qreason.judge.verdict import Judge, LocalModel
    from qreason.model.resident import Resident
    from qreason.rewards.tags import read_answer

    resident = Resident(recipe.model, hardware)
    stand_in = Judge(LocalModel(LocalGenerator(resident)))

    def judged(completions: list[Any], example: list[int], **kwargs: Any) -> list[float | None]:
        answers = [read_answer(one[0]["content"]) for one in completions]
        pairs = [(examples[index].reference, answer) for index, answer in zip(example, answers, strict=True) if answer]
        with meter.during("judge"):
            written = [resident.tokenizer.decode(ids) for ids in write_scores(resident, pairs)] if pairs else []
        with meter.during(UNCOUNTED):
            verdicts = stand_in(pairs) if pairs else []
        numbers = [re.search(r"\d*\.?\d+", text) for text in written]
        marks = iter(
            [
                min(1.0, float(number[0])) if number else verdict
                for number, verdict in zip(numbers, verdicts, strict=True)
            ]
        )
        return [next(marks) if answer else 0.0 for answer in answers]

    judged.__name__ = "judge"
    return judged


# --- time to quality -------------------------------------------------------------------------------


def with_callbacks(trainer: Any, callbacks: Sequence[Any]) -> Any:
    class Watched(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for callback in callbacks:
                self.add_callback(callback)

    return Watched


def pass_at_one(
    given: Row, recipe: Recipe, resident: Any, examples: Sequence[Example], meter: Meter, curve: list[Row], folder: Path
) -> Any:
    """A callback that measures pass@1 every so many steps, with the clock stopped, and stops at the target."""
    from transformers import TrainerCallback

    from qreason.data.prompts import HELPDESK, render
    from qreason.inference.generate import LocalGenerator
    from qreason.rewards.text import correctness

    prompts = [render(example, HELPDESK) for example in examples]
    repeated = [example for example in examples for _ in range(4)]

    class Evaluating(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % given["every"]:
                return
            with meter.during(UNCOUNTED):
                saved = folder / f"adapter-{state.global_step}"
                kwargs["model"].save_pretrained(str(saved))
                resident.load_adapter(saved)
                drawing = recipe.sampling.sampling(seed=1)
                made = LocalGenerator(resident).generate(prompts, n=4, sampling=drawing, fast=True)
                marks = correctness([reply for group in made for reply in group], repeated)
                resident.remove_adapter()
            right = sum(bool(mark) for mark in marks) / len(marks)
            seconds = sum(step_seconds(step) for step in (*meter.steps, meter.spent))
            curve.append({"step": state.global_step, "seconds": round(seconds, 2), "pass_at_1": round(right, 4)})
            control.should_training_stop = right >= given["target"]

    return Evaluating()


def step_seconds(step: dict[str, float]) -> float:
    return sum(seconds for phase, seconds in step.items() if phase != UNCOUNTED)
