"""Rows as others write them, recognized by their columns -> qreason's own columns, earlier turns and system prompt.

| form | columns |
|---|---|
| messages | `messages`: a list of `role` and `content` |
| ShareGPT | `conversations`: a list of `from` (human, gpt, system) and `value` |
| prompt/completion | `prompt`, `completion`: texts, or lists of messages |
| Alpaca | `instruction`, `output` (or `response`), `input` (or `context`) or nothing, and `history` or nothing |
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qreason.data.prompts import demonstrate
from qreason.errors import DataError
from qreason.types import Example

CHATS = {"messages": "messages", "conversations": "ShareGPT"}
"""Column with a whole chat -> the name of the form."""
PAIR, ALPACA = "prompt/completion", "Alpaca"
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
CHAT = ("user", "assistant")
CALLS, TOOLS = ("tool_calls", "function_call"), ("tools", "functions")
"""Keys of a message that call tools, and columns of a row that offer them."""
NONE: tuple[Any, ...] = (None, "", "[]", "null", [])
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold what the assistant thought before its content."""
THOUGHT = re.compile(r"\s*<(think|reasoning)>(.*?)</\1>\s*(.*)", re.DOTALL)
ANSWER = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)


@dataclass(frozen=True)
class Turn:
    """A message of a chat; of the assistant's, the reasoning apart."""

    role: str
    text: str
    reasoning: str | None = None
    learned: bool = True

    @property
    def content(self) -> str:
        """The text as the model reads and writes it."""
        return demonstrate(Example("", "", self.text, reasoning=self.reasoning))


@dataclass(frozen=True)
class Chat:
    """A row in qreason's own columns, with what these have no place for."""

    row: Mapping[str, Any]
    form: str = ""
    system: str | None = None
    history: tuple[Turn, ...] = ()


def form_of(row: Mapping[str, Any], fields: Mapping[Any, str]) -> str:
    """The form of a row; empty for qreason's own columns, and where `data.fields` names another column."""
    prompt = fields.get("prompt")
    for column, form in CHATS.items():
        if prompt in (None, column) and row.get(column) is not None:
            return form
    if prompt in (None, "prompt") and "completion" in row and "prompt" in row:
        return PAIR
    if prompt in (None, "instruction") and "instruction" in row and ("output" in row or "response" in row):
        return ALPACA
    return ""


def read_chat(row: Mapping[str, Any], fields: Mapping[Any, str], location: str) -> Chat:
    """A row of any form. Raises DataError with `file:line` for a chat that cannot be trained on."""
    form, system = form_of(row, fields), row.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(f"{location}: 'system' is {type(system).__name__}, not text")
    own = Chat(row, form, (system or "").strip() or None)
    if form == ALPACA:
        return alpaca(own, fields, location)
    if form == PAIR and as_messages(row["prompt"]) is None and as_messages(row["completion"]) is None:
        return split_reply(own, "completion", fields)
    if form:
        columns = ("prompt", "completion") if form == PAIR else [name for name in CHATS if CHATS[name] == form]
        return messages(own, columns, location)
    return own


def as_messages(cell: Any) -> list[Any] | None:
    """The list of messages in a cell, in a table as JSON; None for anything else."""
    if isinstance(cell, list):
        return cell
    if not (isinstance(cell, str) and cell.lstrip().startswith("[")):
        return None
    try:
        found = json.loads(cell)
        json.dumps(found, ensure_ascii=False).encode()  # half a character
    except (ValueError, RecursionError):
        return None
    return found if found == [] or is_chat(found) else None


def is_chat(cell: Any) -> bool:
    """Whether a cell holds a list of messages."""
    found = as_messages(cell)
    return bool(found) and all(isinstance(one, dict) and {"role", "from"} & one.keys() for one in found or ())


def alpaca(chat: Chat, fields: Mapping[Any, str], location: str) -> Chat:
    """The instruction with its input below it."""
    column = "input" if "input" in chat.row else "context"
    asked, given = chat.row["instruction"], chat.row.get(column)
    if given is not None and not isinstance(given, str):
        raise DataError(f"{location}: '{column}' is {type(given).__name__}, not text")
    whole = f"{asked}\n\n{given}" if given and given.strip() and isinstance(asked, str) else asked
    row = {**chat.row, "instruction": whole, "prompt": whole}
    chat = replace(chat, row=row, history=read_history(row.get("history") or [], location))
    return split_reply(chat, "output" if "output" in row else "response", fields)


def read_history(cell: Any, location: str) -> tuple[Turn, ...]:
    """The turns of earlier questions and answers: a list of pairs, in a table as JSON."""
    try:
        pairs = json.loads(cell) if isinstance(cell, str) else cell
    except (ValueError, RecursionError):
        pairs = None
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError(f"{location}: 'history' is no list of [question, answer] pairs; correct it or remove it")
    turns = [{"role": role, "content": text} for pair in pairs for role, text in zip(CHAT, pair, strict=True)]
    return tuple(read_turn(turn, f"{location}: history") for turn in turns)


def split_reply(chat: Chat, column: str, fields: Mapping[Any, str]) -> Chat:
    """The reply of a column as reference, its reasoning apart."""
    column = fields.get("reference", column)
    reply = chat.row.get(column)
    row = {**chat.row, "reference": reply}
    if isinstance(reply, str):
        turn = read_reply(reply)
        row |= {column: turn.text, "reference": turn.text} | ({"reasoning": turn.reasoning} if turn.reasoning else {})
    return replace(chat, row=row)


def messages(chat: Chat, columns: Sequence[str], location: str) -> Chat:
    """A whole chat: its last assistant turn is the reference, the user's turn before it the prompt.

    With weights, its last one that is learned: what follows it teaches nothing.
    """
    if offered := next((key for key in TOOLS if chat.row.get(key) not in NONE), None):
        raise DataError(f"{location}: '{offered}' offers tools, which qreason does not render; remove them or the row")
    turns: list[Turn] = []
    for place, column in enumerate(columns):
        cell = chat.row.get(column)
        given = as_messages(cell)
        if given is None and len(columns) == 2 and isinstance(cell, str):  # one of prompt and completion is a text
            given = [{"role": "assistant" if place else "user", "content": cell}]
        if given is None:
            kind = "text, but no JSON list" if isinstance(cell, str) else f"{type(cell).__name__}, not a list"
            raise DataError(f"{location}: '{column}' is {kind} of messages with role and content")
        turns += [read_turn(one, f"{location}: turn {number}") for number, one in enumerate(given, len(turns) + 1)]
    system = [turn.text for turn in turns[:1] if turn.role == "system"]
    talk = turns[len(system) :]
    while talk and talk[-1].role == "user":  # a question that nobody answered
        talk.pop()
    if not talk:
        raise DataError(f"{location}: no turn of the assistant after one of the user; remove the row")
    for number, turn in enumerate(talk):
        if turn.role != ("assistant" if number % 2 else "user"):
            problem = f"turn {number + 1 + len(system)} is of the {turn.role}"
            raise DataError(f"{location}: {problem}, but user and assistant take turns, the user first; correct it")
    while talk and not talk[-1].learned:
        del talk[-2:]
    if not talk:
        raise DataError(f"{location}: every turn of the assistant has weight 0; remove the row")
    *earlier, asked, reply = talk
    row = {**chat.row, "prompt": asked.text, "reference": reply.text}
    row |= {"reasoning": reply.reasoning} if reply.reasoning else {}
    return Chat(row, chat.form, (system[0].strip() or None) if system else chat.system, tuple(earlier))


def read_turn(message: Any, location: str) -> Turn:
    """A message with `role` and `content`, or `from` and `value`."""
    if not isinstance(message, dict):
        raise DataError(f"{location}: {type(message).__name__}, not a message with role and content")
    keys = ("from", "value") if "from" in message else ("role", "content")
    role, content = (message.get(key) for key in keys)
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{location}: {keys[0]} is {role!r}; there are {', '.join(ROLES)}; remove the row")
    if called := next((key for key in CALLS if message.get(key) not in NONE), None):
        raise DataError(f"{location}: '{called}' calls tools, which qreason does not train; remove the row")
    if message.get("weight") not in (None, 0, 1):
        raise DataError(f"{location}: weight is {message['weight']!r}; write 1, or 0 for a turn that is not learned")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or (ROLES[role] != "system" and not content.strip()):
        problem = "is empty" if content in (None, "") or isinstance(content, str) else "is not text"
        raise DataError(f"{location}: {keys[1]} {problem}; fill it or remove the row")
    if ROLES[role] != "assistant":
        return Turn(ROLES[role], content)
    turn = read_reply(content)
    thought = next((text for key in REASONING if isinstance(text := message.get(key), str) and text.strip()), None)
    return Turn(turn.role, turn.text, turn.reasoning or thought, learned=message.get("weight") != 0)


def read_reply(text: str) -> Turn:
    """An assistant's turn, with what stands in <think> or <reasoning> tags at its beginning as the reasoning."""
    match = THOUGHT.fullmatch(text)
    if match is None or not match[3].strip():
        return Turn("assistant", text)
    return Turn("assistant", bare_answer(match[3]), match[2].strip() or None)


def bare_answer(text: str) -> str:
    """A text without <answer> tags around it."""
    answer = ANSWER.fullmatch(text)
    return answer[1].strip() if answer else text


def bare_columns(reasoning: str | None, reference: str) -> tuple[str | None, str]:
    """Reasoning and reference without the tags of a reply, which training puts around them."""
    turn = read_reply(reference)
    thought = THOUGHT.fullmatch(reasoning or "")
    own = thought[2].strip() if thought and not thought[3] else reasoning
    return own or turn.reasoning, bare_answer(turn.text)
