"""The plan of memory in the terminal, 80 columns wide, readable without colour."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qreason.machine.hardware import GIB
from qreason.planning.memory import Change, Plan
from qreason.planning.phases import Phase

BARS = {
    "weights": ("█", "blue", ("weights",)),
    "judge": ("▌", "magenta", ("judge",)),
    "training": ("▚", "cyan", ("adapters", "gradients", "optimizer")),
    "KV cache": ("▒", "green", ("KV cache",)),
    "activations": ("▓", "yellow", ("activations",)),
    "logits": ("░", "red", ("logits",)),
    "other": ("·", "", ("dequantized", "fragmentation", "CUDA context", "libraries")),
}
"""What a bar is made of, in this order: name -> its character, its colour, the components it holds."""
LABEL, WIDTH = 22, 41


def in_gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def plan_table(plan: Plan) -> Group:
    """A bar for each phase with the card's limit, the parts of the one that peaks, and what would lower it."""
    step, peak, needed = plan.peak
    free = plan.card.free_bytes
    scale = max(free, needed)
    verdict = "fits" if plan.fits else f"does not fit: {in_gib(needed - free)} GiB too much"
    lines: list[Text | Table] = [
        Text(f"{plan.recipe} on {plan.card.name}, {in_gib(free)} GiB: {verdict}", style="bold"),
        Text(""),
    ]
    for owner in plan.steps:
        for name, phase in owner.phases.items():
            if name == "load" and owner is not plan.steps[0]:
                continue
            top = (owner, name) == (step, peak)
            label = name if name == "load" else f"{owner.name} {name}"
            figure = f"{in_gib(sum(phase.values())):>6}{' ◄ peak' if top else ''}"
            lines.append(Text.assemble(f"{label:<{LABEL}}", bar(phase, scale, free), (figure, "bold" if top else "")))
    lines += [Text(" " * (LABEL + column(free, scale)) + f"│ {in_gib(free)} GiB"), Text("")]
    lines += [parts_table(step.phases[peak]), Text("")]
    lines += [changes_table(plan.changes)] if plan.changes else [Text("nothing in the recipe lowers the peak")]
    lines += [Text(f"note: {note}", style="yellow") for note in plan.notes]
    return Group(*lines)


def column(size: int, scale: int) -> int:
    """The character of a bar at which so many bytes end."""
    return min(WIDTH - 1, round(WIDTH * size / scale))


def bar(phase: Phase, scale: int, free: int) -> Text:
    """The components of a phase side by side, and the card's limit across them; WIDTH characters."""
    cells: list[tuple[str, str]] = []
    reached = 0
    for character, style, components in BARS.values():
        reached += sum(phase.get(component, 0) for component in components)
        cells += [(character, style)] * (round(WIDTH * reached / scale) - len(cells))
    cells += [(" ", "")] * (WIDTH - len(cells))
    cells[column(free, scale)] = ("│", "bold")
    return Text.assemble(*cells)


def parts_table(phase: Mapping[str, int]) -> Table:
    """The bytes of a phase's components, grouped as in the bars."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for name, (character, style, components) in BARS.items():
        parts = {component: phase[component] for component in components if component in phase}
        if parts:
            named = ", ".join(f"{part} {in_gib(size)}" for part, size in parts.items())
            label = named if list(parts) != [name] else ""
            table.add_row(Text.assemble((character * 2, style), f" {name}"), in_gib(sum(parts.values())), label)
    return table


def changes_table(changes: tuple[Change, ...]) -> Table:
    """What to set, and how much that lowers the peak in GiB; cheapest first."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("GiB less", justify="right", no_wrap=True)
    table.add_column("with --set", max_width=51, overflow="fold")
    table.add_column("results", no_wrap=True)
    for change in changes:
        same = "the same" if change.same_mathematics else "differ"
        table.add_row(in_gib(change.gained_bytes), "\n".join(change.settings), same)
    return table
