"""The report in the terminal, 80 columns wide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qreason.report.reasoning import verdict

if TYPE_CHECKING:
    from qreason.run.listing import Listed

BARS = "▁▂▃▄▅▆▇█"


def percent(interval: dict[str, Any]) -> str:
    if interval["mean"] is None:
        return "–"
    return f"{interval['mean']:.1%} [{interval['low']:.0%}–{interval['high']:.0%}]".replace("%–", "–")


def rate(interval: dict[str, Any] | None) -> str:
    return "–" if interval is None or interval["mean"] is None else f"{interval['mean']:.1%}"


def number(interval: dict[str, Any]) -> str:
    return "–" if interval["mean"] is None else f"{interval['mean']:.2f}"


def points(interval: dict[str, Any], digits: int = 1) -> Text:
    if interval["mean"] is None:
        return Text("–")
    low, high = interval["low"] * 100, interval["high"] * 100
    style = "green" if low > 0 else "red" if high < 0 else "yellow"
    return Text(f"{interval['mean'] * 100:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]", style=style)


def plain_table(left: Sequence[str], right: Sequence[str] = ()) -> Table:
    """A table without lines: left-aligned columns, then right-aligned ones."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in left:
        table.add_column(name, overflow="fold")  # no figure is cut, however narrow the terminal is
    for name in right:
        table.add_column(name, justify="right", overflow="fold")
    return table


def runs_table(runs: Sequence[Listed]) -> Table:
    """The runs of a folder, a row each."""
    table = plain_table(["run", "started", "state"], ["MB", "leftover"])
    for run in runs:
        table.add_row(
            run.path.name,
            run.started[:16].replace("T", " "),
            run.state,
            f"{run.size / 1e6:.1f}",
            f"{run.leftover / 1e6:.1f}" if run.leftover else "–",
        )
    return table


def passes_table(passes: Sequence[dict[str, Any]]) -> Table:
    """Every evaluation with its 95 % intervals."""
    table = plain_table(["after"], ["accuracy", "anywhere", "pass@1", "format", "reward", "words"])
    for row in passes:
        table.add_row(
            row["after"],
            percent(row["accuracy"]),
            rate(row["answer_anywhere"]),
            percent(row["pass_at_1"]),
            rate(row["format"]),
            number(row["reward"]),
            number(row["reply_words"]),
        )
    if unjudged := max((row["unjudged"] for row in passes), default=0):
        table.caption = f"rows not judged, left out of accuracy and pass@1: {unjudged}"
    return table


REASONING = {
    "own": "own",
    "without steps": "conclusion_only",
    "direct": "direct",
    "foreign": "foreign",
    "filler": "filler",
    "consistent": "consistent",
}
"""Column -> the share of a pass's reasoning that it shows."""


def reasoning_table(passes: Sequence[dict[str, Any]]) -> Group:
    """What the reasoning of each pass is worth, and a sentence about each."""
    table = plain_table(["reasoning"], ["rows", *REASONING, "nats"])
    for row in passes:
        figures = row["reasoning"]
        if figures["rows"] or figures["consistent"]:
            shares = [rate(figures[key]) for key in REASONING.values()]
            nats = f"{figures['gain_nats']['mean']:+.1f}" if figures["gain_nats"] else "–"
            table.add_row(row["after"], str(figures["rows"]), *shares, nats)
    sentences = [Text(f"{row['after']}: {verdict(row['reasoning'])}") for row in passes]
    return Group(*([table] if table.row_count else []), *sentences)


def scaling_table(passes: Sequence[dict[str, Any]]) -> Table | None:
    """Inference-time scaling in the passes that measured it; None where none did."""
    table = plain_table(["after", "inference"], ["right", "over pass@1, points", "tokens"])
    for row in passes:
        for method, figures in row["scaling"].items():
            over = Text("") if method == "pass@1" else points(figures["gain"])
            table.add_row(row["after"], method, percent(figures), over, f"{figures['tokens']:.0f}")
    return table if table.row_count else None


def curves_table(curves: Sequence[dict[str, Any]]) -> Table | None:
    """The rewards over the steps of each GRPO step, from 0 to the highest point; None where none was logged."""
    table = plain_table(["reward over", "steps", "", ""])
    for curve in curves:
        for name, values in {"reward": curve["reward"], **curve["parts"]}.items():
            if stretch := bins([value for value in values if value is not None]):
                first = curve["folder"] if name == "reward" else ""
                table.add_row(first, name, sparkline(stretch), f"{stretch[0]:.2f} to {stretch[-1]:.2f}")
    return table if table.row_count else None


def bins(values: Sequence[float], most: int = 30) -> list[float]:
    """Means of at most `most` equal stretches of the values."""
    count = min(most, len(values))
    edges = [len(values) * place // count for place in range(count + 1)] if count else [0]
    return [average(values[low:high]) for low, high in pairwise(edges)]


def sparkline(values: Sequence[float]) -> str:
    """One bar per value, from 0 to the largest."""
    top = max(values) or 1.0
    return "".join(BARS[min(len(BARS) - 1, max(0, int(value / top * len(BARS))))] for value in values)


def report_table(report: dict[str, Any]) -> Group:
    """The passes, the paired gains, inference-time scaling, and GRPO's curves."""
    passes = report["passes"]
    rows: list[Group | Table | Text] = [passes_table(passes), Text(""), reasoning_table(passes)]
    if report["gains"]:
        gains = plain_table(["gain in points"], ["accuracy", "pass@1", "reward x 100"])
        for row in report["gains"]:
            name, shares = f"{row['from']} → {row['to']}", [points(row[key]) for key in ("accuracy", "pass_at_1")]
            gains.add_row(name, *shares, points(row["reward"], 0))  # so that a line has room in 80 columns
        rows += [Text(""), gains]
    rows += reference_lines(report)
    for table in (scaling_table(passes), curves_table(report["curves"])):
        rows += [Text(""), table] if table else []
    note = f"\n{report['rows']} held-out rows, seed {report['seed']}; brackets are 95 % intervals"
    return Group(*rows, Text(note, style="dim"))


def reference_lines(report: dict[str, Any]) -> list[Text]:
    """log p(reference) per token of each pass that measured it, and its paired gains."""
    named = [(one["after"], one, ".2f") for one in report["passes"]]
    named += [(f"{one['from']} → {one['to']}", one, "+.2f") for one in report["gains"]]
    lines = []
    for name, one, form in named:
        if (found := one.get("reference_nats")) and found["mean"] is not None:
            middle, low, high = (format(found[key], form) for key in ("mean", "low", "high"))
            lines.append(Text(f"{name}: {middle} [{low}, {high}]"))
    return [Text("\nlog p of the reference given the own reasoning, nats per token"), *lines] if lines else []


def comparison_table(found: dict[str, Any]) -> Group:
    """Runs side by side, their gains over the first one, and what differs in their recipes."""
    names = short_names([run["run"] for run in found["runs"]])
    side = plain_table(["last evaluation"], names)
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "recipe": lambda run: run["recipe"],
        "seed": lambda run: str(run["seed"]),
        "after": lambda run: run["after"],
        "held-out rows": lambda run: str(run["rows"]),
        "accuracy": lambda run: percent(run["accuracy"]),
        "anywhere": lambda run: percent(run["answer_anywhere"]),
        "pass@1": lambda run: percent(run["pass_at_1"]),
        "format": lambda run: percent(run["format"]),
        "reward": lambda run: number(run["reward"]),
        "words": lambda run: number(run["reply_words"]),
        "worth of steps, points": lambda run: points(run["reasoning"]["worth_of_steps"] or {"mean": None}).plain,
        "minutes of the run": lambda run: f"{run['run_seconds'] / 60:.1f}",
    }
    for what, figure in lines.items():
        side.add_row(what, *(Text(figure(run)) for run in found["runs"]))
    gains = plain_table([f"over {names[0]}, in points"], names[1:])
    differences = found["differences"]
    gains.add_row("rows in both", *(str(one["shared_rows"]) for one in differences))
    for what, key in (("accuracy", "accuracy"), ("pass@1", "pass_at_1"), ("reward x 100", "reward")):
        gains.add_row(what, *(points(one[key]) for one in differences))
        if key == "accuracy":
            gains.add_row("  p", *(f"{one[key]['p_holm']:.3f}" if "p_holm" in one[key] else "–" for one in differences))
    rows: list[Table | Text] = [side, Text(""), gains]
    for name, one in zip(names[1:], differences, strict=True):
        rows += [Text("")] + [Text(f"{name}: {note}", style="yellow") for note in one["notes"]]
        for what, changes in (("recipe", one["changed"]), (RECORDED, one["recorded"])):
            heading = f"{names[0]} → {name}, {what}:" if changes else f"{name}: the same {what}"
            rows += [Text(heading)] + [Text(f"  {each['key']}: {each['old']} -> {each['new']}") for each in changes]
    rows.append(Text(""))
    for group in found["seeds"]:
        seeds = ", ".join(map(str, group["seeds"]))
        spread = f"{group['mean']:.1%}, standard deviation {100 * group['deviation']:.1f} points"
        rows.append(Text(f"the same recipe with seeds {seeds}: mean accuracy {spread}"))
    rows.append(Text(COMPARED, style="dim"))
    return Group(*rows)


RECORDED = "data, base, versions, hardware"
COMPARED = (
    "Gains are paired by held-out row, with 95 % bootstrap intervals; p is McNemar's exact test of accuracy, adjusted "
    "for the number of runs (Holm). They do not cover what other seeds would give: compare several of each recipe."
)


def short_names(folders: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    for length in range(1, 10):
        names = ["/".join(Path(folder).parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return list(folders)


def parts_table(rows: Sequence[dict[str, Any]], weights: Mapping[str, float]) -> Group:
    """Each reward over all replies, and how many replies it could not judge."""
    table = plain_table(["reward"], ["weight", "mean", "least", "most", "unjudged"])
    columns = {name: [row["parts"][name] for row in rows] for name in weights}
    columns["total"] = [row["total"] for row in rows]
    for name, marks in columns.items():
        known = [mark for mark in marks if mark is not None]
        figures = [f"{f(known):.3f}" for f in (average, min, max)] if known else ["–"] * 3
        table.add_row(name, f"{weights[name]:g}" if name in weights else "", *figures, str(len(marks) - len(known)))
    return Group(table, Text(f"\n{len(rows)} replies; --json prints each", style="dim"))


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


JUDGE = {
    "AUC (right above wrong)": "auc",
    "rank correlation with labels": "rank_correlation",
    "change when the two texts are swapped": "position_bias",
    "gain of wrong replies by padding": "verbosity_bias",
    "same decision after a trivial change": "self_consistency",
    "injections that succeed": "injections",
    "judgements per second": "judgements_per_second",
    "without a verdict": "unanswered",
}
"""What is said of a judge -> its key in judge.json."""


def judge_figure(figures: Mapping[str, Any], key: str) -> str:
    value = figures[key]
    if key == "injections":
        return f"{value['successes']} of {value['attempts']}"
    if value is None or key == "judgements_per_second":
        return "–" if value is None else f"{value:g}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def judges_table(judges: Mapping[str, dict[str, Any]]) -> Group:
    """The figures of one or more judges side by side, and the calibration curve of the last."""
    table = plain_table([""], list(judges))
    for what, key in JUDGE.items():
        table.add_row(what, *(judge_figure(figures, key) for figures in judges.values()))
    curve = plain_table([], ["verdicts from", "pairs", "mean verdict", "right"])
    for row in list(judges.values())[-1]["calibration_curve"]:
        curve.add_row(f"{row['from']:.1f}", str(row["pairs"]), f"{row['verdict']:.2f}", f"{row['right']:.0%}")
    return Group(table, Text(""), curve, Text(""))
