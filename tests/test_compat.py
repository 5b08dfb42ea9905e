"""What qreason/model/compat bends, against the installed libraries: each test fails when a library goes another way."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import give_weights, load_resident
from torch.utils._python_dispatch import TorchDispatchMode

from qreason.machine.hardware import detect
from qreason.model.classifier import with_head
from qreason.model.compat import bitsandbytes as compat_bitsandbytes
from qreason.model.compat import peft as compat_peft
from qreason.model.compat import transformers as compat_transformers
from qreason.model.compat import trl as compat_trl
from qreason.model.compat import trl_logprobs
from qreason.model.compat.cache import RoomyLayer, roomy_cache
from qreason.model.load import fingerprint, four_bit
from qreason.model.resident import Resident
from qreason.recipe.sections import Lora, Model

PROMPT = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
TOKEN = {"input_ids": torch.tensor([[9]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}


@pytest.fixture(scope="module")
def quantized() -> Resident:
    """The embedded base in 4 bits; tests leave no adapter on it."""
    return Resident(Model(base="qreason/tiny", quantization="nf4"), detect())


@pytest.fixture
def adapted(own_resident: Resident) -> Resident:
    own_resident.new_adapter(Lora(r=4))
    give_weights(own_resident, 0.05)
    return own_resident


# --- TRL -------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What TRL did in one GRPO step of one micro-batch, cut in two."""

    calls: Counter[str] = field(default_factory=Counter)
    rows: list[int] = field(default_factory=list)
    """Of each call of the loss."""
    prepared: int = 0
    counted: int = 0
    """Micro-batches, by TRL's count."""
    rounds: list[tuple[int, int]] = field(default_factory=list)
    """Shapes of what the model read."""
    trainer: Any = None
    kind: Any = None
    """TRL's own class."""


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """A real GRPO step: one prompt, four replies."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    seen, resident = Seen(), load_resident()
    resident.new_adapter(Lora(r=4))

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        replies = [[20 + number, 30, 40] for number in range(len(prompts))]
        return {"prompt_ids": [[5, 6, 7, 8]] * len(prompts), "completion_ids": replies, "logprobs": None}

    def halves(inputs: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
        seen.prepared = len(inputs["completion_ids"])
        rows = {key: value for key, value in inputs.items() if getattr(value, "ndim", 0)}
        rest = {key: value for key, value in inputs.items() if key not in rows}
        return [({key: value[part] for key, value in rows.items()} | rest, 0.5) for part in (slice(2), slice(2, 4))]

    class Watched(trl_logprobs.frugal(GRPOTrainer, resident.model, print)):  # type: ignore[misc]
        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            seen.calls["logps"] += 1
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.rows.append(len(inputs["completion_ids"]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    arguments = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("grpo")),
        per_device_train_batch_size=4,
        num_generations=4,
        max_steps=1,
        temperature=0.7,
        max_completion_length=3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = compat_trl.in_pieces(Watched, lambda trainer, model, attempt: attempt(halves))(
        model=resident.model,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
        processing_class=resident.tokenizer,
        reward_funcs=[lambda completions, **kwargs: [float(number) for number in range(len(completions))]],
        rollout_func=rollout,
    )
    read = trl_logprobs.read_prompts_once

    def reading(model: Any, **inputs: Any) -> Any:
        seen.calls["once"] += 1
        return read(model, **inputs)

    base = resident.model.get_base_model()
    hook = base.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.rounds.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl_logprobs, "read_prompts_once", reading)
        trainer.train()
    hook.remove()
    seen.counted, seen.trainer, seen.kind = trainer._step, trainer, GRPOTrainer
    return replace(seen, calls=seen.calls.copy(), rows=list(seen.rows))


def test_trl_asks_for_log_probabilities_where_prompts_are_shared(one_step: Seen) -> None:
    seen = one_step
    assert seen.calls["logps"] == 2
    assert seen.calls["once"] == seen.calls["logps"]
    assert seen.rounds == [(1, 4), (2, 3)] * 2  # each prompt once, then the replies of the piece


def test_trl_computes_the_pieces_it_is_given_and_counts_one_micro_batch(one_step: Seen) -> None:
    seen = one_step
    assert seen.prepared == 4
    assert seen.rows == [2, 2]
    assert seen.counted == 1


def test_trl_gets_the_same_log_probabilities_from_prompts_that_are_read_once(one_step: Seen) -> None:
    ids = torch.tensor([[3, 5, 6, 20, 21, 22], [3, 5, 6, 30, 31, 3]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]])
    kept = mask[:, -3:].bool()
    own = one_step.kind._get_per_token_logps_and_entropies
    trainer, model = one_step.trainer, one_step.trainer.model
    with torch.no_grad():
        theirs = own(trainer, model, ids, mask, 3, compute_entropy=True)
        ours = trainer._get_per_token_logps_and_entropies(model, ids, mask, 3, compute_entropy=True)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(one[kept], other[kept], rtol=1e-4, atol=1e-5)
    assert ours[0][kept].max() < 0 < ours[1][kept].min()


def test_trl_casts_the_adapter_on_a_quantized_base_and_it_is_cast_back(quantized: Resident, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    quantized.new_adapter(Lora(r=4))
    give_weights(quantized, 0.05)
    trained = [parameter for parameter in quantized.model.parameters() if parameter.requires_grad]
    values = [parameter.detach().clone() for parameter in trained]
    arguments = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=16)
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    with compat_trl.float32_adapter(quantized.model):
        SFTTrainer(model=quantized.model, args=arguments, train_dataset=rows, processing_class=quantized.tokenizer)
        assert {parameter.dtype for parameter in trained} == {torch.bfloat16}
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert all(torch.equal(parameter, value) for parameter, value in zip(trained, values, strict=True))
    quantized.remove_adapter()


def test_trl_compares_a_quantized_policy_with_its_float32_values(quantized: Resident, tmp_path: Path) -> None:
    """With beta TRL copies the adapter as the reference: the copy, too, is what the policy was."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    quantized.new_adapter(Lora(r=4))
    give_weights(quantized, 0.05)
    arguments = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", beta=0.1, per_device_train_batch_size=8
    )
    with compat_trl.float32_adapter(quantized.model):
        GRPOTrainer(
            model=quantized.model,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "a"}]),
            processing_class=quantized.tokenizer,
            reward_funcs=[lambda completions, **kwargs: [0.0] * len(completions)],
        )
    weights = dict(quantized.model.named_parameters())
    pairs = [
        (weight, weights[name.replace(".default.", ".ref.")]) for name, weight in weights.items() if ".default." in name
    ]
    assert pairs
    assert all(torch.equal(policy, reference) for policy, reference in pairs)
    assert {weight.dtype for pair in pairs for weight in pair} == {torch.float32}
    quantized.remove_adapter()


@contextmanager
def as_on_a_gpu(trainer: Any, **more: Any) -> Iterator[Any]:
    """A GRPO trainer that does not read prompts once, with other attributes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl_logprobs, "can_share_prompts", lambda args: False)
        for name, value in {"tiled": True, "rows": None, **more}.items():
            patch.setattr(trainer, name, value)
        yield trainer


IDS = torch.tensor([[3, 5, 6, 20, 21, 22], [3, 5, 6, 30, 31, 3], [3, 3, 6, 30, 9, 8]])
MASK = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]])


def test_trl_gives_the_same_log_probabilities_and_gradients_in_tiles(one_step: Seen) -> None:
    own, model = one_step.kind._get_per_token_logps_and_entropies, one_step.trainer.model
    kept = MASK[:, -3:].bool()

    def scored(compute: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        model.zero_grad()
        logps, entropies, _ = compute(model, IDS, MASK, 3, compute_entropy=True)
        logps[kept].mean().backward()
        gradient = torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])
        return logps.detach()[kept], entropies.detach()[kept], gradient

    whole = scored(partial(own, one_step.trainer))
    with as_on_a_gpu(one_step.trainer) as trainer:
        tiled = scored(trainer._get_per_token_logps_and_entropies)
    for one, other in zip(tiled, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_trl_never_holds_the_logits_of_all_tokens(one_step: Seen) -> None:
    vocabulary = one_step.trainer.model.config.vocab_size
    for tiled in (True, False):
        largest = Largest()
        with as_on_a_gpu(one_step.trainer, tiled=tiled) as trainer, largest:
            trainer._get_per_token_logps_and_entropies(trainer.model, IDS.repeat(8, 1), MASK.repeat(8, 1), 3)
        assert (largest.logits >= 24 * 3 * vocabulary) is not tiled


def test_many_logits_are_computed_in_tiles_with_shared_prompts_too(
    one_step: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, found, largest = one_step.trainer, [], []
    ids, mask = IDS.repeat(8, 1), MASK.repeat(8, 1)
    for most in (2**26, 0):
        monkeypatch.setattr(trl_logprobs, "MOST_LOGITS", most)
        trainer.model.zero_grad()
        with Largest() as seen:
            scores, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 3)
        scores[mask[:, -3:].bool()].mean().backward()
        largest.append(seen.logits)
        found.append(
            (scores, torch.cat([one.grad.flatten() for one in trainer.model.parameters() if one.requires_grad]))
        )
    (whole, steep), (tiled, also) = found
    assert largest[0] >= len(ids) * 3 * trainer.vocabulary > largest[1]
    real = mask[:, -3:].bool()
    torch.testing.assert_close(tiled[real], whole[real], rtol=1e-4, atol=1e-5)
    assert (also - steep).norm() < 1e-4 * steep.norm()


class Largest(TorchDispatchMode):  # type: ignore[misc]
    """The most numbers of a tensor whose last dimension is a vocabulary."""

    logits = 0

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim == 3:
            self.logits = max(self.logits, out.numel())
        return out


def test_log_probabilities_of_a_batch_go_on_in_halves_when_memory_runs_out(one_step: Seen) -> None:
    said: list[str] = []
    with as_on_a_gpu(one_step.trainer, say=said.append) as trainer, torch.no_grad():
        expected = trainer._get_per_token_logps_and_entropies(trainer.model, IDS, MASK, 3, compute_entropy=True)
        trainer.rows, chunked, rows = None, trainer._chunked_logps, []

        def small(model: Any, ids: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
            rows.append(len(ids))
            if len(ids) > 1:
                raise torch.AcceleratorError("CUDA error: out of memory")
            return chunked(model, ids, *rest, **kwargs)

        trainer._chunked_logps = small
        found = trainer._get_per_token_logps_and_entropies(
            trainer.model, IDS, MASK, 3, batch_size=2, compute_entropy=True, num_images=None
        )
        del trainer._chunked_logps
    assert rows == [2, 1, 1, 1]
    assert len(said) == 1
    assert found[2] is None
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_kernel_of_trl_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import utils

    def fail(*args: Any) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(utils, "_fused_logprob_entropy", fail)
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: torch.ones(*size, **options))
    assert trl_logprobs.check_kernel("cpu") is None
    assert utils._fused_logprob_entropy is fail
    assert "Failed to find C compiler" in (trl_logprobs.check_kernel("cuda") or "")
    assert utils._fused_logprob_entropy is None
    assert utils.selective_log_softmax(torch.ones(1, 2, 4), torch.ones(1, 2, dtype=torch.long)).shape == (1, 2)


# --- transformers ----------------------------------------------------------------------------------


def test_transformers_attends_through_the_registered_function(
    own_resident: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, queries = compat_transformers.attend, []

    def counting(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        queries.append(query.shape[2])
        return attend(module, query, *args, **kwargs)

    monkeypatch.setattr(compat_transformers, "attend", counting)
    model, config = own_resident.model, own_resident.model.config
    with torch.no_grad(), compat_transformers.grouped_queries(model):
        first = model(**PROMPT, use_cache=True)
        model(**TOKEN, past_key_values=first.past_key_values, use_cache=True)
    layers = config.num_hidden_layers
    assert queries == [4] * layers + [1] * layers
    with torch.no_grad():
        model(**PROMPT)
    assert len(queries) == 2 * layers


def test_transformers_keeps_keys_and_values_in_the_layers_of_the_cache(resident: Resident) -> None:
    cache = roomy_cache(resident.model.config, room=8)
    with torch.no_grad():
        resident.model(**PROMPT, past_key_values=cache, use_cache=True)
        resident.model(**TOKEN, past_key_values=cache, use_cache=True)
    assert all(type(layer) is RoomyLayer for layer in cache.layers)
    assert [layer.spacious[0].shape[-2] for layer in cache.layers] == [13] * len(cache.layers)
    assert cache.get_seq_length() == 5


def test_transformers_counts_the_gpus_it_sees_and_one_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", per_device_train_batch_size=4)
    before = arguments.train_batch_size
    compat_transformers.use_one_gpu(arguments)
    assert (before, arguments.train_batch_size) == (8, 4)
    assert arguments.n_gpu == 1


def test_transformers_turns_by_the_angles_that_a_hook_returns(resident: Resident) -> None:
    with torch.no_grad():
        own = resident.model(**PROMPT).logits
        with compat_transformers.engine_angles(resident.model):
            theirs = resident.model(**PROMPT).logits
        rotary = resident.model.model.rotary_emb
        hook = rotary.register_forward_hook(lambda module, inputs, angles: (angles[0] * 0, angles[1] * 0))
        none = resident.model(**PROMPT).logits
        hook.remove()
    assert (none - own).abs().max() > 1e-2
    assert 0 < (theirs - own).abs().max() < 1e-3


def test_transformers_marks_what_it_quantized_and_trainers_look_for_the_marks(
    quantized: Resident, tmp_path: Path
) -> None:
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    assert hasattr(quantized.model.config, "quantization_config")
    assert not hasattr(compat_transformers.unquantized_config(quantized.model), "quantization_config")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    model = with_head(quantized)
    assert (model.is_loaded_in_4bit, model.is_quantized) == (True, True)
    assert model.hf_quantizer is quantized.model.hf_quantizer
    assert model.quantization_method == quantized.model.quantization_method
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=model, args=arguments)
    config = Lora(r=2)
    kinds = []
    for marked in (True, False):
        model = with_head(quantized)
        model.is_loaded_in_4bit = marked
        wrapped = get_peft_model(model, lora_config_for_scores(config))
        kinds.append({type(layer).__name__ for _, layer in compat_peft.adapted_layers(wrapped)})
        wrapped.unload()
    assert kinds == [{"Linear4bit"}, {"Linear"}]


def lora_config_for_scores(lora: Lora) -> Any:
    from qreason.model.load import lora_config

    config = lora_config(lora)
    config.task_type = "SEQ_CLS"
    return config


def test_the_commit_of_a_hub_model_is_that_of_its_snapshot_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    commit, folder = "0af1" * 10, tmp_path / "models--someone--small"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    cached = partial(huggingface_hub.try_to_load_from_cache, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert fingerprint("someone/small") == f"commit:{commit}"
    assert fingerprint("someone/else") == "commit:unknown"


# --- PEFT ------------------------------------------------------------------------------------------


def test_peft_adds_what_get_delta_weight_says(adapted: Resident) -> None:
    layers = dict(compat_peft.adapted_layers(adapted.model))
    assert len(layers) == 7 * adapted.model.config.num_hidden_layers
    assert all(compat_peft.base_of(layer) is layer.base_layer for layer in layers.values())
    weights = [layer.base_layer.weight for layer in layers.values()]
    with torch.no_grad():
        beside = adapted.model(**PROMPT).logits
        with adapted.model.disable_adapter():
            bare = adapted.model(**PROMPT).logits
        with compat_peft.folded(adapted.model):
            inside = adapted.model(**PROMPT).logits
    torch.testing.assert_close(inside, beside, rtol=1e-3, atol=1e-3)
    assert (bare - beside).abs().max() > 0.1
    assert all(layer.base_layer.weight is weight for layer, weight in zip(layers.values(), weights, strict=True))


def test_peft_stops_the_training_of_a_policy_beside_which_a_judge_is_put(adapted: Resident, tmp_path: Path) -> None:
    adapted.model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    model = adapted.model.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    seen = []

    def load(model: Any) -> None:
        model.load_adapter(str(tmp_path), compat_peft.JUDGE)
        seen.append(model.training)

    for _ in range(2):
        with compat_peft.judge_adapter(model, load):
            seen.append(any(parameter.requires_grad for parameter in model.parameters()))
            assert model.active_adapter == compat_peft.JUDGE
        assert model.active_adapter == compat_peft.POLICY
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert seen == [False, False, False]  # loaded once; switched to evaluation, and nothing of it trained
    assert model.training


def test_peft_writes_the_base_that_its_config_names(adapted: Resident, tmp_path: Path) -> None:
    named = []
    for number in (1, 2):
        adapted.model.save_pretrained(str(tmp_path / str(number)), save_embedding_layers=False)
        named.append(json.loads((tmp_path / f"{number}/adapter_config.json").read_text())["base_model_name_or_path"])
        compat_peft.name_base(adapted.model, "qreason/tiny")
    assert named[0] != "qreason/tiny"
    assert named[1] == "qreason/tiny"


# --- bitsandbytes ----------------------------------------------------------------------------------


def test_bitsandbytes_asks_for_avx512_and_no_longer_repacks(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    modules = bitsandbytes.nn.modules
    asked = []
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: asked.append(True))
    modules.Linear4bit(64, 64)
    assert asked == [True]
    four_bit(detect())
    layer = modules.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
    assert len(asked) == 1
    assert not layer.support_avx512bf16_for_cpu


def test_four_bit_weights_keep_their_layout_in_a_pass_without_gradients(quantized: Resident) -> None:
    weights = [weight for weight in quantized.model.parameters() if compat_bitsandbytes.is_four_bit(weight)]
    assert len(weights) == 7 * quantized.model.config.num_hidden_layers
    before = [weight.data.clone() for weight in weights]
    with torch.no_grad():
        quantized.model.eval()(**PROMPT)
    assert all(torch.equal(weight.data, old) for weight, old in zip(weights, before, strict=True))
    layer = quantized.model.model.layers[0].mlp.up_proj
    whole = compat_bitsandbytes.to_float32(layer.weight)
    inputs = torch.randn(3, layer.in_features)
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), inputs @ whole.T, rtol=1e-4, atol=1e-4)


def test_bitsandbytes_says_what_its_library_was_built_for() -> None:
    from bitsandbytes.cextension import lib

    assert isinstance(lib.compiled_with_cuda, bool)
    assert compat_bitsandbytes.four_bit_trouble("cpu") is None


# --- Unsloth and torch -----------------------------------------------------------------------------


def test_unsloth_takes_the_arguments_it_is_given() -> None:
    if find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    code = (
        "import inspect, json\n"
        "from unsloth import FastLanguageModel as Model\n"
        "names = ('from_pretrained', 'get_peft_model', 'patch_peft_model')\n"
        "print(json.dumps([list(inspect.signature(getattr(Model, name)).parameters) for name in names]))\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    load, adapt, patch = map(set, json.loads(answer.splitlines()[-1]))
    assert {"model_name", "max_seq_length", "dtype", "load_in_4bit", "load_in_16bit", "device_map"} <= load
    assert {"use_exact_model_name", "fix_tokenizer"} <= load
    assert {"r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "random_state"} <= adapt
    assert {"use_gradient_checkpointing"} <= adapt & patch


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="a build with oneDNN")
def test_torch_has_the_private_questions_about_bfloat16() -> None:
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
