"""What bench_gpu.py measures, and the Markdown it becomes: pure functions from result rows to text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from qreason.machine.hardware import GIB

CONTENDERS = ("qreason plain", "qreason unsloth", "TRL", "Unsloth")
PEERS = {"TRL": "qreason plain", "Unsloth": "qreason unsloth"}
"""A stock trainer -> who is compared with it."""
TIGHT = {"1.5b": 5.0, "0.5b": 3.0}
"""Shape -> GiB under which GRPO with the judge must run, 4 completions of 256 tokens."""
CLOSE, ENOUGH = 0.10, 12
"""How far off a plan may be, and in how many settings it must not be."""
PHASES = {"load": "load", "rollout": "rollout", "judge": "rewards", "backward": "training"}
"""A phase of the plan -> where it is measured."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One measurement: who trains what. `rows` are SFT rows or completions a step, `cap` is in GiB."""

    contender: str
    base: str
    stage: str
    rows: int
    tokens: int = 256
    """The most tokens of a completion."""
    cap: float | None = None
    quantization: str = "nf4"
    checkpointing: bool = True

    @property
    def task(self) -> str:
        size = f"{self.rows} x {self.tokens}" if self.stage == "grpo" else f"{self.rows} rows"
        plain = "" if self.checkpointing else ", no checkpointing"
        return f"{self.stage} {size}, {self.base} {'bf16' if self.quantization == 'none' else self.quantization}{plain}"

    @property
    def name(self) -> str:
        return f"{self.task}, {f'{self.cap:g} GiB' if self.cap else 'no cap'}: {self.contender}"


@dataclass(frozen=True)
class Result:
    """All rounds of a setting: medians over their steps in seconds, the highest peak in bytes; None: not measured."""

    setting: Setting
    outcome: str
    rounds: int
    step: float | None = None
    rollout: float | None = None
    rewards: float | None = None
    training: float | None = None
    tokens_per_second: float | None = None
    peak: int | None = None
    reserved: int | None = None


def collect(rows: Iterable[Row]) -> dict[Setting, Result]:
    """The rounds of each setting together; one that failed in any round counts as failed."""
    rounds: dict[Setting, list[Row]] = {}
    for row in rows:
        rounds.setdefault(Setting(**row["setting"]), []).append(row)
    return {setting: summarize(setting, those) for setting, those in rounds.items()}


def summarize(setting: Setting, rounds: Sequence[Row]) -> Result:
    bad = next((row["outcome"] for row in rounds if row["outcome"] != "measured"), None)
    if bad:
        return Result(setting, bad, len(rounds))
    steps = [step for row in rounds for step in row["steps"]]
    spent = {phase: median(step.get(phase, 0.0) for step in steps) for phase in ("rollout", "rewards", "training")}
    tokens = [count for row in rounds for count in row["tokens"]]
    whole = [sum(step.values()) for step in steps]
    peaks = [peak for row in rounds for peak in row["peak_bytes"].values()]
    return Result(
        setting,
        "measured",
        len(rounds),
        step=median(whole),
        **(spent if setting.stage == "grpo" else {"training": spent["training"]}),
        tokens_per_second=sum(tokens) / sum(whole) if len(tokens) == len(whole) else None,
        peak=max(peaks, default=None),
        reserved=max((row["reserved_bytes"] + row["context_bytes"] for row in rounds if peaks), default=None),
    )


def show(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def gib(size: int | None) -> str:
    return show(None if size is None else size / GIB)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; nothing where there are no rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def side_by_side(results: dict[Setting, Result]) -> str:
    """Every contender on the same task, nothing capped."""
    tasks: dict[str, list[Result]] = {}
    for setting, result in results.items():
        if not setting.cap:
            tasks.setdefault(setting.task, []).append(result)
    head = ("task", "contender", "s a step", "rollout", "rewards", "training", "tokens/s", "peak GiB", "rounds")
    return table(
        head,
        [
            (
                task,
                one.setting.contender,
                *times(one),
                show(one.tokens_per_second, ".0f"),
                gib(one.peak),
                f"{one.rounds}",
            )
            for task, those in tasks.items()
            if len(those) > 1
            for one in sorted(those, key=lambda one: CONTENDERS.index(one.setting.contender))
        ],
    )


def times(one: Result) -> tuple[str, ...]:
    if one.outcome != "measured":
        return (one.outcome, "–", "–", "–")
    return (show(one.step), show(one.rollout), show(one.rewards), show(one.training))


def under_caps(results: dict[Setting, Result]) -> str:
    """Seconds a step and peak of each contender as the memory shrinks."""
    caps = sorted({setting.cap for setting in results if setting.cap})
    lines = list(dict.fromkeys(replace(setting, cap=None) for setting in results if setting.cap))

    def cell(setting: Setting) -> str:
        one = results.get(setting)
        if one is None:
            return "not run"
        peak = f", {gib(one.peak)} GiB" if one.peak else ""
        return f"{show(one.step)} s{peak}" if one.outcome == "measured" else one.outcome

    head = ("task", "contender", *(f"{cap:g} GiB" for cap in caps))
    return table(
        head,
        [(one.task, one.contender, *(cell(replace(one, cap=cap)) for cap in caps)) for one in sorted(lines, key=str)],
    )


def plan_rows(rows: Iterable[Row]) -> list[tuple[Row, int, int]]:
    """(row, predicted peak, measured peak) in bytes that torch allocates, of each setting that has both."""
    last = {Setting(**row["setting"]): row for row in rows if row.get("plan")}
    return [
        (row, max(phase["allocated"] for phase in row["plan"].values()), max(row["peak_bytes"].values()))
        for row in last.values()
        if row["outcome"] == "measured" and row["peak_bytes"]
    ]


def plan_against_measured(rows: Iterable[Row]) -> str:
    """The peak that torch allocates, then phase by phase; then all that the card holds, the CUDA context included."""
    lines = []
    for row, planned, measured in plan_rows(rows):
        phases = []
        for phase, where in PHASES.items():
            own = row["plan"].get(phase)
            phases.append(f"{gib(own['allocated'])} / {gib(row['peak_bytes'].get(where))}" if own else "–")
        whole = max(phase["all"] for phase in row["plan"].values())
        held = row["reserved_bytes"] + row["context_bytes"]
        name = Setting(**row["setting"]).name
        lines.append(
            (name, gib(planned), gib(measured), off(planned, measured), *phases, f"{gib(whole)} / {gib(held)}")
        )
    head = ("setting", "plan GiB", "measured", "off by", *(f"{phase}: plan / measured" for phase in PHASES), "in all")
    return table(head, lines)


def off(planned: int, measured: int) -> str:
    return f"{planned / measured - 1:+.1%}"


# --- bars ----------------------------------------------------------------------------------------

Bar = tuple[str, str, bool | None]
"""(what is asked, what was measured, whether it is met; None: not measured)"""


def bars(rows: Sequence[Row]) -> list[Bar]:
    results = collect(rows)
    return [plan_bar(rows), *(tight_bar(results, base, cap) for base, cap in TIGHT.items()), *step_bars(results)]


def plan_bar(rows: Sequence[Row]) -> Bar:
    what = f"the plan's peak is within {CLOSE:.0%} of the measured one in {ENOUGH} settings or more"
    errors = [planned / measured - 1 for _, planned, measured in plan_rows(rows)]
    if not errors:
        return what, "no peak was measured", None
    close = sum(abs(error) <= CLOSE for error in errors)
    worst = max(errors, key=abs)
    return what, f"{close} of {len(errors)}, the worst off by {worst:+.1%}", close >= ENOUGH


def tight_bar(results: dict[Setting, Result], base: str, cap: float) -> Bar:
    setting = Setting("qreason plain", base, "grpo", 4, cap=cap)
    what = f"{setting.task}, with the judge, runs under {cap:g} GiB"
    one = results.get(setting)
    if one is None or (one.outcome == "measured" and one.reserved is None):
        return what, "no peak was measured", None
    if one.outcome != "measured":
        return what, one.outcome, False
    assert one.reserved is not None
    told = f"{show(one.step)} s a step, {gib(one.peak)} GiB allocated, {gib(one.reserved)} GiB held in all"
    return what, told, one.reserved <= cap * GIB


def step_bars(results: dict[Setting, Result]) -> list[Bar]:
    """Each stock trainer against ours on every task that both were measured on."""
    found: list[Bar] = []
    for peer, own in PEERS.items():
        stock = [one for setting, one in results.items() if setting.contender == peer and not setting.cap]
        found += [
            step_bar(mine, one)
            for one in stock
            if (mine := results.get(replace(one.setting, contender=own))) and mine.step and one.step
        ]
        if not any(peer in what for what, *_ in found):
            found.append((f"a step takes no longer than {peer}'s", "not measured side by side", None))
    return found


def step_bar(own: Result, stock: Result) -> Bar:
    """No slower than stock TRL; against stock Unsloth, faster by what its judge takes longer."""
    assert own.step is not None
    assert stock.step is not None
    share = 0.0
    if stock.setting.contender == "Unsloth" and stock.rewards is not None and own.rewards is not None:
        share = stock.rewards - own.rewards
    less = f" less the {share:.2f} s that its judge takes longer" if share else ""
    what = (
        f"{own.setting.task}: a step of {own.setting.contender} takes no longer than {stock.setting.contender}'s{less}"
    )
    told = f"{own.step:.2f} s against {stock.step:.2f} s ({own.step / stock.step:.0%})"
    return what, told, own.step <= stock.step - share


# --- the document --------------------------------------------------------------------------------

VERDICTS = {True: "yes", False: "**no**", None: "not measured"}
INTRODUCTION = """\
The bases 0.5b and 1.5b have the real shapes of Qwen2.5 and random weights (`scripts/random_qwen.py`): times and memory
are those of the real models, what they write is not. Random weights stop by chance only, so nearly all completions have
the full length, and they write no answer, so every judge is asked about resolutions of other tickets instead. The
training rows are the longest of the helpdesk data.

Each measurement is a process of its own; contenders take turns. Times are medians over all steps but the first of each
process, `training` being what is left of a step: log-probabilities, backward pass, optimizer. `TRL` is stock TRL, PEFT
and bitsandbytes, `Unsloth` has the settings of its public notebooks; their judge is a second 4-bit copy that writes a
score in up to 16 tokens, qreason's is one forward pass of the base that is being trained. Peaks are
`torch.cuda.max_memory_allocated`. A cap bounds what torch may take to itself less the CUDA context that the plan
states; qreason fits itself into it as `qreason run` does, the others run as they are.\
"""


def document(rows: Sequence[Row], left_out: dict[str, str], pending: Sequence[Setting], command: str) -> str:
    """docs/benchmarks.md: machine, versions and command, the bars, the tables, and what is missing."""
    results = collect(rows)
    machines = list(dict.fromkeys(machine_line(row["machine"]) for row in rows if row.get("machine")))
    verdicts = [(what, told, VERDICTS[met]) for what, told, met in bars(rows)]
    parts = ["# Benchmarks", f"```\n{command}\n```", *(machines or ["Nothing has been measured yet."]), INTRODUCTION]
    sections = {
        "Bars": table(("bar", "measured", "met"), verdicts),
        "Side by side": side_by_side(results),
        "Under memory caps": under_caps(results),
        "What qreason changed to fit": "\n".join(dict.fromkeys(change_lines(rows))),
        "Plan against measured": plan_against_measured(rows),
        "Left out, failed, not run": "\n".join(missing_lines(rows, left_out, pending)),
    }
    for title, text in sections.items():
        parts += [f"## {title}", text] if text else []
    return "\n\n".join(parts) + "\n"


def change_lines(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        yield from (f"- {Setting(**row['setting']).name}: {change}" for change in row.get("changes", []))


def missing_lines(rows: Sequence[Row], left_out: dict[str, str], pending: Sequence[Setting]) -> Iterator[str]:
    yield from (f"- {who}: {why}" for who, why in left_out.items())
    yield from (f"- {Setting(**row['setting']).name}: {row['why']}" for row in rows if row["outcome"] != "measured")
    yield from (f"- {setting.name}: not run" for setting in pending)


def machine_line(machine: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    memory = f", {gib(machine['memory_bytes'])} GiB" if machine["memory_bytes"] else ""
    return f"Measured on {machine['name']}{memory}; {versions}."
