"""Merge: the newest adapter folded into its base, as a plain transformers folder."""

from __future__ import annotations

from typing import Any

from qreason.errors import RunFolderError, TrainingError
from qreason.models import load_base
from qreason.prompts import SYSTEM_PROMPTS, render
from qreason.recipe import Merge, Step
from qreason.run import Artifact, Run

CHECKED_ROWS = 8
MOST_DIVERGENCE = 1e-3
"""Nats a token between the trained and the merged model, above which a merge is refused."""


def merge(step: Step, run: Run) -> Artifact:
    """Fold the adapter into the base in float32, check it against the adapter, store it in the asked dtype."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = step.settings
    assert isinstance(settings, Merge)
    adapter = run.adapter()
    if adapter is None:
        raise RunFolderError(f"{run.folder}: nothing to merge yet; run sft or grpo first")
    resident = run.resident
    resident.load_adapter(adapter)
    trained = first_distributions(resident.model, run)
    resident.remove_adapter()
    base = load_base(run.recipe.model, resident.hardware)
    if run.recipe.model.quantization == "nf4":
        base = base.dequantize()
    base = base.to(device="cpu", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    model = model.to(getattr(torch, settings.dtype))
    folder = run.clear_stage_folder() / "model"
    model.save_pretrained(str(folder))
    resident.tokenizer.save_pretrained(str(folder))
    stored = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    merged = first_distributions(stored.to(resident.device), run)
    divergence = float((trained.exp() * (trained - merged)).sum(-1).mean())
    if not divergence <= MOST_DIVERGENCE:
        raise TrainingError(f"{folder}: the merged model differs from the trained one (KL {divergence:.2e} a token)")
    return Artifact(folder, f"{settings.dtype}, KL from the trained model {divergence:.1e}")


def first_distributions(model: Any, run: Run) -> Any:
    """Log-probabilities after each token of a few prompts, (tokens, vocabulary)."""
    import torch

    from qreason.generate import render_ids

    source = "heldout" if run.recipe.data.heldout else "sft" if run.recipe.data.sft else "prompts"
    system = SYSTEM_PROMPTS[run.recipe.data.prompt]
    prompts = [render(example, system) for example in run.examples(source)[:CHECKED_ROWS]]
    rows = []
    with torch.no_grad():
        for ids in render_ids(run.resident.tokenizer, prompts):
            logits = model.eval()(input_ids=torch.tensor([ids], device=model.device)).logits[0]
            rows.append(torch.log_softmax(logits.float(), -1))
    return torch.cat(rows)
