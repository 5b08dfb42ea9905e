"""Unsloth: importing it without its side effects, loading a base, putting adapters on it.

Read in Unsloth 2026.10.9. It replaces parts of transformers and TRL when it is imported, so it is imported first, and
it changes defaults of TRL's configs, so the trainers get every argument (qreason/training/trainer.py).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from qreason.machine.hardware import Hardware
from qreason.recipe.sections import Lora, Model


def import_unsloth() -> None:
    """Import Unsloth; the code it generates goes into a cache, not the current folder, and no statistics are sent.

    Raises RuntimeError where trl was imported before: its trainers would not be patched.
    """
    if "trl" in sys.modules and "unsloth" not in sys.modules:
        raise RuntimeError("trl was imported before the backend was chosen")
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qreason" / "unsloth"
    caches.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(caches))
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    import unsloth  # noqa: F401


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
        use_exact_model_name=True,  # or it loads its own 4-bit copy from the Hub
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
    """A loaded adapter, prepared for the fused kernels."""
    from unsloth import FastLanguageModel

    return FastLanguageModel.patch_peft_model(adapted, "unsloth" if checkpointing else False)


def resume_training(model: Any) -> None:
    """Arm gradient checkpointing again, as it was chosen for the adapter, and leave the mode that decodes.

    Read in Unsloth 2026.10.9: generate disarms it in every layer, and arms it again only for a model that it found in
    training mode, which ours is not while it answers; train() does neither.
    """
    from unsloth import FastLanguageModel

    FastLanguageModel.for_training(model)
