"""Folding adapters into a float32 copy of their base, storing it, and measuring how far two models differ."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qreason.errors import InputError, ModelError, RunFolderError, TrainingError, first_line
from qreason.machine.files import read_json
from qreason.machine.hardware import GIB, Hardware, free_bytes
from qreason.machine.rows import free_memory
from qreason.model.compat.bitsandbytes import to_float32
from qreason.model.compat.noise import MISSING_KEYS, TIED, without
from qreason.model.compat.transformers import unquantized_config
from qreason.model.load import cannot_load, locate
from qreason.model.resident import Resident
from qreason.recipe.sections import Model
from qreason.recipe.settings import Merge
from qreason.types import Reply

if TYPE_CHECKING:
    import torch

LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE", "NOTICE.txt")
CHECKED_TOKENS = 128
"""Tokens of a reply that two models are compared on: a distribution over a large vocabulary is half a megabyte."""
ROOM = 1.4
"""Memory for folding and comparing a model, as a multiple of its weights."""
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Bytes per weight of a stored model."""

# --- the base in float32 ---------------------------------------------------------------------------


def float32_copy(resident: Resident) -> Any:
    """The bare base as it was trained on, in float32 on the CPU; 4-bit weights dequantized, one layer at a time."""
    import torch

    resident.remove_adapter()
    config = unquantized_config(resident.model)
    weights = {name: to_float32(weight) for name, weight in resident.model.named_parameters()}
    model = type(resident.model).from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    model.generation_config = resident.model.generation_config
    return model.requires_grad_(False).eval()


def float32_original(model: Model) -> Any:
    """The base as it is stored, never quantized, in float32 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        base = AutoModelForCausalLM.from_pretrained(locate(model.base), dtype=torch.float32, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{model.base}: {cannot_load(error)}") from error
    return base.requires_grad_(False).eval()


def to_gpu(model: Any, hardware: Hardware) -> Any:
    """A float32 model on the GPU, where there is one whose free memory holds it; else as it is."""
    import torch

    if hardware.device != "cuda":
        return model
    free_memory()
    room = torch.cuda.mem_get_info()[0]
    return model.to("cuda") if ROOM * BYTES["float32"] * model.num_parameters() < room else model


# --- adapters --------------------------------------------------------------------------------------


def check_adapter(folder: Path, base: Mapping[str, str]) -> None:
    """ModelError for an adapter of another base (`id` and `fingerprint`), or a folder without one."""
    try:
        config = read_json(folder / "adapter_config.json", dict[str, Any])
    except RunFolderError:
        raise ModelError(f"{folder}: no adapter there (adapter_config.json); give its folder, or a stage's") from None
    try:
        own = read_json(folder.parent.parent / "manifest.json")["base"]
    except (RunFolderError, KeyError, TypeError):
        own = None
    if own is not None:
        if own["fingerprint"] != base["fingerprint"]:
            raise ModelError(
                f"{folder}: trained on other weights ({own['id']}) than this run's base ({base['id']}); "
                "give an adapter of the same base"
            )
        return
    name = config.get("base_model_name_or_path")
    if name and locate(name) != locate(base["id"]):
        raise ModelError(
            f"{folder}: an adapter for {name}, not for {base['id']}; give an adapter of the same base, or, if both are "
            "the same model, write this run's name of it into adapter_config.json"
        )


def put_on(base: Any, adapters: Sequence[Path], settings: Merge, seed: int) -> Any:
    """A PEFT model with the adapters active, one after the other or blended into one; nothing is folded yet.

    Raises ModelError where an adapter does not fit. DARE drops weights at random: `seed` makes it the same each time.
    """
    import torch
    from peft import PeftModel

    names = [f"adapter{position}" for position in range(len(adapters))]
    untie(base, adapters)
    model: Any = None
    for name, folder in zip(names, adapters, strict=True):
        try:
            with without(MISSING_KEYS, TIED):  # check_weights and `untie` handle both
                if model is None:
                    model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
                else:
                    model.load_adapter(str(folder), name)
        except Exception as error:
            raise ModelError(f"{folder}: does not fit the base ({first_line(error)[:200]})") from error
        check_weights(model, name, folder)
    if settings.blend:
        torch.manual_seed(seed)
        weights = settings.weights or [1 / len(names)] * len(names)
        options = {} if settings.density is None else {"density": settings.density}
        try:
            model.add_weighted_adapter(names, weights, "blend", combination_type=settings.blend, **options)
        except Exception as error:
            raise ModelError(
                f"these adapters cannot be blended by {settings.blend} ({first_line(error)[:200]})"
            ) from error
        names = ["blend"]
    model.base_model.set_adapter(names)
    return model.requires_grad_(False).eval()


def untie(base: Any, adapters: Sequence[Path]) -> None:
    """Untie output layer and embedding where an adapter changes only one of them."""
    import torch

    if not getattr(base.config, "tie_word_embeddings", False):
        return
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    tied = {name.rpartition(".")[2] for name, module in base.named_modules() if module in (inputs, outputs)}
    if any(f".{name}.lora" in key for folder in adapters for key in adapter_keys(folder) for name in tied):
        outputs.weight = torch.nn.Parameter(outputs.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False


def adapter_keys(folder: Path) -> set[str]:
    """The names of an adapter's weights."""
    from safetensors import safe_open

    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
            return set(stored.keys())
    except Exception as error:
        raise ModelError(f"{folder}: adapter_model.safetensors cannot be read ({first_line(error)})") from error


def check_weights(model: Any, name: str, folder: Path) -> None:
    """ModelError unless each weight of an adapter has its place: PEFT leaves others out with a warning."""
    from peft import get_peft_model_state_dict

    wanted = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    if odd := adapter_keys(folder) ^ wanted:
        raise ModelError(
            f"{folder}: does not fit the base ({min(odd)} has no counterpart); give the base it was trained on"
        )


def fold(model: Any) -> Any:
    """The base of a PEFT model with the active adapters added into its weights."""
    with without(TIED):  # `untie` has handled them
        return model.merge_and_unload(safe_merge=True, adapter_names=list(model.base_model.active_adapters))


# --- storing ---------------------------------------------------------------------------------------


def check_room(folder: Path, parameters: int, dtype: str, copies: int) -> None:
    """InputError where the disk cannot hold so many copies of a model."""
    needed, free = int(parameters * BYTES[dtype] * copies * 1.05), free_bytes(folder)
    if free < needed:
        raise InputError(
            f"{folder}: {needed / GIB:.1f} GiB are needed for the merged model and {free / GIB:.1f} GiB are free; "
            "make room, or give a folder on another disk with --out"
        )


def store(model: Any, tokenizer: Any, folder: Path, settings: Merge, base: str) -> None:
    """Write a transformers folder: weights, tokenizer with its template, generation config, the base's licence."""
    import torch

    try:
        model.to(getattr(torch, settings.dtype)).save_pretrained(str(folder), max_shard_size=settings.max_shard_size)
        tokenizer.save_pretrained(str(folder))
        for file in licence_files(base):
            shutil.copyfile(file, folder / file.name)
    except Exception as error:  # for a full disk safetensors raises its own exceptions
        raise TrainingError(
            f"{folder}: the merged model could not be written ({first_line(error)[:200]}); make room, or give a folder "
            "on another disk with --out"
        ) from error


def licence_files(base: str) -> list[Path]:
    """The licence files of a base: those in its folder, or those that can be downloaded from the Hub."""
    from huggingface_hub import hf_hub_download

    folder, found = Path(locate(base)), []
    if folder.is_dir():
        return [folder / name for name in LICENCES if (folder / name).is_file()]
    for name in LICENCES:
        with suppress(Exception):  # not there, or no connection
            found.append(Path(hf_hub_download(base, name)))
    return found


# --- comparing -------------------------------------------------------------------------------------


def log_probabilities(model: Any, replies: Sequence[Reply]) -> list[torch.Tensor]:
    """For each reply the log-probabilities of its tokens, teacher-forced: (tokens, vocabulary), float32, on the CPU."""
    import torch

    rows = []
    with torch.no_grad():
        for reply in replies:
            tokens = [*reply.prompt_ids, *reply.token_ids[:CHECKED_TOKENS]]
            logits = model(input_ids=torch.tensor([tokens], device=model.device)).logits[0]
            rows.append(torch.log_softmax(logits[len(reply.prompt_ids) - 1 : -1].float(), -1).cpu())
    return rows


def divergence(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """KL(one || other) in nats per token; in float64, or rounding would hide small differences."""
    total = sum(float((p.double().exp() * (p.double() - q.double())).sum()) for p, q in zip(one, other, strict=True))
    return total / sum(map(len, one))
