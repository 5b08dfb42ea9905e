"""Each family that is exported, in a real llama.cpp: a small model with random weights, its tokenizer and its chats."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from test_export import rewrite

from qreason.cli import main
from qreason.data.prompts import HELPDESK
from qreason.export import engine, lora, ollama, quality, reference, verify, writer
from qreason.export.reference import Heldout
from qreason.export.vocabulary import LLAMA3
from qreason.model.load import EMBEDDED, load_tokenizer
from qreason.types import Example, Reply

TINY = EMBEDDED["qreason/tiny"]
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_TOKENS = (
    "<|begin_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
R1_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "<|vision_pad|>",
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}
SCALED = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
"""Llama 3.2's, but for the length of its first training, so that a short text shows it."""


def llama_words(parts: dict[str, Any]) -> None:
    parts["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = LLAMA3
    parts["model"]["ignore_merges"] = True


FAMILIES: dict[str, dict[str, Any]] = {
    "llama3": {
        "kind": "Llama",
        "config": {"rope_parameters": SCALED, "head_dim": 32, "rms_norm_eps": 1e-5},
        "tokens": LLAMA_TOKENS,
        "names": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": None},
        "words": llama_words,
        "template": (TEMPLATES / "llama3_2.jinja").read_text("utf-8"),
    },
    "smollm2": {
        "kind": "Llama",
        "config": {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96},
        "words": lambda parts: parts.update(pre_tokenizer=DIGITS, normalizer=None),
        "template": SMOLLM,
    },
    "qwen3": {
        "kind": "Qwen3",
        "config": {"head_dim": 64},
        "tokens": ("<think>", "</think>"),
        "template": (TEMPLATES / "qwen3.jinja").read_text("utf-8"),
    },
    "r1": {
        "kind": "Qwen2",
        "config": {"tie_word_embeddings": False},
        "tokens": R1_TOKENS,
        "names": dict(zip(("bos_token", "eos_token", "pad_token"), (*R1_TOKENS[:2], R1_TOKENS[1]), strict=True)),
        "template": (TEMPLATES / "deepseek_r1_distill.jinja").read_text("utf-8"),
    },
}  # fmt: skip


def write_base(folder: Path, name: str) -> Path:
    """A random model of a family, with the embedded vocabulary, the family's own marks and its way to cut words."""
    family, tokens = FAMILIES[name], FAMILIES[name].get("tokens", ())
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.jinja"))
    parts = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    family.get("words", lambda parts: None)(parts)
    like = parts["added_tokens"][0]
    parts["added_tokens"] += [
        like | {"id": 4096 + place, "content": token, "special": "think" not in token}
        for place, token in enumerate(tokens)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(parts), "utf-8")
    file = folder / "tokenizer_config.json"
    named = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"} | family.get("names", {})
    file.write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text(family["template"], "utf-8")
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 1024, "vocab_size": 4096 + len(tokens)}
    config = getattr(transformers, f"{family['kind']}Config")(
        **{"tie_word_embeddings": True, **sizes, **family["config"]}
    )
    model = getattr(transformers, f"{family['kind']}ForCausalLM")(config)
    with torch.no_grad():
        for weight in model.parameters():  # attention and tokens that matter, norms and biases that differ
            weight.mul_(10 if weight.dim() == 2 else 1).add_(torch.randn_like(weight) * 0.3 * (weight.dim() == 1))
    model.half().save_pretrained(folder)
    return folder


def heldout_of(base: Path) -> Heldout:
    rows = [Example(str(number), f"Ticket {number * 37}: the VPN drops", "") for number in range(3)]
    return Heldout(rows, HELPDESK, load_tokenizer(str(base)), 8, 3)


def some_replies(heldout: Heldout) -> list[Reply]:
    return [Reply("", prompt_ids=tuple(ids[:-40]), token_ids=tuple(ids[-40:])) for ids in heldout.prompts]


@pytest.fixture(scope="module", params=list(FAMILIES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / request.param, request.param)


def test_a_family_is_in_llama_cpp_what_it_is_in_transformers(base: Path, tmp_path: Path) -> None:
    heldout, file = heldout_of(base), tmp_path / "x-f32.gguf"
    writer.write_model(base, file, "f32", "x")
    asked = some_replies(heldout)
    own = reference.write_logits(reference.in_float32(base).model, asked, tmp_path / "own")
    checks = [
        verify.check_metadata(file, "f32", base, heldout.tokenizer),
        verify.check_logits(file, "f32", own, engine.logits(file, asked, tmp_path / "found")),
        ollama.check_template(heldout),
    ]
    with engine.Server(file, 512) as server:
        checks += [check(file, server, heldout) for check in (verify.check_tokens, verify.check_template)]
        checks.append(verify.check_stop(file, server, heldout))
    assert [check.line for check in checks if not check.passed] == []
    assert ollama.modelfile("x.gguf", heldout, 1024, base).count("{{ .Content }}") in (1, 3)


def write_adapter(base: Path, folder: Path) -> None:
    adapted: Any = get_peft_model(
        reference.in_float32(base).model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    )
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    adapted.save_pretrained(folder)


def check_adapter(base: Path, tmp_path: Path) -> verify.Check:
    lora.write_adapter(tmp_path / "adapter", base, tmp_path / "adapter.gguf", "x")
    writer.write_model(base, tmp_path / "base.gguf", "f16", "x")
    model = reference.with_adapter(base, tmp_path / "adapter")
    prompts = heldout_of(base).prompts
    return quality.check_adapter_file(tmp_path / "adapter.gguf", tmp_path / "base.gguf", model, prompts, 512, tokens=8)


def test_the_adapter_of_a_family_and_a_quantized_file_are_its_own(base: Path, tmp_path: Path) -> None:
    write_adapter(base, tmp_path / "adapter")
    found = check_adapter(base, tmp_path)
    assert found.passed, found.line
    heldout = heldout_of(base)
    file, asked = tmp_path / "x-q8_0.gguf", some_replies(heldout)
    writer.write_model(base, file, "q8_0", "x")
    plain = reference.in_float32(base).model
    quality.take_weights(plain, file)
    own = quality.check_own_weights(
        file, reference.write_logits(plain, asked, tmp_path / "own"), engine.logits(file, asked, tmp_path / "found")
    )
    assert own.passed, own.line


def unturned(tensors: dict[str, Any]) -> None:
    rows = tensors["blk.0.attn_q.weight"]
    tensors["blk.0.attn_q.weight"] = rows.reshape(4, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3", unturned),
        ("llama3", lambda tensors: tensors.pop("rope_freqs.weight")),
        ("qwen3", lambda tensors: tensors.update({"blk.0.attn_k_norm.weight": tensors["blk.1.attn_k_norm.weight"]})),
    ],
    ids=["rows of queries", "rotary scaling", "norm of keys"],
)
def test_a_mistake_of_a_family_is_caught(name: str, change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", name)
    writer.write_model(base, tmp_path / "right.gguf", "f32", "x")
    file, asked = (
        rewrite(tmp_path / "right.gguf", tmp_path / "wrong.gguf", change=change),
        some_replies(heldout_of(base)),
    )
    own = reference.write_logits(reference.in_float32(base).model, asked, tmp_path / "own")
    assert not verify.check_logits(file, "f32", own, engine.logits(file, asked, tmp_path / "found")).passed


def test_an_adapter_whose_rows_are_not_turned_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", "smollm2")
    write_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(lora, "to_engine", lambda config, name, load: load)
    assert not check_adapter(base, tmp_path).passed


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rope_parameters": {**SCALED, "rope_type": "yarn"}}, "rope_type yarn cannot be exported"),
        ({"attention_bias": True}, "attention_bias cannot be exported"),
        ({"mlp_bias": True}, "mlp_bias cannot be exported"),
        ({}, "does not cut words as one of llama.cpp's pre-tokenizers qwen2, llama-bpe, smollm, gpt-2 does"),
    ],
)
def test_what_llama_cpp_would_compute_or_cut_otherwise_is_named_before(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", "llama3")
    file, words = base / "config.json", base / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    if not changed:
        words.write_text(words.read_text("utf-8").replace("{1,3}", "{1,4}"), "utf-8")
    steps = "steps=[{sft: {max_steps: 1}}, merge, export]"
    told = CliRunner().invoke(main, ["validate", "smoke", "--set", f"model.base={base}", "--set", steps])
    assert told.exit_code == 2
    assert said in told.stderr


def test_a_wrong_beginning_or_cut_of_words_is_caught(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama3")
    heldout = heldout_of(base)
    writer.write_model(base, tmp_path / "right.gguf", "f32", "x")
    wrong = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.pre": "qwen2"}
    file = rewrite(tmp_path / "right.gguf", tmp_path / "wrong.gguf", wrong)
    told = verify.check_metadata(file, "f32", base, heldout.tokenizer).figures["wrong"]
    assert all(key in told for key in wrong)
    with engine.Server(file, 512) as server:
        assert not verify.check_tokens(file, server, heldout).passed
        assert not verify.check_template(file, server, heldout).passed
