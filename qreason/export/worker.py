"""Runs llama.cpp in a separate process, `python -m qreason.export.worker`, with its task as JSON on stdin.

A crash of llama.cpp does not end the export, and a model's memory is free when its process ends.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def serve(task: dict[str, Any]) -> None:
    """llama-server on a free port, whose address is the first line printed; it ends with its standard input."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = task["model"]
    if task["lora"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(task["lora"], 1.0)]
    params.n_parallel, params.n_ctx = task["slots"], task["slots"] * task["context"]
    params.n_gpu_layers, params.no_extra_bufts = 0, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = task["threads"]
    params.hostnames, params.port, params.ui, params.warmup = ["127.0.0.1"], 0, False, False
    params.use_jinja, params.fit_params, params.cache_prompt = True, False, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


def logits(task: dict[str, Any]) -> None:
    """The logits of each sequence from position `start` on, (tokens, vocabulary) float32, one .npy file each."""
    import numpy
    from cyllama.llama import llama_cpp

    class Model(llama_cpp.LlamaModel):  # type: ignore[misc]
        @property
        def n_vocab(self) -> int:  # the context asks its model for it, and cyllama 0.2.18 lacks it
            return int(self.get_vocab().n_vocab)

    llama_cpp.disable_logging()
    settings = llama_cpp.LlamaModelParams()
    settings.n_gpu_layers, settings.use_extra_bufts = 0, False
    model = Model(task["model"], settings, False)
    longest = max(len(sequence["ids"]) for sequence in task["sequences"])
    options = llama_cpp.LlamaContextParams()
    options.n_ctx = options.n_batch = longest
    options.n_ubatch = min(longest, 512)
    options.type_k = options.type_v = 0  # F32: the file is checked, not a rounded cache
    options.flash_attn_type = 0
    options.n_threads = options.n_threads_batch = task["threads"]
    context = llama_cpp.LlamaContext(model, options, False)
    for number, sequence in enumerate(task["sequences"]):
        ids, start = sequence["ids"], sequence["start"]
        context.kv_cache_clear()
        batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        batch.set_batch(ids, 0, True)
        context.decode(batch)
        rows = numpy.empty((len(ids) - start, model.n_vocab), dtype=numpy.float32)
        for row in range(len(rows)):
            rows[row] = context.get_logits_ith(start + row)
        numpy.save(Path(task["out"]) / f"{number}.npy", rows)
        print(number, flush=True)


def quantize(task: dict[str, Any]) -> None:
    """A float GGUF file -> one of a K-quant type."""
    from cyllama.llama import llama_cpp
    from gguf import LlamaFileType

    llama_cpp.disable_logging()
    settings = llama_cpp.LlamaModelQuantizeParams()
    settings.ftype = int(LlamaFileType[f"MOSTLY_{task['kind'].upper()}"])
    settings.nthread = task["threads"]
    llama_cpp.model_quantize(task["model"], task["out"], settings)


TASKS = {"serve": serve, "logits": logits, "quantize": quantize}

if __name__ == "__main__":
    line = json.loads(sys.stdin.readline())
    TASKS[line["task"]](line)
