"""The reward that asks a judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qreason.rewards.tags import read_answer
from qreason.types import Example, Reply, Reward

Judge = Callable[[Sequence[tuple[str, str]]], list[float | None]]
"""(reference, response) pairs -> 0..1 each; None where the judge gave no verdict. Equal references form a group."""


class JudgeSettings(BaseModel):
    """Which judge; by default the policy's own base, adapter off, at no cost in memory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["score", "groupwise"] = "score"
    """Each response against the reference, or the responses of a group also against each other."""
    adapter: str | None = None
    """A judge adapter on the policy's base, as `qreason judge train` makes it."""
    base: str | None = None
    """A small model of its own instead: a folder or a Hub id."""
    quantization: Literal["none", "nf4"] = "nf4"
    """Of that model; nf4 is a quarter of the memory."""
    offload: bool = False
    """Keep that model in the CPU's memory while the policy trains on the GPU."""
    endpoint: str | None = None
    """An OpenAI-compatible server instead: the address before /chat/completions."""
    model: str | None = None
    """The name of the model at the endpoint."""
    api_key: str = "OPENAI_API_KEY"
    """The environment variable that holds the endpoint's key; it may be unset."""
    timeout: float = Field(30.0, gt=0)
    """Seconds the endpoint has for an answer."""
    retries: int = Field(4, ge=0)
    """Further attempts after a timeout, a 429 or a 5xx; then there is no verdict."""
    concurrency: int = Field(8, ge=1)
    """Requests to the endpoint at a time."""

    @model_validator(mode="after")
    def one_judge(self) -> JudgeSettings:
        given = [name for name in ("adapter", "base", "endpoint") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: a judge is one of them")
        if bool(self.endpoint) != bool(self.model):
            raise ValueError("endpoint and model go together: the address, and the model's name there")
        return self


def judge_reward(judge: Judge) -> Reward:
    """0..1: how sure the judge is that the answer says what the reference says. No answer earns 0, unasked."""

    def reward(replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]:
        answers = [read_answer(reply.text) for reply in replies]
        asked = [index for index, answer in enumerate(answers) if answer]
        verdicts = judge([(examples[index].reference, answers[index]) for index in asked])
        marks: list[float | None] = [0.0] * len(replies)
        for index, verdict in zip(asked, verdicts, strict=True):
            marks[index] = verdict
        return marks

    return reward
