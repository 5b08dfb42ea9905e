"""Bases and adapters: what is loaded, and what is refused with a cure."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trl
from conftest import give_weights
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from qreason.errors import ModelError
from qreason.machine.hardware import detect
from qreason.model.load import EMBEDDED, fingerprint, load_base, load_tokenizer
from qreason.model.resident import Resident
from qreason.recipe.sections import Lora, Model

TINY = EMBEDDED["qreason/tiny"]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of the embedded base, to be broken."""
    return Path(shutil.copytree(TINY, tmp_path / "base"))


def set_config(folder: Path, file: str, **values: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@contextmanager
def same_weights(resident: Resident) -> Iterator[None]:
    """Afterwards each weight is the tensor that it was, with the values it had."""
    before = {name: (p.data_ptr(), p.clone()) for name, p in resident.model.named_parameters()}
    yield
    for name, parameter in resident.model.named_parameters():
        address, value = before[name]
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, value)


def test_a_base_without_a_chat_template_is_refused(broken: Path) -> None:
    (broken / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(str(broken))


def test_a_base_that_pads_with_its_stop_token_is_refused(broken: Path) -> None:
    set_config(broken, "tokenizer_config.json", pad_token="<|im_end|>")
    with pytest.raises(ModelError, match="unlearn stopping"):
        load_tokenizer(str(broken))


@pytest.mark.parametrize(("token", "named"), [("pad_token", "padding token"), ("eos_token", "end-of-reply token")])
def test_a_base_without_a_token_that_training_needs_is_refused(broken: Path, token: str, named: str) -> None:
    # The message used to say that the padding token were the end-of-reply token.
    set_config(broken, "tokenizer_config.json", **{token: None})
    with pytest.raises(ModelError, match=rf"no {named} \({token}\).* tokenizer_config.json"):
        load_tokenizer(str(broken))


TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TURNS,
        TURNS.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"),
    ],
)
def test_a_template_without_a_system_role_gets_its_text_in_the_users_turn(
    broken: Path, tmp_path: Path, template: str
) -> None:
    (broken / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(str(broken))
    folded = "<|im_start|>user\nBe brief.\n\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == folded
    assert tokenizer.apply_chat_template(CHAT[1:], tokenize=False) == folded.replace("Be brief.\n\n", "")
    tokenizer.save_pretrained(tmp_path / "merged")  # whoever serves the merged model folds in the same way
    assert load_tokenizer(str(tmp_path / "merged")).apply_chat_template(CHAT, tokenize=False) == folded


def test_a_template_with_a_system_role_stays_as_it_is() -> None:
    assert load_tokenizer("qreason/tiny").chat_template == (TINY / "chat_template.jinja").read_text()


def published(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "off", "on"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_start|>assistant\n"),
        ("deepseek_r1_distill", "<｜Assistant｜>", "<｜Assistant｜><think>\n"),
    ],
)
def test_a_prompt_ends_as_a_reply_begins_unless_thoughts_are_wanted(
    broken: Path, tmp_path: Path, name: str, off: str, on: str
) -> None:
    (broken / "chat_template.jinja").write_text(published(name), "utf-8")
    for thinking, end in ((False, off), (True, on)):
        tokenizer = load_tokenizer(str(broken), thinking=thinking)
        asked = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
        assert asked.endswith(f"Why?{'' if 'r1' in name else '<|im_end|>' + chr(10)}{end}")
        whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
        assert whole.startswith(asked + "So.") is not thinking
        assert tokenizer.apply_chat_template(CHAT[:2], tokenize=False) + off + "So." in whole
        tokenizer.save_pretrained(tmp_path / "merged")  # whoever serves the merged model asks in the same way
        assert load_tokenizer(str(tmp_path / "merged")).chat_template == tokenizer.chat_template


def test_a_space_before_replies_is_left_to_their_first_token(broken: Path) -> None:
    own = "{% for m in messages %}{{ (' ' if m.role == 'assistant' else '[I] ') + m.content }}{% endfor %}"
    (broken / "chat_template.jinja").write_text(own)
    assert load_tokenizer(str(broken)).chat_template == own


def test_a_template_without_a_beginning_of_replies_gets_one(broken: Path) -> None:
    (broken / "chat_template.jinja").write_text(TURNS.partition("{% if add_gen")[0])
    asked = load_tokenizer(str(broken)).apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("Why?<|im_end|>\n<|im_start|>assistant\n")


def test_a_date_in_a_template_is_the_same_tomorrow(broken: Path, tmp_path: Path) -> None:
    (broken / "chat_template.jinja").write_text(published("llama3_2"), "utf-8")
    tokenizer = load_tokenizer(str(broken))
    for given in ({}, {"date_string": "1 Jan 2030"}):  # as llama.cpp's server gives it
        assert "Today Date: 26 Jul 2024\n" in tokenizer.apply_chat_template(CHAT, tokenize=False, **given)
    tokenizer.save_pretrained(tmp_path / "merged")
    assert load_tokenizer(str(tmp_path / "merged")).chat_template == tokenizer.chat_template


@pytest.mark.parametrize("padding", [None, "<|im_end|>"])
def test_a_base_without_padding_of_its_own_pads_with_a_token_that_no_chat_uses(broken: Path, padding: str) -> None:
    # Llama 3.2 names none, R1's Qwen its end-of-reply token; neither could be trained.
    file = broken / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace("<|endoftext|>", "<|finetune_right_pad_id|>"), "utf-8")
    (broken / "chat_template.jinja").write_text(TURNS.replace("<|im_end|>", "<end>"))
    set_config(broken, "tokenizer_config.json", pad_token=padding, unk_token=None)
    tokenizer = load_tokenizer(str(broken))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|finetune_right_pad_id|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for i in range(90000) %}{% for j in range(900) %}{% endfor %}{% endfor %}",  # ends: its thread goes on
            "does not end within 0.5 sec",
        ),
        ("{{ messages[1].content * 2000 }}" * 40, "makes .* characters of a short chat"),
        (" " * 1_000_001, "has 1000001 characters"),
        ("{{ raise_exception('not today') }}", "fails .*not today"),
        ("Hello", "leaves out what the user says"),
        ("{% for %}", "fails"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(
    broken: Path, monkeypatch: pytest.MonkeyPatch, template: str, said: str
) -> None:
    monkeypatch.setattr("qreason.model.templates.RENDERING", 0.5)
    (broken / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=said) as caught:
        load_tokenizer(str(broken))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [4000, 4095])
def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(broken: Path, rows: int) -> None:
    set_config(broken, "config.json", vocab_size=rows)
    with pytest.raises(ModelError, match=f"its tokenizer has 4096 tokens, its embedding {rows} rows: '"):
        Resident(Model(base=str(broken)), detect())


@pytest.mark.parametrize("missing", [True, False])
def test_weights_that_do_not_fit_the_config_are_refused(broken: Path, missing: bool) -> None:
    # A missing weight used to be drawn at random.
    weights, name = load_file(broken / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    weights = {k: (w if k != name else w[:-1].contiguous()) for k, w in weights.items() if not missing or k != name}
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    said = f"{name} is missing" if missing else rf"{name} has the shape \[1023, 256\], not \[1024, 256\]"
    with pytest.raises(ModelError, match=said):
        load_base(Model(base=str(broken)), detect())


def test_a_base_variant_that_ends_documents_learns_to_end_turns(broken: Path) -> None:
    # as Qwen's base variants: end of text for both
    set_config(broken, "tokenizer_config.json", pad_token="<|endoftext|>", eos_token="<|endoftext|>")
    tokenizer = load_tokenizer(str(broken))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_a_model_that_does_not_generate_is_refused(tmp_path: Path) -> None:
    small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=50)
    BertForMaskedLM(small).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="BertForMaskedLM, not a causal language model"):
        load_base(Model(base=str(tmp_path)), detect())


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Hub id") as caught:
        Resident(Model(base=str(tmp_path)), detect())
    assert "\n" not in str(caught.value)


def test_a_fresh_adapter_changes_nothing_and_leaves_with_its_layers(own_resident: Resident) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with own_resident.inference() as model:
        bare = model(input_ids=ids).logits
    own_resident.new_adapter(Lora())
    with own_resident.inference() as model:
        assert torch.equal(model(input_ids=ids).logits, bare)
    own_resident.remove_adapter()
    assert not any("lora" in name for name, _ in own_resident.model.named_parameters())


def test_folding_the_adapter_changes_no_reply_and_leaves_the_base_as_it_was(own_resident: Resident) -> None:
    own_resident.new_adapter(Lora())
    give_weights(own_resident, 0.02)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        apart = own_resident.model.eval()(input_ids=ids).logits
    with same_weights(own_resident), own_resident.inference() as model:
        folded = model(input_ids=ids).logits
    assert torch.allclose(folded, apart, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(own_resident.model(input_ids=ids).logits, apart)


def test_folding_an_adapter_of_a_tied_layer_leaves_the_other_layer_alone(own_resident: Resident) -> None:
    # Folded into the tensor itself, it changed the embedding as well, and every reply with it.
    own_resident.new_adapter(Lora(target_modules=["lm_head"]))
    give_weights(own_resident, 0.02)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        apart = own_resident.model.eval()(input_ids=ids).logits
    with own_resident.inference() as model:
        assert torch.allclose(model(input_ids=ids).logits, apart, atol=1e-4)
    embedding, head = own_resident.model.get_input_embeddings(), own_resident.model.get_output_embeddings()
    assert head.base_layer.weight is embedding.weight


def test_fast_replies_are_computed_in_bfloat16_and_leave_the_weights_as_they_were(own_resident: Resident) -> None:
    own_resident.hardware = replace(own_resident.hardware, autocast="bfloat16")
    own_resident.new_adapter(Lora())
    ids = torch.tensor([[5, 6, 7, 8]])
    with same_weights(own_resident):
        with own_resident.inference() as model:
            exact = model(input_ids=ids).logits
        with own_resident.inference(fast=True) as model:
            fast = model(input_ids=ids).logits
    assert fast.dtype == torch.bfloat16
    assert 0 < (fast - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_an_adapter_for_another_shape_is_refused(own_resident: Resident, tmp_path: Path) -> None:
    own_resident.new_adapter(Lora(r=4))
    own_resident.model.save_pretrained(str(tmp_path))
    own_resident.remove_adapter()
    set_config(tmp_path, "adapter_config.json", r=8)
    with pytest.raises(ModelError, match="no adapter for qreason/tiny"):
        own_resident.load_adapter(tmp_path)


def test_four_bit_weights_answer_nearly_like_the_full_ones(resident: Resident) -> None:
    four = Resident(Model(base="qreason/tiny", quantization="nf4"), detect())
    assert four.model.is_loaded_in_4bit
    ids = resident.tokenizer("The print spooler", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        full = torch.log_softmax(resident.model(input_ids=ids).logits.float(), -1)
        small = torch.log_softmax(four.model(input_ids=ids).logits.float(), -1)
    assert 0 < (full.exp() * (full - small)).sum(-1).mean() < 0.5


def test_the_fingerprint_of_a_folder_follows_its_weights(broken: Path) -> None:
    before = fingerprint(str(broken))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert before == fingerprint("qreason/tiny")
    assert fingerprint(str(broken)) != before


def test_the_embedded_base_is_small_enough_and_of_the_promised_kind() -> None:
    config = json.loads((TINY / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["hidden_size"] % 256 == 0
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 16 * 2**20
    assert (TINY / "README.md").is_file()
