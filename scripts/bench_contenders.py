"""One measurement of bench_gpu.py in this process: a contender trains with a meter in its trainer."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_tables import Row, Setting

from qreason.machine.files import read_jsonl, write_jsonl
from qreason.machine.hardware import GIB, prepare_process

if TYPE_CHECKING:
    from qreason.machine.hardware import Hardware
    from qreason.planning.shapes import Card
    from qreason.recipe.schema import Recipe
    from qreason.types import Example, Reward

HELPDESK = Path(__file__).parent.parent / "data" / "helpdesk"
STEPS = {"sft": 12, "grpo": 4}
"""Steps that are measured, after one that is not."""
NOTEBOOK = {"optim": "adamw_8bit", "learning_rate": 5e-6, "weight_decay": 0.001, "lr_scheduler_type": "linear"}
"""Stock Unsloth: the trainer's settings in its public notebooks."""
CONTEXT = 1024
"""Stock Unsloth: max_seq_length of its GRPO notebooks."""
OUT_OF_MEMORY = "out of GPU memory"
"""What a run says when it goes on in smaller pieces."""
UNALLOCATED = ("fragmentation", "CUDA context")
"""Parts of a plan that torch does not count as allocated."""


class Meter:
    """Seconds of every step by phase, and the most that torch allocated in each phase, in bytes."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.phase, self.since = "load", time.perf_counter()
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []
        self.tokens: list[float] = []
        self.peaks: dict[str, int] = {}
        self.reserved = 0
        self.seen = 0.0

    def enter(self, phase: str) -> str:
        """Close the phase that runs, which is returned, and start another one."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), torch.cuda.max_memory_allocated())
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        closed, now = self.phase, time.perf_counter()
        self.spent[closed] += now - self.since
        self.phase, self.since = phase, now
        return closed

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        outer = self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)

    def start(self) -> None:
        self.enter("training")
        self.spent.clear()

    def end_step(self) -> None:
        self.enter(self.phase)
        self.steps.append(dict(self.spent))
        self.spent.clear()

    def log(self, logs: Row, completions: int) -> None:
        """Tokens of the step: those of the completions, or for SFT all that were read."""
        if "completions/mean_length" in logs:
            self.tokens.append(logs["completions/mean_length"] * completions)
        elif "num_tokens" in logs and "loss" in logs:
            self.tokens.append(logs["num_tokens"] - self.seen)
            self.seen = logs["num_tokens"]


def metered(trainer: Any, meter: Meter, completions: int) -> Any:
    """A TRL trainer class, whoever patched it, that tells the meter what it does."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            meter.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.end_step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Row, **kwargs: Any) -> None:
            meter.log(logs, completions)

    class Metered(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(Stopwatch())

        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            with meter.during("rollout"):
                return super()._generate(*args, **kwargs)

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            with meter.during("rewards"):
                return super()._calculate_rewards(*args, **kwargs)

    Metered.__name__ = trainer.__name__
    return Metered


def measure(setting: Setting, base: str, folder: Path) -> Row:
    """Train in this process and report; patches trl and the judge's reward for good, so the process should end."""
    prepare_process()
    from qreason.errors import InputError, OutOfMemoryError
    from qreason.machine.rows import is_out_of_memory
    from qreason.model import backends

    backends.start("unsloth" if "unsloth" in setting.contender.lower() else "plain")
    import torch
    import trl

    from qreason.machine.hardware import detect
    from qreason.planning.memory import find_card
    from qreason.planning.shapes import Card

    hardware, card = detect(), find_card()
    meter = Meter(hardware.device == "cuda")
    trl.SFTTrainer = metered(trl.SFTTrainer, meter, setting.rows)
    trl.GRPOTrainer = metered(trl.GRPOTrainer, meter, setting.rows)
    recipe = write_recipe(setting, base, folder)
    if setting.cap:
        card = Card(f"{setting.cap:g} GiB", int(setting.cap * GIB), card.capability or (8, 6))
        if meter.cuda:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(share(card.free_bytes - card.context_bytes, total))
    row: Row = {"setting": asdict(setting), "machine": machine(hardware), "plan": None, "changes": [], "judgements": 0}
    try:
        if setting.contender.startswith("qreason"):
            train_qreason(recipe, card, bool(setting.cap), folder, row)
        else:
            train_stock(setting, recipe, hardware, folder, row)
        meter.enter("done")
        row |= {"outcome": "measured", "steps": meter.steps[1:], "tokens": meter.tokens[1:]}
    except InputError as error:
        row |= {"outcome": "does not fit", "why": str(error).splitlines()[0]}
    except (RuntimeError, OutOfMemoryError) as error:
        if not isinstance(error, OutOfMemoryError) and not is_out_of_memory(error):
            raise
        row |= {"outcome": "out of memory", "why": str(error).splitlines()[0]}
    context = 0
    if meter.cuda:
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
    return row | {"peak_bytes": meter.peaks, "reserved_bytes": meter.reserved, "context_bytes": context}


def share(part: int, whole: int) -> float:
    """Of a card's memory, as torch takes it: it refuses more than all, and less than nothing."""
    return min(1.0, max(0.0, part / whole))


def machine(hardware: Any) -> Row:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "qreason"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    cuda = hardware.device == "cuda"
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else 0
    return {"name": hardware.name or hardware.device, "memory_bytes": memory, "versions": versions}


def write_recipe(setting: Setting, base: str, folder: Path) -> Recipe:
    """The helpdesk recipe with this step alone, on its longest rows: as many as are trained on, so each is met."""
    from qreason.model.load import load_tokenizer
    from qreason.recipe.load import load_recipe

    step: Row = {
        "max_steps": STEPS[setting.stage] + 1,
        "per_device_train_batch_size": setting.rows,
        "gradient_checkpointing": setting.checkpointing,
        "logging_steps": 1,
    }
    if setting.stage == "grpo":
        step |= {"num_generations": setting.rows, "preflight": False}
    use, each = ("sft", setting.rows) if setting.stage == "sft" else ("prompts", 1)
    rows = read_jsonl(HELPDESK / f"{use}.jsonl")
    texts = [f"{row['issue']} {row['steps']} {row['resolution']}" if use == "sft" else row["issue"] for row in rows]
    tokens = [len(ids) for ids in load_tokenizer(base)(texts)["input_ids"]]
    longest = sorted(range(len(rows)), key=lambda index: -tokens[index])[: each * step["max_steps"]]
    write_jsonl(folder / f"{use}.jsonl", [rows[index] for index in longest])
    settings = {
        "model.base": base,
        "model.quantization": setting.quantization,
        "model.backend": "unsloth" if setting.contender == "qreason unsloth" else "plain",
        f"data.{use}": str(folder / f"{use}.jsonl"),
        "data.heldout": None,
        "data.labels": None,
        "sampling.max_completion_length": setting.tokens,
        "steps": [{setting.stage: step}],
    }
    return load_recipe("helpdesk", [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def answers() -> Iterator[str]:
    """What the judge is asked about: random weights write no answer of their own, and none would go unasked."""
    return cycle([row["resolution"] for row in read_jsonl(HELPDESK / "prompts.jsonl")])


def train_qreason(recipe: Recipe, card: Card, capped: bool, folder: Path, row: Row) -> None:
    """As `qreason run` does: fitted to the memory where there is a cap, planned, trained."""
    from qreason.planning.fit import fit, plan
    from qreason.planning.memory import read_lengths
    from qreason.planning.shapes import read_shape
    from qreason.run.session import Session
    from qreason.stages import run_stage

    run = Session.open(
        recipe, folder / "run", say=lambda line: row["changes"].append(line) if OUT_OF_MEMORY in line else None
    )
    _ = run.backend  # before transformers is imported
    shape, lengths = read_shape(recipe.model.base), read_lengths(recipe)
    if capped:
        run.recipe, changes = fit(recipe, shape, card, lengths)
        row["changes"] += changes
    phases = plan(run.recipe, shape, card, lengths).steps[0].phases
    row["plan"] = {
        name: {"allocated": sum(phase[part] for part in phase if part not in UNALLOCATED), "all": sum(phase.values())}
        for name, phase in phases.items()
    }
    asked = answers()
    judged: Any = import_module("qreason.rewards.judged")  # Any: mypy refuses the assignment below
    judged.read_answer = lambda text: next(asked)
    run_stage(run.recipe.steps[0], run)
    row["judgements"] = run.rewards.judge.asked if run.rewards.judge else 0


def train_stock(setting: Setting, recipe: Recipe, hardware: Hardware, folder: Path, row: Row) -> None:
    """The same rows and rewards with TRL's trainers as they come, or with Unsloth's as its notebooks have them."""
    import trl
    from datasets import Dataset

    from qreason.data.examples import read_examples
    from qreason.data.prompts import HELPDESK, render
    from qreason.model.compat.noise import quiet
    from qreason.model.load import load_tokenizer
    from qreason.stages.sft import conversation

    quiet()
    options: Row = {
        "output_dir": str(folder / "stock"),
        "max_steps": STEPS[setting.stage] + 1,
        "per_device_train_batch_size": setting.rows,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": recipe.seed,
        "use_cpu": hardware.device == "cpu",
        "bf16": hardware.autocast == "bfloat16",
        "fp16": hardware.autocast == "float16",
        "gradient_checkpointing": setting.checkpointing,
    }
    unsloth = setting.contender == "Unsloth"
    parts = unsloth_parts(setting, recipe, hardware) if unsloth else trl_parts(recipe, hardware, options)
    options |= NOTEBOOK if unsloth else {}
    parts["processing_class"] = load_tokenizer(recipe.model.base)
    if setting.stage == "sft":
        rows = [conversation(example, HELPDESK) for example in read_examples(folder / "sft.jsonl", use="sft")]
        trainer = trl.SFTTrainer(args=trl.SFTConfig(**options), train_dataset=Dataset.from_list(rows), **parts)
    else:
        examples = read_examples(folder / "prompts.jsonl", use="prompts")
        options |= {"num_generations": setting.rows, "max_completion_length": setting.tokens}
        options["reward_weights"] = list(recipe.weights.values())
        parts["reward_funcs"] = stock_rewards(setting, recipe, hardware, examples, row)
        rows = [{"prompt": render(example), "example": index} for index, example in enumerate(examples)]
        trainer = trl.GRPOTrainer(args=trl.GRPOConfig(**options), train_dataset=Dataset.from_list(rows), **parts)
    trainer.train()


def trl_parts(recipe: Recipe, hardware: Hardware, options: Row) -> Row:
    """Stock TRL loads the base by itself, quantized, and makes the adapter."""
    from peft import LoraConfig

    from qreason.model.load import four_bit, locate

    lora = recipe.model.lora
    options["model_init_kwargs"] = {"dtype": hardware.dtype}
    if hardware.device == "cuda":
        options["model_init_kwargs"]["device_map"] = {"": 0}
    adapter = LoraConfig(task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules)
    packed = four_bit(hardware) if recipe.model.quantization == "nf4" else None
    return {"model": locate(recipe.model.base), "peft_config": adapter, "quantization_config": packed}


def unsloth_parts(setting: Setting, recipe: Recipe, hardware: Hardware) -> Row:
    """Stock Unsloth: fused kernels, its own checkpointing, no vLLM."""
    import torch
    from unsloth import FastLanguageModel

    from qreason.model.load import locate

    model, _ = FastLanguageModel.from_pretrained(
        model_name=locate(recipe.model.base),
        max_seq_length=CONTEXT,
        dtype=getattr(torch, hardware.dtype),
        load_in_4bit=setting.quantization == "nf4",
        fast_inference=False,
        use_exact_model_name=True,  # there is no network to fetch its own copy from
        fix_tokenizer=False,
    )
    lora = recipe.model.lora
    model = FastLanguageModel.get_peft_model(
        model, r=lora.r, lora_alpha=lora.alpha, use_gradient_checkpointing="unsloth", random_state=3407
    )
    return {"model": model}


def stock_rewards(
    setting: Setting, recipe: Recipe, hardware: Hardware, examples: Sequence[Example], row: Row
) -> list[Any]:
    """The recipe's rules as reward functions, and a judge as one would add it: a second copy that writes a score."""
    from bench_judge import write_scores

    from qreason.model.resident import Resident

    judge = Resident(recipe.model, hardware, backend="unsloth" if setting.contender == "Unsloth" else "plain")
    asked = answers()

    def judged(example: list[int], **kwargs: Any) -> list[float]:
        write_scores(judge, [(examples[index].reference, next(asked)) for index in example])
        row["judgements"] += len(example)
        # random weights write no score that could be read; these differ, so that there is a gradient
        return [place / len(example) for place in range(len(example))]

    known = rule_rewards(recipe, examples, setting.tokens) | {"judge": judged}
    return [known[name] for name in recipe.weights]


def rule_rewards(recipe: Recipe, examples: Sequence[Example], tokens: int) -> dict[str, Any]:
    """The recipe's rewards without the judge, as reward functions of TRL; `tokens` is the most of a completion."""
    from qreason.rewards.registry import build
    from qreason.types import Reply

    def ruled(name: str, rule: Reward) -> Any:
        def reward(completions: list[Any], example: list[int], **kwargs: Any) -> list[float | None]:
            return rule([Reply(one[0]["content"]) for one in completions], [examples[index] for index in example])

        reward.__name__ = name
        return reward

    rules = build({name: {} for name in recipe.rewards if name != "judge"}, lambda settings: None, tokens)
    return {name: ruled(name, rule) for name, rule in rules.items()}
