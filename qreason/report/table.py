"""The report in the terminal, 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence
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


def report_table(report: dict[str, Any]) -> Group:
    """Both tables: the passes with 95 % intervals, then the paired gains."""
    rows: list[Table | Text] = [passes_table(report["passes"])]
    if report["gains"]:
        rows += [Text(""), gains_table(report["gains"])]
    note = f"\n{report['rows']} held-out rows, seed {report['seed']}; brackets are 95 % intervals"
    return Group(*rows, Text(note, style="dim"))
