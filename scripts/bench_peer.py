"""GRPO of qreason against plain TRL and PEFT: a step by phase, memory, and the time to a held-out pass@1.

    python scripts/bench_peer.py                                       # the embedded model, 64 replies, 5 rounds
    python scripts/bench_peer.py --base FOLDER --replies 32 --micro 8  # another base
    python scripts/bench_peer.py --quality --seeds 1 2 3               # wall time to --target, evaluations left out

Both train the same adapter, made by the quickstart's SFT (or --adapter), on the same prompts and rewards, with the
quickstart's settings. TRL as its documentation has it: GRPOTrainer, PEFT, transformers' generate, in float32 and under
bfloat16 autocast, of which the faster counts; its judge is a second copy of the base that writes a score. Where it
writes no number, qreason's verdict stands in, and its time is not counted: both learn from equally good marks. Every
measurement has a process of its own; ways take turns. Prints JSON; --out also keeps every row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench_peer_ways import GROUP, OURS, PHASES, TRL, measure
from bench_tables import Row

from qreason.machine.files import write_jsonl
from qreason.machine.hardware import GIB


def run_one(given: Row) -> Row:
    """A measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(given)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{given['arm']}: {ended.stderr.strip()[-2000:]}")
    row: Row = json.loads(ended.stdout.strip().splitlines()[-1])
    return row


def make_adapter(args: argparse.Namespace, folder: Path) -> Path:
    """The adapter of the quickstart's SFT on this base."""
    changes = [f"model.base={args.base}", "steps=[{sft: {per_device_train_batch_size: 16, learning_rate: 2e-3}}]"]
    changes += [f"sft.rows={args.sft_rows}"]
    settings = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, "-m", "qreason", "run", "quickstart", "--out", str(folder / "start"), *settings]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "start" / "01-sft" / "adapter"


def median_step(rows: Sequence[Row]) -> Row:
    """Medians over all steps but each process's first."""
    steps = [step for row in rows for step in row["steps"][1:]]
    tokens = [count for row in rows for count in row["tokens"][1:]]
    seconds = [sum(step.values()) for step in steps]
    return {
        "step_seconds": round(statistics.median(seconds), 3),
        **{phase: round(statistics.median(step[phase] for step in steps), 3) for phase in PHASES},
        "tokens_per_second": round(sum(tokens) / sum(seconds), 1),
        "peak_gib": round(max(row["peak_bytes"] for row in rows) / GIB, 2),
    }


def compare_steps(rows: Sequence[Row]) -> Row:
    ways = {arm: median_step([row for row in rows if row["arm"] == arm]) for arm in (OURS, *TRL)}
    better = min(TRL, key=lambda arm: ways[arm]["step_seconds"])
    seconds = {
        (row["arm"], row["round"]): statistics.median(sum(step.values()) for step in row["steps"][1:]) for row in rows
    }
    ratios = [seconds[better, row["round"]] / seconds[OURS, row["round"]] for row in rows if row["arm"] == OURS]
    return {
        "ways": ways,
        "against": better,
        "times_faster": round(statistics.median(ratios), 2),
        "times_faster_by_round": [round(ratio, 2) for ratio in ratios],
        "share_of_its_memory": round(ways[OURS]["peak_gib"] / ways[better]["peak_gib"], 2),
    }


def compare_quality(rows: Sequence[Row], target: float) -> Row:
    """Seconds until pass@1 reached the target, by way and seed; None where it did not."""
    reached = {
        (row["arm"], row["seed"]): next((p["seconds"] for p in row["curve"] if p["pass_at_1"] >= target), None)
        for row in rows
    }
    seeds = sorted({row["seed"] for row in rows})
    ratios: dict[int, float | None] = {}
    for seed in seeds:
        own, others = reached[OURS, seed], [reached[arm, seed] for arm in TRL]
        known = [seconds for seconds in others if seconds is not None]
        ratios[seed] = round(min(known) / own, 2) if own and known else None
    return {
        "target": target,
        "seconds": {arm: [reached[arm, seed] for seed in seeds] for arm in (OURS, *TRL)},
        "times_faster_by_seed": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="qreason/tiny", help="a folder or a Hub id")
    parser.add_argument("--adapter", type=Path, help="to start from; made where not given")
    parser.add_argument("--sft-rows", type=int, default=560, help="that the adapter is made from")
    parser.add_argument("--replies", type=int, default=64, help=f"per step, in groups of {GROUP}")
    parser.add_argument("--micro", type=int, default=32, help="replies of a micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="per round, after one that does not count")
    parser.add_argument("--quality", action="store_true", help="the time to a pass@1 instead of that of a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of --quality")
    parser.add_argument("--target", type=float, default=0.45, help="held-out pass@1")
    parser.add_argument("--rows", type=int, default=100, help="held-out rows, four replies to each")
    parser.add_argument("--every", type=int, default=10, help="steps between two evaluations")
    parser.add_argument("--most", type=int, default=100, help="steps at most; the schedule is for so many")
    parser.add_argument("--out", type=Path, help="a JSONL file that every row is added to")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.one:
            print(json.dumps(measure(json.loads(args.one), Path(folder))))
            return
        micro = min(args.micro, args.replies)
        if args.replies % GROUP or args.replies % micro:
            parser.error(f"--replies must be a multiple of {GROUP} and of --micro ({micro})")
        adapter = args.adapter or make_adapter(args, Path(folder))
        common = {key: getattr(args, key) for key in ("base", "replies", "micro", "quality", "target", "rows", "every")}
        common |= {"adapter": str(adapter.resolve()), "steps": args.most if args.quality else args.steps + 1}
        turns = [(0, seed) for seed in args.seeds] if args.quality else [(number, 1) for number in range(args.rounds)]
        rows: list[Row] = []
        for number, seed in turns:
            for arm in (OURS, *TRL)[:: 1 if len(rows) % 2 == 0 else -1]:
                rows.append(run_one(common | {"arm": arm, "round": number, "seed": seed}))
                if args.out:
                    write_jsonl(args.out, rows[-1:], append=True)
    figures = compare_quality(rows, args.target) if args.quality else compare_steps(rows)
    print(json.dumps({"base": args.base, "replies": args.replies, "machine": rows[0]["machine"]} | figures, indent=2))


if __name__ == "__main__":
    main()
