"""Runs side by side: their last evaluations, paired on the same held-out rows, and what differs in their recipes."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from qreason.errors import RunFolderError
from qreason.report.build import Rows, column, measure, read_pass
from qreason.report.statistics import NOTHING, gain, sign_test
from qreason.run.folder import RunFolder

ABSENT = "–"
RECORDED = ("base", "data", "versions", "hardware")
"""Parts of the manifest whose differences are shown after the recipe's."""
FIGURES = {"accuracy": "accurate", "pass_at_1": "pass_at_1", "reward": "total"}
"""A figure of a pass -> its column in evaluation.jsonl."""


@dataclass(frozen=True)
class Compared:
    """A run with the rows of its last evaluation."""

    name: str
    run: RunFolder
    rows: Rows

    @property
    def after(self) -> str:
        return self.run.evaluations()[-1].name


def compare_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """The last pass of each run, the others against the first, and what differs; docs/contracts.md has the keys."""
    runs = [open_compared(folder) for folder in folders]
    first, *others = runs
    passes = [measure(one.rows, one.after, evaluated(one.run)["seconds"]) for one in runs]
    differences = [set_against(first, other) for other in others]
    adjust(differences)
    return {
        "runs": [
            {"run": one.name, "recipe": one.run.recipe.name, "seed": one.run.recipe.seed}
            | {"run_seconds": sum(step["seconds"] for step in one.run.manifest["steps"])}
            | figures
            for one, figures in zip(runs, passes, strict=True)
        ],
        "differences": differences,
        "seeds": list(spread_of_seeds(runs, passes)),
    }


def open_compared(folder: Path) -> Compared:
    run = RunFolder.reopen(folder)
    if not (evaluations := run.evaluations()):
        raise RunFolderError(f"{folder}: no evaluation is finished yet; `qreason run` continues it")
    return Compared(str(folder), run, read_pass(evaluations[-1]))


def set_against(first: Compared, other: Compared) -> dict[str, Any]:
    """The gains of a run over the first one on the rows that both have, and `changed`: key, old, new."""
    pairs = shared_rows(first.rows, other.rows)
    before, after = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    found: dict[str, Any] = {"from": first.name, "to": other.name, "shared_rows": len(pairs)}
    for name, key in FIGURES.items():
        comparable = name != "reward" or same_rewards(first, other)
        found[name] = gain(column(before, key), column(after, key)) if comparable else dict(NOTHING)
    found["accuracy"]["p"] = round(sign_test(column(before, "accurate"), column(after, "accurate")), 6)
    data = [one.run.manifest["data"] for one in (first, other)]
    same = {f"data.{key}" for key, hash_ in data[0].items() if data[1].get(key) == hash_}
    changed = changed_keys(settings_of(first.run), settings_of(other.run))
    found["changed"] = [one for one in changed if one["key"] not in same]  # the same file at another place
    found["recorded"] = changed_keys(recorded(first.run), recorded(other.run))
    found["notes"] = list(notes(first, other, len(pairs)))
    return found


def shared_rows(first: Rows, other: Rows) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows with the same id, prompt and reference in both, in the first one's order."""
    known = dict(numbered(other))
    return [(row, known[key]) for key, row in numbered(first) if key in known]


def same_rewards(first: Compared, other: Compared) -> bool:
    before, after = (one.run.recipe.dump()["rewards"] for one in (first, other))
    return bool(before == after)


def numbered(rows: Rows) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Each row with what makes it the same row in another run; rows that are alike are counted."""
    seen: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        same = (row["id"], row["prompt"], row["reference"])
        yield (*same, seen[same]), row
        seen[same] += 1


def notes(first: Compared, other: Compared, shared: int) -> Iterator[str]:
    """What makes figures of two runs mean different things."""
    if not shared:
        yield "no held-out row is in both: nothing is compared"
    elif shared < max(len(first.rows), len(other.rows)):
        yield f"only {shared} rows are in both ({len(first.rows)} and {len(other.rows)}): the gains are over these"
    if not same_rewards(first, other):
        yield "the rewards differ: `reward` is not compared"
    measured = [one.run.recipe.dump()["steps"][evaluated(one.run)["step"]]["evaluate"] for one in (first, other)]
    for key in ("right_by", "chain_of_thought", "shots"):
        if measured[0][key] != measured[1][key]:
            yield f"`{key}` of the evaluation differs: the replies were asked for, or judged, in another way"


def evaluated(run: RunFolder) -> dict[str, Any]:
    """The manifest's entry of the last finished evaluation."""
    return next(done for done in reversed(run.manifest["steps"]) if done["stage"] == "evaluate")


def adjust(differences: list[dict[str, Any]]) -> None:
    """`p_holm`: each p of accuracy adjusted for the number of comparisons (Holm 1979)."""
    least = 0.0
    ranked = sorted((one for one in differences if one["shared_rows"]), key=lambda one: one["accuracy"]["p"])
    for place, one in enumerate(ranked):
        least = max(least, min(1.0, one["accuracy"]["p"] * (len(ranked) - place)))
        one["accuracy"]["p_holm"] = round(least, 6)


# --- what differs ----------------------------------------------------------------------------------


def settings_of(run: RunFolder) -> dict[str, Any]:
    """Every field of a recipe by its path; a step's by its folder and, where it is not the folder's, its stage."""
    whole = run.recipe.dump()
    steps, found = whole.pop("steps"), dict(flatten(whole))
    for folder, step in zip(run.stage_names, steps, strict=True):
        for stage, settings in step.items():
            path = folder if folder.endswith(f"-{stage}") else f"{folder}.{stage}"
            found |= {path: "a step"} | dict(flatten(settings, path))
    return found


def recorded(run: RunFolder) -> dict[str, Any]:
    return dict(flatten({key: run.manifest.get(key, {}) for key in RECORDED}))


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for key, inner in value.items():
        yield from flatten(inner, f"{path}.{key}" if path else str(key))


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """What differs, as key, old and new; of a step that only one of them has, not each of its settings."""
    differing = [key for key in {**old, **new} if old.get(key, ABSENT) != new.get(key, ABSENT)]
    steps = [f"{key}." for key in differing if "a step" in (old.get(key), new.get(key))]
    return [
        {"key": key, "old": old.get(key, ABSENT), "new": new.get(key, ABSENT)}
        for key in differing
        if not any(key.startswith(step) for step in steps)
    ]


def spread_of_seeds(runs: Sequence[Compared], passes: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Accuracy over the runs that differ in their seed alone: mean and standard deviation."""

    def without_seed(place: int) -> str:
        settings = settings_of(runs[place].run)
        return str(sorted((key, str(value)) for key, value in settings.items() if key != "seed"))

    for _, places in groupby(sorted(range(len(runs)), key=without_seed), key=without_seed):
        group = list(places)
        known = [passes[place]["accuracy"]["mean"] for place in group if passes[place]["accuracy"]["mean"] is not None]
        seeds = [runs[place].run.recipe.seed for place in group]
        if len(set(seeds)) == len(known) > 1:
            yield {
                "seeds": seeds,
                "mean": round(statistics.mean(known), 4),
                "deviation": round(statistics.stdev(known), 4),
            }
