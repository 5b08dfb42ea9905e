"""A preference model: a sequence classifier with one output, higher for the reply that people prefer.

One that was trained on the run's base shares the layers with weights of the base in memory, under containers, a head
and a LoRA of its own, so the policy's adapter and this one do not interfere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qreason.errors import ModelError
from qreason.machine.files import read_json
from qreason.machine.records import Adapter, Level
from qreason.machine.rows import Rows
from qreason.model.compat.noise import quiet
from qreason.model.compat.peft import base_of
from qreason.model.compat.transformers import mark_quantized, unquantized_config
from qreason.model.load import cannot_load, locate
from qreason.model.resident import Resident

ROWS = 32
"""Replies per forward pass, at most."""
LEVEL = "level.json"
"""Beside the weights of a reward model: the output that is neither good nor bad, as a preference step measured it."""
NO_CLASSIFIER = "a preference model is a sequence classifier with one label, as a preference step makes it"


class PreferenceModel:
    """(prompt, reply) pairs -> 0..1 each, the sigmoid of the model's output above its level."""

    def __init__(self, name: str, resident: Resident) -> None:
        """A classifier, or an adapter of one: a folder or a Hub id.

        Raises ModelError for any other model. `resident` is the base an adapter may stand on.
        """
        from transformers import AutoTokenizer

        quiet()
        self.rows = Rows(ROWS, "replies to rate", resident.say)
        path = locate(name)
        adapter = read_adapter(path)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            level = Path(path) / LEVEL
            # 0 for a model from elsewhere
            self.level = read_json(level, Level)["level"] if level.is_file() else 0.0
            self.model = load_adapter(name, path, adapter, resident) if adapter else load_whole(name, path, resident)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{name}: {cannot_load(error)}") from error
        self.model.eval()
        self.tokenizer.padding_side = "right"
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        import torch

        return (torch.tensor(self.outputs(pairs), dtype=torch.float64) - self.level).sigmoid().tolist()

    def outputs(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The model's output for each (prompt, reply): log-odds, of which only differences have a meaning."""
        outputs: list[float] = []
        while left := pairs[len(outputs) :]:
            batch = left[: self.rows.most]
            outputs += self.rows.attempt(partial(self.rate, batch), len(batch)) or []
        return outputs

    def rate(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The outputs for pairs that are read in one pass."""
        import torch

        ids = [render_ids(self.tokenizer, *pair) for pair in pairs]
        inputs = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        with torch.no_grad():
            outputs: list[float] = self.model(**inputs, use_cache=False).logits.float().squeeze(-1).tolist()
        return outputs


def render_ids(tokenizer: Any, prompt: str, reply: str) -> list[int]:
    """The input of a preference model, in training and after: the prompt and the reply as a chat."""
    text = f"{prompt}\n\n{reply}"
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def read_adapter(path: str) -> dict[str, Any] | None:
    """The adapter_config.json of a folder; None where it is none."""
    file = Path(path) / "adapter_config.json"
    config: dict[str, Any] | None = read_json(file, Adapter) if file.is_file() else None
    return config


def load_adapter(name: str, path: str, adapter: dict[str, Any], resident: Resident) -> Any:
    """An adapter with its head: on the resident base if it was trained on it, else on a base loaded for it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    if adapter.get("task_type") != "SEQ_CLS":
        raise ModelError(f"{name}: an adapter for {adapter.get('task_type')}, not SEQ_CLS; {NO_CLASSIFIER}")
    name, dtype = adapter["base_model_name_or_path"], getattr(torch, resident.hardware.dtype)
    if name == resident.settings.base and resident.backend == "plain":
        return PeftModel.from_pretrained(with_head(resident), path)
    base = AutoModelForSequenceClassification.from_pretrained(
        locate(name), num_labels=1, dtype=dtype, trust_remote_code=False
    )
    return PeftModel.from_pretrained(base, path).to(resident.device)


def load_whole(name: str, path: str, resident: Resident) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    kind = (config.architectures or ["nothing"])[0]
    if not kind.endswith("ForSequenceClassification"):  # transformers would put a random head on any other model
        raise ModelError(f"{name}: a {kind}; {NO_CLASSIFIER}")
    if config.num_labels != 1:
        raise ModelError(f"{name}: {config.num_labels} labels; {NO_CLASSIFIER}")
    dtype = getattr(torch, resident.hardware.dtype)
    return AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype, trust_remote_code=False).to(
        resident.device
    )


def with_head(resident: Resident) -> Any:
    """A sequence classifier with one output on the resident base, whose layers with weights it shares."""
    import torch
    from transformers import AutoModelForSequenceClassification

    causal = resident.model.get_base_model() if resident.wrapped else resident.model
    config = unquantized_config(causal)  # the layers are quantized already
    config.num_labels = 1
    config.get_text_config().pad_token_id = resident.tokenizer.pad_token_id
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation=resident.hardware.attention)
    backbone, shared = getattr(model, model.base_model_prefix), getattr(causal, causal.base_model_prefix)
    for name in [name for name, module in backbone.named_modules() if name and not list(module.children())]:
        backbone.set_submodule(name, base_of(shared.get_submodule(name)))
    head = torch.nn.Linear(model.score.in_features, 1, bias=False, device=resident.device)
    torch.nn.init.zeros_(head.weight)  # a random direction drowns the difference of two replies: LOG.md
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))  # float32 always: pairs differ by little
    model.score = head
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ModelError(f"{resident.settings.base}: a {type(causal).__name__} cannot carry a scalar head here")
    mark_quantized(model, causal)
    model.requires_grad_(False)
    return model.eval()
