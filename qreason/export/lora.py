"""A PEFT LoRA adapter as a GGUF adapter, in float32 as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qreason.errors import ModelError
from qreason.export.writer import (
    ARCHITECTURE,
    add_tensor,
    add_value,
    check_space,
    count_bytes,
    gguf_names,
    open_tensors,
    read_config,
    written,
)

REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "lora_bias": "lora_bias",
    "trainable_token_indices": "trainable_token_indices",
    "target_parameters": "target_parameters",
    "layer_replication": "layer_replication",
    "fan_in_fan_out": "fan_in_fan_out",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
}
"""Settings of PEFT's LoRA that GGUF has no place for -> what they are called."""


def read_lora(adapter: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    found = [name for key, name in REFUSED.items() if settings.get(key)]
    if settings["peft_type"] != "LORA":
        found = [settings["peft_type"]]
    if settings["bias"] != "none":
        found.append(f"bias: {settings['bias']}")
    if found:
        raise ModelError(f"{adapter}: {', '.join(found)} cannot be an adapter in GGUF; merge it and export the model")
    return settings


def lora_target(key: str, adapter: Path) -> tuple[str, str]:
    """PEFT's name of a LoRA matrix -> (the weight it belongs to, `lora_a` or `lora_b`)."""
    target, _, side = key.removeprefix("base_model.model.").partition(".lora_")
    if side not in ("A.weight", "B.weight") or target == "lm_head":
        raise ModelError(f"{adapter}: {key} cannot be part of an adapter in GGUF; merge it and export the model")
    return f"{target}.weight", f"lora_{side[0].lower()}"


def check_fits(adapter: Path, merged: Path) -> None:
    """ModelError for an adapter of another base: its matrices must have the shapes of the merged model's weights."""
    matrices, weights = open_tensors(adapter)[0], open_tensors(merged)[0]
    for key, shape in matrices.items():
        target, _, side = key.removeprefix("base_model.model.").partition(".lora_")
        if side not in ("A.weight", "B.weight"):
            continue
        columns, rows = shape[-1], shape[0]
        weight = weights.get(f"{target}.weight", [0, 0])
        if (columns != weight[-1]) if side == "A.weight" else (rows != weight[0]):
            raise ModelError(
                f"{adapter}: made for another base ({target} is {weight} in {merged}); export the adapter that this "
                "run trained"
            )


def write_adapter(adapter: Path, base: Path, out: Path, name: str) -> None:
    """A PEFT LoRA folder -> a GGUF adapter for the GGUF file of its base, in float32 as it was trained.

    llama.cpp scales by alpha / r; for rsLoRA, which scales by alpha / sqrt(r) (Kalajdzievski 2023), alpha is
    multiplied by sqrt(r). Raises ModelError for kinds of adapters that GGUF cannot hold.
    """
    import gguf

    config, settings = read_config(base), read_lora(adapter)
    alpha = settings["lora_alpha"] * (settings["r"] ** 0.5 if settings["use_rslora"] else 1.0)
    shapes, load = open_tensors(adapter)
    weights = {key: lora_target(key, adapter) for key in sorted(shapes)}
    names = gguf_names(config, {target for target, _ in weights.values()})
    check_space(out.parent, sum(count_bytes(shape) * 4 for shape in shapes.values()))
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    values = {"general.type": "adapter", "adapter.type": "lora", "general.name": name}
    for metadata, value in {**values, "adapter.lora.alpha": float(alpha), "general.file_type": 0}.items():
        add_value(writer, metadata, value)
    for key, (target, side) in weights.items():
        kind = gguf.GGMLQuantizationType.F32
        add_tensor(writer, f"{names[target]}.{side}", shapes[key], count_bytes(shapes[key]) * 4, kind)
    with written(writer, out):
        for key in weights:
            writer.write_tensor_data(load(key).float().numpy())
