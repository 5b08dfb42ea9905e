"""GGUF files of the Qwen2 family from a transformers folder, tensor by tensor.

Tensors equal those of llama.cpp's converter byte for byte; one at a time is in memory.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qreason.errors import InputError, ModelError, first_line
from qreason.machine.progress import progress_bar
from qreason.recipe.settings import GGUF_TYPES

if TYPE_CHECKING:
    import numpy

FLOATS = ("f32", "f16", "bf16")
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""Types that are written here, with vectors in F32 -> llama.cpp's name of the file type."""
BYTES = dict(zip(GGUF_TYPES, (4.0, 2.0, 2.0, 1.07, 0.9, 0.8, 0.8, 0.75, 0.75, 0.65, 0.6), strict=True))
"""Bytes per weight at most; more than the names suggest, because the embedding is stored in a finer type."""
NATIVE = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
"""Number format of a folder's weights -> the type that holds them without loss."""
ANEW = "restore it from a copy, or make it anew by training or `qreason merge RUN`"
ROWS = 8192
"""Rows encoded at a time: in float32 a large embedding takes a gigabyte, and encoding it several."""


def write_model(source: Path, out: Path, kind: str, name: str) -> None:
    """A transformers folder -> one GGUF file of a type of FILE_TYPES.

    Raises ModelError unless it is a Qwen2 model that llama.cpp computes alike, InputError without disk space.
    """
    from qreason.model.load import load_tokenizer

    config = read_config(source)
    shapes, load = open_tensors(source)
    kept = without_tied_output(shapes, config, load)
    names = gguf_names(config, kept)
    tensors = [(names[key], shapes[key], tensor_type(kind, shapes[key]), partial(load, key)) for key in kept]
    vocabulary = tokenizer_metadata(load_tokenizer(str(source)), config.vocab_size, str(source))
    write_file(out, {**architecture_metadata(config, name, kind), **vocabulary}, tensors)


def write_file(
    out: Path, metadata: Mapping[str, Any], tensors: Sequence[tuple[str, list[int], Any, Callable[[], Any]]]
) -> None:
    """A GGUF file from its header and its tensors: (name, shape, GGUF type, function that loads it).

    Raises InputError without disk space, ModelError for values that float16 cannot hold.
    """
    import gguf

    writer = gguf.GGUFWriter(None, "qwen2")
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


def native_type(config: Any) -> str:
    """The type that holds a folder's weights without loss."""
    return NATIVE[str(config.dtype).removeprefix("torch.")]


def read_config(folder: Path) -> Any:
    """The configuration of a folder; ModelError where llama.cpp's `qwen2` would compute something else."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder / 'config.json'}: damaged ({first_line(error)[:200]}); {ANEW}") from error
    if config.model_type != "qwen2":
        raise ModelError(f"{folder}: a {config.model_type} model; export writes the Qwen2 family (qwen2) only")
    rope = config.rope_parameters
    unlike = {
        f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
        f"rope_type {rope['rope_type']}": rope["rope_type"] != "default",
        "use_sliding_window": config.use_sliding_window,
    }
    if found := [what for what, differs in unlike.items() if differs]:
        raise ModelError(f"{folder}: {', '.join(found)} cannot be exported; llama.cpp would compute something else")
    return config


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


# --- names, types and header -----------------------------------------------------------------------


def gguf_names(config: Any, names: Sequence[str]) -> dict[str, str]:
    """Name in transformers -> name in GGUF; ModelError for a tensor that Qwen2 does not have."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    if unknown := [name for name, known in found.items() if known is None]:
        raise ModelError(f"{unknown[0]}: no tensor of a Qwen2 model; it cannot be exported")
    return found


def tensor_type(kind: str, shape: list[int]) -> Any:
    """The GGUF type of one tensor in a file of this type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[kind.upper()]
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def architecture_metadata(config: Any, name: str, kind: str) -> dict[str, Any]:
    """The keys under `general.` and `qwen2.`. Nothing from generation_config: servers would apply it."""
    import gguf

    return {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(gguf.LlamaFileType[FILE_TYPES[kind]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "qwen2.block_count": config.num_hidden_layers,
        "qwen2.context_length": config.max_position_embeddings,
        "qwen2.embedding_length": config.hidden_size,
        "qwen2.feed_forward_length": config.intermediate_size,
        "qwen2.attention.head_count": config.num_attention_heads,
        "qwen2.attention.head_count_kv": config.num_key_value_heads,
        "qwen2.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "qwen2.rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }


def tokenizer_metadata(tokenizer: Any, rows: int, name: str) -> dict[str, Any]:
    """The keys under `tokenizer.`, in llama.cpp's names, for an embedding of `rows` rows.

    Raises ModelError where llama.cpp would split text differently, or for more tokens than the embedding has rows.
    """
    from gguf import TokenType

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    check_splitting(parts, name)
    tokens = {number: (token, TokenType.NORMAL) for token, number in parts["model"]["vocab"].items()}
    for token in parts["added_tokens"]:
        tokens[token["id"]] = token["content"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if (last := max(tokens)) >= rows:
        raise ModelError(
            f"{name}: the tokenizer was extended ('{tokens[last][0]}' has id {last}, the embedding {rows} rows); "
            "export with the tokenizer of the base, or resize the base's embedding before training"
        )
    every = [tokens.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(rows)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [token for token, _ in every],
        "tokenizer.ggml.token_type": [int(kind) for _, kind in every],
        "tokenizer.ggml.merges": [
            pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]
        ],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        # never added; without it llama.cpp would take the token with id 11
        "tokenizer.ggml.bos_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def check_splitting(parts: dict[str, Any], name: str) -> None:
    """ModelError unless words are split as by llama.cpp's pre-tokenizer `qwen2`."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    steps = (parts["pre_tokenizer"] or {}).get("pretokenizers", [])
    pattern = next((step["pattern"].get("Regex") for step in steps if step["type"] == "Split"), None)
    bytes_only = [step["type"] for step in steps] == ["Split", "ByteLevel"] and not steps[1]["add_prefix_space"]
    if parts["model"]["type"] != "BPE" or pattern != PRETOKENIZE_REGEX or not bytes_only:
        raise ModelError(f"{name}: the tokenizer does not cut words as Qwen2's does; only that one can be exported")
    if parts["normalizer"] not in (None, {"type": "NFC"}):
        raise ModelError(f"{name}: the tokenizer normalizes text ({parts['normalizer']['type']}); llama.cpp would not")
