"""What can be known about a run before its base is loaded: every problem at once, and what could not be looked at."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from qreason.data.prompts import demonstrate, lesson, render, system_prompt, unlearned
from qreason.data.turns import reply_spans
from qreason.errors import InputError, QReasonError, nearest
from qreason.judge.calibration import read_labels
from qreason.machine import ranks
from qreason.machine.files import read_json
from qreason.machine.hardware import detect
from qreason.model.load import (
    EMBEDDED,
    check_packed,
    check_vocabulary,
    is_here,
    load_tokenizer,
    locate,
    read_base_config,
)
from qreason.model.templates import opens_thoughts
from qreason.planning.data import fields_without_column, learned_by_heart
from qreason.planning.memory import check_disk, shape_of
from qreason.planning.shapes import Shape
from qreason.recipe.schema import Recipe, Step
from qreason.recipe.training import Training
from qreason.rewards.registry import CALL_SECONDS, build
from qreason.rewards.scoring import Raised, ask
from qreason.training.arguments import is_usual, refused_arguments
from qreason.types import Example, Messages, Pair, Reply

TURN = {True: 40, False: 300}
"""Bytes that a chat template adds to a turn at most: the embedded base's, and another one's."""
FIRST_CHATS = 20
"""Chats that show whether a chat template keeps earlier turns."""
OWN_WORDS = "I do not know this one."
"""A made-up reply without tags."""


@dataclass
class Findings:
    """`problems` stop a run, `notes` are said before it; a line each."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(self, work: Callable[[], Any]) -> Any:
        """The result of work; None where it raises an error of ours, which becomes a problem."""
        try:
            return work()
        except QReasonError as error:
            self.problems.append(str(error))
            return None


def examine(
    recipe: Recipe,
    examples: Mapping[str, Sequence[Example]],
    pairs: Sequence[Pair],
    folder: Path,
    *,
    fetch: bool,
) -> Findings:
    """Everything that can be known before the base is loaded; `examples` by use, those that could be read.

    `fetch`: for a run, which needs the base in any case; otherwise it is looked at only where it is on this machine,
    and torch and its kin are imported only where the recipe asks for something that is not known without them.
    """
    found = Findings(launch_problems(recipe))
    for step in recipe.steps:
        if isinstance(step.settings, Training) and not is_usual(step.settings):
            found.problems += refused_arguments(step.stage, step.settings, detect())
    found.problems += own_reward_problems(recipe, examples) + fields_without_column(recipe, examples)
    found.notes += learned_by_heart(recipe, examples)
    if labels := recipe.data.labels:
        found.attempt(lambda: read_labels(Path(labels), recipe.data))
    if not fetch and not is_here(recipe.model.base):
        found.notes.append(
            f"skipped, since {recipe.model.base} is not on this machine: its chat template and vocabulary, the lengths "
            "of prompts, the layers of model.lora.target_modules, disk space"
            + (", whether it can be exported" if any(step.export for step in recipe.steps) else "")
        )
        return found
    embedded, shape = recipe.model.base in EMBEDDED, None
    if fetch or not embedded or recipe.model.lora.target_modules != "all-linear":
        base, thinking = recipe.model.base, recipe.model.thinking
        if (tokenizer := found.attempt(lambda: load_tokenizer(base, thinking=thinking))) is not None:
            found.attempt(lambda: check_vocabulary(base, tokenizer))
            found.attempt(lambda: check_packed(recipe.model, read_base_config(base)))
        if tokenizer is None or (shape := found.attempt(lambda: shape_of(base))) is None:
            return found
        if targets := target_problems(recipe, shape):
            found.problems += targets
        else:
            found.attempt(lambda: check_disk(recipe, shape, folder))
        found.attempt(lambda: check_export(recipe))
        found.attempt(lambda: check_thoughts(recipe, tokenizer))
        found.attempt(lambda: check_turns(recipe, examples.get("sft", []), tokenizer))
    context = (
        shape.context
        if shape
        else int(read_json(EMBEDDED[recipe.model.base] / "config.json")["max_position_embeddings"])
    )
    found.attempt(lambda: check_texts(recipe, examples, pairs, context, found))
    return found


def launch_problems(recipe: Recipe) -> list[str]:
    """What of a recipe several processes cannot do together."""
    if ranks.count() == 1:
        return []
    problems = [
        f"accelerate's {name} is not supported: take recipes/accelerate/ddp.yml, which has the base in each process"
        for name in ("FSDP", "DEEPSPEED")
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
    ]
    for step in recipe.steps:
        if step.settings.processes == "one":
            problems.append(f"{step.stage}: it runs in one process only; run the recipe without accelerate launch")
        replies = step.grpo.replies_of_launch(ranks.count()) // ranks.count() if step.grpo else 0
        if step.grpo and replies % step.grpo.num_generations:
            problems.append(
                f"grpo: a process makes {replies} replies at a time, no whole groups of {step.grpo.num_generations} "
                "(num_generations); raise per_device_train_batch_size, or leave trl.steps_per_generation out"
            )
    return problems


# --- rewards -------------------------------------------------------------------------------------


def own_reward_problems(recipe: Recipe, examples: Mapping[str, Sequence[Example]]) -> list[str]:
    """What is wrong with rewards of one's own, each called once on two made-up replies."""
    asked = {(name, repr(one)): one for step in recipe.steps for name, one in recipe.rewards_of(step).items()}
    completion, problems = recipe.sampling.max_completion_length, []
    for (name, _), one in asked.items():
        uses = ("plain",) if one.only == "plain" else ("prompts", "heldout", "sft")
        rows = next((list(examples[use][:2]) for use in uses if examples.get(use)), [])
        if ":" not in (kind := one.kind(name)) or not rows:  # on the Hub, for `validate`
            continue
        replies = [made_up(demonstrate(row) if place else OWN_WORDS) for place, row in enumerate(rows)]
        seconds = {name: one.call_timeout or CALL_SECONDS}
        try:
            built = build({name: one.settings}, lambda _: None, completion, kinds={name: kind}, seconds=seconds)
            ask(name, built[name], replies, rows)
        except (Raised, ValueError, QReasonError) as error:
            problems.append(f"{error} (on made-up replies, before the run)")
    return problems


def made_up(text: str) -> Reply:
    return Reply(text, token_ids=tuple(range(len(text.split()))), prompt_ids=(0, 1))


# --- the base ------------------------------------------------------------------------------------


def target_problems(recipe: Recipe, shape: Shape) -> list[str]:
    """The names in model.lora.target_modules that fit no layer of the base, matched as PEFT does."""
    wanted, trains = recipe.model.lora.target_modules, any(isinstance(s.settings, Training) for s in recipe.steps)
    if not trains or wanted == "all-linear":
        return []
    layers = sorted({name.rpartition(".")[2] for name in shape.adaptable})
    known = f"there are {', '.join(layers)}, and all-linear"
    if isinstance(wanted, str):
        try:
            fits = any(re.fullmatch(wanted, name) for name in shape.adaptable)
        except re.error as error:
            return [f"model.lora.target_modules: '{wanted}' is no regular expression ({error}); {known}"]
        return [] if fits else [f"model.lora.target_modules: '{wanted}' fits no layer of {shape.base}; {known}"]
    if not wanted:
        return [f"model.lora.target_modules: names no layer; {known}"]
    return [
        f"model.lora.target_modules: {shape.base} has no layer '{name}'{nearest(name, layers)}; {known}"
        for name in wanted
        if not any(f".{layer}".endswith(f".{name}") for layer in shape.adaptable)
    ]


def check_export(recipe: Recipe) -> None:
    """ModelError where an export step would refuse the base's architecture or its tokenizer."""
    if any(step.export for step in recipe.steps):
        from qreason.export.architecture import read_config
        from qreason.export.vocabulary import splitting

        read_config(Path(locate(recipe.model.base)))
        splitting(load_tokenizer(recipe.model.base), recipe.model.base)


def check_thoughts(recipe: Recipe, tokenizer: Any) -> None:
    """InputError where an sft step would teach replies without the thoughts that prompts ask for."""
    if any(step.sft for step in recipe.steps) and opens_thoughts(tokenizer):
        raise InputError(
            f"sft: the chat template of {recipe.model.base} asks for thoughts that it leaves out of finished replies, "
            "so sft would teach not to think; leave model.thinking out, or train by grpo alone"
        )


def check_turns(recipe: Recipe, examples: Sequence[Example], tokenizer: Any) -> None:
    """DataError where an sft step cannot learn every turn of chats through the base's chat template."""
    if any(step.sft and not step.sft.reads_sampled and step.sft.turns == "all" for step in recipe.steps):
        for example in [example for example in examples if example.history][:FIRST_CHATS]:
            reply_spans(tokenizer, lesson(example, system_prompt(recipe.data)), example.source, unlearned(example))


# --- lengths -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Chats of a source that a step reads, the rows they come from, and the tokens that there is room for."""

    chats: list[Messages]
    sources: list[str]
    room: int
    why: str
    replying: bool
    cut: bool = False
    """Whether longer ones are cut, in place of refused."""


def check_texts(
    recipe: Recipe,
    examples: Mapping[str, Sequence[Example]],
    pairs: Sequence[Pair],
    context: int,
    found: Findings,
) -> None:
    """A problem or a note for every source with texts that do not fit, with file and line of the longest one."""
    for texts in texts_of(recipe, examples, pairs, context):
        long = too_long(recipe.model.base, texts)
        if not long:
            continue
        tokens, source = max(long, key=lambda one: one[0])
        many = f"; {len(long)} rows are too long, this one most" if len(long) > 1 else ""
        line = f"{source}: {tokens} tokens, but {texts.why} leaves {texts.room}"
        if texts.cut:
            found.notes.append(f"{line}: it is cut there{many}")
        else:
            found.problems.append(f"{line}; shorten or remove the row{many}")


def texts_of(
    recipe: Recipe, examples: Mapping[str, Sequence[Example]], pairs: Sequence[Pair], context: int
) -> list[Texts]:
    """What the steps of a recipe read, each source once per limit."""
    whole, reply = f"the base's context of {context}", recipe.sampling.max_completion_length
    asked = f"a context of {context} less max_completion_length {reply}"
    found: dict[tuple[Any, ...], Texts] = {}
    for step in recipe.steps:
        for use in step.settings.reads():
            rows = list(examples.get(use, []))[: getattr(step.settings, "rows", None)]
            if use == "pairs":
                chosen = list(pairs)[: getattr(step.settings, "rows", None)]
                sides = [(pair, side) for pair in chosen for side in (pair.chosen, pair.rejected)]
                chats = [[{"role": "user", "content": p.prompt}, {"role": "assistant", "content": s}] for p, s in sides]
                found[use,] = Texts(chats, [pair.source for pair, _ in sides], context, whole, replying=False)
            elif step.sft and use == "sft":
                chats = [lesson(row, system_prompt(recipe.data)) for row in rows]
                sources, most = [row.source for row in rows], step.sft.trl.get("max_length") or context
                found[use, len(rows), "lesson"] = Texts(chats, sources, context, whole, replying=False)
                if most < context and not step.sft.packing:
                    why = f"sft.trl.max_length of {most}"
                    found[use, len(rows), most] = Texts(chats, sources, most, why, replying=False, cut=True)
            elif use != "sft" and not step.settings.origin:
                chats = questions(step, recipe, rows, examples.get("sft", []))
                sources = [row.source for row in rows]
                found[use, len(rows), step.stage] = Texts(chats, sources, context - reply, asked, replying=True)
    return list(found.values())


def questions(step: Step, recipe: Recipe, rows: Sequence[Example], taught: Sequence[Example]) -> list[Messages]:
    """The prompts of a step, as it asks them."""
    system, shots = system_prompt(recipe.data), taught[:0]
    if step.evaluate:
        system = system_prompt(recipe.data, direct=not step.evaluate.chain_of_thought)
        shots = taught[: step.evaluate.shots]
    return [render(row, system, shots) for row in rows]


def too_long(base: str, texts: Texts) -> list[tuple[int, str]]:
    """(tokens, source) of the texts that do not fit.

    A text has no more tokens than bytes, so few are tokenized. Those of an embedded base are counted without
    transformers, which takes seconds to import: first what all share, the system prompt.
    """
    turn, chosen = TURN[base in EMBEDDED], list(zip(texts.chats, texts.sources, strict=True))
    for size in (in_bytes, system_in_tokens, in_tokens) if base in EMBEDDED else (in_bytes,):
        chosen = [(chat, source) for chat, source in chosen if sum(size(m, base) + turn for m in chat) > texts.room]
    if not chosen:
        return []
    tokenizer = load_tokenizer(base)
    rendered = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=texts.replying) for chat, _ in chosen
    ]
    lengths = [len(ids) for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"]]
    return [(length, source) for length, (_, source) in zip(lengths, chosen, strict=True) if length > texts.room]


def in_bytes(message: dict[str, str], base: str) -> int:
    return len(message["content"].encode())


def system_in_tokens(message: dict[str, str], base: str) -> int:
    return (in_tokens if message["role"] == "system" else in_bytes)(message, base)


def in_tokens(message: dict[str, str], base: str) -> int:
    return count_tokens(base, message["content"])


@lru_cache(64)
def count_tokens(base: str, text: str) -> int:
    """By the tokenizer of an embedded base, of which no token goes beyond a word; a system prompt is counted once."""
    return sum(count_word(base, f" {word}") for word in text.split(" "))


@cache
def count_word(base: str, word: str) -> int:
    return len(read_tokenizer(base).encode(word))


@cache
def read_tokenizer(base: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(EMBEDDED[base] / "tokenizer.json"))
