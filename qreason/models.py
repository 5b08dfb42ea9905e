"""Tokenizer, base and adapters: one base resident in memory, at most one policy adapter on it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qreason.attention import grouped_queries
from qreason.backends import Name, adapt_with_unsloth, load_with_unsloth, patch_with_unsloth
from qreason.errors import ModelError, first_line
from qreason.hardware import Hardware
from qreason.sections import Lora, Model

if TYPE_CHECKING:
    import torch

EMBEDDED = {"qreason/tiny": Path(__file__).parent / "assets" / "tiny"}
"""Bases that come with the package: name -> folder."""
TURN_END = "<|im_end|>"
"""What ends a turn of Qwen's chats."""
JUDGE = "judge"
"""What a judge adapter is called beside the policy's, which is PEFT's `default`."""


def locate(base: str) -> str:
    """Where the weights of a base are: the folder of an embedded one, else what was given."""
    return str(EMBEDDED.get(base, base))


def load_tokenizer(base: str) -> Any:
    """The base's tokenizer, padding on the left.

    Raises ModelError without a chat template, or where padding would hide the end of a reply from the loss.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(locate(base))
    except Exception as error:
        raise ModelError(f"{base}: {cannot_load(error)}") from error
    if tokenizer.pad_token_id == tokenizer.eos_token_id and TURN_END in (tokenizer.chat_template or ""):
        tokenizer.eos_token = TURN_END  # a base variant: its own mark ends a document, not a turn
    if not tokenizer.chat_template:
        raise ModelError(f"{base}: the tokenizer has no chat template; take the instruct variant of the model")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ModelError(
            f"{base}: the padding token is the end-of-reply token ({tokenizer.eos_token}), so training would unlearn "
            "stopping; set another pad_token in the base's tokenizer_config.json, or take the instruct variant"
        )
    tokenizer.padding_side = "left"
    return tokenizer


def load_base(model: Model, hardware: Hardware, backend: Name = "plain") -> Any:
    """The frozen causal model of a recipe in the machine's number format, 4-bit where the recipe says nf4."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = locate(model.base)
    options: dict[str, Any] = {"dtype": getattr(torch, hardware.dtype), "attn_implementation": hardware.attention}
    if hardware.device == "cuda":
        options["device_map"] = {"": 0}
    if model.quantization == "nf4":
        from qreason.doctor import four_bit_trouble

        if trouble := four_bit_trouble(hardware.device):
            raise ModelError(f"model.quantization is nf4, but {trouble}; `qreason doctor` shows the cure")
        options["quantization_config"] = four_bit(hardware)
    try:
        config = AutoConfig.from_pretrained(path)
        kind = (config.architectures or ["nothing"])[0]
        if not kind.endswith(("ForCausalLM", "LMHeadModel")):
            raise ModelError(f"{model.base}: a {kind}, not a causal language model; give a text generation model")
        if (packed := getattr(config, "quantization_config", None)) is not None:
            raise ModelError(f"{model.base}: {already_quantized(packed)}")
        if backend == "unsloth":
            context = config.get_text_config().max_position_embeddings
            base = load_with_unsloth(path, model, hardware, context)
        else:
            base = AutoModelForCausalLM.from_pretrained(path, **options)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{model.base}: {cannot_load(error)}") from error
    base.requires_grad_(False)
    return base.eval()


def four_bit(hardware: Hardware) -> Any:
    """NF4 with double quantization (QLoRA, Dettmers et al. 2023)."""
    import bitsandbytes
    import torch
    from transformers import BitsAndBytesConfig

    # On CPUs with AVX512-BF16, inference would repack the 4-bit weights in place and break training and merging.
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
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


def already_quantized(packed: Any) -> str:
    """Why a base that is stored quantized (GPTQ, AWQ, bitsandbytes) is refused."""
    settings = packed if isinstance(packed, dict) else packed.to_dict()
    method = settings.get("quant_method", "some method")
    return (
        f"its weights are stored quantized ({getattr(method, 'value', method)}), and can neither be quantized again "
        "nor merged exactly; give the original 16-bit model with model.quantization: nf4"
    )


def cannot_load(error: Exception) -> str:
    reason = first_line(error)[:200]
    return f"cannot be loaded as a model ({reason}); give qreason/tiny, a Hub id or a folder with the weights"


def quiet() -> None:
    """Only errors from the libraries: what matters is in the progress bar and in metrics.jsonl."""
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for library in ("trl", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)


class Resident:
    """A base in memory, and the policy adapter that is on it now (None: the bare base)."""

    def __init__(
        self,
        settings: Model,
        hardware: Hardware,
        say: Callable[[str], None] = lambda line: None,
        backend: Name = "plain",
    ) -> None:
        quiet()
        self.settings = settings
        self.hardware = hardware
        self.say = say
        self.backend = backend
        self.tokenizer = load_tokenizer(settings.base)
        self.model = load_base(settings, hardware, backend)
        self.adapter: Path | None = None
        self.wrapped = False

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def context_length(self) -> int:
        """The most tokens, prompt and reply together."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    def remove_adapter(self) -> None:
        if self.wrapped:
            self.model = self.model.unload()
            self.wrapped, self.adapter = False, None

    def load_adapter(self, folder: Path | None, *, trainable: bool = False, checkpointing: bool = False) -> None:
        """Put a saved adapter on the base in place of the one that is there; None leaves the bare base.

        `checkpointing` is for Unsloth, which has its own.
        """
        from peft import PeftModel

        if folder is not None and folder == self.adapter and not trainable:
            return
        self.remove_adapter()
        if folder is None:
            return
        try:
            self.model = PeftModel.from_pretrained(self.model, str(folder), is_trainable=trainable)
        except Exception as error:
            raise self.no_adapter(folder, error) from error
        if self.backend == "unsloth":
            self.model = patch_with_unsloth(self.model, checkpointing)
        self.wrapped, self.adapter = True, folder

    def no_adapter(self, folder: Path, error: Exception) -> ModelError:
        return ModelError(f"{folder}: no adapter for {self.settings.base} ({first_line(error)})")

    def new_adapter(self, lora: Lora, *, seed: int = 0, checkpointing: bool = False) -> None:
        """Put a fresh, trainable adapter on the base; it changes nothing until it is trained.

        `seed` and `checkpointing` are for Unsloth, which has its own.
        """
        from peft import get_peft_model

        self.remove_adapter()
        if self.backend == "unsloth":
            self.model = adapt_with_unsloth(self.model, lora, seed, checkpointing)
            self.wrapped = True
            return
        self.model = get_peft_model(self.model, lora_config(lora))
        self.wrapped = True

    @contextmanager
    def inference(self, *, adapter: bool | Path = True, fast: bool = False) -> Iterator[Any]:
        """The model ready to answer, without gradients; afterwards it is as it was.

        With the policy adapter on, with it off (False: the bare base), or with a judge adapter in its place (a folder).
        `fast` computes in the number format of training steps where that is another one.
        """
        import torch

        worn = self.judging(adapter) if isinstance(adapter, Path) else self.folded() if adapter else self.bare()
        with torch.no_grad(), worn:
            was_training = self.model.training
            self.model.eval()
            try:
                # Not the outer PeftModel: a trainer may have wrapped its forward in autocast. Unsloth patches generate
                # of the outer one.
                inner = self.wrapped and self.backend == "plain"
                answering = self.model.get_base_model() if inner else self.model
                rounded = self.rounded(answering) if fast else nullcontext()
                attention = grouped_queries(answering) if self.backend == "plain" else nullcontext()
                with rounded, attention:
                    yield answering
            finally:
                self.model.train(was_training)

    @contextmanager
    def judging(self, folder: Path) -> Iterator[None]:
        """A judge adapter on in place of the policy's, whose weights and training are left alone."""
        if not self.wrapped:
            self.load_adapter(folder)
            try:
                yield
            finally:
                self.remove_adapter()
            return
        if JUDGE not in self.model.peft_config:
            was_training = self.model.training
            try:
                self.model.load_adapter(str(folder), JUDGE)
            except Exception as error:
                raise self.no_adapter(folder, error) from error
            self.model.train(was_training)  # PEFT switches to evaluation
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.set_adapter(JUDGE, inference_mode=True)
        try:
            yield
        finally:
            self.model.set_adapter("default", inference_mode=True)
            for parameter in trained:
                parameter.requires_grad_(True)

    def bare(self) -> AbstractContextManager[Any]:
        """The adapter switched off."""
        disabled: AbstractContextManager[Any] = self.model.disable_adapter() if self.wrapped else nullcontext()
        return disabled

    @contextmanager
    def folded(self) -> Iterator[None]:
        """On a CPU, each adapter added into its layer's weight while replies are made: a third less work a token.

        The base's own tensors are put aside and put back, so that nothing is rounded and nothing drifts; a layer that
        shares its tensor with another one gets one of its own for that time.
        """
        import torch

        if not self.wrapped or self.hardware.device != "cpu" or self.settings.quantization != "none":
            yield
            return
        layers = [module for module in self.model.modules() if hasattr(module, "get_delta_weight")]
        own = [layer.base_layer.weight for layer in layers]
        for layer, weight in zip(layers, own, strict=True):
            folded = weight.data + layer.get_delta_weight("default").to(weight.dtype)
            layer.base_layer.weight = torch.nn.Parameter(folded, requires_grad=False)
        try:
            with self.bare():
                yield
        finally:
            for layer, weight in zip(layers, own, strict=True):
                layer.base_layer.weight = weight

    @contextmanager
    def rounded(self, model: Any) -> Iterator[None]:
        """On a CPU that trains in bfloat16, all weights in bfloat16; afterwards their own tensors are back."""
        import torch

        if (
            self.hardware.device != "cpu"
            or self.hardware.autocast != "bfloat16"
            or self.settings.quantization != "none"
        ):
            yield
            return
        own = [(parameter, parameter.data) for parameter in model.parameters()]
        for parameter, weight in own:
            parameter.data = weight.to(torch.bfloat16)
        try:
            yield
        finally:
            for parameter, weight in own:
                parameter.data = weight


def fingerprint(base: str, config: Any) -> str:
    """What identifies the weights of a base: a hash of the files of a folder, or the commit of a Hub model."""
    folder = Path(locate(base))
    if not folder.is_dir():
        return f"commit:{getattr(config, '_commit_hash', None) or 'unknown'}"
    return f"sha256:{hash_files(sorted(folder.glob('*.safetensors')) or sorted(folder.glob('*.bin')))}"


def hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
