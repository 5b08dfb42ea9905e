"""Chat templates of bases, changed where training would see other tokens than answering, or a message would be lost."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from qreason.errors import ModelError, kind_and_line
from qreason.machine.foreign import TimedOut, within

FOLD = (
    "{%- if messages and messages[0]['role'] == 'system' %}{%- set messages = [{'role': 'user', 'content': "
    "messages[0]['content'] + '\n\n' + messages[1]['content']}] + messages[2:] %}{%- endif %}"
)
"""In front of a chat template that refuses or drops the system role: the user's turn begins with the system prompt."""
PROBE = ({"role": "system", "content": "qreason asks"}, {"role": "user", "content": "does this arrive"})
REPLY = {"role": "assistant", "content": "it does"}
RENDERING, MOST_TEMPLATE = 10.0, 10**6
"""Seconds for rendering one short chat, and characters of a template and of what it makes of that chat."""
TODAY, DAY = re.compile(r"strftime_now\([^()]*\)"), '"26 Jul 2024"'
"""The current date in a chat template, and the day in its place, which is Llama's own where there is no clock."""
DATED = f"{{% set date_string = {DAY} %}}"
"""In front of a chat template that llama.cpp's server would give the date as `date_string`."""
THINKS = "{#- asks for thoughts -#}"
"""In front of a chat template whose thoughts the recipe wants."""
BEGUN = (
    "{% set reply_is_asked = add_generation_prompt is defined and add_generation_prompt %}"
    "{% set add_generation_prompt = false %}",
    "{% if reply_is_asked %}{{ MARK }}{% endif %}",
)
"""Around a chat template whose prompts end otherwise than its replies begin; MARK is how those begin."""


def fit_template(base: str, tokenizer: Any, *, thinking: bool = False) -> None:
    """Change a chat template so that training, answering and serving see the same tokens, today and tomorrow.

    A date in it is fixed; the system prompt goes into the user's turn where the system role is refused or dropped;
    prompts end as replies begin, unless `thinking`: Qwen3's and R1's ask for thoughts that their replies do not show.
    ModelError for a template that does not end, is huge, or loses what the user says.
    """
    own = tokenizer.chat_template
    if not isinstance(own, str):  # named templates, of which apply_chat_template takes the default one
        own = tokenizer.get_chat_template()
    if len(own) > MOST_TEMPLATE:
        raise ModelError(f"{base}: its chat template has {len(own)} characters; give it a template for chats alone")
    own = TODAY.sub(DAY, own)
    if "date_string" in own and DATED not in own:
        own = DATED + own
    tokenizer.chat_template = with_system(base, tokenizer, own)
    ends = around_the_reply(tokenizer)
    if differ(*ends) and THINKS not in own:
        if thinking:
            tokenizer.chat_template = THINKS + tokenizer.chat_template
        else:
            leave_thoughts_out(tokenizer, ends[1])


def with_system(base: str, tokenizer: Any, own: str) -> str:
    """The template, with the system prompt folded into the user's turn where it refuses or drops the system role."""
    trouble = ""
    for template in (own, FOLD + own):
        try:
            text = show(tokenizer, PROBE, template)
        except TimedOut:
            raise ModelError(
                f"{base}: its chat template does not end within {RENDERING:g} seconds for a short chat; correct "
                "chat_template in the base's folder"
            ) from None
        except Exception as error:
            trouble = trouble or kind_and_line(error)
            continue
        if len(text) > MOST_TEMPLATE:
            raise ModelError(f"{base}: its chat template makes {len(text)} characters of a short chat; correct it")
        if all(message["content"] in text for message in PROBE):
            return template
    raise ModelError(
        f"{base}: its chat template {f'fails ({trouble})' if trouble else 'leaves out what the user says'}; correct "
        "chat_template in the base's folder, or take the instruct variant"
    )


def show(tokenizer: Any, chat: Sequence[dict[str, str]], template: str | None = None, *, asks: bool = False) -> str:
    """A chat as text, by a template or the tokenizer's own; `asks`: up to where the reply begins."""
    work = partial(tokenizer.apply_chat_template, [*chat], chat_template=template, tokenize=False)
    return str(within(RENDERING, partial(work, add_generation_prompt=asks)))


def around_the_reply(tokenizer: Any) -> tuple[str, str]:
    """(how a prompt ends, how the reply to it begins in a finished chat), after the chat; both empty where unclear."""
    try:
        chat, prompt = show(tokenizer, PROBE), show(tokenizer, PROBE, asks=True)
        whole = show(tokenizer, [*PROBE, REPLY])
    except Exception:  # of a template that knows no replies
        return "", ""
    begin, found, _ = whole.removeprefix(chat).partition(REPLY["content"])
    known = found and whole.startswith(chat) and prompt.startswith(chat)
    return (prompt.removeprefix(chat), begin) if known else ("", "")


def differ(end: str, begin: str) -> bool:
    """Whether prompts end otherwise than replies begin; white space at that place belongs to a reply's first token."""
    return end.strip() != begin.strip()


def opens_thoughts(tokenizer: Any) -> bool:
    """Whether prompts ask for thoughts that finished replies do not show."""
    return differ(*around_the_reply(tokenizer))


def leave_thoughts_out(tokenizer: Any, begin: str) -> None:
    """End prompts as replies `begin`, without thoughts or with empty ones."""
    before, behind = BEGUN
    mark = json.dumps(begin, ensure_ascii=False)
    tokenizer.chat_template = before + tokenizer.chat_template.removesuffix("\n") + behind.replace("MARK", mark)
