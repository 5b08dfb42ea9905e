"""The Modelfile of an export: what it says, and that Ollama asks the model with the tokens of training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AutoTokenizer

from qreason.data.prompts import HELPDESK
from qreason.errors import InputError
from qreason.export import engine, ollama
from qreason.export.reference import Heldout
from qreason.model.load import EMBEDDED
from qreason.model.templates import fit_template
from qreason.types import Example

EXAMPLES = [
    Example("1", "My printer is offline.", ""),
    Example("2", "  The disk is full.\n\n", ""),
    Example("3", 'It says "quota" {{ .Content }} {content} – seit gestern.', ""),
]
WRITTEN = '''FROM ./model-q8_0.gguf
TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
SYSTEM """Be brief.
Say "yes" – # no comment {{ .Role }}"""
PARAMETER temperature 0
PARAMETER repeat_penalty 1.0
PARAMETER num_ctx 1024
PARAMETER num_predict 64
PARAMETER stop "<|im_end|>"
LICENSE """Line one

Line two"""
'''
"""As Ollama's parser reads it: real newlines, its own names of parameters, nothing escaped."""


@pytest.fixture
def heldout() -> Heldout:
    return Heldout(EXAMPLES, HELPDESK, AutoTokenizer.from_pretrained(EMBEDDED["qreason/tiny"]), 64, 3)


@pytest.fixture
def qwen(heldout: Heldout) -> Heldout:
    """With Qwen2.5's own chat template, which brings a system message where there is none."""
    heldout.tokenizer.chat_template = published("qwen2_5")
    return heldout


def write(heldout: Heldout, source: Path, **changes: Any) -> str:
    return ollama.modelfile("model-q8_0.gguf", replace(heldout, **changes), 1024, source)


def test_every_line_is_as_ollama_reads_it(heldout: Heldout, tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("Line one\n\nLine two")
    system = 'Be brief.\nSay "yes" – # no comment {{ .Role }}'
    assert write(heldout, tmp_path, system=system) == WRITTEN


def test_the_sampling_is_that_of_the_reported_accuracy(heldout: Heldout, tmp_path: Path) -> None:
    lines = write(heldout, tmp_path).splitlines()
    written = dict(line.split()[1:3] for line in lines if line.startswith("PARAMETER"))
    asked = engine.GREEDY | {"num_predict": heldout.limit}
    for name in ("temperature", "repeat_penalty", "num_predict"):
        assert float(written[name]) == asked[name], name
    assert not written.keys() & {"top_p", "top_k", "min_p", "seed"}


def test_a_context_longer_than_needed_is_cut(heldout: Heldout, tmp_path: Path) -> None:
    assert "PARAMETER num_ctx 4096\n" in ollama.modelfile("m.gguf", heldout, 32768, tmp_path)


def test_the_model_is_asked_with_the_tokens_of_training(heldout: Heldout) -> None:
    check = ollama.check_template(heldout)
    assert check.passed
    assert check.figures == {"conversations": 3, "different": 0}


def test_the_system_prompt_of_training_stands_in_for_qwens_own(qwen: Heldout) -> None:
    assert ollama.check_template(qwen).passed


def test_a_question_is_asked_with_the_system_prompt_that_is_written(heldout: Heldout) -> None:
    asked, form = [{"role": "user", "content": "x"}], ollama.read_form(heldout)
    assert ollama.as_ollama_asks(asked, "Be brief.", form).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    trained = replace(heldout, system="Be brief.")
    assert ollama.check_template(trained).passed
    other = replace(heldout)
    other.__dict__["prompts"] = trained.prompts  # a cached property: the model was trained with another system prompt
    assert ollama.check_template(other).figures["different"] == 3


@pytest.mark.parametrize(
    ("message", "reply"),
    [
        ("<|im_start|>{role}\n{content}<|im_end|>", "<|im_start|>assistant\n"),
        ("<|im_start|>{role} {content}<|im_end|>\n", "<|im_start|>assistant\n"),
        ("<|im_start|>{role}\n{content}\n", "<|im_start|>assistant\n"),
        ("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant"),
        ("<|im_start|>{role}\n{content}<|im_end|>\n", ""),
    ],
)
def test_a_wrong_template_is_found_out(
    heldout: Heldout, message: str, reply: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _, after = message.partition("{content}")
    around = {role: (before.format(role=role), after) for role in ("system", "user", "assistant")}
    monkeypatch.setattr(ollama, "read_form", lambda heldout: ollama.Form(around, reply))
    check = ollama.check_template(heldout)
    assert not check.passed
    assert check.figures["different"] == 3
    text = write(heldout, tmp_path)
    assert f'{message.format(role="{{ .Role }}", content="{{ .Content }}")}{{{{ end }}}}{reply}"' in text


def test_a_chat_template_without_marks_of_turns_is_asked_as_it_is(heldout: Heldout) -> None:
    heldout.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert ollama.check_template(heldout).passed
    assert "{{- range .Messages }}{{ .Content }}{{ end }}" in ollama.read_form(heldout).template()


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages[-2:] %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}",
        "{{ messages }}{% for message in messages %}{{ message['content'] }}{% endfor %}",
        "{{ '{{' }}{% for message in messages %}{{ message['content'] }}{% endfor %}",
    ],
)
def test_a_chat_template_that_leaves_out_or_repeats_messages_has_no_modelfile(heldout: Heldout, template: str) -> None:
    heldout.tokenizer.chat_template = template
    with pytest.raises(InputError, match="the chat template does not have every message once"):
        ollama.check_template(heldout)


def test_a_template_that_numbers_its_turns_is_found_out(heldout: Heldout) -> None:
    heldout.tokenizer.chat_template = (
        "{% for message in messages %}{{ messages|length }} {{ message.role }} {{ message.content }}\n{% endfor %}"
    )
    assert ollama.check_template(heldout).figures["different"] == 3


def published(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_2", "qwen3", "deepseek_r1_distill"])
@pytest.mark.parametrize("system", [HELPDESK, ""])
def test_published_templates_are_asked_with_the_tokens_of_training(
    heldout: Heldout, name: str, system: str, tmp_path: Path
) -> None:
    heldout.tokenizer.chat_template = published(name)
    fit_template("a base", heldout.tokenizer)
    rows = [replace(row, prompt=row.prompt.strip()) for row in heldout.examples]  # Llama's template strips them
    asked = Heldout(rows, system, heldout.tokenizer, 64, 3)
    check = ollama.check_template(asked)
    assert check.passed, check.line
    assert write(asked, tmp_path).startswith('FROM ./model-q8_0.gguf\nTEMPLATE """{{- ')


def test_triple_quotes_cannot_be_written(heldout: Heldout, tmp_path: Path) -> None:
    with pytest.raises(InputError, match='the system prompt has """ in it'):
        write(heldout, tmp_path, system='Use """ here')
    (tmp_path / "LICENSE").write_text('"""')
    with pytest.raises(InputError, match='the licence has """ in it'):
        write(heldout, tmp_path)
