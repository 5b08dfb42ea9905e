"""bitsandbytes: whether it works here, and what is bent in it."""

from __future__ import annotations

from qreason.errors import kind_and_line


def four_bit_trouble(device: str) -> str | None:
    """What is wrong with bitsandbytes; None where its library is loaded and a tensor comes back from NF4."""
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
