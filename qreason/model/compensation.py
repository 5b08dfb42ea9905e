"""An initial adapter that offsets the NF4 quantization error, limited by its rank.

Of a layer's quantization error, the adapter corrects the part that changes the layer's outputs most on text of the run:
with inputs X and the error E of the weight, the first directions of X E' are kept. That is the best correction of this
rank for these inputs (QERA, arXiv 2410.06040; without inputs it would be LoftQ, arXiv 2310.08659).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qreason.model.compat.bitsandbytes import is_four_bit, to_float32
from qreason.model.compat.peft import POLICY, adapted_layers
from qreason.model.merging import float32_original
from qreason.model.resident import Resident

if TYPE_CHECKING:
    import torch

TOKENS = 2048
"""Tokens whose inputs to every layer are kept, in the model's number format, in CPU memory."""
ROWS = 16
WRAPPED = "base_model.model."


def compensate(resident: Resident, texts: Sequence[str]) -> tuple[float, float]:
    """Initialize the fresh adapter on a 4-bit base from the base's layer inputs on `texts`.

    Returns the relative error of the layers' outputs, mean over layers, without and with it. The adapter's first
    matrix keeps the norm it was drawn with, so that the learning rate keeps its meaning.
    """
    import torch

    layers = {
        name.removeprefix(WRAPPED): layer
        for name, layer in adapted_layers(resident.model)
        if is_four_bit(layer.base_layer.weight)
    }
    inputs = read_inputs(resident, layers, texts)
    original = float32_original(resident.settings)
    before, after = [], []
    for name, layer in layers.items():
        whole = original.get_submodule(name).weight.data
        error, read = whole - to_float32(layer.base_layer.weight), inputs.pop(name).float()
        lora_a, lora_b = layer.lora_A[POLICY].weight, layer.lora_B[POLICY].weight
        down, up = correction(error, read, len(lora_a))
        scale = float(lora_a.detach().norm() / down.norm())
        with torch.no_grad():
            lora_a[: len(down)] = scale * down.to(lora_a)
            lora_b[:, : len(down)] = (up / (scale * layer.scaling[POLICY])).to(lora_b)
        size = (read @ whole.T).norm()
        before.append(float((read @ error.T).norm() / size))
        after.append(float((read @ (error - up @ down).T).norm() / size))
    return sum(before) / len(before), sum(after) / len(after)


def correction(error: torch.Tensor, read: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank, inputs) and (outputs, rank), whose product is nearest to `error` in its effect on the inputs `read`.

    The error is projected on the output directions in which its effect is largest.
    """
    import torch

    shown = read @ error.T
    _, _, directions = torch.svd_lowrank(shown, q=min(2 * rank, *shown.shape), niter=8)
    up = directions[:, :rank]
    return up.T @ error, up


def read_inputs(resident: Resident, layers: dict[str, Any], texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Layer -> its inputs, (tokens, width) on the CPU, without padding."""
    import torch

    read: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    mask = torch.empty(0)

    def keep(name: str) -> Any:
        return lambda layer, inputs: read[name].append(inputs[0][mask].cpu())

    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        with resident.inference() as model:
            count = 0
            for start in range(0, len(texts), ROWS):
                batch = resident.tokenizer(
                    list(texts[start : start + ROWS]), return_tensors="pt", padding=True, add_special_tokens=False
                ).to(resident.device)
                mask = batch["attention_mask"].bool()
                model(**batch, logits_to_keep=1)
                if (count := count + int(mask.sum())) >= TOKENS:
                    break
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in read.items()}
