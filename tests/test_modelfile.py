"""Modelfiles: what Ollama would read is what was written, and asks the model as training did."""

import math
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AutoTokenizer

from qreason.data.prompts import HELPDESK
from qreason.errors import InputError
from qreason.export.modelfile import check, parse, render, render_template
from qreason.model.load import EMBEDDED
from qreason.types import Messages

CONVERSATIONS: list[Messages] = [
    [{"role": "system", "content": HELPDESK}, {"role": "user", "content": "My printer is offline."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  The disk is full.\n\n"},
        {"role": "assistant", "content": "Since <when>?"},
        {"role": "user", "content": 'It says "quota" {{ .Content }} – seit gestern.'},
    ],
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED["qreason/tiny"])


@pytest.fixture(scope="module")
def qwen() -> Any:
    """A tokenizer with Qwen2.5's own chat template, which brings a system message where there is none."""
    loaded = AutoTokenizer.from_pretrained(EMBEDDED["qreason/tiny"])
    loaded.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    return loaded


def write(**changes: Any) -> str:
    wanted = {
        "model": "./model-q8_0.gguf",
        "system": HELPDESK,
        "stops": ["<|im_end|>"],
        "parameters": {"temperature": 0.7, "num_ctx": 1024},
        "license": "Apache-2.0",
    }
    return render(**(wanted | changes))


@pytest.mark.parametrize(
    "system", [HELPDESK, 'Say "yes"', '"quoted"', "# no comment\n\nFROM here\n  on  ", "Ünï – {{ .Role }}"]
)
def test_what_is_written_is_read_again(system: str) -> None:
    text = write(system=system, stops=["<|im_end|>", 'a "b"'], license="Line one\n\nLine two")
    modelfile = parse(text)
    assert modelfile.model == "./model-q8_0.gguf"
    assert modelfile.system == system
    assert modelfile.stops == ["<|im_end|>", 'a "b"']
    assert modelfile.parameters == {"temperature": 0.7, "num_ctx": 1024}
    assert modelfile.licenses == ["Line one\n\nLine two"]
    assert "\\n" not in text


def test_the_model_is_asked_with_the_tokens_of_training(tokenizer: Any, qwen: Any) -> None:
    assert check(write(), tokenizer, CONVERSATIONS) == []
    assert check(write(), qwen, CONVERSATIONS) == []


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("<|im_end|>\n{{ end }}", "<|im_end|>{{ end }}", "conversation 1, as it is: token"),
        ("<|im_end|>\n{{ end }}", "<|im_end|>\n{{- end }}", "conversation 1, as it is: token"),
        ("<|im_start|>assistant\n", "<|im_start|>assistant", "conversation 1, as it is: token"),
        ("<|im_start|>{{ .Role }}\n", "<|im_start|>{{ .Role }}\\n", "conversation 1, as it is: token"),
        ("{{ .Content }}", "{{ .Prompt }}", "{{ .Prompt }} is not understood"),
        ("{{ end }}", "", "range .Messages has no end"),
        ("PARAMETER stop", "#", "no PARAMETER stop <|im_end|>"),
        ("SYSTEM", "LICENSE", "no SYSTEM"),
        ("TEMPLATE", "LICENSE", "no TEMPLATE"),
    ],
)
def test_a_mutated_modelfile_is_found_out(tokenizer: Any, old: str, new: str, named: str) -> None:
    text = write()
    assert old in text
    assert any(named in problem for problem in check(text.replace(old, new), tokenizer, CONVERSATIONS))


def test_qwens_own_system_message_does_not_pass_for_that_of_training(qwen: Any) -> None:
    # Without SYSTEM, Ollama sends none, and the chat template brings Qwen's: the tokens differ.
    problems = check(write().replace("SYSTEM", "LICENSE"), qwen, CONVERSATIONS)
    assert any("conversation 1, without system message: token" in problem for problem in problems)


def test_neighbours_of_one_role_are_joined_as_ollama_joins_them(tokenizer: Any) -> None:
    twice = [{"role": "user", "content": "One."}, {"role": "user", "content": "Two."}]
    assert len(check(write(), tokenizer, [twice])) == 2


def test_dashes_take_white_space_away_as_in_go() -> None:
    messages = [{"role": "user", "content": "x"}]
    assert render_template("a \n{{- range .Messages -}} \n b{{ .Role }}{{ end }}", messages) == "abuser"
    assert render_template("a {{range .Messages}} {{.Content}} {{end}}", messages) == "a  x "


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("FROM x\nPARAMETER repetition_penalty 1.1", "Modelfile:2: PARAMETER repetition_penalty: Ollama has none"),
        ("FROM x\nPARAMETER top_k many", "'many' is not a whole number"),
        ("FROM x\nPARAMETER use_mmap 1", "'1' is not true or false"),
        ("FROM x\nSISTEM y", "unknown command 'SISTEM' (did you mean 'SYSTEM'?)"),
        ('FROM x\nSYSTEM """never', "Modelfile:2: the quotes of SYSTEM are never closed"),
        ("FROM x\nMESSAGE tool y", "the role is system, user or assistant"),
        ("SYSTEM y", "no FROM line"),
    ],
)
def test_what_ollama_refuses_is_refused_with_its_line(text: str, named: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    assert named in str(caught.value)


def test_other_spellings_of_the_grammar_are_read() -> None:
    modelfile = parse('# head\n\nfrom ./a b.gguf\nParameter Temperature 0\nMESSAGE user """hi\nyou"""\nSYSTEM "x" \n')
    assert modelfile.model == "./a b.gguf"
    assert modelfile.parameters == {"temperature": 0.0}
    assert modelfile.messages == [{"role": "user", "content": "hi\nyou"}]
    assert modelfile.system == "x"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"system": 'Use """ here'}, 'the system prompt has """ in it'),
        ({"license": '"""'}, 'the licence has """ in it'),
        ({"parameters": {"repetition_penalty": 1.1}}, "did you mean 'repeat_penalty'?"),
        ({"parameters": {"top_k": math.inf}}, "'inf' is not a whole number"),
        ({"model": ""}, "name the GGUF file"),
    ],
)
def test_what_a_modelfile_cannot_hold_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as caught:
        write(**changes)
    assert named in str(caught.value)
