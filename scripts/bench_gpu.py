"""Speed and memory of SFT and GRPO on a GPU: qreason, stock TRL and stock Unsloth side by side, plan and measured.

    python scripts/bench_gpu.py                                   # everything; writes docs/benchmarks.md
    python scripts/bench_gpu.py --quick                           # a short look at each, in 9 minutes
    python scripts/bench_gpu.py --minutes 9                       # what matters most first; again to go on
    python scripts/bench_gpu.py --only '1.5b.*no cap' --rounds 1
    python scripts/bench_gpu.py --device cpu --bases qreason/tiny --tokens 16 --out /tmp/bench.md    # does it run?

Needs no network: bases are random weights of Qwen2.5's shapes. Results are kept line by line in a .jsonl file beside
the output; the same command goes on where it stopped. Failures are tried again, out of memory is a result.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench_tables import CONTENDERS, TIGHT, Row, Setting, document

from qreason.machine.files import read_jsonl, write_jsonl
from qreason.machine.hardware import GIB
from qreason.machine.progress import progress_bar

SCRIPTS = Path(__file__).parent
CAPS = (4.0, 6.0, 8.0, 12.0, 16.0)
TASKS = (("grpo", 4), ("sft", 2), ("grpo", 8))
"""(stage, rows or completions), the most important first."""


def arrange(bases: Sequence[str], tokens: int, rounds: int) -> list[tuple[Setting, int]]:
    """(setting, round), the most important first. Contenders of a task take turns, so that drift hits all alike."""

    def of(base: str, stage: str, rows: int, contender: str = CONTENDERS[0], **more: Any) -> Setting:
        return Setting(contender, base, stage, rows, tokens=tokens, **more)

    order = [(of(base, "grpo", 4, cap=TIGHT[base]), 0) for base in bases if base in TIGHT]
    for number, (stage, rows) in enumerate(TASKS):
        for base in bases:
            for turn in range(rounds):
                order += [(of(base, stage, rows, one), turn) for one in CONTENDERS[:: 1 if turn % 2 == 0 else -1]]
        if number == 0:
            order += [(setting, 0) for base in bases for setting in planned(of(base, "grpo", 4))]
    order += [
        (of(base, stage, rows, one, cap=cap), 0)
        for stage, rows in TASKS
        for base in bases
        for cap in CAPS
        for one in CONTENDERS
    ]
    return list(dict.fromkeys(order))


QUICK = {"sft": 4, "grpo": 2}
"""Steps that --quick measures."""
QUICK_MINUTES = 9.0


def arrange_quick(bases: Sequence[str], tokens: int) -> list[tuple[Setting, int]]:
    """(setting, 0): SFT and GRPO in 4 bits for every contender, then in 16 bits for those without Unsloth."""
    stages = (("grpo", 4), ("sft", 2))
    order = [
        Setting(one, base, stage, rows, tokens=tokens, quantization=quantization)
        for quantization in ("nf4", "none")
        for stage, rows in stages
        for base in bases
        for one in CONTENDERS
        if quantization == "nf4" or "unsloth" not in one.lower()
    ]
    return [(setting, 0) for setting in order]


def planned(setting: Setting) -> list[Setting]:
    """Further settings that the plan is held against."""
    return [
        replace(setting, checkpointing=False),
        replace(setting, quantization="none"),
        replace(setting, stage="sft", rows=8),
        replace(setting, stage="sft", rows=8, checkpointing=False),
        replace(setting, stage="sft", rows=2, quantization="none"),
    ]


def hindrances(device: str) -> dict[str, str]:
    """The contenders that cannot run here, and why."""
    why = "Unsloth's kernels need a GPU" if device == "cpu" else "Unsloth is not installed"
    missing = device == "cpu" or find_spec("unsloth") is None
    return {one: why for one in CONTENDERS if "unsloth" in one.lower() and missing}


def gpu_memory() -> int | None:
    """The bytes of the GPU; None without one."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def has_room(setting: Setting, memory: int | None) -> bool:
    """Whether a card is as large as the setting's cap."""
    return not setting.cap or memory is None or setting.cap * GIB <= memory


def run_one(setting: Setting, base: str, device: str, limit: float, steps: Mapping[str, int] | None = None) -> Row:
    """The setting in a process of its own; a process that dies or hangs is a failure with its last line."""
    given = json.dumps({"setting": asdict(setting), "base": base, "steps": dict(steps or {})})
    environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    command = [sys.executable, __file__, "--one", given]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"setting": asdict(setting), "outcome": "failed", "why": f"took longer than {limit:.0f} s"}
    printed = ended.stdout.strip().splitlines()
    if ended.returncode == 0 and printed:
        row: Row = json.loads(printed[-1])
        return row
    why = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
    return {"setting": asdict(setting), "outcome": "failed", "why": why}


def find_base(base: str, models: Path) -> str:
    """The folder of random weights of a shape, written at its first use; any other base as it is."""
    if base not in TIGHT:
        return base
    folder = models / base
    if not (folder / "config.json").exists():
        draft = models / f"{base}.draft"
        subprocess.run([sys.executable, str(SCRIPTS / "random_qwen.py"), str(draft), "--size", base], check=True)
        draft.rename(folder)
    return str(folder)


def measure_all(order: Sequence[tuple[Setting, int]], file: Path, args: argparse.Namespace) -> None:
    """Measure what is not in the file yet, until the minutes are over: no measurement begins that would not end."""
    known = read_rows(file)
    done = {(Setting(**row["setting"]), row["round"]) for row in known if row["outcome"] != "failed"}
    left = [one for one in order if one not in done]
    end, longest = time.monotonic() + 60 * args.minutes, 0.0
    with progress_bar("benchmarks", len(left)) as bar:
        for setting, turn in left:
            if time.monotonic() + longest > end:
                return
            bar.note(setting.name)
            start = time.monotonic()
            more = {"steps": QUICK} if args.quick else {}
            row = run_one(setting, find_base(setting.base, args.models), args.device, args.limit, **more)
            longest = max(longest, time.monotonic() - start)
            known.append(row)
            machines = {one["machine"]["name"] for one in known if one.get("machine")}
            if len(machines) > 1:
                raise SystemExit(
                    f"{file}: holds results of another machine ({', '.join(machines)}); give another --out"
                )
            write_jsonl(file, [row | {"round": turn}], append=True)
            bar.advance(1)


def read_rows(file: Path) -> list[Row]:
    """The newest row of each setting and round."""
    rows = read_jsonl(file) if file.exists() else []
    return list({(Setting(**row["setting"]), row["round"]): row for row in rows}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=SCRIPTS.parent / "docs" / "benchmarks.md")
    parser.add_argument("--bases", nargs="+", default=["1.5b", "0.5b"], help="0.5b, 1.5b, qreason/tiny or a folder")
    parser.add_argument(
        "--models", type=Path, default=SCRIPTS.parent / "runs" / "bench", help="where 0.5b and 1.5b lie"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=256, help="of a completion")
    parser.add_argument("--rounds", type=int, default=2, help="of the comparisons without a cap")
    parser.add_argument("--only", default="", metavar="PATTERN", help="a regular expression; --list shows the names")
    parser.add_argument("--list", action="store_true", help="print the settings in their order and end")
    parser.add_argument("--quick", action="store_true", help=f"few steps of each, within {QUICK_MINUTES:g} minutes")
    parser.add_argument("--minutes", type=float, help="start nothing that would not end in time")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one measurement may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        given = json.loads(args.one)
        from bench_contenders import STEPS, measure

        STEPS.update(given["steps"])
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(Setting(**given["setting"]), given["base"], Path(folder))))
        return
    memory = gpu_memory() if args.device == "cuda" else None
    if args.device == "cuda" and memory is None and not args.list:
        parser.error("no CUDA device; --device cpu tries the script, not the speed")
    args.minutes = args.minutes or (QUICK_MINUTES if args.quick else float("inf"))
    left_out = hindrances(args.device)
    every = arrange_quick(args.bases, args.tokens) if args.quick else arrange(args.bases, args.tokens, args.rounds)
    order = [one for one in every if re.search(args.only, one[0].name) and has_room(one[0], memory)]
    if args.list:
        print("\n".join(dict.fromkeys(setting.name for setting, _ in order)))
        return
    order = [one for one in order if one[0].contender not in left_out]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    file = args.out.with_suffix(".jsonl")
    measure_all(order, file, args)
    rows = read_rows(file)
    done = {Setting(**row["setting"]) for row in rows}
    pending = [setting for setting in dict.fromkeys(setting for setting, _ in order) if setting not in done]
    command = shlex.join(["python", "scripts/bench_gpu.py", *sys.argv[1:]])
    args.out.write_text(document(rows, left_out, pending, command), encoding="utf-8")
    print(f"{args.out}: {len(rows)} measurements, {len(pending)} settings not run")


if __name__ == "__main__":
    main()
