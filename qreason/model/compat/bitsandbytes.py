"""bitsandbytes: whether it works here, 4-bit weights that keep their layout, and their values in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qreason.errors import kind_and_line

if TYPE_CHECKING:
    import torch


def import_without_compiler() -> None:
    """Import bitsandbytes, where it is installed, before PEFT does, and without torch's compiler: 3 s less.

    Read in bitsandbytes 0.50.0 and 0.50.2: `backends/default/ops.py` passes two functions to torch.compile when it is
    imported. CPU and CUDA have kernels of their own for both.
    """
    import torch

    library: Any = torch  # mypy refuses the assignment
    compiler, library.compile = library.compile, lambda function, **kwargs: function
    try:
        import bitsandbytes  # noqa: F401
    except Exception:  # missing or broken: whoever needs it reports that
        return
    finally:
        library.compile = compiler


def four_bit_trouble(device: str) -> str | None:
    """What is wrong with bitsandbytes; None where its library is loaded and NF4 reproduces a tensor."""
    try:
        import torch
        from bitsandbytes.cextension import lib
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        if device == "cuda" and torch.version.cuda and not lib.compiled_with_cuda:
            return f"bitsandbytes did not load its library for CUDA {torch.version.cuda}"
        weights = torch.linspace(-1, 1, 256, device=device).reshape(4, 64)
        packed, state = quantize_4bit(weights, blocksize=64, quant_type="nf4", compress_statistics=True)
        difference = float((dequantize_4bit(packed, state) - weights).abs().max())
    except Exception as error:
        return f"bitsandbytes fails: {kind_and_line(error)}"
    # the widest gap between NF4 levels is 0.3, and the scale of a block is itself rounded to 8 bits
    return None if difference < 0.2 else f"bitsandbytes is wrong: a tensor comes back from NF4 off by {difference:.2f}"


def keep_layout() -> None:
    """Layers created from now on keep the layout of their 4-bit weights.

    Read in bitsandbytes 0.50.0 and 0.50.2: on CPUs with AVX512-BF16, Linear4bit asks `has_avx512bf16` when it is
    made, and then its first pass without gradients repacks the weights in place. Training after that fails, merging
    is wrong.
    """
    import bitsandbytes

    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False


def is_four_bit(weight: Any) -> bool:
    """Read in bitsandbytes 0.50.0 and 0.50.2: a packed weight carries its scales as `quant_state`."""
    return getattr(weight, "quant_state", None) is not None


def to_float32(weight: torch.Tensor) -> torch.Tensor:
    """A weight in float32 on the CPU; a 4-bit one as the forward pass dequantizes it."""
    import torch

    if not is_four_bit(weight):
        return weight.detach().to("cpu", torch.float32, copy=True)
    from bitsandbytes.functional import dequantize_4bit

    packed: Any = weight
    return torch.as_tensor(dequantize_4bit(packed.data, packed.quant_state)).to("cpu", torch.float32)
