"""Tokenizer, base and adapters: one base resident in memory, at most one policy adapter on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qreason.errors import ModelError, first_line
from qreason.machine.hardware import Hardware
from qreason.model.backends import Name
from qreason.model.compat.bitsandbytes import import_without_compiler
from qreason.model.compat.noise import quiet
from qreason.model.compat.peft import JUDGE, folded, judge_adapter
from qreason.model.compat.transformers import grouped_queries
from qreason.model.compat.unsloth import adapt_with_unsloth, patch_with_unsloth, resume_training
from qreason.model.load import check_vocabulary, load_base, load_tokenizer, lora_config
from qreason.recipe.sections import Lora, Model

if TYPE_CHECKING:
    import torch


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
        import_without_compiler()
        self.settings, self.hardware, self.say, self.backend = settings, hardware, say, backend
        self.tokenizer = load_tokenizer(settings.base, thinking=settings.thinking)
        check_vocabulary(settings.base, self.tokenizer)
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
        """Replace the adapter on the base by a saved one or none; `checkpointing` is for Unsloth, which has its own."""
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
        """Put a fresh, trainable adapter on the base; its effect is zero until it is trained.

        `seed` and `checkpointing` are for Unsloth, which has its own.
        """
        from peft import get_peft_model

        self.remove_adapter()
        if self.backend == "unsloth":
            self.model = adapt_with_unsloth(self.model, lora, seed, checkpointing)
        else:
            self.model = get_peft_model(self.model, lora_config(lora))
        self.wrapped = True

    @contextmanager
    def inference(self, *, adapter: bool | Path = True, fast: bool = False) -> Iterator[Any]:
        """The model ready to answer, without gradients; afterwards its state is restored.

        With the policy adapter on (True), off (False: the bare base), or replaced by a judge adapter (its folder).
        `fast` computes in the number format of training steps where that is another one.
        """
        import torch

        with torch.no_grad(), self.adapter_context(adapter):
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
                if was_training and self.backend == "unsloth":
                    resume_training(self.model)

    def adapter_context(self, adapter: bool | Path) -> AbstractContextManager[Any]:
        """Which adapter answers: the policy's, folded into the base on a CPU; none; or a judge's."""
        if isinstance(adapter, Path):
            return self.judging(adapter)
        if not self.wrapped:
            return nullcontext()
        if not adapter:
            disabled: AbstractContextManager[Any] = self.model.disable_adapter()
            return disabled
        on_cpu = self.hardware.device == "cpu" and self.settings.quantization == "none"
        return folded(self.model) if on_cpu else nullcontext()

    @contextmanager
    def judging(self, folder: Path) -> Iterator[None]:
        """A judge adapter in place of the policy's, whose weights and training state stay as they are."""
        if not self.wrapped:
            self.load_adapter(folder)
            try:
                yield
            finally:
                self.remove_adapter()
            return

        def load(model: Any) -> None:
            try:
                model.load_adapter(str(folder), JUDGE)
            except Exception as error:
                raise self.no_adapter(folder, error) from error

        with judge_adapter(self.model, load):
            yield

    @contextmanager
    def rounded(self, model: Any) -> Iterator[None]:
        """On a CPU that trains in bfloat16, all weights in bfloat16; afterwards their original tensors are back."""
        import torch

        hardware, quantization = self.hardware, self.settings.quantization
        if (hardware.device, hardware.autocast, quantization) != ("cpu", "bfloat16", "none"):
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
