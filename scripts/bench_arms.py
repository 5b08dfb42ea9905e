"""What the steps of a reasoning are worth as training data: the recipe against control arms trained without them.

    python scripts/bench_arms.py recipes/quickstart.yaml --seeds 1 2 3 --out runs/arms

Every arm has the same rows, with other reasonings, and no reward for steps but in the first:

- steps: as they are;
- conclusion: the last sentence alone;
- shuffled: the steps of another row of the same category, then the own conclusion;
- answer: the same few words for every row.

Shorter replies are quicker to train on, so those arms do more steps (LONGER), as many as take at least the same time.
Prints the greedy accuracy after each training step, the mean of all seeds row by row, and its difference to the first
arm, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from qreason.machine.files import read_jsonl, write_jsonl
from qreason.report.statistics import gain, mean
from qreason.rewards.steps import sentences

Row = dict[str, Any]
ARMS = ("steps", "conclusion", "shuffled", "answer")
TRAINED = ("sft", "grpo")
LONGER = {"conclusion": {"sft": 2.0, "grpo": 2.5}, "answer": {"sft": 2.0, "grpo": 2.5}}
"""Times the optimizer steps: by the tokens of prompts and replies on the helpdesk data, rounded up."""


def reasoned(rows: list[Row], arm: str) -> list[Row]:
    """The rows of SFT with the reasonings of an arm."""
    if arm == "steps":
        return rows
    if arm == "answer":
        return [row | {"steps": "See the resolution."} for row in rows]
    parted = [sentences(row["steps"]) for row in rows]
    if arm == "conclusion":
        return [row | {"steps": conclusion} for row, (*_, conclusion) in zip(rows, parted, strict=True)]
    rng, made = random.Random(1), list(rows)
    for category in sorted({row["category"] for row in rows}):
        places = [place for place, row in enumerate(rows) if row["category"] == category]
        for place, other in zip(places, rng.sample(places, len(places)), strict=True):
            made[place] = rows[place] | {"steps": " ".join([*parted[other][:-1], parted[place][-1]])}
    return made


def lengthened(steps: list[Any], longer: dict[str, float], rows: int) -> list[Any]:
    """The steps of a recipe with so many times the optimizer steps, SFT within its rows."""
    made = []
    for step in steps:
        (name, settings), *_ = step.items() if isinstance(step, dict) else [(step, {})]
        if name == "sft" and "sft" in longer:
            wanted = round(settings["rows"] * longer["sft"])
            passes = max(1, round(wanted / rows))
            settings = settings | {"rows": min(rows, wanted), "num_train_epochs": passes}
        if name == "grpo" and "grpo" in longer:
            settings = settings | {"max_steps": round(settings["max_steps"] * longer["grpo"])}
        made.append({name: settings} if settings else name)
    return made


def trained_steps(folder: Path) -> dict[str, Path]:
    """sft and grpo -> the folder of the step."""
    names = {path.name.partition("-")[2]: path for path in sorted(folder.iterdir()) if path.is_dir()}
    return {name: names[name] for name in TRAINED if name in names}


def run(recipe: Row, folder: Path, seed: int) -> dict[str, Path]:
    """Run a recipe into a folder, or go on there; the folders of its training steps."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "qreason", "run", str(file), "--out", str(folder), "--seed", str(seed)]
    subprocess.run(command, check=True)
    return trained_steps(folder)


def answers(folders: list[Path]) -> list[float]:
    """The share of the seeds with which each held-out row was right."""
    seeds = [[bool(row["accurate"]) for row in read_jsonl(folder / "evaluation.jsonl")] for folder in folders]
    return [sum(row) / len(seeds) for row in zip(*seeds, strict=True)]


def percent(interval: dict[str, Any]) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * interval[name] for name in ("mean", "low", "high")))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    recipe = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    rows = list(read_jsonl(Path(recipe["data"]["sft"])))
    args.out.mkdir(parents=True, exist_ok=True)
    ran: dict[str, dict[str, list[Path]]] = {}
    for arm in ARMS:
        file = args.out / f"{arm}.jsonl"
        write_jsonl(file, reasoned(rows, arm))
        own = recipe | {"name": arm, "data": recipe["data"] | {"sft": str(file)}}
        if arm != ARMS[0]:  # there are no steps to pay for
            own["rewards"] = {name: one for name, one in recipe["rewards"].items() if name != "consistent_steps"}
        own["steps"] = lengthened(recipe["steps"], LONGER.get(arm, {}), len(rows))
        runs = [run(own, args.out / f"{arm}-{seed}", seed) for seed in args.seeds]
        ran[arm] = {name: [one[name] for one in runs] for name in runs[0]}
    print("| arm | after | accuracy | steps - this |\n|---|---|---|---|")
    for arm, steps in ran.items():
        for name, folders in steps.items():
            own, best = mean(answers(folders)), gain(answers(folders), answers(ran[ARMS[0]][name]))
            print(f"| {arm} | {name} | {percent(own)} | {percent(best) if arm != ARMS[0] else ''} |")


if __name__ == "__main__":
    main()
