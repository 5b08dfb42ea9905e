"""The reference in transformers: greedy replies and teacher-forced logits that GGUF files are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qreason.data.prompts import render
from qreason.inference.generate import LocalGenerator
from qreason.inference.reading import render_ids
from qreason.machine.hardware import detect
from qreason.machine.progress import progress_bar
from qreason.model.compat.transformers import engine_angles
from qreason.model.resident import Resident
from qreason.recipe.sections import Model
from qreason.rewards.tags import answer_of
from qreason.rewards.text import correct
from qreason.types import Example, Messages, Reply, Sampling


@dataclass(frozen=True)
class Heldout:
    """The held-out rows as questions: all are rendered and tokenized, the first `rows` are answered."""

    examples: Sequence[Example]
    system: str
    tokenizer: Any
    limit: int
    """Tokens per reply, at most."""
    rows: int

    @cached_property
    def conversations(self) -> list[Messages]:
        return [render(example, self.system) for example in self.examples]

    @cached_property
    def texts(self) -> list[str]:
        """The same through the chat template, up to where the assistant begins."""
        return [self.render(conversation) for conversation in self.conversations]

    @cached_property
    def prompts(self) -> list[list[int]]:
        """The same as token ids."""
        return render_ids(self.tokenizer, self.conversations)

    @property
    def questions(self) -> list[Messages]:
        """The rows that are answered."""
        return self.conversations[: self.rows]

    @property
    def asked(self) -> list[list[int]]:
        """The same as token ids."""
        return self.prompts[: self.rows]

    def render(self, messages: Messages) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def accuracy(self, texts: Sequence[str]) -> float:
        """The share of replies to the first rows that have the right answer."""
        rows = self.examples[: self.rows]
        answers = [answer_of(Reply(text), row) for text, row in zip(texts, rows, strict=True)]
        right = sum(correct(answer, row.references) > 0 for answer, row in zip(answers, rows, strict=True))
        return right / len(rows)


def answer(resident: Resident, questions: Sequence[Messages], limit: int, what: str) -> list[Reply]:
    """Greedy replies of a model in transformers; `what` names the progress bar."""
    sampling = Sampling(temperature=0.0, max_completion_length=limit)
    with progress_bar(what, total=len(questions)) as bar:
        drawn = LocalGenerator(resident).generate(questions, n=1, sampling=sampling, on_progress=bar.advance)
    return [reply for (reply,) in drawn]


def in_float32(merged: Path) -> Resident:
    """The merged model in float32, on the device of the stages."""
    return Resident(Model(base=str(merged)), replace(detect(), dtype="float32"))


def write_logits(model: Any, replies: Sequence[Reply], folder: Path) -> list[Path]:
    """Teacher-forced logits before each token of the replies: a .npy per reply, (tokens, vocabulary) float32.

    With llama.cpp's rotary angles, so that they are comparable with those of a file.
    """
    import numpy
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number}.npy" for number in range(len(replies))]
    with torch.no_grad(), engine_angles(model):
        for reply, file in zip(replies, files, strict=True):
            ids = torch.tensor([[*reply.prompt_ids, *reply.token_ids[:-1]]], device=model.device)
            logits = model(input_ids=ids, logits_to_keep=len(reply.token_ids)).logits[0]
            numpy.save(file, logits.float().cpu().numpy())
    return files


def with_adapter(base: Path, adapter: Path) -> Any:
    """The base with the adapter, in float32 on the CPU."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32, trust_remote_code=False)
    return PeftModel.from_pretrained(model, str(adapter)).eval()
