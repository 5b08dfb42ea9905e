"""Loading a base and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qreason.errors import ModelError, first_line
from qreason.machine import ranks
from qreason.machine.files import hash_files
from qreason.machine.hardware import Hardware
from qreason.model.backends import Name
from qreason.model.compat.bitsandbytes import four_bit_trouble, keep_layout
from qreason.model.compat.unsloth import load_with_unsloth
from qreason.model.templates import fit_template
from qreason.recipe.sections import Lora, Model

EMBEDDED = {"qreason/tiny": Path(__file__).parents[1] / "assets" / "tiny"}
"""Bases that come with the package: name -> folder."""
TURN_END = "<|im_end|>"
"""The token that ends a turn of Qwen's chats."""
PADS = ("<|finetune_right_pad_id|>", "<|vision_pad|>", "<|pad|>", "<pad>", "[PAD]")
"""Tokens of Llama 3, of R1's Qwen and others that no chat uses, where a base names no padding token of its own."""


def locate(base: str) -> str:
    """Where the weights of a base are: the folder of an embedded one, else what was given."""
    return str(EMBEDDED.get(base, base))


def is_here(base: str) -> bool:
    """Whether a base's files are on this machine: embedded, a folder, or fetched from the Hub before."""
    if base in EMBEDDED or Path(base).is_dir() or base.startswith((".", "/", "~")):  # a missing folder is a problem
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(base, "config.json"), str)
    except HFValidationError:
        return True


def load_tokenizer(base: str, *, thinking: bool = False) -> Any:
    """The base's tokenizer, padding on the left; `thinking`: its chat template asks for thoughts where it knows them.

    Raises ModelError without a chat template, or where padding would hide the end of a reply from the loss.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(locate(base), trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{base}: {cannot_load(error)}") from error
    if tokenizer.pad_token_id == tokenizer.eos_token_id and TURN_END in (tokenizer.chat_template or ""):
        tokenizer.eos_token = TURN_END  # a base variant: its own mark ends a document, not a turn
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        spare = tokenizer.get_added_vocab().keys() & set(PADS)
        tokenizer.pad_token = min(spare, key=PADS.index, default=tokenizer.pad_token)
    if not tokenizer.chat_template:
        raise ModelError(f"{base}: the tokenizer has no chat template; take the instruct variant of the model")
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        missing = "end-of-reply token (eos_token)" if tokenizer.eos_token_id is None else "padding token (pad_token)"
        raise ModelError(
            f"{base}: the tokenizer has no {missing}, so training cannot tell where a reply ends; set one in the "
            "base's tokenizer_config.json, a special token that chats do not use, or take the instruct variant"
        )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ModelError(
            f"{base}: the padding token is the end-of-reply token ({tokenizer.eos_token}), so training would unlearn "
            "stopping; set another pad_token in the base's tokenizer_config.json, or take the instruct variant"
        )
    tokenizer.padding_side = "left"
    fit_template(base, tokenizer, thinking=thinking)
    return tokenizer


def read_base_config(base: str) -> Any:
    """The configuration of a base; ModelError where it has none that can be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(locate(base), trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{base}: {cannot_load(error)}") from error


def check_vocabulary(base: str, tokenizer: Any) -> None:
    """ModelError where the tokenizer has tokens beyond the rows that the config gives the model's embedding."""
    rows = read_base_config(base).get_text_config().vocab_size
    ids = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    if ids:
        first = min(ids, key=lambda token: ids[token])
        raise ModelError(
            f"{base}: its tokenizer has {max(ids.values()) + 1} tokens, its embedding {rows} rows: '{first}' and "
            f"{len(ids) - 1} more have none; take tokenizer and weights from the same model, or resize its embedding"
        )


def load_base(model: Model, hardware: Hardware, backend: Name = "plain") -> Any:
    """The frozen causal model of a recipe in the machine's number format, 4-bit where the recipe says nf4."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = locate(model.base)
    options: dict[str, Any] = {"dtype": getattr(torch, hardware.dtype), "attn_implementation": hardware.attention}
    if hardware.device == "cuda":
        options["device_map"] = {"": ranks.gpu()}
    if model.quantization == "nf4":
        if trouble := four_bit_trouble(hardware.device):
            raise ModelError(f"model.quantization is nf4, but {trouble}; `qreason doctor` shows the cure")
        options["quantization_config"] = four_bit(hardware)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind = (config.architectures or ["nothing"])[0]
        if not kind.endswith(("ForCausalLM", "LMHeadModel")):
            raise ModelError(f"{model.base}: a {kind}, not a causal language model; give a text generation model")
        if packed := check_packed(model, config):
            config.quantization_config = packed | {"bnb_4bit_compute_dtype": hardware.dtype}
            options["config"] = config
            del options["quantization_config"]  # the base has its own
        if backend == "unsloth":
            base = load_with_unsloth(path, model, hardware, config.get_text_config().max_position_embeddings)
        else:
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            base, told = AutoModelForCausalLM.from_pretrained(path, **options, trust_remote_code=False)
            check_weights(model.base, told)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{model.base}: {cannot_load(error)}") from error
    base.requires_grad_(False)
    return base.eval()


def stored_quantization(config: Any) -> dict[str, Any]:
    """How the weights of a base are stored, as its config.json says; empty where they are not quantized."""
    packed = getattr(config, "quantization_config", None) or {}
    return dict(packed if isinstance(packed, dict) else packed.to_dict())


def check_packed(model: Model, config: Any) -> dict[str, Any]:
    """How a base's weights are stored, where that is bitsandbytes' 4 bits; empty where they are not quantized.

    ModelError for any other quantization, and where the recipe takes the base for one of 16 bits.
    """
    packed = stored_quantization(config)
    if not packed:
        return {}
    method = packed.get("quant_method", "some method")
    if not packed.get("load_in_4bit"):
        raise ModelError(
            f"{model.base}: its weights are stored quantized ({getattr(method, 'value', method)}), and can neither "
            "be quantized again nor merged exactly; give the original 16-bit model with model.quantization: nf4"
        )
    if model.quantization == "none":
        raise ModelError(f"{model.base}: its weights are stored in 4 bits; set model.quantization: nf4")
    if model.lora.init == "quantization_error":
        raise ModelError(
            f"{model.base}: its weights are stored in 4 bits, so their quantization error is not known; leave "
            "model.lora.init out, or give the original 16-bit model"
        )
    return packed


def check_weights(base: str, told: Mapping[str, Any]) -> None:
    """ModelError where weights are missing or have another shape than the config says, by transformers' report."""
    troubles = [
        f"{name} has the shape {list(found)}, not {list(wanted)}" for name, found, wanted in told["mismatched_keys"]
    ]
    troubles += [f"{name} is missing" for name in sorted(told["missing_keys"])]
    if troubles:
        more = f" (and {len(troubles) - 1} more)" if len(troubles) > 1 else ""
        raise ModelError(f"{base}: its weights do not fit its config.json: {troubles[0]}{more}; get the model again")


def four_bit(hardware: Hardware) -> Any:
    """NF4 with double quantization (QLoRA, Dettmers et al. 2023)."""
    import torch
    from transformers import BitsAndBytesConfig

    keep_layout()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, hardware.dtype),
    )


def lora_config(lora: Lora) -> Any:
    """The adapter of a recipe as PEFT's LoraConfig."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )


def cannot_load(error: Exception) -> str:
    reason = first_line(error)[:200]
    return f"cannot be loaded as a model ({reason}); give qreason/tiny, a Hub id or a folder with the weights"


def fingerprint(base: str) -> str:
    """Identifies the weights of a base: a hash of a folder's files, or the commit of a Hub model."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(locate(base))
    if not folder.is_dir():
        cached = try_to_load_from_cache(base, "config.json")  # …/snapshots/COMMIT/config.json
        return f"commit:{Path(cached).parent.name if isinstance(cached, str) else 'unknown'}"
    return f"sha256:{hash_files(sorted(folder.glob('*.safetensors')) or sorted(folder.glob('*.bin')))}"
