"""The checks of quantized files and of the adapter's file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qreason.errors import ExportError
from qreason.export.architecture import from_engine, gguf_names
from qreason.export.engine import Server
from qreason.export.verify import Check, distance, named
from qreason.report.statistics import Interval, share

OWN_WEIGHTS_KL = 5e-3
"""Nats per token between llama.cpp and the file's own weights in float32: it rounds activations to 8 bits.

SmolLM2-135M, whose 30 layers round often, has 4.5e-3.
"""
QUANTIZED_KL = {"q8_0": 0.01, "q6_k": 0.05, "q5_k_m": 0.1, "q5_k_s": 0.1, "q4_k_m": 0.2, "q4_k_s": 0.2}
"""Nats per token from the verified file: about ten times that of the embedded model."""
MOST_KL = 2.0
"""The same for coarser types, whose loss is the user's choice: beyond it a file is broken rather than coarse."""
ADAPTER_LOGPROB = 0.1
"""Largest difference of a log-probability between llama.cpp with the GGUF adapter and PEFT."""
LIKELY = -7.0
"""Log-probability from which a token counts in the check of an adapter."""


def types_of(file: Path) -> dict[str, int]:
    """Tensor type -> share of the weights in percent, largest first: `Q4_K_M` is a mix, not always with Q4_K in it."""
    from gguf import GGUFReader

    counts: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    return {name: round(100 * count / counts.total()) for name, count in counts.most_common()}


def check_quantized(
    file: Path, kind: str, verified: Sequence[Path], found: Sequence[Path], accuracy: dict[str, float]
) -> Check:
    """The distance of the quantized model from the verified one, its tensor types and its accuracy."""
    far = distance(verified, found)
    most = QUANTIZED_KL.get(kind, MOST_KL)
    mix = " ".join(f"{name} {share}%" for name, share in types_of(file).items())
    figures = {"types": mix, **asdict(far), **accuracy}
    return Check(named(file), "quantized as expected", far.kl <= most, figures, f"kl {most:g}")


def check_own_weights(file: Path, own: Sequence[Path], found: Sequence[Path]) -> Check:
    """llama.cpp computes the same as transformers with the file's dequantized weights: file and kernels are sound."""
    far = distance(own, found)
    return Check(named(file), "as its own weights", far.kl <= OWN_WEIGHTS_KL, asdict(far), f"kl {OWN_WEIGHTS_KL:g}")


def take_weights(model: Any, file: Path) -> None:
    """Put the dequantized weights of a GGUF file into a transformers model, tensor by tensor."""
    import gguf
    import numpy
    import torch

    parameters = dict(model.named_parameters())  # a tied output layer is not named twice
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, inside in gguf_names(model.config, list(parameters)).items():
        tensor, parameter = stored[inside], parameters[name]
        weights = numpy.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=numpy.float32)
        rows = torch.from_numpy(weights.reshape(parameter.shape))
        parameter.data.copy_(from_engine(model.config, name, rows))


def check_adapter_file(
    file: Path, base: Path, trained: Any, prompts: Sequence[list[int]], context: int, tokens: int = 24
) -> Check:
    """llama.cpp with the base and the GGUF adapter predicts what PEFT predicts with the base and the adapter.

    `trained` is the PEFT model in float32. Compared are the log-probabilities of likely tokens along greedy replies.
    """
    import torch

    with Server(base, context, lora=file) as server:
        completions = [server.complete(prompt, tokens, top=10) for prompt in prompts]
    worst, compared = 0.0, 0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = [*prompt, *completion.tokens]
        with torch.no_grad():
            logits = trained(input_ids=torch.tensor([ids[:-1]], device=trained.device)).logits[0]
        own = torch.log_softmax(logits[len(prompt) - 1 :].double(), -1)
        for row, likely in zip(own, completion.logprobs, strict=False):
            for token, logprob in likely.items():
                if logprob > LIKELY:
                    worst, compared = max(worst, abs(float(row[token]) - logprob)), compared + 1
    if not compared:
        raise ExportError(f"{file}: llama.cpp gave no probabilities to compare")
    figures, bound = {"logprob_difference": worst, "compared": compared}, f"logprob_difference {ADAPTER_LOGPROB:g}"
    return Check(named(file), "same as PEFT", worst <= ADAPTER_LOGPROB, figures, bound)


def original_accuracy(accuracy: Mapping[str, float], rows: int) -> Interval:
    """The trained model's accuracy on the rows that every file answered, with its interval."""
    right = round(accuracy["adapter"] * rows)
    return share([True] * right + [False] * (rows - right))


def recommend(sizes: Mapping[str, int], accuracy: Mapping[str, float], rows: int) -> str | None:
    """The smallest type whose accuracy is not below the interval of the trained model's; None without a measurement.

    `sizes`: bytes of each finished file by its type.
    """
    measured = sizes.keys() & accuracy.keys()
    if not measured or "adapter" not in accuracy:
        return None
    low = original_accuracy(accuracy, rows)["low"]
    good = [kind for kind in measured if low is not None and accuracy[kind] >= low]
    return min(good, key=lambda kind: sizes[kind], default=None)
