"""PEFT: adapters folded temporarily, loaded beside each other, read layer by layer, and saved with the base's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

POLICY = "default"
"""PEFT's name of an adapter without one."""
JUDGE = "judge"
"""The name of a judge adapter beside the policy's."""


def adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, layer) of the layers that have the policy adapter.

    Read in PEFT 0.20.0 and 0.21.2: a LoRA layer has lora_A and lora_B (modules by adapter), scaling (numbers by
    adapter), base_layer (the layer it wraps), and get_delta_weight (what merging would add to its weight).
    """
    for name, layer in model.named_modules():
        if POLICY in getattr(layer, "lora_A", ()):
            yield name, layer


def base_of(layer: Any) -> Any:
    """The layer that an adapter wraps; the layer itself without one."""
    return getattr(layer, "base_layer", layer)


@contextmanager
def folded(model: Any) -> Iterator[None]:
    """Within it, the policy adapter is added into the weights of its layers and switched off: less work per token.

    The base's tensors are kept and restored, so that no rounding accumulates, as with PEFT's merge_adapter and
    unmerge_adapter; meanwhile a layer that shares its tensor with another one has its own.
    """
    import torch

    layers = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
    own = [layer.base_layer.weight for layer in layers]
    for layer, weight in zip(layers, own, strict=True):
        whole = weight.data + layer.get_delta_weight(POLICY).to(weight.dtype)
        layer.base_layer.weight = torch.nn.Parameter(whole, requires_grad=False)
    try:
        with model.disable_adapter():
            yield
    finally:
        for layer, weight in zip(layers, own, strict=True):
            layer.base_layer.weight = weight


@contextmanager
def judge_adapter(model: Any, load: Callable[[Any], None]) -> Iterator[None]:
    """Within it, a judge adapter replaces the policy's, whose weights and training state stay as they are.

    `load` puts the judge adapter on the model, once. Read in PEFT 0.20.0 and 0.21.2: load_adapter switches to
    evaluation, and in 0.20.0 takes requires_grad from the policy; set_adapter with inference_mode does in both.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if JUDGE not in model.peft_config:
        was_training = model.training
        load(model)
        model.train(was_training)
    model.set_adapter(JUDGE, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(POLICY, inference_mode=True)
        for parameter in trained:
            parameter.requires_grad_(True)


def name_base(model: Any, base: str) -> None:
    """Set the base that save_pretrained writes for the policy adapter, whatever folder the base was loaded from.

    Read in PEFT 0.20.0 and 0.21.2: save_pretrained takes it from the config, from the model only where that has none.
    """
    model.peft_config[POLICY].base_model_name_or_path = base
