"""Ollama: a Modelfile with the prompt of training and greedy replies, and `ollama create` where Ollama is installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from qreason.errors import ExportError, InputError
from qreason.export.engine import GREEDY
from qreason.export.reference import Heldout
from qreason.export.verify import Check
from qreason.types import Messages

MESSAGE = "<|im_start|>{role}\n{content}<|im_end|>\n"
REPLY = "<|im_start|>assistant\n"
"""ChatML: a message, and the start of a reply; both Ollama's template and its check are made from these."""
LONGEST_CONTEXT = 4096
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


def template() -> str:
    """ChatML in Go's text/template; a dash removes the white space on its side."""
    message = MESSAGE.format(role="{{ .Role }}", content="{{ .Content }}")
    return f"{{{{- range .Messages }}}}{message}{{{{ end }}}}{REPLY}"


def modelfile(model: str, heldout: Heldout, context: int, source: Path) -> str:
    """The Modelfile for a GGUF file in the same folder, with the sampling by which its accuracy was measured.

    InputError for text that a Modelfile cannot hold.
    """
    parameters = {
        "temperature": GREEDY["temperature"],
        "repeat_penalty": GREEDY["repeat_penalty"],
        "num_ctx": min(context, LONGEST_CONTEXT),
        "num_predict": heldout.limit,
        "stop": f'"{heldout.tokenizer.eos_token}"',
    }
    lines = [f"FROM ./{model}", f"TEMPLATE {fenced(template(), 'template')}"]
    if heldout.system:
        lines.append(f"SYSTEM {fenced(heldout.system, 'system prompt')}")
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    licence = next((file for file in (source / name for name in LICENCES) if file.is_file()), None)
    if licence:
        lines.append(f"LICENSE {fenced(licence.read_text(encoding='utf-8'), 'licence')}")
    return "\n".join(lines) + "\n"


def fenced(text: str, what: str) -> str:
    """Text in triple quotes, which it must not contain: the format cannot escape them."""
    if '"""' in text:
        raise InputError(f'the {what} has """ in it, which a Modelfile cannot hold; take it out of the {what}')
    return f'"""{text}"""'


def as_ollama_asks(messages: Messages, system: str) -> str:
    """Messages as Ollama renders them: SYSTEM first where there is no system message, then the template."""
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return "".join(MESSAGE.format(**message) for message in messages) + REPLY


def check_template(heldout: Heldout) -> Check:
    """Every held-out question, as Ollama renders it from the user's message, has the tokens of training."""
    own = {"role": "system", "content": heldout.system}
    bare = [[one for one in messages if one != own] for messages in heldout.conversations]
    texts = [as_ollama_asks(messages, heldout.system) for messages in bare]
    ids = heldout.tokenizer(texts, add_special_tokens=False)["input_ids"]
    wrong = [text for text, ours, theirs in zip(texts, ids, heldout.prompts, strict=True) if ours != theirs]
    figures = {"conversations": len(texts), "different": len(wrong), **({"first": wrong[0]} if wrong else {})}
    return Check("Modelfile", "renders like the chat template", not wrong, figures)


def ask(create: Sequence[str], question: Sequence[str]) -> str | None:
    """Create the model in Ollama and ask it a question; its reply, None where Ollama is not installed."""
    if shutil.which("ollama") is None:
        return None
    for command in (create, question):
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise ExportError(f"`{' '.join(command[:3])}` ended with {done.returncode} ({''.join(last)[:200]})")
    return done.stdout.strip()
