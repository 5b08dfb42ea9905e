"""The sections of a recipe beside its steps: model, data, sampling, rewards; unknown keys fail."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from qreason.errors import nearest
from qreason.rewards.registry import NAMES, settings_model
from qreason.types import Sampling

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""Endings of data files, in any case."""
OTHER_FILES = (".txt", ".ndjson", ".xlsx", ".xls", ".ods", ".gz", ".bz2", ".xz", ".zip", ".zst", ".arrow", ".yaml")
"""Endings of files that are no data files."""
HUB_ID = re.compile(r"[a-z0-9][\w.-]*(/[a-z0-9][\w.-]*)?", re.ASCII | re.IGNORECASE)
USES = ("sft", "prompts", "heldout", "plain")
"""Data keys whose rows are examples."""


def is_hub_id(source: str) -> bool:
    """Whether a source can be a data set on the Hub: it does not look like a file."""
    return HUB_ID.fullmatch(source) is not None and not source.lower().endswith(SUFFIXES + OTHER_FILES)


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True, allow_inf_nan=False
    )


class Lora(Strict):
    """The adapter, in PEFT's terms."""

    r: int = Field(16, gt=0)
    """The rank of the update of each layer."""
    alpha: int = Field(32, gt=0)
    """The update is scaled by `alpha / r`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """The share of its inputs that is dropped in training."""
    target_modules: str | list[str] = "all-linear"
    """The layers that get one: `all-linear`, names, or a pattern."""
    init: Literal["zero", "quantization_error"] = "zero"
    """What the policy's fresh adapter adds: nothing, or the NF4 quantization error of the base, limited by its rank."""


class Model(Strict):
    base: str
    """`qreason/tiny` (embedded), a Hub id or a local folder."""
    quantization: Literal["none", "nf4"] = "none"
    """The format of the base's weights: as the machine computes, or 4 bits (NF4)."""
    backend: Literal["auto", "plain", "unsloth"] = "auto"
    """`plain` is transformers and PEFT; `auto` takes Unsloth where it is installed and there is a GPU."""
    thinking: bool = False
    """Let the chat template ask for the base's own thoughts (Qwen3, R1), before the reply with its tags."""
    lora: Lora = Lora()
    """The adapter that is trained."""


class Data(Strict):
    """Where examples come from: a file (JSONL, JSON, CSV, TSV, Parquet) or a Hub id (`name` and `splits` with it)."""

    sft: str | None = None
    """Rows to learn from."""
    prompts: str | None = None
    """Rows to draw replies to, for grpo, sample and distill."""
    heldout: str | None = None
    """Rows to measure on, never trained on."""
    plain: str | None = None
    """Rows without reasoning, prompt and reply, that sample and grpo steps mix in."""
    pairs: str | None = None
    """Ranked pairs of replies for a preference step: `prompt`, `chosen`, `rejected`."""
    labels: str | None = None
    """Labelled pairs that the judge is measured on: `reference`, `reply`, and `label` (1 right, 0 wrong)."""
    name: str | None = None
    """Configuration of a Hub data set."""
    splits: dict[Literal["sft", "prompts", "heldout", "plain", "pairs"], str] = {}
    """Split of a Hub data set for each use; `train`, or `test` for held-out rows, when not given."""
    fields: dict[Literal["id", "prompt", "reference", "reasoning", "accepted", "category", "tests"], str] = {}
    """Column names, where they are not among the usual ones (data/examples.py)."""
    choices: str | tuple[str, ...] | None = None
    """Multiple choice: the column with the list of choices, or one column per choice, the right one first."""
    where: dict[str, tuple[str, ...]] = {}
    """Use only rows whose column has one of these values."""
    prompt: Literal["general", "helpdesk", "math", "choice", "none"] | None = None
    """A shipped system prompt (docs/data.md); chosen by the rows where neither it nor `system` is given."""
    system: str | None = Field(None, min_length=1)
    """A system prompt of your own, in place of a shipped one; that of a row wins over it."""
    heldout_share: float | None = Field(None, gt=0, lt=1)
    """Where `heldout` is also read for training: the share of its chats, by a hash of how they begin, that is held out
    and not trained on."""
    separator: Literal[",", ";", "\t", "|"] | None = None
    """Of the CSV files, where it is not a comma."""
    encoding: Literal["utf-8", "cp1252", "utf-16"] = "utf-8"
    """Of the text files; cp1252 is Windows-1252."""

    @model_validator(mode="after")
    def check_prompt(self) -> Data:
        if self.system is not None and self.prompt is not None:
            raise ValueError("prompt and system: both give a system prompt; leave out data.prompt or data.system")
        if self.heldout_share and self.heldout not in (self.sft, self.prompts):
            raise ValueError(
                "heldout_share: parts one file in two, so data.heldout must be the file of data.sft or data.prompts; "
                "name it there too, or leave heldout_share out"
            )
        return self

    @property
    def sources(self) -> dict[str, str]:
        """Those of `sft`, `prompts`, `heldout` and `plain` that are given -> file or Hub id."""
        return {use: source for use in USES if (source := getattr(self, use)) is not None}

    @property
    def all_sources(self) -> dict[str, str]:
        """The same and `pairs`: what a model is trained or measured on."""
        return self.sources | ({"pairs": self.pairs} if self.pairs else {})

    @property
    def files(self) -> dict[str, str]:
        """The same and `labels`."""
        return self.all_sources | ({"labels": self.labels} if self.labels else {})


class Draw(Strict):
    """How replies are drawn, in rollouts and for pass@1; in TRL's terms."""

    temperature: float = Field(1.0, ge=0)
    """0 is greedy; training needs more than 0, at least 0.0001."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the most probable tokens that make up this share; 1: all."""
    top_k: int = Field(0, ge=0)
    """Draw from so many most probable tokens; 0: all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Leave out tokens less probable than this share of the most probable one."""
    max_completion_length: int = Field(256, gt=0)
    """Tokens of a reply at most."""
    max_num_seqs: int = Field(128, gt=0)
    """Replies that are decoded at a time; fewer need less memory and take longer."""

    @field_validator("temperature")
    @classmethod
    def finite_logits(cls, temperature: float) -> float:
        """Logits are divided by it, and have to stay finite."""
        if 0 < temperature < 1e-4:
            raise ValueError("Input should be 0 (greedy) or at least 0.0001")
        return temperature

    def sampling(self, *, greedy: bool = False, seed: int | None = None) -> Sampling:
        drawn = self.model_dump() | ({"temperature": 0.0} if greedy else {})
        return Sampling(**drawn, seed=seed)


class Weighted(Strict):
    """A reward's weight and settings; in a recipe the weight alone, or a mapping with all of them."""

    weight: float = Field(ge=0)
    """Its share in the total; 0: it is only measured."""
    reward: str | None = None
    """The reward's name, where the recipe's key is another one: for two preference models, for example."""
    only: Literal["reasoning", "plain"] | None = None
    """The rows that it scores: those of data.plain, or the others; elsewhere the total leaves it out."""
    call_timeout: float | None = Field(None, gt=0)
    """Seconds that one call of a reward of your own may take; 300 where not given."""
    settings: dict[str, Any] = {}
    """Those of the reward, written beside the weight."""

    @model_validator(mode="before")
    @classmethod
    def flat(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "settings" not in raw:
            own = {key: raw[key] for key in ("weight", "reward", "only", "call_timeout") if key in raw}
            return own | {"settings": {key: value for key, value in raw.items() if key not in own}}
        return raw if isinstance(raw, (dict, Weighted)) else {"weight": raw}

    @model_serializer
    def as_written(self) -> Any:
        own = {key: value for key in ("reward", "only", "call_timeout") if (value := getattr(self, key))}
        return {"weight": self.weight, **own, **self.settings} if own or self.settings else self.weight

    def kind(self, name: str) -> str:
        """The reward's name, given its key in the recipe."""
        return self.reward or name


STORED = {"stored": True}
"""The context in which the recipe of a run folder is read: no module of one's own is imported to look at a run."""


def check_rewards(rewards: dict[str, Weighted], info: ValidationInfo) -> dict[str, Weighted]:
    """ValueError for an unknown reward or setting, and where all weights are 0."""
    for name, reward in rewards.items():
        kind = reward.kind(name)
        if kind not in NAMES and ":" not in kind:
            known = f"{', '.join(NAMES)}, or your own as my_module:my_reward"
            raise ValueError(f"unknown reward '{kind}'{nearest(kind, NAMES)}; there are {known}")
        if reward.call_timeout and ":" not in kind:
            raise ValueError(f"{name}: call_timeout is for rewards of your own, my_module:my_reward; leave it out")
        if ":" not in kind or info.context != STORED:
            check_settings(kind, reward.settings)
    if not any(reward.weight for reward in rewards.values()):
        raise ValueError("all weights are 0; give at least one reward a weight above 0")
    return rewards


def check_settings(name: str, settings: dict[str, Any]) -> None:
    """ValueError for an unknown setting of a reward, or a wrong value."""
    model = settings_model(name)
    try:
        model.model_validate(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = list(model.model_fields)
            listed = f"; there are weight, {', '.join(known)}" if known else "; it has none but weight"
            raise ValueError(f"{name}: unknown setting '{key}'{nearest(key, known)}{listed}") from None
        raise ValueError(f"{name}: {key + ': ' if key else ''}{problem['msg'].removeprefix('Value error, ')}") from None


Rewards = Annotated[dict[str, Weighted], Field(min_length=1), AfterValidator(check_rewards)]


def preference_models(rewards: Mapping[str, Weighted]) -> list[tuple[str, str]]:
    """(name, model) of the rewards that ask a preference model."""
    return [(name, str(one.settings["model"])) for name, one in rewards.items() if one.kind(name) == "preference"]
