"""Charts as SVG, drawn by Vega-Lite (vl-convert); their colours are CSS variables of the page that holds them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qreason.errors import MissingExtra
from qreason.machine.records import MOST

POINTS = 200
"""Points of a curve; more steps are averaged."""
WIDTH, HEIGHT, LEFT = 340, 110, 46
"""Of a chart and, in it, of the labels at its left: a browser's font may be wider than the one that Vega measures."""
VEGA_LITE = "6.4"
COLOURS = ("ink", "paper", "soft", "rule", "line", "alarm")
INK, PAPER, SOFT, RULE, LINE, ALARM = (f"var(--{name})" for name in COLOURS)
CONFIG = {
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {"domain": False, "ticks": False, "gridColor": RULE, "labelColor": SOFT, "titleColor": SOFT}
    | {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "labelPadding": 4},
}
Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """A curve of metrics.jsonl: its title, its key, the keys of its spread (one: a deviation; two: least and most)."""

    title: str
    key: str
    spread: tuple[str, ...] = ()
    is_share: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawn curve, its first and last value; `svg` is empty where there are fewer than two points."""

    title: str
    first: float
    last: float
    points: int
    svg: str


def kinds(rows: Rows) -> list[Kind]:
    """The curves that a stage may have: every reward, then what else tells how it went."""
    keys = dict.fromkeys(key for row in rows for key in row)
    parts = [found[1] for key in keys if (found := re.fullmatch("rewards/([^/]+)/mean", key))]
    return [
        Kind("reward", "reward", ("reward_std",)),
        *(Kind(part, f"rewards/{part}/mean", (f"rewards/{part}/std",)) for part in parts),
        *([] if "reward" in keys else [Kind("loss", "loss")]),
        Kind("token accuracy", "mean_token_accuracy", is_share=True),
        Kind("tokens per reply", "completions/mean_length", ("completions/min_length", "completions/max_length")),
        Kind("groups without signal", "groups_without_signal", is_share=True),
        Kind("replies whose steps fit", "reasoning/consistent", is_share=True),
        Kind("gain of the reasoning, nats", "reasoning/gain_nats"),
        Kind("entropy, nats per token", "entropy"),
        Kind("learning rate", "learning_rate"),
    ]


def need_charts() -> None:
    """MissingExtra where the package of the extra `report` is not installed."""
    if importlib.util.find_spec("vl_convert") is None:
        raise MissingExtra("vl-convert-python, which draws the charts, is missing: pip install 'qreason[report]'")


def draw_stage(rows: Rows, alarms: Sequence[int] = ()) -> list[Chart]:
    """Every curve of a stage's metrics.jsonl; the steps of `alarms` are marked in each."""
    thinned = thin(rows)
    charts = []
    for kind in kinds(rows):
        points = [row for row in thinned if kind.key in row]
        if points:
            svg = to_svg(curve(kind, points, alarms)) if len(points) > 1 else ""
            charts.append(Chart(kind.title, points[0][kind.key], points[-1][kind.key], len(points), svg))
    return charts


def thin(rows: Rows, most: int = POINTS) -> list[dict[str, float]]:
    """At most `most` rows, each the means over an equal stretch of rows; what is not a finite number is left out."""
    count = min(most, len(rows))
    stretches = [rows[len(rows) * place // count : len(rows) * (place + 1) // count] for place in range(count)]
    return [average(stretch) for stretch in stretches]


def average(rows: Rows) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, int | float) and abs(value) <= MOST:
                found.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in found.items()}


def curve(kind: Kind, points: Sequence[dict[str, float]], alarms: Sequence[int]) -> dict[str, Any]:
    """A line over the steps with its spread as a band, and a dashed rule at each alarm."""
    values = [{"step": row["step"], "y": row[kind.key], **band(kind, row)} for row in points]
    x = {"field": "step", "type": "quantitative", "title": None, "axis": {"grid": False, "tickCount": 5}}
    scale = {"domain": [0, 1]} if kind.is_share else {"zero": True}
    axis = {"tickCount": 4, "format": "%" if kind.is_share else ".6~g", "minExtent": LEFT, "maxExtent": LEFT}
    y = {"field": "y", "type": "quantitative", "title": None, "axis": axis, "scale": scale}
    across = x | {"scale": {"zero": False, "nice": False}}
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "line", "color": LINE, "strokeWidth": 1.5}, "encoding": {"x": across, "y": y}}
    ]
    if any("low" in value for value in values):
        spread = {"x": across, "y": y | {"field": "low"}, "y2": {"field": "high"}}
        layers.insert(0, {"mark": {"type": "area", "color": LINE, "opacity": 0.16}, "encoding": spread})
    if alarms:
        rule = {"type": "rule", "color": ALARM, "strokeDash": [4, 3]}
        steps = [{"step": step} for step in sorted(set(alarms))]
        layers.append({"data": {"values": steps}, "mark": rule, "encoding": {"x": across}})
    return {"width": WIDTH - LEFT - 10, "height": HEIGHT, "data": {"values": values}, "layer": layers}


def band(kind: Kind, row: dict[str, float]) -> dict[str, float]:
    if not kind.spread or any(key not in row for key in kind.spread):
        return {}
    if len(kind.spread) == 1:
        return {"low": row[kind.key] - row[kind.spread[0]], "high": row[kind.key] + row[kind.spread[0]]}
    return dict(zip(("low", "high"), (row[key] for key in kind.spread), strict=True))


MEASURES = {"accuracy": "accuracy", "anywhere": "answer_anywhere", "pass@1": "pass_at_1"}


def draw_passes(passes: Rows) -> str:
    """The shares of each pass as points with their 95 % intervals; empty where nothing was judged."""
    values = [
        {"after": one["after"], "measure": name, **one[key]}
        for one in passes
        for name, key in MEASURES.items()
        if one[key]["mean"] is not None
    ]
    if not values:
        return ""
    left = 9 * max(len(one["after"]) for one in passes)
    label = {"grid": False, "labelColor": INK, "labelFontSize": 12, "minExtent": left}
    measure = {"field": "measure", "sort": list(MEASURES)}
    placed = {
        "y": {"field": "after", "type": "nominal", "title": None, "sort": None, "axis": label},
        "yOffset": measure | {"scale": {"paddingInner": 0, "paddingOuter": 0.7}},
    }
    x = {"type": "quantitative", "title": None, "scale": {"domain": [0, 1]}, "axis": {"format": "%", "tickCount": 5}}
    point = {"type": "point", "size": 40, "stroke": LINE, "strokeWidth": 1.5, "opacity": 1}
    look = {
        "shape": measure | {"scale": {"range": ["circle", "diamond", "square"]}, "legend": None},
        "fill": measure | {"scale": {"range": [LINE, PAPER, LINE]}, "legend": None},
    }
    interval = {"x": x | {"field": "low"}, "x2": {"field": "high"}}
    layers = [
        {"mark": {"type": "rule", "color": LINE, "strokeWidth": 1.5}, "encoding": placed | interval},
        {"mark": point, "encoding": placed | {"x": x | {"field": "mean"}} | look},
    ]
    return to_svg({"width": 340, "height": {"step": 13}, "data": {"values": values}, "layer": layers})


def draw_calibration(bins: Rows) -> str:
    """The share of right replies over the mean verdict, with their number, and the diagonal of a perfect judge."""
    scale = {"domain": [0, 1]}
    x = {"field": "verdict", "type": "quantitative", "title": "mean verdict", "scale": scale, "axis": {"tickCount": 5}}
    y = {"field": "right", "type": "quantitative", "title": "share right", "scale": scale, "axis": {"tickCount": 5}}
    ends = [{"verdict": 0, "right": 0}, {"verdict": 1, "right": 1}]
    diagonal = {"type": "line", "color": SOFT, "strokeDash": [4, 3], "strokeWidth": 1}
    size = {"field": "pairs", "type": "quantitative", "legend": None, "scale": {"range": [20, 300]}}
    point = {"type": "point", "filled": True, "color": LINE, "opacity": 0.75}
    layers = [
        {"data": {"values": ends}, "mark": diagonal, "encoding": {"x": x, "y": y}},
        {"data": {"values": list(bins)}, "mark": point, "encoding": {"x": x, "y": y, "size": size}},
    ]
    return to_svg({"width": 190, "height": 190, "layer": layers})


def to_svg(spec: dict[str, Any]) -> str:
    import vl_convert

    whole = {"background": None, "padding": 2, "config": CONFIG, **spec}
    svg: str = vl_convert.vegalite_to_svg(whole, vl_version=VEGA_LITE)
    return re.sub(r"<svg [^>]*?(width=\"[^>]*)>", r'<svg aria-hidden="true" \1>', svg, count=1)
