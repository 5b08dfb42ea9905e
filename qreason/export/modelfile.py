"""Ollama's Modelfile: writing one, reading one as Ollama does, and whether it asks the model as training did.

Source: the grammar and the order of things in Ollama's `parser`, `template` and chat route.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qreason.errors import InputError, nearest
from qreason.types import Messages

TEMPLATE = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
"""ChatML, as Go's text/template writes it."""

NUMBERS: dict[str, type[int] | type[float]] = {
    **dict.fromkeys(("num_keep", "seed", "num_predict", "top_k", "repeat_last_n"), int),
    **dict.fromkeys(("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread"), int),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "temperature"), float),
    **dict.fromkeys(("repeat_penalty", "presence_penalty", "frequency_penalty"), float),
}
"""Parameter -> the kind of its value; besides them there are `stop` (text) and `use_mmap` (true or false)."""
PARAMETERS = (*NUMBERS, "stop", "use_mmap")
COMMANDS = ("FROM", "TEMPLATE", "SYSTEM", "PARAMETER", "LICENSE", "ADAPTER", "MESSAGE")
FENCE = '"""'


@dataclass
class Modelfile:
    """What a Modelfile says."""

    model: str = ""
    template: str | None = None
    system: str | None = None
    stops: list[str] = field(default_factory=list)
    parameters: dict[str, float | int | bool] = field(default_factory=dict)
    licenses: list[str] = field(default_factory=list)
    adapter: str | None = None
    messages: Messages = field(default_factory=list)


# --- writing ---------------------------------------------------------------------------------------


def render(
    *,
    model: str,
    system: str,
    stops: Sequence[str],
    parameters: Mapping[str, float | int],
    license: str | None,
) -> str:
    """A Modelfile for a model that speaks ChatML.

    `model` is what FROM names, a path relative to the file; `system` the system prompt of training.
    Raises InputError for text that a Modelfile cannot hold, and for a parameter that Ollama does not have.
    """
    if not model.strip() or "\n" in model:
        raise InputError(f"FROM {model!r}: name the GGUF file, as a path relative to the Modelfile")
    lines = [f"FROM {model}", f"TEMPLATE {fenced(TEMPLATE, 'template')}", f"SYSTEM {fenced(system, 'system prompt')}"]
    for name, value in parameters.items():
        lines.append(f"PARAMETER {name} {value}")
        read_parameter(name, str(value))
    lines += [f"PARAMETER stop {fenced(stop, 'stop text') if unquotable(stop) else quoted(stop)}" for stop in stops]
    if license:
        lines.append(f"LICENSE {fenced(license, 'licence')}")
    return "\n".join(lines) + "\n"


def fenced(text: str, what: str) -> str:
    """Text between triple quotes, which it cannot have inside: the format has no way to escape them."""
    if FENCE in text:
        raise InputError(f'the {what} has """ in it, which a Modelfile cannot hold; take it out of the {what}')
    return f"{FENCE}{text}{FENCE}"


def unquotable(text: str) -> bool:
    return '"' in text or "\n" in text


def quoted(text: str) -> str:
    return f'"{text}"'


# --- reading ---------------------------------------------------------------------------------------


def parse(text: str) -> Modelfile:
    """A Modelfile as Ollama reads it. Raises InputError, with the line, for what Ollama refuses."""
    modelfile = Modelfile()
    for number, command, value in read_commands(text):
        try:
            apply(modelfile, command, value)
        except InputError as error:
            raise InputError(f"Modelfile:{number}: {error}") from None
    if not modelfile.model:
        raise InputError("Modelfile: no FROM line; name the GGUF file there")
    return modelfile


def read_commands(text: str) -> Iterator[tuple[int, str, str]]:
    """(line number, command, value) in order; a value that opens quotes goes on to where they are closed."""
    lines = iter(enumerate(text.split("\n"), start=1))
    for number, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        command, _, value = line.strip().partition(" ")
        if command.upper() not in COMMANDS:
            raise InputError(f"Modelfile:{number}: unknown command '{command}'{nearest(command.upper(), COMMANDS)}")
        head, inner = "", value
        if command.upper() in ("PARAMETER", "MESSAGE"):  # the quotes open behind a name
            head, _, inner = value.strip().partition(" ")
        while (closed := unquote(inner.strip())) is None:
            _, more = next(lines, (0, None))
            if more is None:
                raise InputError(f"Modelfile:{number}: the quotes of {command} are never closed")
            inner += "\n" + more
        yield number, command.upper(), f"{head} {closed}" if head else closed


def unquote(text: str) -> str | None:
    """The text between quotes, or as it is without them; None where they are not closed yet."""
    for mark in (FENCE, '"'):
        if text.startswith(mark):
            closed = len(text) >= 2 * len(mark) and text.endswith(mark)
            return text[len(mark) : -len(mark)] if closed else None
    return text


def apply(modelfile: Modelfile, command: str, value: str) -> None:
    """Take over one command."""
    if command == "PARAMETER":
        name, _, rest = value.partition(" ")
        setting = read_parameter(name.lower(), rest)
        if isinstance(setting, str):
            modelfile.stops.append(setting)
        else:
            modelfile.parameters[name.lower()] = setting
    elif command == "MESSAGE":
        role, _, content = value.partition(" ")
        if role not in ("system", "user", "assistant"):
            raise InputError(f"MESSAGE {role}: the role is system, user or assistant")
        modelfile.messages.append({"role": role, "content": content})
    elif command == "LICENSE":
        modelfile.licenses.append(value)
    else:
        setattr(modelfile, "model" if command == "FROM" else command.lower(), value)


def read_parameter(name: str, value: str) -> float | int | bool | str:
    """The value of a parameter; text only for `stop`. Raises InputError where Ollama would."""
    if name == "stop":
        return value
    if name == "use_mmap" and value in ("true", "false"):
        return value == "true"
    if name not in PARAMETERS:
        raise InputError(f"PARAMETER {name}: Ollama has none of that name{nearest(name, PARAMETERS)}")
    try:
        return NUMBERS[name](value)
    except (KeyError, ValueError):
        kind = {int: "a whole number", float: "a number"}.get(NUMBERS.get(name, bool), "true or false")
        raise InputError(f"PARAMETER {name}: '{value}' is not {kind}") from None


# --- the template ----------------------------------------------------------------------------------

ACTION = re.compile(r"(?P<left>\s*\{\{- |\{\{)\s*(?P<what>.*?)\s*(?P<right> -\}\}\s*|\}\})", re.DOTALL)
"""An action of Go's text/template, with the white space that its dashes take away."""


def render_template(template: str, messages: Messages) -> str:
    """What a template makes of messages. It may range over `.Messages` and show `.Role` and `.Content`, no more."""
    written: list[str] = []
    loop: list[tuple[str, str]] | None = None
    for kind, what in pieces(template):
        if loop is None and kind == "text":
            written.append(what)
        elif loop is None and re.fullmatch(r"range\s+\.Messages", what):
            loop = []
        elif loop is not None and (kind == "text" or what in (".Role", ".Content")):
            loop.append((kind, what))
        elif loop is not None and what == "end":
            written += [
                piece if kind == "text" else message[piece[1:].lower()] for message in messages for kind, piece in loop
            ]
            loop = None
        else:
            raise InputError(f"TEMPLATE: {{{{ {what} }}}} is not understood there; range over .Messages, no more")
    if loop is not None:
        raise InputError("TEMPLATE: range .Messages has no end")
    return "".join(written)


def pieces(template: str) -> Iterator[tuple[str, str]]:
    """A template as (`text` or `action`, what it says), in order."""
    end = 0
    for action in ACTION.finditer(template):
        yield "text", template[end : action.start()]
        yield "action", action["what"]
        end = action.end()
    yield "text", template[end:]


def as_ollama_sends(messages: Messages, system: str | None) -> Messages:
    """The messages that reach the template: SYSTEM in front where there is no system message, neighbours joined."""
    if system and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    sent: Messages = []
    for message in messages:
        if sent and sent[-1]["role"] == message["role"]:
            sent[-1] = {**sent[-1], "content": f"{sent[-1]['content']}\n\n{message['content']}"}
        else:
            sent.append(message)
    return sent


def check(text: str, tokenizer: Any, conversations: Sequence[Messages]) -> list[str]:
    """What is wrong with a Modelfile for a model with this tokenizer; empty when nothing is.

    Every conversation is compared token by token with the tokenizer's chat template: as it is, and without its system
    message, for which SYSTEM then stands.
    """
    try:
        modelfile = parse(text)
    except InputError as error:
        return [str(error)]
    problems = []
    if tokenizer.eos_token not in modelfile.stops:
        problems.append(f"no PARAMETER stop {tokenizer.eos_token}: replies would not end there")
    if not modelfile.system:
        problems.append("no SYSTEM: without a system message the model would be asked as it was never trained")
    if modelfile.template is None:
        return [*problems, "no TEMPLATE: Ollama would guess one"]
    for number, conversation in enumerate(conversations, start=1):
        bare = [message for message in conversation if message["role"] != "system"]
        for what, asked in (("as it is", conversation), ("without system message", bare)):
            if asked and (problem := compare(modelfile, tokenizer, asked)):
                problems.append(f"conversation {number}, {what}: {problem}")
    return problems


def compare(modelfile: Modelfile, tokenizer: Any, conversation: Messages) -> str | None:
    """Where Ollama's tokens of a conversation leave those of the chat template; None where they are the same."""
    asked = conversation
    if modelfile.system and conversation[0]["role"] != "system":
        asked = [{"role": "system", "content": modelfile.system}, *conversation]
    try:
        ours = render_template(modelfile.template or "", as_ollama_sends(conversation, modelfile.system))
        theirs = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    except InputError as error:
        return str(error)
    ours, theirs = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (ours, theirs))
    if ours == theirs:
        return None
    place = next(
        (i for i, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other),
        min(len(ours), len(theirs)),
    )
    one, other = (tokenizer.decode(ids[place : place + 8]) for ids in (ours, theirs))
    return f"token {place} begins {one!r} in Ollama and {other!r} in the chat template"
