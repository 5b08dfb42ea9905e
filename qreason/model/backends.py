"""Who loads the base and puts adapters on it: transformers and PEFT, or Unsloth with its fused kernels.

Unsloth replaces parts of transformers and TRL when it is imported, so the choice is made once, before either is.
It needs its own way of decoding and judging, too: its models read no cache of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from qreason.errors import MissingExtra, ModelError
from qreason.model.compat.unsloth import import_unsloth

Name = Literal["plain", "unsloth"]
LEAST_CAPABILITY = (7, 0)
"""Triton, which Unsloth's kernels are written in, compiles for no older card."""
INSTALL = "pip install unsloth==2026.10.9"
"""By its own name: qreason is installed from its folder, and an extra has no name without that."""


@dataclass(frozen=True)
class Choice:
    """`why` is for the person at the terminal; `cure`, where there is one, leads to Unsloth."""

    name: Name
    why: str
    cure: str = ""


def capability() -> tuple[int, int] | None:
    """The compute capability of the GPU; None where there is none."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def choose(wanted: Literal["auto", "plain", "unsloth"], card: tuple[int, int] | None) -> Choice:
    """Unsloth where there is a GPU for it and it is installed.

    Raises ModelError, or MissingExtra, where a recipe insists on Unsloth and it cannot be.
    """
    if wanted == "plain":
        return Choice("plain", "as the recipe says")
    if card is None:
        hindrance = Choice("plain", "Unsloth's kernels need a GPU")
    elif card < LEAST_CAPABILITY:
        hindrance = Choice("plain", f"Unsloth needs compute capability 7.0, this GPU has {card[0]}.{card[1]}")
    elif find_spec("unsloth") is None:
        hindrance = Choice("plain", "Unsloth is not installed", INSTALL)
    else:
        return Choice("unsloth", "fused kernels")
    if wanted == "unsloth":
        if hindrance.cure:
            raise MissingExtra(f"model.backend is unsloth, but {hindrance.why}: {hindrance.cure}")
        raise ModelError(f"model.backend is unsloth, but {hindrance.why}; take backend: auto or plain")
    return hindrance


def start(wanted: Literal["auto", "plain", "unsloth"]) -> Choice:
    """Choose, and import Unsloth where it is chosen."""
    chosen = choose(wanted, capability())
    if chosen.name == "unsloth":
        import_unsloth()
    return chosen
