"""Ollama: a Modelfile with the prompt of training and greedy replies, and `ollama create` where Ollama is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from qreason.errors import ExportError, InputError
from qreason.export.engine import GREEDY
from qreason.export.reference import Heldout
from qreason.export.verify import Check, bos_of
from qreason.types import Messages

LONGEST_CONTEXT = 4096
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


@dataclass(frozen=True)
class Form:
    """A chat template as the text around messages; both Ollama's template and its check are made from it."""

    around: dict[str, tuple[str, str]]
    """Role -> what stands before and after its content."""
    reply: str
    """What stands before the reply."""
    alone: str = ""
    """What stands before everything in a chat without a system message, such as the template's own."""

    def render(self, messages: Messages) -> str:
        begin = "" if messages[0]["role"] == "system" else self.alone
        turns = (f"{before}{one['content']}{after}" for one in messages for before, after in [self.around[one["role"]]])
        return begin + "".join(turns) + self.reply

    def template(self) -> str:
        """The same in Go's text/template; a dash removes the white space on its side."""
        named = {(pair[0].replace(role, "{{ .Role }}", 1), pair[1]) for role, pair in self.around.items()}
        if len(named) == 1:  # ChatML: the same text around each message, with the role in it
            ((before, after),) = named
            message = f"{before}{{{{ .Content }}}}{after}"
        else:
            parts = [
                f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ '
                for role, (before, after) in self.around.items()
            ]
            message = "{{ " + "else ".join(parts) + "end }}"
        alone = f'{{{{- if ne (index .Messages 0).Role "system" }}}}{self.alone}{{{{ end }}}}' if self.alone else ""
        return f"{alone}{{{{{'' if alone else '-'} range .Messages }}}}{message}{{{{ end }}}}{self.reply}"


def read_form(heldout: Heldout) -> Form:
    """The form of a chat template, from what it makes of two chats; InputError where it is none.

    Without the BOS, which llama.cpp adds by itself.
    """
    words = {"system": "(S)", "user": "(U)", "assistant": "(A)", "again": "(V)"}
    chat = [{"role": "user" if role == "again" else role, "content": word} for role, word in words.items()]
    begin = bos_of(heldout.tokenizer)
    whole, bare = (heldout.render(one).removeprefix(begin) for one in (chat, chat[1:2]))
    parts, alone = re.split("|".join(map(re.escape, words.values())), whole), bare.partition("(U)")[0]
    if len(parts) != 5 or "{{" in whole:
        raise InputError("the chat template does not have every message once, so no Modelfile can be written for it")
    opening, asking, replying, going_on, last = parts
    if "system" in opening and "user" in asking:  # what stands before the role is the same everywhere
        mark = common_end(opening.partition("system")[0], asking.partition("user")[0])
        after = asking[: asking.index("user") - len(mark)]
    else:
        after = asking.removesuffix(common_end(common_end(alone, asking), going_on))
    asks = asking.removeprefix(after)
    ended = after if replying.startswith(after) and last.startswith(after) else ""
    return Form(
        {
            "system": (opening, after),
            "user": (asks, ended),
            "assistant": (replying.removeprefix(ended), going_on.removesuffix(asks)),
        },
        last.removeprefix(ended),
        "" if heldout.system else alone.removesuffix(asks),
    )


def common_end(one: str, other: str) -> str:
    """The longest text that both end with."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False)))
    return one[len(one) - same :]


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
    lines = [f"FROM ./{model}", f"TEMPLATE {fenced(read_form(heldout).template(), 'template')}"]
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


def as_ollama_asks(messages: Messages, system: str, form: Form) -> str:
    """Messages as Ollama renders them: SYSTEM first where there is no system message, then the template."""
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return form.render(messages)


def check_template(heldout: Heldout) -> Check:
    """Every held-out question, as Ollama renders it from the user's message, has the tokens of training."""
    own = {"role": "system", "content": heldout.system}
    bare = [[one for one in messages if one != own] for messages in heldout.conversations]
    form, begin = read_form(heldout), bos_of(heldout.tokenizer)
    texts = [begin + as_ollama_asks(messages, heldout.system, form) for messages in bare]
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
