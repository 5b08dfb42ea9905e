"""A PEFT LoRA adapter as a GGUF adapter, in float32 as it was trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from qreason.errors import ModelError
from qreason.export.architecture import gguf_names, read_config, to_engine
from qreason.export.writer import open_tensors, write_file
from qreason.machine.files import read_json
from qreason.machine.records import LoraFile, Peft
from qreason.model.load import stored_quantization

NAMED = {"use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "arrow_config": "Arrow"}
REFUSED = (
    *(*NAMED, "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "trainable_token_indices"),
    *("target_parameters", "layer_replication", "fan_in_fan_out", "alora_invocation_tokens"),
)
"""Settings of PEFT's LoRA that GGUF cannot hold; NAMED has those whose method has a better known name."""
SIDES = {"A.weight": "lora_a", "B.weight": "lora_b"}
"""PEFT's name of a matrix, behind `.lora_` -> GGUF's."""
OUTPUTS = "B.weight"
"""The matrix whose rows are those of the weight."""


def read_alpha(adapter: Path) -> float:
    """The alpha for llama.cpp, which scales by alpha / r; ModelError for kinds that GGUF cannot hold.

    rsLoRA scales by alpha / sqrt(r) (Kalajdzievski 2023): its alpha is multiplied by sqrt(r).
    """
    file = adapter / "adapter_config.json"
    settings: dict[str, Any] = read_json(file, Peft)
    found = [NAMED.get(key, key) for key in REFUSED if settings.get(key)]
    if settings["peft_type"] != "LORA":
        found = [settings["peft_type"]]
    elif read_json(file, LoraFile)["bias"] != "none":
        found.append(f"bias: {settings['bias']}")
    if found:
        raise ModelError(f"{adapter}: {', '.join(found)} cannot be an adapter in GGUF; merge it and export the model")
    return float(settings["lora_alpha"] * (settings["r"] ** 0.5 if settings["use_rslora"] else 1.0))


def split_key(key: str) -> tuple[str, str]:
    """PEFT's name of a LoRA matrix -> (the weight it belongs to, the suffix, which SIDES should have)."""
    target, _, side = key.removeprefix("base_model.model.").partition(".lora_")
    return f"{target}.weight", side


def check_fits(adapter: Path, merged: Path) -> None:
    """ModelError for an adapter of another base: its matrices must have the shapes of the merged model's weights."""
    weights = open_tensors(merged)[0]
    for key, shape in open_tensors(adapter)[0].items():
        target, side = split_key(key)
        weight, place = weights.get(target, [0, 0]), -1 if side == "A.weight" else 0
        if side in SIDES and shape[place] != weight[place]:
            raise ModelError(
                f"{adapter}: made for another base ({target.removesuffix('.weight')} is {weight} in {merged}); export "
                "the adapter that this run trained"
            )


def write_adapter(adapter: Path, base: Path, out: Path, name: str) -> None:
    """A PEFT LoRA folder -> a GGUF adapter for the GGUF file of its base; ModelError for kinds GGUF cannot hold."""
    from gguf import GGMLQuantizationType

    alpha = read_alpha(adapter)
    shapes, load = open_tensors(adapter)
    parts = {key: split_key(key) for key in shapes}
    if wrong := [key for key, (to, side) in parts.items() if side not in SIDES or to == "lm_head.weight"]:
        raise ModelError(f"{adapter}: {wrong[0]} cannot be part of an adapter in GGUF; merge it and export the model")
    config = read_config(base)
    if stored_quantization(config):
        raise ModelError(f"{base}: its weights are stored in 4 bits, so there is no GGUF file of it for an adapter")
    names = gguf_names(config, [target for target, _ in parts.values()])
    header = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.name": name,
        "adapter.lora.alpha": alpha,
        "general.file_type": 0,
    }
    tensors = [
        (
            f"{names[to]}.{SIDES[side]}",
            shapes[key],
            GGMLQuantizationType.F32,
            to_engine(config, to, partial(load, key)) if side == OUTPUTS else partial(load, key),
        )
        for key, (to, side) in parts.items()
    ]
    write_file(out, config.model_type, header, tensors)
