"""GGUF files from a transformers folder, tensor by tensor.

Tensors equal those of llama.cpp's converter byte for byte; one at a time is in memory.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qreason.errors import InputError, ModelError, first_line
from qreason.export.architecture import (
    ANEW,
    architecture_metadata,
    extra_tensors,
    gguf_names,
    read_config,
    to_engine,
)
from qreason.export.vocabulary import tokenizer_metadata
from qreason.machine.progress import progress_bar
from qreason.recipe.settings import GGUF_TYPES

if TYPE_CHECKING:
    import numpy

FLOATS = ("f32", "f16", "bf16")
BYTES = dict(zip(GGUF_TYPES, (4.0, 2.0, 2.0, 1.07, 0.9, 0.8, 0.8, 0.75, 0.75, 0.65, 0.6), strict=True))
"""Bytes per weight at most; more than the names suggest, because the embedding is stored in a finer type."""
Tensor = tuple[str, list[int], Any, Callable[[], Any]]
"""Name in GGUF, shape, GGUF type, a function that loads it."""
ROWS = 8192
"""Rows encoded at a time: in float32 a large embedding takes a gigabyte, and encoding it several."""


def write_model(source: Path, out: Path, kind: str, name: str) -> None:
    """A transformers folder -> one GGUF file of a type of FILE_TYPES.

    Raises ModelError unless it is of a family that llama.cpp computes alike, InputError without disk space.
    """
    from qreason.model.load import load_tokenizer

    config = read_config(source)
    shapes, load = open_tensors(source)
    kept = without_tied_output(shapes, config, load)
    names = gguf_names(config, kept)
    tensors: list[Tensor] = [
        (names[key], shapes[key], tensor_type(kind, shapes[key]), to_engine(config, key, partial(load, key)))
        for key in kept
    ]
    for extra, values in extra_tensors(config).items():
        tensors.append((extra, list(values.shape), tensor_type("f32", list(values.shape)), values.clone))
    vocabulary = tokenizer_metadata(load_tokenizer(str(source)), config.vocab_size, str(source))
    write_file(out, config.model_type, {**architecture_metadata(config, name, kind), **vocabulary}, tensors)


def write_file(out: Path, family: str, metadata: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
    """A GGUF file from its header and its tensors.

    Raises InputError without disk space, ModelError for values that float16 cannot hold.
    """
    import gguf

    writer = gguf.GGUFWriter(None, family)
    for key, value in metadata.items():
        add_value(writer, key, value)
    with progress_bar(f"write {out.name.partition('.gguf')[0]}", total=len(tensors)) as bar:
        for name, shape, kind, load in tensors:
            writer.add_tensor(name, encoded_later(name, shape, kind, load, bar.advance), raw_dtype=kind)
        check_space(out.parent, sum(tensor.nbytes for tensor in writer.tensors[0].values()))
        try:
            writer.write_header_to_file(out)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise InputError(f"{out}: no space left on the disk; free some and run the export again") from error
            raise
        finally:
            writer.close()


def add_value(writer: Any, key: str, value: Any) -> None:
    """One key of the header, in the GGUF type of its Python type."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)


def encoded_later(
    name: str, shape: list[int], kind: Any, load: Callable[[], Any], on_tensor: Callable[[int], None]
) -> Any:
    """A tensor in a GGUF type, loaded and encoded when it is written."""
    import gguf
    import numpy

    def encode() -> numpy.ndarray[Any, Any]:
        parts = [gguf.quants.quantize(rows.float().numpy(), kind) for rows in load().split(ROWS)]
        data: numpy.ndarray[Any, Any] = numpy.concatenate(parts)
        if kind.name == "F16" and not numpy.isfinite(data).all():
            raise ModelError(f"{name}: has values that float16 cannot hold; export bf16 or f32 in place of f16")
        on_tensor(1)
        return data

    dtype = {"F32": numpy.float32, "F16": numpy.float16}.get(kind.name, numpy.uint8)
    stored = gguf.quant_shape_to_byte_shape(shape, kind) if dtype is numpy.uint8 else shape
    empty = gguf.LazyNumpyTensor.meta_with_dtype_and_shape(dtype, tuple(stored))
    return gguf.LazyNumpyTensor(meta=empty, func=encode)


def check_space(folder: Path, needed: int) -> None:
    """InputError where the disk has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: no disk space: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; free some, or "
            "export fewer types"
        )


# --- what is read ----------------------------------------------------------------------------------


def open_tensors(folder: Path) -> tuple[dict[str, list[int]], Callable[[str], Any]]:
    """A folder's safetensors: (name -> shape, in alphabetical order; a function that reads a tensor by name).

    The file is mapped for one tensor at a time: the pages of an open map stay in memory.
    """
    from safetensors import safe_open

    found: dict[str, tuple[Path, list[int]]] = {}
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as stored:
                found |= {
                    name: (file, list(stored.get_slice(name).get_shape()))
                    for name in stored.keys()  # noqa: SIM118
                }
        except Exception as error:
            raise ModelError(f"{file}: damaged ({first_line(error)[:200]}); {ANEW}") from error
    if not found:
        raise ModelError(f"{folder}: no *.safetensors in it; save the model with save_pretrained")

    def load(name: str) -> Any:
        with safe_open(found[name][0], framework="pt") as stored:
            return stored.get_tensor(name)

    return {name: found[name][1] for name in sorted(found)}, load


def without_tied_output(shapes: Mapping[str, list[int]], config: Any, load: Callable[[str], Any]) -> list[str]:
    """Names of the tensors to write; ModelError for an output layer that is tied in config.json only."""
    if not (config.tie_word_embeddings and "lm_head.weight" in shapes):
        return list(shapes)
    if not load("lm_head.weight").equal(load("model.embed_tokens.weight")):
        raise ModelError(
            "lm_head.weight differs from the embedding although config.json says tie_word_embeddings; "
            "set it to false there, or save the model again"
        )
    return [name for name in shapes if name != "lm_head.weight"]


# --- types ------------------------------------------------------------------------------------------


def tensor_type(kind: str, shape: list[int]) -> Any:
    """The GGUF type of one tensor in a file of this type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[kind.upper()]
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16
