"""Who loads the base and puts adapters on it: transformers and PEFT, or Unsloth with its fused kernels.

Unsloth replaces parts of transformers and TRL when it is imported, so the choice is made once, before either is.
It needs its own way of decoding and judging, too: its models read no cache of ours.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from qreason.errors import MissingExtra, ModelError
from qreason.machine.hardware import Hardware
from qreason.recipe.sections import Lora, Model

Name = Literal["plain", "unsloth"]
LEAST_CAPABILITY = (7, 0)
"""Triton, which Unsloth's kernels are written in, compiles for no older card."""
INSTALL = "pip install 'qreason[unsloth]'"


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
    """Choose, and import Unsloth where it is chosen; its caches and its statistics stay out of the way."""
    chosen = choose(wanted, capability())
    if chosen.name == "unsloth":
        if "trl" in sys.modules and "unsloth" not in sys.modules:
            raise RuntimeError("trl was imported before the backend was chosen")
        caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qreason" / "unsloth"
        caches.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(caches))
        os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
        import unsloth  # noqa: F401
    return chosen


def load_with_unsloth(path: str, model: Model, hardware: Hardware, context: int) -> Any:
    import torch
    from unsloth import FastLanguageModel

    base, _ = FastLanguageModel.from_pretrained(
        model_name=path,
        max_seq_length=context,
        dtype=getattr(torch, hardware.dtype),
        load_in_4bit=model.quantization == "nf4",
        load_in_16bit=model.quantization == "none",
        device_map={"": 0} if hardware.device == "cuda" else None,
        use_exact_model_name=True,  # or it takes a 4-bit copy of its own from the Hub
        fix_tokenizer=False,
    )
    return base


def adapt_with_unsloth(base: Any, lora: Lora, seed: int, checkpointing: bool) -> Any:
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(
        base,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        bias="none",
        use_rslora=False,
        use_gradient_checkpointing="unsloth" if checkpointing else False,
        random_state=seed,
    )


def patch_with_unsloth(adapted: Any, checkpointing: bool) -> Any:
    """A loaded adapter, made ready for the fused kernels."""
    from unsloth import FastLanguageModel

    return FastLanguageModel.patch_peft_model(adapted, "unsloth" if checkpointing else False)
