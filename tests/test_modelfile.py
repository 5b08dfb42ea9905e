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
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    heldout.tokenizer.chat_template = template.read_text(encoding="utf-8")
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
    asked = [{"role": "user", "content": "x"}]
    assert ollama.as_ollama_asks(asked, "Be brief.").startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    trained = replace(heldout, system="Be brief.")
    assert ollama.check_template(trained).passed
    other = replace(heldout)
    other.__dict__["prompts"] = trained.prompts  # a cached property: the model was trained with another system prompt
    assert ollama.check_template(other).figures["different"] == 3


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("MESSAGE", "<|im_start|>{role}\n{content}<|im_end|>"),
        ("MESSAGE", "<|im_start|>{role} {content}<|im_end|>\n"),
        ("MESSAGE", "<|im_start|>{role}\n{content}\n"),
        ("REPLY", "<|im_start|>assistant"),
        ("REPLY", ""),
    ],
)
def test_a_wrong_template_is_found_out(
    heldout: Heldout, part: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama, part, wrong)
    check = ollama.check_template(heldout)
    assert not check.passed
    assert check.figures["different"] == 3
    assert wrong.format(role="{{ .Role }}", content="{{ .Content }}") in write(heldout, tmp_path)


def test_a_chat_template_that_is_not_chatml_is_found_out(heldout: Heldout) -> None:
    heldout.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert ollama.check_template(heldout).figures["different"] == 3


def test_triple_quotes_cannot_be_written(heldout: Heldout, tmp_path: Path) -> None:
    with pytest.raises(InputError, match='the system prompt has """ in it'):
        write(heldout, tmp_path, system='Use """ here')
    (tmp_path / "LICENSE").write_text('"""')
    with pytest.raises(InputError, match='the licence has """ in it'):
        write(heldout, tmp_path)
