"""Replies drawn on this machine: our decoding loop, the same with transformers' cache, and transformers' `generate`.

    python scripts/bench_rollouts.py                    # the embedded model, a GRPO step of the quickstart
    python scripts/bench_rollouts.py --prompts 32 --n 4 --precise

Prompts are the first ones of data/helpdesk; --precise computes in float32 as greedy replies are, else as rollouts are.
Prints the medians of several rounds, each round every way in turn, in tokens a second: drawn replies differ in length.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qreason.data.examples import read_examples
from qreason.data.prompts import SYSTEM_PROMPTS, render
from qreason.inference.decoding import decode_by_generate
from qreason.inference.generate import LocalGenerator
from qreason.inference.reading import render_ids
from qreason.machine.hardware import detect, prepare_process
from qreason.model.resident import Resident
from qreason.recipe.sections import Draw, Model

PROMPTS = Path(__file__).parents[1] / "data" / "helpdesk" / "prompts.jsonl"


def with_cache(make: Any, decode: Callable[..., list[list[int]]]) -> Callable[..., list[list[int]]]:
    """The decoding loop, its caches made by `make`."""
    from qreason.model.compat import cache

    def way(*args: Any) -> list[list[int]]:
        cache.roomy_cache = make
        return decode(*args)

    return way


def main() -> None:
    prepare_process()
    from transformers import DynamicCache

    from qreason.model.compat.cache import roomy_cache

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="qreason/tiny")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--n", type=int, default=8, help="replies to a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="the most tokens of a reply")
    parser.add_argument("--precise", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    resident = Resident(Model(base=args.base), detect())
    generator = LocalGenerator(resident)
    examples = read_examples(str(PROMPTS))[: args.prompts]
    ids = render_ids(resident.tokenizer, [render(example, SYSTEM_PROMPTS["helpdesk"]) for example in examples])
    sampling = Draw(temperature=1.0, min_p=0.1, max_completion_length=args.tokens).sampling(seed=1)
    ways: dict[str, Callable[..., Any]] = {
        "ours": with_cache(roomy_cache, generator.decode),
        "ours, transformers' cache": with_cache(lambda config, room: DynamicCache(config=config), generator.decode),
        "transformers' generate": partial(decode_by_generate, resident),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name, way in ways.items():
            with resident.inference(fast=not args.precise) as model:
                drawing = generator.drawing(sampling)
                start = time.perf_counter()
                rows = way(model, ids, args.n, drawing)
                seconds = time.perf_counter() - start
            if number:  # the first round warms up
                rates[name].append(sum(map(len, rows)) / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    figures = {
        "base": args.base,
        "replies": args.prompts * args.n,
        "number": resident.hardware.autocast if not args.precise else resident.hardware.dtype,
        "tokens_a_second": {name: round(value) for name, value in medians.items()},
        "times_faster": {name: round(medians["ours"] / value, 2) for name, value in list(medians.items())[1:]},
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
