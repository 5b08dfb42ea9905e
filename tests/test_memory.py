"""The plan of GPU memory: stored bytes exact against allocated tensors, computed ones against what torch holds."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import bitsandbytes
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, GPT2Config, Qwen2Config, Trainer, TrainingArguments
from transformers.integrations import sdpa_attention
from transformers.training_args import OptimizerNames
from trl.trainer import grpo_trainer, sft_trainer
from trl.trainer import utils as trl_utils

from qreason.errors import InputError, ModelError
from qreason.inference.drawing import draw
from qreason.machine.hardware import GIB, Hardware
from qreason.model.compat.trl_logprobs import read_prompts_once
from qreason.model.load import load_base
from qreason.planning.chart import plan_table
from qreason.planning.fit import fit, plan
from qreason.planning.known import known_config
from qreason.planning.memory import CARDS, Plan, find_card, read_card, read_lengths
from qreason.planning.phases import (
    PLAIN_LOGIT,
    SFT_LOGIT,
    STATES,
    TILE,
    adapted,
    adapter_sizes,
    backward,
    cache_bytes,
    draw_bytes,
    loss_logits,
    nf4_bytes,
    optimizer_bytes,
    reading,
    rollout,
    saved_by_layer,
    weight_bytes,
)
from qreason.planning.shapes import Lengths, Shape, read_shape
from qreason.recipe.load import load_recipe
from qreason.recipe.schema import Recipe, Step
from qreason.recipe.sections import Draw, Lora, Model
from qreason.recipe.stage import Work
from qreason.recipe.training import Grpo
from qreason.run.session import Session
from qreason.stages import run_stage

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from random_qwen import SHAPES  # noqa: E402

BFLOAT16 = Hardware("cpu", "", "bfloat16", "bfloat16", "sdpa", 1)
"""The numbers of a GPU on a CPU."""
TINY = Model(base="qreason/tiny")
TINY_4BIT = Model(base="qreason/tiny", quantization="nf4")


def held(tensors: Iterable[Any]) -> int:
    """The bytes of different storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def stored(model: Any) -> list[Any]:
    """Parameters, buffers, and what bitsandbytes keeps beside its packed ones."""
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    beside = [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
    return [*model.parameters(), *model.buffers(), *beside]


def trainable(model: Any, lora: Lora) -> Any:
    """A policy as GRPO trains it, its adapter in float32."""
    options = {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=lora.target_modules, **options)
    ).train()


class Live(TorchDispatchMode):  # type: ignore[misc]
    """The bytes of all tensors made under it that are still alive, and their peak."""

    def __init__(self, *known: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {t.untyped_storage()._cdata: weakref.ref(t.untyped_storage()) for t in known}

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def count(self, storage: Any) -> None:
        size, key = storage.nbytes(), storage._cdata

        def gone(_: Any) -> None:
            self.now -= size
            self.seen.pop(key, None)

        self.seen[key] = weakref.ref(storage, gone)
        self.now += size


@pytest.fixture(scope="module")
def tiny() -> Shape:
    return read_shape("qreason/tiny")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Shape]:
    """The real Qwen2.5 shapes by size; nothing but a config is written."""
    shapes = {}
    for size, settings in SHAPES.items():
        folder = tmp_path_factory.mktemp(size)
        Qwen2Config(
            **settings,
            vocab_size=151936,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            architectures=["Qwen2ForCausalLM"],
        ).save_pretrained(folder)
        shapes[size] = read_shape(str(folder))
    return shapes.__getitem__


@pytest.fixture
def recipe() -> Recipe:
    """The 1.5B recipe."""
    return load_recipe(ROOT / "recipes" / "helpdesk-1.5b.yaml")


def changed(recipe: Recipe, *overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / f"{recipe.name}.yaml", overrides)


# --- stored bytes --------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "number"), [("float32", 4), ("bfloat16", 2)])
def test_weights_of_the_embedded_base_are_exact(tiny: Shape, dtype: Any, number: int) -> None:
    base = load_base(TINY, Hardware("cpu", "", dtype, "none", "sdpa", 1))
    assert weight_bytes(replace(tiny, number=number), "none") == held(stored(base))


@pytest.mark.parametrize(("dtype", "number"), [("float32", 4), ("bfloat16", 2)])
def test_nf4_weights_of_the_embedded_base_are_exact(tiny: Shape, dtype: Any, number: int) -> None:
    base = load_base(TINY_4BIT, Hardware("cpu", "", dtype, "none", "sdpa", 1))
    assert weight_bytes(replace(tiny, number=number), "nf4") == held(stored(base))


@pytest.mark.parametrize(("size", "parameters"), [("0.5b", 494_032_768), ("1.5b", 1_543_714_304)])
def test_real_shapes_have_the_published_parameters(qwen: Any, size: str, parameters: int) -> None:
    shape = qwen(size)
    assert shape.parameters == parameters
    assert weight_bytes(shape, "none") == 2 * parameters + shape.buffer_bytes
    assert [linear.name for linear in shape.linears if not linear.quantized] == ["lm_head"]


@pytest.mark.parametrize("size", SHAPES)
def test_nf4_weights_of_the_real_shapes_are_exact_layer_by_layer(qwen: Any, size: str) -> None:
    shape = qwen(size)
    packed = [(one.outputs, one.inputs) for one in shape.linears if one.quantized]
    each = {}
    for outputs, inputs in set(packed):
        layer = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, quant_type="nf4")
        layer.weight = bitsandbytes.nn.Params4bit(torch.ones(outputs, inputs, dtype=torch.bfloat16), quant_type="nf4")
        each[outputs, inputs] = held(stored(layer.to("cpu")))
        assert nf4_bytes(outputs * inputs) == each[outputs, inputs]
    rest = shape.parameters - sum(outputs * inputs for outputs, inputs in packed)
    assert weight_bytes(shape, "nf4") == sum(each[one] for one in packed) + 2 * rest + shape.buffer_bytes


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.(up|down)_proj", ["lm_head"]])
def test_adapters_and_gradients_are_exact(tiny: Shape, targets: Any) -> None:
    lora = Lora(r=6, target_modules=targets)
    model = trainable(load_base(TINY, BFLOAT16), lora)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.float().sum().backward()
    sizes = adapter_sizes(tiny, lora)
    assert sorted(sizes) == sorted(weight.numel() for weight in weights)
    assert held(weights) == held(weight.grad for weight in weights) == 4 * sum(sizes)


@pytest.mark.parametrize("size", SHAPES)
def test_adapters_of_the_real_shapes_are_exact(qwen: Any, size: str) -> None:
    from transformers import AutoConfig, Qwen2ForCausalLM

    with torch.device("meta"):
        model = trainable(Qwen2ForCausalLM(AutoConfig.from_pretrained(qwen(size).base)), Lora())
    found = sorted(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sorted(adapter_sizes(qwen(size), Lora())) == found


@pytest.mark.parametrize("optim", STATES)
def test_optimizer_states_are_exact(tiny: Shape, tmp_path: Path, optim: str) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    sizes = adapter_sizes(tiny, Lora(r=6))  # some of them below the 4,096 weights of the 8-bit optimizers
    assert min(sizes) < 4096 < max(sizes)
    weights = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = kind(weights, **options)
    optimizer.step()
    states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert optimizer_bytes(optim, sizes) == held(value for value in states if isinstance(value, torch.Tensor))


def test_every_optimizer_in_the_table_is_one_of_transformers() -> None:
    assert STATES.keys() <= {name.value for name in OptimizerNames}


def test_an_unknown_optimizer_is_taken_for_adamw_and_said(tiny: Shape, recipe: Recipe) -> None:
    assert optimizer_bytes("adamw_torch_4bit", [5000]) == optimizer_bytes("adamw_torch", [5000])
    told = plan(changed(recipe, "grpo.optim=adamw_torch_4bit"), tiny, CARDS["t4"]).notes
    assert len(told) == 1
    assert "grpo.optim: adamw_torch_4bit is not known" in told[0]


def test_cache_of_the_embedded_base_is_exact(tiny: Shape) -> None:
    base = load_base(TINY, BFLOAT16)
    cache = DynamicCache(config=base.config)
    with torch.no_grad():
        for _ in range(2):  # the second reading appends
            base(input_ids=torch.ones(3, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert cache_bytes(tiny, 3, 14) == held(t for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("size", SHAPES)
def test_cache_of_the_real_shapes_is_exact(qwen: Any, size: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(qwen(size).base)
    cache, width = DynamicCache(config=config), config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        made = torch.zeros(2, config.num_key_value_heads, 5, width, dtype=torch.bfloat16)
        cache.update(made, made.clone(), layer)
    assert cache_bytes(qwen(size), 2, 5) == held(t for layer in cache.layers for t in (layer.keys, layer.values))


# --- computed bytes ------------------------------------------------------------------------------


@pytest.fixture
def gpu_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's 4-bit layer asks whether autocast is on without saying where; on a CPU the answer would be no."""
    real = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: real(*device) if device else True)


def close(predicted: int, measured: int, share: float = 0.05) -> bool:
    return abs(predicted - measured) <= share * measured


@pytest.mark.usefixtures("gpu_autocast")
@pytest.mark.parametrize("model", [TINY, TINY_4BIT], ids=["16-bit", "4-bit"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_layers_keep_for_the_backward_pass(tiny: Shape, model: Model, dropout: float) -> None:
    rows, tokens, lora = 4, 96, Lora(dropout=dropout)
    policy = trainable(load_base(model, BFLOAT16), lora)
    policy.enable_input_require_grads()  # else the first layer keeps a little less than the others
    ids = torch.ones(rows, tokens, dtype=torch.long)
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)
    live = Live(*stored(policy), ids, mask)
    with live, torch.autocast("cpu", torch.bfloat16):
        decoder = policy.get_base_model().model
        hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    cast = 2 * sum(adapter_sizes(tiny, lora))
    norm = hidden.numel() * (2 + 4)
    # A CPU keeps what was dropped in the numbers it was read in, a GPU in a byte each.
    wider = (3 if model is TINY else 1) * rows * tokens * sum(one.inputs for one in adapted(tiny, lora))
    layer = saved_by_layer(tiny, model.model_copy(update={"lora": lora}), rows, tokens)
    assert close(tiny.layers * layer + bool(dropout) * wider, live.now - cast - norm, 0.02)


@pytest.mark.usefixtures("gpu_autocast")
@pytest.mark.parametrize("model", [TINY, TINY_4BIT], ids=["16-bit", "4-bit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_grpo_micro_batch(tiny: Shape, model: Model, checkpointing: bool) -> None:
    """With TRL's log-probabilities as they are without Triton, float32 logits as accelerate hands them over."""
    rows, prompt, completion = 4, 64, 64
    policy = trainable(load_base(model, BFLOAT16), Lora())
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.enable_input_require_grads()
    ids = torch.ones(rows, prompt + completion, dtype=torch.long)
    mask = torch.ones(rows, 1, *ids.shape[1:], *ids.shape[1:], dtype=torch.bool)
    live = Live(*stored(policy), ids, mask)
    with live:
        with torch.autocast("cpu", torch.bfloat16):
            options = {"use_cache": False, "logits_to_keep": completion + 1}
            logits = policy(input_ids=ids, attention_mask=mask, **options).logits
        logits = logits.float()[:, :-1]
        logps, entropies = trl_utils.selective_log_softmax_and_entropy(
            logits, ids[:, -completion:], entropy_requires_grad=False
        )
        del logits, entropies
        live.peak = live.now
        logps.mean().backward()
    settings = Grpo(gradient_checkpointing=checkpointing, optim="adamw_torch_fused")
    logits_bytes = PLAIN_LOGIT * rows * (completion + 1) * tiny.vocabulary
    predicted = backward(tiny, model, settings, rows, prompt + completion, logits_bytes)
    assert close(sum(predicted.values()), live.peak)


@pytest.mark.parametrize("model", [TINY, TINY_4BIT], ids=["whole", "4-bit"])
@pytest.mark.parametrize(("rows", "prompt", "completion", "prompts"), [(8, 128, 64, 4), (8, 64, 128, 8)])
def test_peak_of_a_grpo_micro_batch_on_a_cpu(
    tiny: Shape, model: Model, rows: int, prompt: int, completion: int, prompts: int
) -> None:
    """In float32, each prompt read once for all its replies."""
    policy = trainable(load_base(model, Hardware("cpu", "", "float32", "none", "sdpa", 1)), Lora())
    ids = torch.ones(rows, prompt + completion, dtype=torch.long)
    ids[:, 0] = torch.arange(rows) % prompts
    mask = torch.ones_like(ids)
    live = Live(*stored(policy), ids, mask)
    with live:
        logits = read_prompts_once(policy, input_ids=ids, attention_mask=mask, logits_to_keep=completion + 1).logits
        logps, entropies = trl_utils.selective_log_softmax_and_entropy(
            logits[:, :-1], ids[:, -completion:], entropy_requires_grad=False
        )
        del logits, entropies
        live.peak = live.now
        logps.mean().backward()
    wide, computed = replace(tiny, number=4), prompts * prompt + rows * completion
    work = Work(rows=rows, logits="completion")
    logits_bytes = loss_logits(wide, model, work, prompt + completion, completion, compiles=False, tiled=False)
    settings = Grpo(gradient_checkpointing=False, optim="adamw_torch_fused")
    predicted = backward(wide, model, settings, rows, prompt + completion, logits_bytes, computed)
    assert close(sum(predicted.values()), live.peak)


@pytest.mark.usefixtures("gpu_autocast")
@pytest.mark.parametrize("model", [TINY, TINY_4BIT], ids=["16-bit", "4-bit"])
def test_peak_of_a_layers_backward_pass(tiny: Shape, model: Model) -> None:
    rows, tokens = 4, 256
    policy = trainable(load_base(model, BFLOAT16), Lora())
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.enable_input_require_grads()
    ids = torch.ones(rows, tokens, dtype=torch.long)
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)
    live = Live(*stored(policy), ids)
    with live:
        with torch.autocast("cpu", torch.bfloat16):
            decoder = policy.get_base_model().model
            loss = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float().sum()
        live.peak = live.now
        loss.backward()
    settings = Grpo(gradient_checkpointing=True, optim="adamw_torch_fused")
    predicted = backward(tiny, model, settings, rows, tokens, logits=0)
    assert close(sum(predicted.values()), live.peak, 0.1)


def test_logits_of_sft_are_those_of_trls_chunk() -> None:
    tokens, hidden, vocabulary = 2 * 256, 64, 4096
    head = torch.ones(vocabulary, hidden, dtype=torch.bfloat16)
    states = torch.ones(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    assert sft_trainer._CHUNKED_LM_HEAD_CHUNK_SIZE == 256
    live = Live(head, states)
    with live:
        labels = torch.ones(1, tokens + 1, dtype=torch.long)
        padded = torch.cat([states, states[:1]]).unsqueeze(0)
        sft_trainer._chunked_cross_entropy_loss(padded, head, 256, labels=labels)[0].backward()
    assert close(SFT_LOGIT * 256 * vocabulary, live.peak)


@pytest.mark.parametrize("tokens", [512, 3000])
def test_logits_of_grpo_are_those_of_trls_tiles(tiny: Shape, tokens: int) -> None:
    wide = replace(tiny, vocabulary=20000)
    assert (trl_utils._CHUNKED_LOGPROB_TOKEN_CHUNK_SIZE, grpo_trainer._CHUNKED_LOGPROB_CHUNK_SIZE) == TILE
    head = torch.ones(wide.vocabulary, wide.hidden, dtype=torch.bfloat16)
    states = torch.ones(tokens, wide.hidden, dtype=torch.bfloat16, requires_grad=True)
    live = Live(head, states)
    with live, torch.autocast("cpu", torch.bfloat16):
        labels = torch.ones(tokens, dtype=torch.long)
        logps, _ = trl_utils._ChunkedLogProbFunction.apply(states, head, None, labels, 1.0, TILE[1], None, 1.0)
        live.peak = live.now
        logps.mean().backward()
    planned = loss_logits(wide, TINY, Work(rows=1, logits="completion"), 0, tokens)
    assert live.peak <= planned <= 1.15 * live.peak


def test_logits_of_grpo_with_an_adapted_head_are_those_of_trls_kernel(
    monkeypatch: pytest.MonkeyPatch, tiny: Shape
) -> None:
    """TRL's own autograd function allocates; only the Triton kernels that fill what it allocates are left out."""
    triton: Any = types.ModuleType("triton")
    triton.language = types.ModuleType("triton.language")
    triton.language.constexpr = int
    triton.jit = lambda function: NoKernel()
    triton.cdiv = lambda a, b: -(-a // b)
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "triton.language", triton.language)
    file = Path(trl_utils.__file__).parents[1] / "kernels" / "logprob_entropy.py"
    spec = importlib.util.spec_from_file_location("logprob_entropy", file)
    assert spec
    assert spec.loader
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    monkeypatch.setattr(sys, "platform", "linux")
    rows, completion = 3, 40
    computed = torch.ones(rows, completion + 1, tiny.vocabulary, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.ones(rows, completion, dtype=torch.long)
    live = Live(computed, ids)
    with live:
        logits = computed.float()[:, :-1]
        logps, _ = kernels.selective_log_softmax_and_entropy(logits, ids, 1.0, ids)
        del logits
        live.peak = live.now
        logps.mean().backward()
    head = Model(base="qreason/tiny", lora=Lora(target_modules=["lm_head"]))
    work = Work(rows=rows, logits="completion")
    assert close(loss_logits(tiny, head, work, 0, completion), live.peak)
    assert loss_logits(tiny, head, work, 0, completion, compiles=False) == 2 * loss_logits(
        tiny, head, work, 0, completion
    )


class NoKernel:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: None


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9}, {"min_p": 0.1}, {"top_k": 5}, {"top_p": 0.9}])
def test_drawing_needs_no_more_than_planned(settings: dict[str, Any], tiny: Shape) -> None:
    logits = torch.rand(8, 4096).bfloat16()
    live = Live(logits)
    with live:
        draw(logits, Draw(**settings).sampling(), None)
    planned = (draw_bytes(tiny, Draw(**settings)) - 2) * logits.numel()  # less the logits themselves
    assert live.peak <= planned * 1.01
    if "top_p" not in settings:  # a GPU sorts in further copies, a CPU does not
        assert close(planned, live.peak)


@pytest.mark.parametrize("model", [TINY, TINY_4BIT], ids=["16-bit", "4-bit"])
@pytest.mark.parametrize("adapter", [True, False])
def test_reading_prompts(tiny: Shape, model: Model, adapter: bool) -> None:
    rows, tokens = 8, 64
    policy = trainable(load_base(model, BFLOAT16), Lora()).eval()
    ids = torch.ones(rows, tokens, dtype=torch.long)
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)
    cache = DynamicCache(config=policy.config)
    live = Live(*stored(policy), ids, mask)

    def read() -> None:
        with torch.no_grad(), live:
            options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            policy.get_base_model()(input_ids=ids, attention_mask=mask, **options)

    if adapter:
        read()
    else:
        with policy.disable_adapter():
            read()
    assert close(sum(reading(tiny, model, rows, tokens, adapter=adapter).values()), live.peak, 0.15)


def test_the_last_token_of_a_rollout(tiny: Shape) -> None:
    prompts, n, prompt, completion = 4, 4, 100, 60
    policy = load_base(TINY, BFLOAT16)
    rows, tokens = prompts * n, prompt + completion
    cache, live = DynamicCache(config=policy.config), Live(*stored(policy))
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, 0] = 0  # prompts of different lengths
    with torch.no_grad(), live:
        for layer in range(tiny.layers):
            made = torch.ones(rows, tiny.kv_heads, tokens - 1, tiny.head_dim, dtype=torch.bfloat16)
            cache.update(made, made.clone(), layer)
        del made
        policy(input_ids=mask[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)
    lengths = Lengths(prompt=prompt)
    planned = sum(rollout(tiny, TINY, Draw(max_completion_length=completion), prompts, n, lengths).values())
    if hasattr(sdpa_attention, "pack_gqa"):  # newer transformers repeat no keys: the plan is on the safe side
        assert 0.7 * planned < live.peak < planned
    else:
        assert close(planned, live.peak, 0.1)


@pytest.mark.parametrize("stage", ["sft", "grpo", "preference"])
def test_peak_of_a_real_training_step(
    tiny: Shape, write_recipe: Any, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage as a GPU runs it, on rows as long as the longest."""
    file = write_recipe(
        (
            "sft: {learning_rate: 1e-5}",
            "sft: {per_device_train_batch_size: 16, max_steps: 2, optim: adamw_torch_fused}",
        ),
        (
            "grpo: {num_generations: 4}",
            "grpo: {num_generations: 4, per_device_train_batch_size: 16, max_steps: 1, preflight: false}",
        ),
        ("- merge", "- preference: {from: base, per_device_train_batch_size: 8, max_steps: 1, heldout_share: 0.5}"),
        ("heldout: heldout.jsonl", "heldout: heldout.jsonl\n  pairs: pairs.jsonl"),
        ("temperature: 0.9, max_completion_length: 12", "temperature: 1, max_completion_length: 24"),
    )
    better, worse = "Restart the spooler. " * 8, "Restart the printers. " * 8
    pairs = [{"prompt": f"printer {n}", "chosen": better, "rejected": worse} for n in range(16)]
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    row = {"issue": "printer is offline " * 8, "resolution": "Restart the spooler.", "steps": "Looked. " * 8}
    for use in ("sft", "prompts"):
        rows = [row | {"id": str(number)} for number in range(32)]
        rows[0]["issue"] = "printer"  # so that rows are padded
        Path(f"{use}.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in rows))
    recipe = load_recipe(file)
    monkeypatch.setattr("qreason.machine.hardware.detect", lambda: BFLOAT16)
    monkeypatch.setattr("qreason.model.compat.trl_logprobs.can_share_prompts", lambda args: False)
    monkeypatch.setattr(
        "qreason.model.compat.trl.select_rows", lambda trainer, selection: trainer
    )  # no reply is paid here
    planned = plan(recipe, tiny, CARDS["t4"], read_lengths(recipe)).steps
    run = Session.open(recipe, Path("run"), say=lambda line: None)
    run.step = [step.stage for step in recipe.steps].index(stage)
    known = stored(run.resident.model)
    live = Live(*known)
    with live:
        run_stage(recipe.steps[run.step], run)
    phase = next(step for step in planned if step.name == stage).phases["backward"]
    allocated = sum(phase.values()) - phase["CUDA context"] - phase["fragmentation"]
    assert close(allocated, held(known) + live.peak, 0.1)


# --- the plan ------------------------------------------------------------------------------------


HELPDESK = Lengths(prompt=110, example=189, question=73, reference=28)
"""About those of the helpdesk data."""


def test_the_1_5b_recipe_on_a_t4(qwen: Any, recipe: Recipe) -> None:
    made = plan(recipe, qwen("1.5b"), read_card("t4"), HELPDESK)
    step, phase, needed = made.peak
    assert made.fits
    assert (step.name, phase) == ("evaluate", "rollout")
    assert 2.5 * GIB < needed < 4 * GIB
    step = next(step for step in made.steps if step.name == "grpo")
    assert sum(step.phases["backward"].values()) < 2.5 * GIB  # all logits of its completions would take 1.2 more
    assert [list(step.phases) for step in made.steps] == [
        ["load", "rollout", "judge"],
        ["load", "backward"],
        ["load", "rollout", "judge", "backward"],
    ]
    for one in made.steps:
        for parts in one.phases.values():
            assert parts["weights"] == weight_bytes(qwen("1.5b"), "nf4")
            assert all(size > 0 for size in parts.values())


def test_lengths_are_those_of_the_data(recipe: Recipe) -> None:
    found = read_lengths(changed(recipe, "model.base=qreason/tiny"))
    assert 50 < found.prompt < found.example < 512
    assert 0 < found.reference < found.question


@pytest.mark.parametrize(
    ("base", "millions", "context"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494.0, 32768),
        ("Qwen/Qwen2.5-3B", 3085.9, 32768),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", 7615.6, 32768),
        ("unsloth/Qwen2.5-Math-1.5B-Instruct", 1543.7, 4096),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1777.1, 131072),
        ("Qwen/Qwen3-1.7B", 1720.6, 40960),
        ("Qwen/Qwen3-4B", 4022.5, 40960),
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", 1235.8, 131072),
        ("meta-llama/Llama-3.2-3B-Instruct", 3212.7, 131072),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 361.8, 8192),
    ],
)
def test_the_sizes_of_a_usual_base_are_known_without_its_files(
    base: str, millions: float, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_network(monkeypatch)
    shape = read_shape(base)
    assert (round(shape.parameters / 1e6, 1), shape.context) == (millions, context)


def test_a_usual_base_is_planned_without_its_files(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    no_network(monkeypatch)
    usual = changed(recipe, "model.base=Qwen/Qwen3-1.7B")
    shape = read_shape("Qwen/Qwen3-1.7B")
    assert plan(usual, shape, CARDS["t4"], read_lengths(usual)).peak[2] > shape.parameters / 2


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qreason.planning.shapes.read_base_config", lambda base: pytest.fail("asked the Hub"))
    monkeypatch.setattr("qreason.planning.shapes.is_here", lambda base: False)
    monkeypatch.setattr("qreason.planning.memory.is_here", lambda base: False)


@pytest.mark.parametrize("size", ["0GiB", "t5", f"{'9' * 400}GiB"])
def test_a_size_that_no_card_has_is_refused(size: str) -> None:
    with pytest.raises(InputError, match=f"{size}: no such card"):
        read_card(size)


def test_a_base_that_is_not_usual_is_read_from_its_files() -> None:
    for base in ("someone/Qwen2.5-0.5B", "Qwen/Qwen9-0.5B", "qreason/tiny"):
        assert known_config(base) is None


LARGER = [
    ("grpo.per_device_train_batch_size=4", "grpo.per_device_train_batch_size=8"),
    ("grpo.per_device_train_batch_size=4", "grpo.gradient_checkpointing=false"),
    ("model.lora.r=16", "model.lora.r=64"),
    ("sampling.max_completion_length=256", "sampling.max_completion_length=512"),
    ("model.quantization=nf4", "model.quantization=none"),
    ("grpo.optim=adamw_8bit", "grpo.optim=adamw_torch"),
    ("grpo.num_generations=4", "grpo.num_generations=16"),
    ("grpo.difficulty_filtering=4", "grpo.difficulty_filtering=64"),
    ("sampling.top_p=1", "sampling.top_p=0.9"),
    ("grpo.beta=0", "grpo.beta=0.1"),
    ("rewards.judge=0.4", "rewards.judge={weight: 0.4, adapter: somewhere}"),
    ("rewards.judge=0.4", "rewards.judge={weight: 0.4, mode: groupwise}"),
]


@pytest.mark.parametrize(("less", "more"), LARGER)
def test_more_never_needs_less(qwen: Any, recipe: Recipe, less: str, more: str) -> None:
    small = plan(changed(recipe, less), qwen("1.5b"), CARDS["t4"])
    large = plan(changed(recipe, more), qwen("1.5b"), CARDS["t4"])
    grew = False
    for before, after in zip(small.steps, large.steps, strict=True):
        for phase, parts in before.phases.items():
            assert sum(parts.values()) <= sum(after.phases[phase].values())
            grew |= sum(parts.values()) < sum(after.phases[phase].values())
    assert grew


def test_longer_texts_never_need_less(qwen: Any, recipe: Recipe) -> None:
    lengths = [Lengths(prompt, 2 * prompt, prompt, prompt // 2) for prompt in (16, 64, 256, 1024)]
    sizes = [plan(recipe, qwen("0.5b"), CARDS["t4"], one).peak[2] for one in lengths]
    assert sizes == sorted(set(sizes))


def test_unsloth_reads_a_prompt_for_each_of_its_replies(qwen: Any, recipe: Recipe) -> None:
    shape, t4 = qwen("1.5b"), read_card("t4")
    phases = {}
    for backend in ("plain", "unsloth"):
        model = recipe.model.model_copy(update={"backend": backend})
        asked = recipe.model_copy(update={"model": model})
        made = plan(asked, shape, t4, Lengths(prompt=2000))
        phases[backend] = next(step for step in made.steps if step.name == "grpo").phases["rollout"]
    grpo = next(step.grpo for step in recipe.steps if step.grpo)
    assert sum(phases["unsloth"].values()) > 2 * sum(phases["plain"].values())
    rows = grpo.prompts_at_a_time * grpo.num_generations
    assert rows <= recipe.sampling.max_num_seqs
    for name, size in reading(shape, recipe.model, rows, 2000, adapter=True).items():
        assert phases["unsloth"][name] == size


def test_an_endpoint_as_judge_takes_nothing_from_the_card(qwen: Any, recipe: Recipe) -> None:
    away = changed(recipe, 'rewards.judge={weight: 0.4, endpoint: "http://localhost:1/v1", model: m}')
    made = plan(away, qwen("1.5b"), CARDS["t4"])
    assert all("judge" not in step.phases for step in made.steps)


def test_a_judge_set_aside_needs_its_weights_only_while_it_is_asked(tiny: Shape, recipe: Recipe) -> None:
    settings = 'rewards.judge={weight: 0.4, base: "qreason/tiny", offload: %s}'
    there, aside = (plan(changed(recipe, settings % flag), tiny, CARDS["t4"]).steps[-1] for flag in ("false", "true"))
    stored_bytes = weight_bytes(tiny, "nf4")
    assert there.phases["backward"]["judge"] == there.phases["judge"]["judge"] == stored_bytes
    assert aside.phases["judge"]["judge"] == stored_bytes
    assert "judge" not in aside.phases["backward"]


def test_a_preference_model_stays_on_the_card(tiny: Shape, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "qreason/tiny"}')
    for model in ("qreason/tiny", tmp_path):
        liked = changed(recipe, f'rewards.preference={{weight: 0.1, model: "{model}"}}')
        phases = plan(liked, tiny, CARDS["t4"]).steps[-1].phases
        assert phases["backward"]["judge"] == phases["rollout"]["judge"] == weight_bytes(tiny, "none")


def test_changes_lower_the_planned_peak_by_what_they_say(qwen: Any, recipe: Recipe) -> None:
    heaviest = ("model.quantization=none", "grpo.gradient_checkpointing=false")
    made = plan(changed(recipe, *heaviest), qwen("1.5b"), read_card("8GiB"))
    assert not made.fits
    kinds = [setting.partition("=")[0] for change in made.changes for setting in change.settings]
    for key in (
        *("grpo.per_device_train_batch_size", "grpo.gradient_checkpointing", "grpo.optim", "model.quantization"),
        *("model.lora.r", "sampling.max_completion_length"),
    ):
        assert key in kinds
    for change in made.changes:
        again = plan(change.recipe, qwen("1.5b"), made.card).peak[2]
        assert again == made.peak[2] - change.gained_bytes < made.peak[2]
        assert plan(changed(recipe, *heaviest, *change.settings), qwen("1.5b"), made.card).peak[2] == again
    same = [change.same_mathematics for change in made.changes]
    assert same == sorted(same, reverse=True)


def effective(recipe: Recipe) -> list[int]:
    steps = [step.sft or step.grpo for step in recipe.steps]
    return [one.per_device_train_batch_size * one.gradient_accumulation_steps for one in steps if one]


@pytest.mark.parametrize("size", ["4GiB", "5GiB", "6GiB", "8GiB", "12GiB", "24GiB"])
def test_fit_keeps_the_effective_batch_and_fits(qwen: Any, recipe: Recipe, size: str) -> None:
    heavy = changed(
        recipe,
        *("sft.per_device_train_batch_size=16", "sft.gradient_checkpointing=false"),
        *("grpo.per_device_train_batch_size=16", "grpo.gradient_accumulation_steps=1"),
        *("grpo.gradient_checkpointing=false",),
    )
    fitted, lines = fit(heavy, qwen("1.5b"), read_card(size))
    assert effective(fitted) == effective(heavy)
    assert fitted.model == heavy.model
    assert fitted.sampling == heavy.sampling
    assert plan(fitted, qwen("1.5b"), read_card(size)).fits
    assert bool(lines) == (fitted != heavy)
    grpo = next(step.grpo for step in fitted.steps if step.grpo)
    assert grpo.per_device_train_batch_size < 16 or size == "24GiB"


def test_fit_leaves_alone_what_fits(qwen: Any, recipe: Recipe) -> None:
    assert fit(recipe, qwen("1.5b"), CARDS["t4"]) == (recipe, [])


def test_fit_checkpoints_when_one_row_alone_is_too_much(qwen: Any, recipe: Recipe) -> None:
    long = changed(recipe, "grpo.gradient_checkpointing=false", "sampling.max_completion_length=2048")
    fitted, _ = fit(long, qwen("0.5b"), read_card("4GiB"))
    grpo = next(step.grpo for step in fitted.steps if step.grpo)
    assert grpo.gradient_checkpointing


def test_fit_keeps_the_rounds_of_replies(qwen: Any, recipe: Recipe) -> None:
    many = ("grpo.per_device_train_batch_size=8", "sampling.max_completion_length=1024")
    rounds = changed(recipe, "grpo.trl={steps_per_generation: 2}", *many)
    fitted, _ = fit(rounds, qwen("1.5b"), read_card("4GiB"))
    grpo = next(step.grpo for step in fitted.steps if step.grpo)
    assert grpo.per_device_train_batch_size < 8
    assert grpo.per_device_train_batch_size * grpo.trl["steps_per_generation"] == 16


def test_a_loss_that_averages_over_micro_batches_keeps_them(qwen: Any, recipe: Recipe) -> None:
    made = plan(changed(recipe, "grpo.loss_type=bnpo"), qwen("1.5b"), CARDS["t4"])
    assert not any("per_device_train_batch_size" in " ".join(change.settings) for change in made.changes)


def test_a_recipe_that_cannot_fit_is_refused_with_a_cure_that_works(qwen: Any, recipe: Recipe) -> None:
    full = changed(recipe, "model.quantization=none")
    with pytest.raises(InputError, match=r"needs 5\.\d\d GiB \(judge\), 4GiB has 4\.00 GiB") as caught:
        fit(full, qwen("1.5b"), read_card("4GiB"))
    cure = str(caught.value).partition("it fits with ")[2]
    assert cure == "model.quantization=nf4"
    assert fit(changed(full, cure), qwen("1.5b"), read_card("4GiB"))


def test_a_card_too_small_for_anything_is_refused(qwen: Any, recipe: Recipe) -> None:
    with pytest.raises(InputError, match=r"nothing makes it fit; take a smaller base, or a card with \d\.\d\d GiB"):
        fit(recipe, qwen("1.5b"), read_card("1GiB"))


def test_a_base_that_is_none_has_no_shape(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded as a model"):
        read_shape(str(tmp_path))
    GPT2Config(architectures=["GPT2LMHeadModel"], n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"intermediate_size"):
        read_shape(str(tmp_path))


def test_a_recipe_that_only_merges_has_no_plan(tiny: Shape, recipe: Recipe) -> None:
    merging = recipe.model_copy(update={"steps": recipe.steps[-1:]})
    with pytest.raises(InputError, match="nothing to plan"):
        plan(merging, tiny, CARDS["t4"])


# --- cards and the picture -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("6GiB", 6 * GIB), ("6GB", 6 * 10**9), ("6144MiB", 6 * GIB), ("5.5 gib", int(5.5 * GIB))]
)
def test_a_card_may_be_a_size(text: str, size: int) -> None:
    assert read_card(text).free_bytes == size


@pytest.mark.parametrize("text", ["rtx4060ti-16gb", "RTX 4060 Ti 16GB", "NVIDIA GeForce RTX 4060 Ti 16GB"])
def test_a_card_may_be_a_name(text: str) -> None:
    assert read_card(text) == CARDS["rtx4060ti-16gb"]


@pytest.mark.parametrize(("text", "near"), [("rtx3061", "rtx306"), ("tesla-t5", "'t4'"), ("0GiB", "6GiB"), ("", "t4")])
def test_other_cards_are_refused_with_the_nearest(text: str, near: str) -> None:
    with pytest.raises(InputError, match=near):
        read_card(text)


def test_the_card_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = find_card()
    assert here.capability is None
    assert 2**30 < here.free_bytes <= psutil.virtual_memory().total
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * GIB, 15 * GIB))
    card = find_card()
    assert card.capability == (7, 5)
    assert 10 * GIB < card.free_bytes < 11 * GIB
    monkeypatch.setattr("qreason.planning.memory.compiler_trouble", lambda: "there is no C compiler (gcc or clang)")
    without = find_card()
    assert not without.compiles


def test_a_card_of_each_generation_knows_its_numbers() -> None:
    assert CARDS["t4"].capability < (8, 0) <= CARDS["rtx3060"].capability
    assert 14 * GIB < CARDS["t4"].free_bytes < 15 * GIB


def shown(made: Plan) -> list[str]:
    console = Console(width=80, no_color=True, file=StringIO(), force_terminal=False)
    console.print(plan_table(made))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


def test_the_picture_marks_the_peak_and_the_limit_in_80_columns(qwen: Any, recipe: Recipe) -> None:
    lines = shown(plan(recipe, qwen("1.5b"), CARDS["t4"], HELPDESK))
    assert max(map(len, lines)) <= 80
    assert "fits" in lines[0]
    marked = [line for line in lines if "◄ peak" in line]
    assert len(marked) == 1
    assert marked[0].startswith("evaluate rollout")
    limits = [line.index("│") for line in lines if "│" in line]
    assert len(limits) == 8
    assert len(set(limits)) == 1
    assert any("sampling.max_completion_length=128" in line for line in lines)


def test_the_picture_shows_how_far_a_plan_is_over(qwen: Any, recipe: Recipe) -> None:
    made = plan(recipe, qwen("1.5b"), read_card("2GiB"), HELPDESK)
    lines = shown(made)
    assert "does not fit" in lines[0]
    over = next(line for line in lines if "◄ peak" in line)
    assert "▒" in over.partition("│")[2]


def test_sampling_is_planned_like_rollouts_and_a_teacher_takes_no_memory_for_replies() -> None:
    recipe = load_recipe("quickstart")
    teacher = {"endpoint": "http://localhost", "model": "m"}

    def phases(sample: dict[str, Any]) -> set[str]:
        steps = [Step.model_validate({"sample": sample})]
        (step,) = plan(recipe.model_copy(update={"steps": steps}), read_shape("qreason/tiny"), read_card("8GiB")).steps
        return set(step.phases)

    assert phases({}) - phases({"teacher": teacher}) == {"rollout"}
