"""What the loss of SFT covers in a chat of several turns, by the base's own chat template."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qreason.errors import DataError
from qreason.types import Messages


def reply_spans(
    tokenizer: Any, chat: Messages, source: str, unlearned: Collection[int] = ()
) -> tuple[str, list[tuple[int, int]]]:
    """(a chat as text, start and end of each assistant turn that is learned, the mark of its end included).

    `unlearned` has turns that are not, counted from the end: -1 is the last.

    Raises DataError where the chat template renders a turn in another way once others follow it, as those do that
    leave earlier thoughts out: the model would learn turns that it never sees so.
    """
    whole: str = tokenizer.apply_chat_template(chat, tokenize=False)
    spans = []
    for place, message in enumerate(chat):
        if message["role"] != "assistant" or place - len(chat) in unlearned:
            continue
        before = tokenizer.apply_chat_template(chat[:place], tokenize=False, add_generation_prompt=True)
        through = tokenizer.apply_chat_template(chat[: place + 1], tokenize=False)
        if not (whole.startswith(through) and through.startswith(before)):
            raise DataError(
                f"{source}: the base's chat template renders turn {place + 1} in another way when others follow it, so "
                "it cannot be learned there; set sft.turns: last, or take a base whose template keeps earlier turns"
            )
        spans.append((len(before), len(through)))
    return whole, spans


def mask_turns(tokenizer: Any, chat: Messages, source: str, unlearned: Collection[int] = ()) -> dict[str, list[int]]:
    """TRL's tokenized row of a chat, `input_ids` and `completion_mask`: 1 for every token of a turn that is learned."""
    text, spans = reply_spans(tokenizer, chat, source, unlearned)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(start < end and begin < stop for begin, end in spans)) for start, stop in found["offset_mapping"]]
    return {"input_ids": found["input_ids"], "completion_mask": mask}
