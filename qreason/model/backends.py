"""Who loads the base and puts adapters on it: transformers and PEFT, or Unsloth with its fused kernels.

Unsloth replaces parts of transformers and TRL when it is imported, so the choice is made once, before either is.
Decoding and judging depend on it, too: Unsloth's models do not read our cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from qreason.errors import MissingExtra, ModelError
from qreason.machine import ranks
from qreason.machine.hardware import COMPILER, compiler_trouble
from qreason.model.compat.unsloth import import_unsloth

Name = Literal["plain", "unsloth"]
LEAST_CAPABILITY = (7, 0)
"""Triton, which Unsloth's kernels are written in, compiles for no older card."""
INSTALL = "pip install unsloth==2026.10.9"
"""Not as an extra of qreason, which is installed from its folder: the command must work anywhere."""


@dataclass(frozen=True)
class Choice:
    """`why` is printed; `cure`, where there is one, is the command that makes Unsloth usable."""

    name: Name
    why: str
    cure: str = ""


def choose(
    wanted: Literal["auto", "plain", "unsloth"], card: tuple[int, int] | None, plain_stage: str | None = None
) -> Choice:
    """Unsloth where it is installed and `card`, the compute capability of the GPU (None without one), can run it.

    `plain_stage` is what of a recipe trains on the plain backend only, such as `a preference step`.
    Raises ModelError, or MissingExtra, where a recipe requires Unsloth and it cannot be used.
    """
    if wanted == "plain":
        return Choice("plain", "as the recipe says")
    if ranks.count() > 1:
        hindrance = Choice("plain", "several processes train on the plain backend only")
    elif card is None:
        hindrance = Choice("plain", "Unsloth's kernels need a GPU")
    elif card < LEAST_CAPABILITY:
        hindrance = Choice("plain", f"Unsloth needs compute capability 7.0, this GPU has {card[0]}.{card[1]}")
    elif find_spec("unsloth") is None:
        hindrance = Choice("plain", "Unsloth is not installed", INSTALL)
    elif trouble := compiler_trouble():
        hindrance = Choice("plain", f"Unsloth's kernels cannot be compiled: {trouble}", COMPILER)
    elif plain_stage:
        hindrance = Choice("plain", f"{plain_stage} trains on the plain backend only")
    else:
        return Choice("unsloth", "fused kernels")
    if wanted == "unsloth":
        if hindrance.cure:
            raise MissingExtra(f"model.backend is unsloth, but {hindrance.why}: {hindrance.cure}")
        raise ModelError(f"model.backend is unsloth, but {hindrance.why}; take backend: auto or plain")
    return hindrance


def start(wanted: Literal["auto", "plain", "unsloth"], plain_stage: str | None = None) -> Choice:
    """Choose, and import Unsloth where it is chosen."""
    import torch

    chosen = choose(wanted, torch.cuda.get_device_capability() if torch.cuda.is_available() else None, plain_stage)
    if chosen.name == "unsloth":
        import_unsloth()
    return chosen
