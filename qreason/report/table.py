"""The report in the terminal, 80 columns wide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text


def percent(interval: dict[str, Any]) -> str:
    if interval["mean"] is None:
        return "–"
    return f"{interval['mean']:.1%} [{interval['low']:.0%}–{interval['high']:.0%}]".replace("%–", "–")


def number(interval: dict[str, Any]) -> str:
    return "–" if interval["mean"] is None else f"{interval['mean']:.2f}"


def points(interval: dict[str, Any]) -> Text:
    if interval["mean"] is None:
        return Text("–")
    low, high = interval["low"] * 100, interval["high"] * 100
    style = "green" if low > 0 else "red" if high < 0 else "yellow"
    return Text(f"{interval['mean'] * 100:+.1f} [{low:+.1f}, {high:+.1f}]", style=style)


def passes_table(passes: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("after")
    for name in ("accuracy", "pass@1", "format", "reward", "words"):
        table.add_column(name, justify="right")
    for row in passes:
        table.add_row(
            row["after"],
            percent(row["accuracy"]),
            percent(row["pass_at_1"]),
            "–" if row["format"]["mean"] is None else f"{row['format']['mean']:.1%}",
            number(row["reward"]),
            number(row["reply_words"]),
        )
    if unjudged := max((row["unjudged"] for row in passes), default=0):
        table.caption = f"rows not judged, left out of accuracy and pass@1: {unjudged}"
    return table


def gains_table(gains: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("gain in points")
    for name in ("accuracy", "pass@1", "reward x 100"):
        table.add_column(name, justify="right")
    for row in gains:
        table.add_row(
            f"{row['from']} → {row['to']}", points(row["accuracy"]), points(row["pass_at_1"]), points(row["reward"])
        )
    return table


def scaling_table(passes: Sequence[dict[str, Any]]) -> Table | None:
    """What more tokens per row buy, in the passes that measured it; None where none did."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("after")
    table.add_column("inference")
    for name in ("right", "over pass@1, points", "tokens"):
        table.add_column(name, justify="right")
    for row in passes:
        for method, figures in row["scaling"].items():
            over = Text("") if method == "pass@1" else points(figures["gain"])
            table.add_row(row["after"], method, percent(figures), over, f"{figures['tokens']:.0f}")
    return table if table.row_count else None


def curves_table(curves: Sequence[dict[str, Any]]) -> Table | None:
    """The rewards over the steps of each GRPO step, from 0 to the highest point; None where none was logged."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in ("reward over", "steps", "", ""):
        table.add_column(name)
    for curve in curves:
        for name, values in {"reward": curve["reward"], **curve["parts"]}.items():
            if stretch := bins([value for value in values if value is not None]):
                first = curve["folder"] if name == "reward" else ""
                table.add_row(first, name, sparkline(stretch), f"{stretch[0]:.2f} to {stretch[-1]:.2f}")
    return table if table.row_count else None


def bins(values: Sequence[float], most: int = 30) -> list[float]:
    """Means of at most so many equal stretches."""
    count = min(most, len(values))
    edges = [len(values) * place // count for place in range(count + 1)] if count else [0]
    return [average(values[low:high]) for low, high in pairwise(edges)]


def sparkline(values: Sequence[float]) -> str:
    """A bar a value, from 0 to the largest."""
    top = max(values) or 1.0
    return "".join(BARS[min(len(BARS) - 1, max(0, int(value / top * len(BARS))))] for value in values)


BARS = "▁▂▃▄▅▆▇█"


def report_table(report: dict[str, Any]) -> Group:
    """The passes with 95 % intervals, the paired gains, what inference-time scaling gave, GRPO's curves."""
    rows: list[Table | Text] = [passes_table(report["passes"])]
    if report["gains"]:
        rows += [Text(""), gains_table(report["gains"])]
    if scaled := scaling_table(report["passes"]):
        rows += [Text(""), scaled]
    if curves := curves_table(report["curves"]):
        rows += [Text(""), curves]
    note = f"\n{report['rows']} held-out rows, seed {report['seed']}; brackets are 95 % intervals"
    return Group(*rows, Text(note, style="dim"))


def parts_table(rows: Sequence[dict[str, Any]], weights: Mapping[str, float]) -> Group:
    """What each reward gave: over all replies, and how many it could not judge."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("reward")
    for name in ("weight", "mean", "least", "most", "unjudged"):
        table.add_column(name, justify="right")
    columns = {name: [row["parts"][name] for row in rows] for name in weights} | {
        "total": [row["total"] for row in rows]
    }
    for name, marks in columns.items():
        known = [mark for mark in marks if mark is not None]
        figures = [f"{f(known):.3f}" for f in (average, min, max)] if known else ["–"] * 3
        table.add_row(name, f"{weights[name]:g}" if name in weights else "", *figures, str(len(marks) - len(known)))
    return Group(table, Text(f"\n{len(rows)} replies; --json prints each", style="dim"))


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def judges_table(judges: Mapping[str, dict[str, Any]]) -> Group:
    """The figures of one or more judges side by side, and the calibration curve of the last."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("")
    for name in judges:
        table.add_column(name, justify="right")
    lines: dict[str, Callable[[dict[str, Any]], Any]] = {
        "AUC (right above wrong)": lambda f: f["auc"],
        "rank correlation with labels": lambda f: f["rank_correlation"],
        "moved by swapping the two texts": lambda f: f["position_bias"],
        "wrong replies gain by padding": lambda f: f["verbosity_bias"],
        "same decision after a trivial change": lambda f: f["self_consistency"],
        "injections that succeed": lambda f: f"{f['injections']['successes']} of {f['injections']['attempts']}",
        "judgements a second": lambda f: f"{f['judgements_per_second']:g}",
        "without a verdict": lambda f: f["unanswered"],
    }
    for what, figure in lines.items():
        values = [figure(figures) for figures in judges.values()]
        table.add_row(what, *("–" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
    curve = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in ("verdicts from", "pairs", "mean verdict", "right"):
        curve.add_column(name, justify="right")
    for row in list(judges.values())[-1]["calibration_curve"]:
        curve.add_row(f"{row['from']:.1f}", str(row["pairs"]), f"{row['verdict']:.2f}", f"{row['right']:.0%}")
    return Group(table, Text(""), curve, Text(""))
