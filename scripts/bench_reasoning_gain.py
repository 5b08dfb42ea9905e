#!/usr/bin/env python
"""The gain of recorded rollouts in nats, and what `reasoning_gain` makes of it at several scales.

    scripts/bench_reasoning_gain.py runs/quickstart/02-grpo runs/quickstart/01-sft/adapter --steps 6

takes the replies of a grpo stage's first steps, and the adapter that it started from. It prints the seconds per step,
the gain of right and wrong answers, and the standard deviation of the reward within groups: what GRPO learns from.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, pstdev, quantiles

from qreason.machine.files import read_jsonl
from qreason.rewards.reasoned import bounded
from qreason.run.session import Session
from qreason.types import Example, Reply

SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a grpo stage's folder, with replies.jsonl")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()
    run = Session.reopen(given.folder.parent, print)
    run.resident.load_adapter(given.adapter)
    gain, seconds = run.reasoning_gain(), []
    steps: dict[int, list[tuple[Reply, Example, bool]]] = defaultdict(list)
    for row in read_jsonl(given.folder / "replies.jsonl"):
        example, right = Example(row["id"], row["prompt"], row["reference"]), bool(row["parts"]["correctness"])
        steps[row["step"]].append((Reply(row["reply"]), example, right))
    groups: dict[tuple[int, str], list[float | None]] = defaultdict(list)
    of_right: dict[bool, list[float]] = {True: [], False: []}
    for step, rows in list(steps.items())[: given.steps]:
        replies, examples, marks = zip(*rows, strict=True)
        start = time.perf_counter()
        nats = gain(replies, examples)
        seconds.append(time.perf_counter() - start)
        for example, value, right in zip(examples, nats, marks, strict=True):
            groups[step, example.id].append(value)
            if value is not None:
                of_right[right].append(value)
    print(f"{mean(seconds):.2f} s per step of {mean(map(len, steps.values())):.0f} replies")
    for right, values in of_right.items():
        tenths = " ".join(f"{value:.1f}" for value in quantiles(values, n=10)) if len(values) > 1 else ""
        print(f"{'right' if right else 'wrong'}: {len(values)} replies, mean {mean(values or [0]):.2f} nats; {tenths}")
    for scale in SCALES:
        earned = [[bounded(value, scale) for value in group] for group in groups.values()]
        flat = sum(pstdev(group) < 0.02 for group in earned) / len(earned)
        print(f"scale {scale:g}: standard deviation within groups {mean(map(pstdev, earned)):.3f}, {flat:.0%} flat")


if __name__ == "__main__":
    main()
