"""A GRPO micro-batch on a CPU, forward and backward: each prompt read once, against TRL's way beside every reply.

    python scripts/bench_grpo_step.py                   # the embedded model, the quickstart's micro-batch

Prompts are the first ones of data/helpdesk, replies their own solutions, reasoning included. Rows are shuffled, as
TRL does. Prints medians of several rounds, each round both ways in turn, and how far their gradients are apart.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from qreason.data.examples import read_examples
from qreason.data.prompts import SYSTEM_PROMPTS, teach
from qreason.inference.reading import pad_left, render_ids
from qreason.machine.hardware import detect
from qreason.model.compat.trl_logprobs import read_prompts_once
from qreason.model.resident import Resident
from qreason.recipe.sections import Lora, Model

INCIDENTS = Path(__file__).parents[1] / "data" / "helpdesk" / "sft.jsonl"


def micro_batch(resident: Resident, rows: int, group: int) -> dict[str, Any]:
    """What TRL hands to the model: prompts padded on the left, replies on the right, each prompt `group` times."""
    examples = read_examples(str(INCIDENTS), use="sft")[: rows // group]
    lessons = [teach(example, SYSTEM_PROMPTS["helpdesk"]) for example in examples] * group
    random.Random(1).shuffle(lessons)
    prompts = pad_left(
        resident.tokenizer, render_ids(resident.tokenizer, [asking for asking, _ in lessons]), resident.device
    )
    replies = resident.tokenizer(
        [reply for _, reply in lessons], padding=True, padding_side="right", return_tensors="pt"
    )
    return {
        "input_ids": torch.cat([prompts["input_ids"], replies["input_ids"]], 1),
        "attention_mask": torch.cat([prompts["attention_mask"], replies["attention_mask"]], 1),
        "logits_to_keep": replies["input_ids"].shape[1] + 1,
        "use_cache": False,
    }


def step(reader: Any, model: Any, batch: dict[str, Any], autocast: bool) -> tuple[float, torch.Tensor]:
    """Seconds of a forward and a backward pass, and the gradient of the replies' mean log-probability."""
    model.zero_grad()
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        logits = reader(**batch).logits[:, :-1]
    length = logits.shape[1]
    chosen = logits.float().log_softmax(-1).gather(-1, batch["input_ids"][:, -length:, None]).squeeze(-1)
    chosen[batch["attention_mask"][:, -length:].bool()].mean().backward()
    seconds = time.perf_counter() - start
    return seconds, torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="qreason/tiny")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--group", type=int, default=8, help="replies to a prompt")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    hardware = detect()
    resident = Resident(Model(base=args.base), hardware)
    torch.manual_seed(1)
    resident.new_adapter(Lora(r=16, alpha=32))
    for name, weight in resident.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    batch = micro_batch(resident, args.rows, args.group)
    model = resident.model
    ways = {"beside every reply": model, "once": partial(read_prompts_once, model)}
    autocast = hardware.autocast == "bfloat16"
    exact = [step(way, model, batch, autocast=False)[1] for way in ways.values()]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name, way in ways.items():
            seconds, _ = step(way, model, batch, autocast)
            if number:  # the first round warms up
                times[name].append(seconds)
    beside, once = (statistics.median(values) for values in times.values())
    figures = {
        "base": args.base,
        "rows": args.rows,
        "tokens": {
            "prompt": batch["input_ids"].shape[1] - batch["logits_to_keep"] + 1,
            "reply": batch["logits_to_keep"] - 1,
        },
        "number": "bfloat16" if autocast else "float32",
        "seconds": {"beside every reply": round(beside, 3), "once": round(once, 3)},
        "times_faster": round(beside / once, 2),
        "gradient_relative_difference_in_float32": float((exact[0] - exact[1]).norm() / exact[0].norm()),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
