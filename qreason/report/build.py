"""A run folder's evaluations -> report.json and replies.jsonl (docs/contracts.md describes both)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qreason.errors import RunFolderError
from qreason.machine.files import RESTORE, read_json, read_jsonl, write_json, write_jsonl
from qreason.machine.records import MOST, Counted, Log, Row
from qreason.report.reasoning import WORTHS, measure_reasoning
from qreason.report.statistics import gain, mean, rate, share, sign_test
from qreason.run.folder import RunFolder

Rows = list[dict[str, Any]]


def measure(rows: Rows, after: str, seconds: float) -> dict[str, Any]:
    """One pass over held-out rows as numbers. Greedy replies, except pass_at_1: the mean over the samples."""
    splits = sorted({row["split"] for row in rows if row["split"]})
    return {
        "after": after,
        "rows": len(rows),
        "unjudged": column(rows, "accurate").count(None),
        "seconds": round(seconds, 1),
        "accuracy": share(column(rows, "accurate")),
        "answer_anywhere": share([row.get("answer_anywhere") for row in rows]),
        "pass_at_1": rate(column(rows, "pass_at_1")),
        "format": share(column(rows, "well_formed")),
        "reward": mean(column(rows, "total")),
        "reference_nats": mean(reference_nats(rows)),
        "parts": {name: mean([row["parts"][name] for row in rows]) for name in rows[0]["parts"]},
        "reply_words": mean(column(rows, "words")),
        "finished": share(column(rows, "finished")),
        "reasoning": measure_reasoning(rows),
        "scaling": measure_scaling(rows),
        "splits": {name: measure_split([row for row in rows if row["split"] == name]) for name in splits},
    }


def measure_scaling(rows: Rows) -> dict[str, Any]:
    """Method -> its mean over rows, completion tokens per row, and the paired gain over pass@1."""
    scaled = [row["scaling"] for row in rows if row.get("scaling")]
    return {
        method: {
            **mean([row[method]["value"] for row in scaled]),
            "tokens": round(sum(row[method]["tokens"] for row in scaled) / len(scaled), 1),
            "gain": gain([row["pass@1"]["value"] for row in scaled], [row[method]["value"] for row in scaled]),
        }
        for method in (scaled[0] if scaled else ())
    }


def measure_split(rows: Rows) -> dict[str, Any]:
    reasoning = measure_reasoning(rows)
    return {
        "rows": len(rows),
        "accuracy": share(column(rows, "accurate")),
        "answer_anywhere": share([row.get("answer_anywhere") for row in rows]),
        "pass_at_1": rate(column(rows, "pass_at_1")),
        **{name: reasoning[name] for name in WORTHS},
    }


def compare(before: Rows, after: Rows, names: tuple[str, str]) -> dict[str, Any]:
    """The gains from one pass to another on the same rows, paired by row."""
    gains: dict[str, Any] = {"from": names[0], "to": names[1]}
    for name, key in (("accuracy", "accurate"), ("pass_at_1", "pass_at_1"), ("reward", "total")):
        gains[name] = gain(column(before, key), column(after, key))
    gains["reference_nats"] = gain(reference_nats(before), reference_nats(after))
    gains["accuracy"]["p"] = round(sign_test(column(before, "accurate"), column(after, "accurate")), 6)
    return gains


def reference_nats(rows: Rows) -> list[float | None]:
    """log p(reference | prompt, own reasoning) per token, of the rows whose reasoning was tested."""
    return [(row.get("reasoning") or {}).get("reference_nats") for row in rows]


def trace(run: RunFolder, folder: str) -> dict[str, Any]:
    """The mean reward and its parts over the logged steps of a GRPO step; None where no reply was judged."""
    file = run.path / folder / "metrics.jsonl"
    if not (logged := read_jsonl(file, Log)):
        raise RunFolderError(f"{file}: empty; {RESTORE}")
    rows = [row for row in logged if "reward" in row]
    parts = {name.split("/")[1]: name for name in (rows[0] if rows else ()) if re.fullmatch("rewards/[^/]+/mean", name)}
    return {
        "folder": folder,
        "step": column(rows, "step"),
        "reward": [shorten(row["reward"]) for row in rows],
        "parts": {part: [shorten(row.get(name)) for row in rows] for part, name in parts.items()},
    }


def shorten(value: float | None) -> float | None:
    """Four decimals; None for a mean over no replies (nan), and for a number beyond all bounds."""
    return None if value is None or not abs(value) <= MOST else round(value, 4)


def read_pass(folder: Path) -> Rows:
    """The rows of an evaluation; RunFolderError where some are gone."""
    file, summary = folder / "evaluation.jsonl", folder / "evaluation.json"
    rows = read_jsonl(file, Row)
    scaled: dict[str, Any] = next((row["scaling"] for row in rows if row.get("scaling")), {"pass@1": {}})
    for number, row in enumerate(rows, 1):
        same = row["parts"].keys() == rows[0]["parts"].keys() and (row.get("scaling") or scaled).keys() == scaled.keys()
        if not same or "pass@1" not in scaled:
            raise RunFolderError(f"{file}:{number}: other rewards or methods than in its first row; {RESTORE}")
    expected = max(1, read_json(summary, Counted)["rows"] if summary.is_file() else len(rows))
    if len(rows) != expected:
        raise RunFolderError(f"{file}: {len(rows)} rows of {expected}; {RESTORE}")
    return rows


def column(rows: Rows, key: str) -> list[Any]:
    return [row[key] for row in rows]


def write_report(run: RunFolder) -> dict[str, Any]:
    """Write the finished evaluations of a run to report.json and replies.jsonl; returns the report."""
    evaluations, steps = run.evaluations(), run.manifest["steps"]
    passes = [read_pass(folder) for folder in evaluations]
    names = [folder.name for folder in evaluations]
    if len({len(rows) for rows in passes}) > 1:
        counts = ", ".join(f"{name} {len(rows)}" for name, rows in zip(names, passes, strict=True))
        raise RunFolderError(f"{run.path}: its evaluation.jsonl have different rows ({counts}); {RESTORE}")
    seconds = {entry["folder"]: entry["seconds"] for entry in steps if entry["stage"] == "evaluate"}
    pairs = [(index, index + 1) for index in range(len(passes) - 1)]
    if len(passes) > 2:
        pairs.append((0, len(passes) - 1))
    report = {
        "recipe": run.recipe.name,
        "seed": run.recipe.seed,
        "rows": len(passes[0]),
        "passes": [measure(rows, name, seconds[name]) for rows, name in zip(passes, names, strict=True)],
        "gains": [compare(passes[a], passes[b], (names[a], names[b])) for a, b in pairs],
        "curves": [trace(run, entry["folder"]) for entry in steps if entry["stage"] == "grpo"],
    }
    write_json(run.path / "report.json", report)
    kept = ("id", "prompt", "reply", "reference", "parts", "total")
    write_jsonl(
        run.path / "replies.jsonl",
        [
            {"after": name, **{key: row[key] for key in kept}}
            for together in zip(*passes, strict=True)
            for name, row in zip(names, together, strict=True)
        ],
    )
    return report
