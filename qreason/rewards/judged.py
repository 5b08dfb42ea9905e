"""The rewards that ask a model: an LLM judge, or a preference model (a sequence classifier with one output)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qreason.rewards.tags import TAG, answer_of, read_answer
from qreason.types import Address, Example, Reply, Reward, Variable

Judge = Callable[[Sequence[tuple[str, str]]], list[float | None]]
"""(reference, response) pairs -> 0..1 each; None where the judge gave no verdict. Equal references form a group."""
PreferenceModel = Callable[[Sequence[tuple[str, str]]], list[float | None]]
"""(prompt, reply) pairs -> one number each, higher is preferred."""


class JudgeSettings(BaseModel):
    """Which judge; by default the policy's own base, adapter off, at no cost in memory."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    mode: Literal["score", "groupwise"] = "score"
    """Each response against the reference, or the responses of a group also against each other."""
    strict: bool = False
    """Decide by rules, without asking, for equal texts, and against a response with other names or numbers than the
    reference, more sentences, or another form. For languages that write only names with a capital letter. Questions
    that are left are computed in the number format of training steps."""
    unfit: Literal["stop", "warn", "drop"] = "warn"
    """Where `data.labels` show before GRPO that the judge is unfit for its weight: end the run, warn, or train with
    weight 0."""
    adapter: str | None = None
    """A judge adapter on the policy's base, as `qreason judge train` makes it."""
    base: str | None = None
    """A small separate model instead: a folder or a Hub id."""
    quantization: Literal["none", "nf4"] = "nf4"
    """Of that model; nf4 is a quarter of the memory."""
    offload: bool = False
    """Keep that model in the CPU's memory while the policy trains on the GPU."""
    endpoint: Address | None = None
    """An OpenAI-compatible server instead: the address before /chat/completions."""
    model: str | None = None
    """The name of the model at the endpoint."""
    api_key: Variable = "OPENAI_API_KEY"
    """The environment variable that holds the endpoint's key; it may be unset."""
    timeout: float = Field(30.0, gt=0)
    """Seconds until a request to the endpoint fails."""
    retries: int = Field(4, ge=0)
    """Further attempts after a timeout, a 429 or a 5xx; then there is no verdict."""
    concurrency: int = Field(8, ge=1)
    """Parallel requests to the endpoint."""
    max_tokens: int = Field(2048, ge=1)
    """Most tokens of a verdict at the endpoint, its thoughts included; a model that does not think is given 16."""

    @model_validator(mode="after")
    def one_judge(self) -> JudgeSettings:
        given = [name for name in ("adapter", "base", "endpoint") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: a judge is one of them")
        if bool(self.endpoint) != bool(self.model):
            raise ValueError("endpoint and model go together: the address, and the model's name there")
        if self.mode == "groupwise" and self.strict:
            raise ValueError("strict is for mode: score; leave one of them out")
        return self


def judge_reward(judge: Judge) -> Reward:
    """0..1: the judge's probability that answer and reference say the same; 0, without asking, for no answer."""

    def reward(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
        answers = [answer_of(reply, example) for reply, example in zip(replies, examples, strict=True)]
        pairs = [(example.reference, answer) for example, answer in zip(examples, answers, strict=True) if answer]
        verdicts = dict(zip(pairs, judge(pairs), strict=True))
        return [
            verdicts[example.reference, answer] if answer else 0.0
            for example, answer in zip(examples, answers, strict=True)
        ]

    return reward


class PreferenceSettings(BaseModel):
    """Which preference model."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str
    """A sequence classification model with one label, or an adapter of one: a folder, a Hub id, or in a grpo step an
    earlier preference step of the run by its folder, as `02-preference`."""
    reads: Literal["reply", "answer"] = "reply"
    """The whole reply, or only the text between the answer tags (a reply without tags is all answer)."""


def preference_reward(settings: PreferenceSettings, model: PreferenceModel) -> Reward:
    """0..1: the sigmoid of the preference model's output for prompt and reply.

    Bradley-Terry: the difference of two outputs is the log-odds that the first reply is preferred.
    """

    def reward(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
        texts = [reply.text for reply in replies]
        if settings.reads == "answer":
            texts = [read_answer(text) if TAG.search(text) else text for text in texts]
        return model([(example.prompt, text) for text, example in zip(texts, examples, strict=True)])

    return reward
