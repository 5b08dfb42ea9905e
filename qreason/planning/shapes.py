"""What a plan of memory is about: the sizes of a model, the lengths of texts, a card, the models that rewards ask."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec

from qreason.errors import ModelError
from qreason.machine.hardware import GIB
from qreason.model.load import cannot_load, is_here, read_base_config, stored_quantization
from qreason.planning.known import known_config
from qreason.recipe.sections import Model

ADAPTABLE = ("Linear", "Conv1D", "Embedding")
"""Kinds of layers that PEFT adapts in a language model."""


@dataclass(frozen=True)
class Linear:
    name: str
    outputs: int
    inputs: int
    quantized: bool
    """Whether nf4 packs it."""
    head: bool


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, from its config; counts are numbers, not bytes."""

    base: str
    parameters: int
    buffer_bytes: int
    linears: tuple[Linear, ...]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    adaptable: tuple[str, ...] = ()
    """The names of all layers that PEFT can put an adapter on."""
    number: int = 2
    """Bytes per number of the base and its activations (`Card.number`)."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest prompt, SFT example, question to the judge (no response), reference, side of a pair."""

    prompt: int = 256
    example: int = 512
    question: int = 128
    reference: int = 64
    pair: int = 512


USUAL = Lengths()
LIBRARIES = int(0.75 * GIB)
"""Python, its libraries and a recipe's data."""


@dataclass(frozen=True)
class Card:
    """A GPU, or the memory of a machine without one, whose `capability` is None.

    `free_bytes` is what a run may use, including its CUDA context, or Python with its libraries.
    """

    name: str
    free_bytes: int
    capability: tuple[int, int] | None = (8, 6)
    compiles: bool = sys.platform == "linux" or find_spec("triton") is not None
    """Whether Triton's kernels can be compiled for it."""

    @property
    def on_cpu(self) -> bool:
        return self.capability is None

    @property
    def number(self) -> int:
        """Bytes per number of the base and its activations: float32 on a CPU, else 16 bits."""
        return 4 if self.on_cpu else 2

    @property
    def context_bytes(self) -> int:
        """Driver, kernels and cuBLAS workspaces, which torch does not count; by generation, assumed, not measured.

        On a CPU the libraries, measured.
        """
        if self.capability is None:
            return LIBRARIES
        return int(GIB * (0.3 if self.capability < (8, 0) else 0.4 if self.capability < (9, 0) else 0.5))


@dataclass(frozen=True)
class Asked:
    """A model that rewards query; `stored` is its bytes beside the policy's base."""

    shape: Shape
    model: Model
    stored: int
    offload: bool = False
    adapter: bool = False
    kind: str = "score"
    """`score` and `groupwise` judges, or `preference`."""


def read_shape(base: str) -> Shape:
    """The shape of a base, built without memory on torch's meta device. Raises ModelError where it is not a model.

    Of a usual base that is not on this machine, by the table of `known.py`.
    """
    import torch
    import transformers
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    try:
        config = (None if is_here(base) else known_config(base)) or read_base_config(base)
        kind, text = getattr(transformers, (config.architectures or [""])[0]), config.get_text_config()
        with torch.device("meta"):
            model = kind(config)
        own = stored_quantization(config).get("llm_int8_skip_modules")
        kept, head = own or get_keys_to_not_convert(model), model.get_output_embeddings()
        return Shape(
            base=base,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
            linears=tuple(
                Linear(name, module.out_features, module.in_features, should_convert_module(name, kept), module is head)
                for name, module in model.named_modules()
                if type(module) is torch.nn.Linear
            ),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            vocabulary=text.vocab_size,
            context=text.max_position_embeddings,
            adaptable=tuple(name for name, module in model.named_modules() if type(module).__name__ in ADAPTABLE),
        )
    except Exception as error:
        raise ModelError(f"{base}: {cannot_load(error)}") from error
