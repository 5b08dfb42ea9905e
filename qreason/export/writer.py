"""Our GGUF writer for the Qwen2 family: a transformers folder, tensor by tensor.

Tensors are those of llama.cpp's own converter, byte for byte; only one of them is in memory at a time.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qreason.errors import InputError, ModelError
from qreason.export.vocabulary import read_vocabulary

if TYPE_CHECKING:
    import numpy

ARCHITECTURE = "qwen2"
WRITTEN = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""Types the writer makes itself -> the type of its matrices; vectors are always F32."""
BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 1.07,
    "q6_k": 0.9,
    "q5_k_m": 0.8,
    "q5_k_s": 0.8,
    "q4_k_m": 0.75,
    "q4_k_s": 0.75,
    "q3_k_m": 0.65,
    "q2_k": 0.6,
}
"""At most so many bytes a weight; more than the names say, for the embedding is kept finer than the rest."""
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
ROWS = 8192
"""Rows that are encoded at a time: in float32 a large embedding takes a gigabyte, and its encoding several."""
FLOATS = ("f32", "f16", "bf16")
NATIVE = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
"""How the weights of a folder are stored -> the type that holds them without loss."""


def write_model(
    source: Path,
    out: Path,
    kind: str,
    name: str,
    *,
    on_start: Callable[[int], None] = lambda tensors: None,
    on_tensor: Callable[[int], None] = lambda tensors: None,
) -> None:
    """A transformers folder -> one GGUF file of a type of WRITTEN.

    Raises ModelError for anything but a Qwen2 model llama.cpp computes alike, InputError without disk space.
    """
    import gguf

    config = read_config(source)
    kinds = {}
    shapes, load = open_tensors(source)
    for tensor in ordered(shapes, config, load):
        kinds[tensor] = tensor_type(kind, shapes[tensor])
    sizes = {tensor: byte_shape(shapes[tensor], kinds[tensor]) for tensor in kinds}
    check_space(out.parent, sum(map(count_bytes, sizes.values())))
    on_start(len(sizes))
    names = gguf_names(config, kinds)
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    for key, value in {**architecture_metadata(config, name, kind), **tokenizer_metadata(source, config)}.items():
        add_value(writer, key, value)
    for tensor, shape in sizes.items():
        numbers, bytes_ = shape if kinds[tensor].name == "Q8_0" else shapes[tensor], count_bytes(shape)
        add_tensor(writer, names[tensor], numbers, bytes_, kinds[tensor])
    with written(writer, out):
        for tensor in sizes:
            writer.write_tensor_data(encode(load(tensor), kinds[tensor], tensor))
            on_tensor(1)


# --- what is read ----------------------------------------------------------------------------------


def native_type(config: Any) -> str:
    """The type that holds a folder's weights as they are."""
    return NATIVE[str(config.dtype).removeprefix("torch.")]


def read_config(folder: Path) -> Any:
    """The configuration of a folder; ModelError where llama.cpp's `qwen2` would compute something else."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder))
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
    """(name -> shape, name -> the tensor, read when it is asked for) of a folder's safetensors.

    The file is mapped for one tensor at a time: pages of a map that stays open stay in memory.
    """
    from safetensors import safe_open

    home: dict[str, Path] = {}
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                home[name], shapes[name] = file, list(stored.get_slice(name).get_shape())
    if not home:
        raise ModelError(f"{folder}: no *.safetensors in it; save the model with save_pretrained")

    def load(name: str) -> Any:
        with safe_open(home[name], framework="pt") as stored:
            return stored.get_tensor(name)

    return shapes, load


def ordered(shapes: Mapping[str, list[int]], config: Any, load: Callable[[str], Any]) -> list[str]:
    """Names of the tensors to write; ModelError for an output layer that is tied by name only."""
    kept = sorted(shapes)
    if config.tie_word_embeddings and "lm_head.weight" in shapes:
        if not load("lm_head.weight").equal(load("model.embed_tokens.weight")):
            raise ModelError(
                "lm_head.weight differs from the embedding although config.json says tie_word_embeddings; "
                "set it to false there, or save the model again"
            )
        kept.remove("lm_head.weight")
    return kept


# --- what is written -------------------------------------------------------------------------------


def architecture_metadata(config: Any, name: str, kind: str) -> dict[str, Any]:
    """The keys under `general.` and `qwen2.`. Nothing of generation_config: servers would sample by it unasked."""
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


def tokenizer_metadata(source: Path, config: Any) -> dict[str, Any]:
    from qreason.model.load import load_tokenizer

    return read_vocabulary(load_tokenizer(str(source)), config.vocab_size, str(source)).metadata


def add_value(writer: Any, key: str, value: Any) -> None:
    """One key of the header, in the GGUF type of its Python type."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)


def gguf_names(config: Any, names: Any) -> dict[str, str]:
    """Name in transformers -> name in GGUF; ModelError for a tensor that Qwen2 does not have."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    if unknown := [name for name, known in found.items() if known is None]:
        raise ModelError(f"{unknown[0]}: no tensor of a Qwen2 model; it cannot be exported")
    return found


def tensor_type(kind: str, shape: list[int]) -> Any:
    import gguf

    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    fits = kind != "q8_0" or shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0] == 0
    return gguf.GGMLQuantizationType[WRITTEN[kind] if fits else "F16"]


def byte_shape(shape: list[int], kind: Any) -> tuple[int, ...]:
    """The shape with the last dimension in bytes."""
    import gguf

    shape_in_bytes: tuple[int, ...] = gguf.quant_shape_to_byte_shape(shape, kind)
    return shape_in_bytes


def count_bytes(shape: Any) -> int:
    product = 1
    for length in shape:
        product *= int(length)
    return product


def add_tensor(writer: Any, name: str, shape: Any, count: int, kind: Any) -> None:
    import numpy

    writer.add_tensor_info(name, shape, numpy.uint8 if kind.name == "Q8_0" else numpy.float32, count, raw_dtype=kind)


def encode(tensor: Any, kind: Any, name: str) -> numpy.ndarray[Any, Any]:
    """A torch tensor as the bytes of a GGUF type; ModelError where float16 cannot hold it."""
    import gguf
    import numpy

    parts = [gguf.quants.quantize(rows.float().numpy(), kind) for rows in tensor.split(ROWS)]
    data: numpy.ndarray[Any, Any] = numpy.concatenate(parts)
    if kind.name == "F16" and not numpy.isfinite(data).all():
        raise ModelError(f"{name}: has values that float16 cannot hold; export bf16 or f32 in place of f16")
    return data


@contextmanager
def written(writer: Any, out: Path) -> Iterator[None]:
    """The header in the file, and the file closed afterwards; a full disk is told as one."""
    try:
        writer.write_header_to_file(out)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"{out}: no space left on the disk; free some and run the export again") from error
        raise
    finally:
        writer.close()


def check_space(folder: Path, needed: int) -> None:
    """InputError before anything is written, where the disk cannot hold so many bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: no disk space: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; free some, or "
            "export fewer types"
        )
