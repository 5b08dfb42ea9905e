"""The YAML schema of a recipe (strict): what to train, on what, with which rewards, in which steps."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from qreason.rewards import NAMES, settings_model
from qreason.types import Sampling

SUFFIXES = (".jsonl", ".csv", ".parquet")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True)


class Lora(Strict):
    """The adapter, in PEFT's terms."""

    r: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class Model(Strict):
    base: str
    """`qreason/tiny` (embedded), a Hub id or a local folder."""
    quantization: Literal["none", "nf4"] = "none"
    backend: Literal["auto", "plain", "unsloth"] = "auto"
    """`plain` is transformers and PEFT; `auto` takes Unsloth where it is installed and there is a GPU."""
    lora: Lora = Lora()


class Data(Strict):
    """Where examples come from: a JSONL, CSV or Parquet file, or a Hub id (`name` and `split` with it)."""

    sft: str | None = None
    prompts: str | None = None
    heldout: str | None = None
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
    """Column names, where they are not among the usual ones (see data.py)."""
    choices: str | tuple[str, ...] | None = None
    """Multiple choice: the column with the list of choices, or the columns with one each, the right one first."""
    where: dict[str, tuple[str, ...]] = {}
    """Use only rows whose column has one of these values."""
    prompt: Literal["helpdesk", "math", "choice"] = "helpdesk"
    """Which system prompt of prompts.py the messages carry."""

    @property
    def sources(self) -> dict[str, str]:
        """`sft`, `prompts`, `heldout` and `plain`, those that are given -> file or Hub id."""
        return {use: source for use in USES if (source := getattr(self, use)) is not None}

    @property
    def all_sources(self) -> dict[str, str]:
        """The same and `pairs`: all that a model is trained or measured on."""
        return self.sources | ({"pairs": self.pairs} if self.pairs else {})

    @property
    def files(self) -> dict[str, str]:
        """The same and `labels`."""
        return self.all_sources | ({"labels": self.labels} if self.labels else {})


class Draw(Strict):
    """How replies are drawn, in rollouts and for pass@1; in TRL's terms."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    max_completion_length: int = Field(256, gt=0)
    max_num_seqs: int = Field(128, gt=0)
    """Replies that are decoded side by side; fewer need less memory and take longer."""

    def sampling(self, *, greedy: bool = False, seed: int | None = None) -> Sampling:
        drawn = self.model_dump() | ({"temperature": 0.0} if greedy else {})
        return Sampling(**drawn, seed=seed)


class Weighted(Strict):
    """A reward's weight and settings; in a recipe the weight alone, or a mapping with all of it."""

    weight: float = Field(ge=0, allow_inf_nan=False)
    reward: str | None = None
    """Which reward it is, where the recipe calls it something else: for two preference models, for example."""
    only: Literal["reasoning", "plain"] | None = None
    """The rows it is for: those of data.plain, or the others; elsewhere the total does without it."""
    settings: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def flat(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "settings" not in raw:
            own = {key: raw[key] for key in ("weight", "reward", "only") if key in raw}
            return own | {"settings": {key: value for key, value in raw.items() if key not in own}}
        return raw if isinstance(raw, (dict, Weighted)) else {"weight": raw}

    @model_serializer
    def as_written(self) -> Any:
        own = {key: value for key in ("reward", "only") if (value := getattr(self, key))}
        return {"weight": self.weight, **own, **self.settings} if own or self.settings else self.weight

    def kind(self, name: str) -> str:
        """The reward's own name, given what the recipe calls it."""
        return self.reward or name


def check_rewards(rewards: dict[str, Weighted]) -> dict[str, Weighted]:
    """ValueError for a reward or a setting that there is not, and where no reward counts."""
    for name, reward in rewards.items():
        kind = reward.kind(name)
        if kind not in NAMES and ":" not in kind:
            known = f"{', '.join(NAMES)}, or your own as my_module:my_reward"
            raise ValueError(f"unknown reward '{kind}'{nearest(kind, NAMES)}; there are {known}")
        check_settings(kind, reward.settings)
    if not any(reward.weight for reward in rewards.values()):
        raise ValueError("all weights are 0; give at least one reward a weight above 0")
    return rewards


NEWEST = "newest"
BASE = "base"
"""What the untrained base is called where stages are named."""


class Start(Strict):
    """A stage that stands on a checkpoint of the run."""

    start: str = Field(NEWEST, alias="from")
    """`newest` adapter, `base` (no adapter), or the folder of an earlier stage, as `01-sft`."""


class Training(Start):
    """What SFT and GRPO share, in TRL's terms; `trl` passes any further field of TRL's config through."""

    per_device_train_batch_size: int = Field(8, gt=0)
    gradient_accumulation_steps: int = Field(1, gt=0)
    num_train_epochs: float = Field(1.0, gt=0)
    max_steps: int = -1
    learning_rate: float = Field(2e-4, gt=0)
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = Field(0.03, ge=0)
    """A number of steps, or below 1 a share of them."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optim: str = "adamw_torch"
    gradient_checkpointing: bool = False
    logging_steps: int = Field(5, gt=0)
    rows: int | None = Field(None, gt=0)
    """Use only the first rows."""
    trl: dict[str, Any] = {}

    @field_validator("trl")
    @classmethod
    def publishes_nothing(cls, trl: dict[str, Any]) -> dict[str, Any]:
        if trl.get("push_to_hub"):
            raise ValueError("push_to_hub: a run publishes nothing by itself; use `qreason push` when it is done")
        return trl


class Sft(Training):
    data: Literal["sft", "sampled"] = "sft"
    """`data.sft`, or what the newest sample step kept."""
    packing: bool = False


class Grpo(Training):
    rewards: dict[str, Weighted] | None = Field(None, min_length=1)
    """Its own rewards; those of the recipe where not given."""
    plain_share: float = Field(0.0, ge=0, lt=1)
    """The share of its prompts that are rows of data.plain, asked without the system prompt."""
    num_generations: int = Field(8, ge=2)
    learning_rate: float = Field(1e-5, gt=0)
    logging_steps: int = Field(1, gt=0)
    beta: float = Field(0.0, ge=0)
    """Weight of the KL divergence from the policy that training started from (the k3 estimator); 0: none."""
    use_bias_correction_kl: bool = False
    """Multiply that divergence by the ratio, as DeepSeek-V3.2 does; TRL does so by default, the GRPO papers do not."""
    epsilon: float = Field(0.2, gt=0)
    """The ratio of new to old probability is clipped to 1 - epsilon .. 1 + epsilon_high."""
    epsilon_high: float | None = Field(None, gt=0)
    """Where not given, epsilon."""
    num_iterations: int = Field(1, gt=0)
    """Optimizer passes over the same rollouts; from the second on, the ratio is not 1 and clipping acts."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """A ratio each token, or one each sequence (GSPO)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the standard deviation of the group, of the batch, or nothing (Dr. GRPO)."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """What the sum over tokens is divided by, and other losses; docs/sampling.md has the formulas."""
    mask_truncated_completions: bool = False
    preflight: bool = True
    """Before training, score the references and a few completions, and stop where GRPO could not learn."""
    stop_on_reward_hacking: bool = False
    """Stop, without an adapter, when a reward is being gamed; otherwise it is only said."""

    @field_validator("rewards")
    @classmethod
    def known_rewards(cls, rewards: dict[str, Weighted] | None) -> dict[str, Weighted] | None:
        return check_rewards(rewards) if rewards else rewards

    @model_validator(mode="after")
    def whole_groups(self) -> Grpo:
        if self.per_device_train_batch_size * self.gradient_accumulation_steps % self.num_generations:
            raise ValueError(
                "per_device_train_batch_size x gradient_accumulation_steps must be a multiple of "
                f"num_generations ({self.num_generations})"
            )
        return self


class Preference(Training):
    """A reward model from ranked pairs: an adapter with a scalar head, for the `preference` reward of later steps."""

    data: Literal["pairs", "sampled"] = "pairs"
    """`data.pairs`, or of each prompt of the newest sample step the best draw against the worst, by total."""
    about: str | None = None
    """Use only the pairs whose `about` column says this."""
    heldout_share: float = Field(0.1, gt=0, lt=1)
    """The share of the prompts whose pairs are kept out, to measure on."""


class Beam(Strict):
    """Step-wise beam search: replies grow step by step, and the best beginnings go on."""

    width: int = Field(4, ge=1)
    """Beginnings that go on."""
    expand: int = Field(4, ge=1)
    """Ways each of them is continued by a step."""
    by: str = "likelihood"
    """What ranks them: `likelihood`, `total`, or one of the recipe's rewards, given the beginning."""


class Teacher(Strict):
    """Who replies in place of the run's own model: a model that is loaded for it, or an OpenAI-compatible server."""

    model: str
    """A Hub id, a model's folder, or a run folder (its newest adapter); with an endpoint, the model's name there."""
    quantization: Literal["none", "nf4"] = "none"
    """Of a model that is loaded here; a run folder has its own."""
    endpoint: str | None = None
    """The server's address before /chat/completions."""
    api_key: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; it may be unset."""
    timeout: float = Field(120.0, gt=0)
    """Seconds a reply may take."""
    retries: int = Field(5, ge=0)
    """Further attempts after a timeout, a 429 or a 5xx, waiting twice as long each time."""
    concurrency: int = Field(8, ge=1)
    """Requests in flight."""

    @model_validator(mode="after")
    def here_or_there(self) -> Teacher:
        elsewhere = sorted(self.model_fields_set - {"model", "quantization", "endpoint"})
        if self.endpoint is None and elsewhere:
            raise ValueError(f"{elsewhere[0]}: only for a server; give its endpoint, or leave it out")
        if self.endpoint is not None and self.quantization != "none":
            raise ValueError("quantization: only for a model that is loaded here, not for one behind an endpoint")
        return self


class Distill(Training):
    """On-policy distillation: the student replies to data.prompts, and learns the teacher's distribution there."""

    teacher: Teacher
    """A model with the student's vocabulary, loaded beside it."""
    beta: float = Field(1.0, ge=0, le=1)
    """The divergence: 0 is the forward KL, 1 the reverse KL, between them the generalized Jensen-Shannon divergence."""
    learning_rate: float = Field(1e-5, gt=0)
    logging_steps: int = Field(1, gt=0)

    @model_validator(mode="after")
    def teacher_is_here(self) -> Distill:
        if self.teacher.endpoint is not None:
            raise ValueError(
                "teacher.endpoint: a server does not give whole distributions; give a model that is loaded here, or "
                "sample with this teacher and train on that"
            )
        return self


class Sample(Start):
    """Rejection sampling: draw replies to data.prompts and keep the good ones as SFT data."""

    teacher: Teacher | None = None
    """Who replies in place of the run's own model."""
    n: int = Field(4, ge=1)
    """Replies a prompt."""
    rows: int | None = Field(None, gt=0)
    """Use only the first prompts."""
    keep: dict[str, float] = {"correctness": 1.0}
    """The least that a kept reply earns: from rewards of the recipe by name, or `total`."""
    per_prompt: int | None = Field(None, ge=1)
    """Keep at most so many replies to a prompt."""
    least_words: int = Field(1, ge=0)
    most_words: int | None = Field(None, ge=1)
    """Bounds on the words of the whole reply."""
    language: str | None = "en"
    """The language a reply must be in; null for any."""
    language_share: float = Field(0.9, ge=0, le=1)
    """The least share of words in that language."""
    plain_share: float = Field(0.0, ge=0, lt=1)
    """The share of the written data that are rows of data.plain."""

    @model_validator(mode="after")
    def known_language(self) -> Sample:
        if self.language is not None:
            check_settings("language_consistency", {"language": self.language})
        if self.most_words is not None and self.most_words < self.least_words:
            raise ValueError(f"most_words ({self.most_words}) is below least_words ({self.least_words})")
        return self


class Evaluate(Strict):
    rows: int | None = Field(None, gt=0)
    """Use only the first held-out rows."""
    samples: int = Field(4, ge=1)
    """Replies a row for pass@1, beside the greedy one."""
    chain_of_thought: bool = True
    """Ask for reasoning before the answer; without, for the answer alone."""
    right_by: Literal["correctness", "math"] = "correctness"
    """The rule that says whether an answer is right."""
    pass_at: tuple[PositiveInt, ...] = ()
    """The k of pass@k: is one of k samples right?"""
    cons_at: tuple[PositiveInt, ...] = ()
    """The k of cons@k: is the majority answer of k samples right?"""
    best_of: tuple[PositiveInt, ...] = ()
    """The n of best-of-n: is the sample right that `best_by` ranks highest among n?"""
    best_by: str = "likelihood"
    """`likelihood` (mean log-probability a token), `total`, or one of the recipe's rewards."""
    beam: Beam | None = None

    @model_validator(mode="after")
    def enough_samples(self) -> Evaluate:
        for key in ("pass_at", "cons_at", "best_of"):
            if (most := max(getattr(self, key), default=0)) > self.samples:
                raise ValueError(
                    f"{key}: {most} is more than the {self.samples} samples a row; raise samples to {most}"
                )
        return self


class Merge(Strict):
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    base: Literal["trained", "original"] = "trained"
    """Of a 4-bit run: the base it was trained on, dequantized, or the original one."""
    max_shard_size: str = Field("5GB", pattern=r"^\d+(\.\d+)?[KMG]B$")
    adapters: list[str] = []
    """Stage folders of the run, or folders of adapters, in order; the newest one of the run when empty."""
    blend: Literal["linear", "ties", "dare_linear", "dare_ties", "cat"] | None = None
    """How several adapters become one first (PEFT's `add_weighted_adapter`); without it they are folded in order."""
    weights: list[float] = []
    density: float | None = Field(None, gt=0, le=1)
    """Share of each adapter that TIES and DARE keep."""
    rows: int = Field(32, gt=0)
    """Held-out rows on which the trained and the merged model are compared."""

    @model_validator(mode="after")
    def blends_several(self) -> Merge:
        if self.blend and len(self.adapters) < 2:
            raise ValueError("blend: it takes two or more adapters; name them in adapters")
        if self.weights and not self.blend:
            raise ValueError("weights: adapters have weights only in a blend; set blend, for example to linear")
        if self.weights and len(self.weights) != len(self.adapters):
            raise ValueError(f"weights: {len(self.weights)} for {len(self.adapters)} adapters; give one for each")
        if (self.density is not None) != (self.blend in SPARSE):
            raise ValueError(
                f"density: the share of weights to keep, for a blend by {', '.join(SPARSE)} and only there"
            )
        return self


SPARSE = ("ties", "dare_linear", "dare_ties")
"""Blends that keep only a part of each adapter."""


class Pull(Strict):
    """An adapter from the Hub that later steps start from."""

    repo: str = Field(pattern=r"^[^/]+/[^/]+$")
    revision: str | None = None
    other_base: bool = False
    """The adapter may name another base than the recipe: it is the same model under another name."""


GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k")


class Export(Strict):
    """The merged model as GGUF files, and the adapter as one."""

    gguf: list[str] = Field(["f16", "q8_0", "q4_k_m"], min_length=1)
    ollama: bool = False
    """Write a Modelfile too, and create the model where Ollama is installed."""
    verify: bool = True
    """Run every file in llama.cpp before it gets its name."""
    rows: int = Field(100, gt=0)
    """Held-out rows that the accuracy of each file is measured on."""

    @field_validator("gguf")
    @classmethod
    def known_types(cls, kinds: list[str]) -> list[str]:
        for kind in kinds:
            if kind not in GGUF_TYPES:
                raise ValueError(f"unknown type '{kind}'{nearest(kind, GGUF_TYPES)}; there are {', '.join(GGUF_TYPES)}")
        return list(dict.fromkeys(kinds))


Settings = Sft | Grpo | Sample | Distill | Preference | Evaluate | Merge | Pull | Export


class Step(Strict):
    """One stage with its settings; exactly one of the fields is set."""

    sft: Sft | None = None
    grpo: Grpo | None = None
    sample: Sample | None = None
    distill: Distill | None = None
    preference: Preference | None = None
    evaluate: Evaluate | None = None
    merge: Merge | None = None
    pull: Pull | None = None
    export: Export | None = None

    @model_validator(mode="before")
    @classmethod
    def bare_name(cls, raw: Any) -> Any:
        """`- evaluate` and `- evaluate:` mean the stage with its defaults."""
        if isinstance(raw, str):
            return {raw: {}}
        return {key: {} if value is None else value for key, value in raw.items()} if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def one_stage(self) -> Step:
        if len(self.model_fields_set) != 1:
            raise ValueError("a step is one stage: start each stage with its own dash")
        return self

    @property
    def stage(self) -> str:
        (name,) = self.model_fields_set
        return name

    @property
    def settings(self) -> Settings:
        settings: Settings = getattr(self, self.stage)
        return settings


STAGES = tuple(Step.model_fields)
POLICIES = ("sft", "grpo", "distill", "pull")
"""Stages whose adapter later ones may start from."""
OWN_FOLDER = re.compile(r"\d{2,}-[a-z]+")
"""How the run's own stages are named, as `02-preference`."""


def stage_folders(steps: Sequence[Step]) -> list[str]:
    """The folder of each step: `01-sft`, `02-grpo`, …; an evaluation lies with the stage it measures."""
    folders, current, number = [], BASE, 0
    for step in steps:
        if step.stage != "evaluate":
            number += 1
            current = f"{number:02d}-{step.stage}"
        folders.append(current)
    return folders


class Recipe(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: Model
    data: Data
    rewards: dict[str, Weighted] = Field(min_length=1)
    sampling: Draw = Draw()
    steps: list[Step] = Field(min_length=1)
    fit: Literal["auto", "none"] = "auto"
    """`auto`: on a GPU, micro-batches and replies side by side are cut down to what its memory holds, or the run is
    refused; the mathematics stays the same. `none`: as written."""
    seed: int = Field(1, ge=0)

    @field_validator("rewards")
    @classmethod
    def known_rewards(cls, rewards: dict[str, Weighted]) -> dict[str, Weighted]:
        return check_rewards(rewards)

    @property
    def weights(self) -> dict[str, float]:
        return weights(self.rewards)

    def rewards_of(self, step: Step) -> dict[str, Weighted]:
        """The rewards of a step: its own, or those of the recipe."""
        return (step.grpo.rewards if step.grpo else None) or self.rewards

    @model_validator(mode="after")
    def has_what_steps_need(self) -> Recipe:
        for key, (stages, what) in NEEDS.items():
            used = [step.stage for step in self.steps if step.stage in stages and reads(step, key)]
            if used and getattr(self.data, key) is None:
                raise ValueError(f"data.{key} is missing: the {used[0]} step needs {what}")
        for step in self.steps if self.sampling.temperature == 0 else ():
            if step.stage in ("grpo", "distill"):
                why = "grpo compares different replies" if step.grpo else "distill draws replies"
                raise ValueError(f"sampling.temperature is 0: {why}; give it a value above 0")
        if len({step.evaluate for step in self.steps if step.evaluate}) > 1:
            raise ValueError("steps: evaluate steps with different settings cannot be compared; give all the same")
        makers = [step.stage for step in self.steps if step.stage != "evaluate"]
        for before_it, stage in zip(["", *makers], makers, strict=False):
            if stage == "export" and before_it not in ("merge", "export"):
                raise ValueError("steps: an export takes a merged model; put a merge step before it")
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            if before.stage == after.stage == "evaluate":
                raise ValueError("steps: two evaluate steps in a row would measure the same model twice")
        return self

    @model_validator(mode="after")
    def earlier_steps_give_what_later_ones_take(self) -> Recipe:
        folders = stage_folders(self.steps)
        for position, step in enumerate(self.steps):
            settings = step.settings
            before = list(zip(folders[:position], self.steps, strict=False))
            trained = [folder for folder, earlier in before if earlier.stage in POLICIES]
            if isinstance(settings, Start) and settings.start not in (NEWEST, BASE, *trained):
                known = ", ".join((NEWEST, BASE, *trained))
                raise ValueError(
                    f"steps.{position}.{step.stage}.from: no earlier '{settings.start}'; there are {known}"
                )
            samples = isinstance(settings, (Sft, Preference)) and settings.data == "sampled"
            if samples and not any(earlier.sample for _, earlier in before):
                raise ValueError(f"steps.{position}.{step.stage}.data: sampled: there is no sample step before it")
            learnt = [folder for folder, earlier in before if earlier.preference]
            for name, model in preference_models(self.rewards_of(step)):
                if OWN_FOLDER.fullmatch(model) and model not in learnt:
                    raise ValueError(
                        f"{f'steps.{position}.grpo.' if step.grpo else ''}rewards.{name}.model: no earlier preference "
                        f"step '{model}'; there are {', '.join(learnt) or 'none'}. A grpo step names one in its own "
                        "rewards"
                    )
        return self

    @model_validator(mode="after")
    def rankings_are_rewards(self) -> Recipe:
        for position, step in enumerate(self.steps):
            named: dict[str, str] = {}
            if isinstance(step.settings, Sample):
                named = {name: f"sample.keep: '{name}'" for name in step.settings.keep}
            elif isinstance(step.settings, Evaluate):
                named[step.settings.best_by] = f"evaluate.best_by: '{step.settings.best_by}'"
                if step.settings.beam:
                    named[step.settings.beam.by] = f"evaluate.beam.by: '{step.settings.beam.by}'"
            known = ["total", *self.rewards] + ([] if step.sample else ["likelihood"])
            for name, place in named.items():
                if name not in known:
                    raise ValueError(
                        f"steps.{position}.{place} is none of {', '.join(known)}{nearest(name, known)}; "
                        "add it to rewards (weight 0 keeps it out of the total)"
                    )
        return self

    def dump(self) -> dict[str, Any]:
        """The recipe as resolved, as plain values that load again."""
        return self.model_dump(mode="json", exclude_none=True, by_alias=True)


def preference_models(rewards: Mapping[str, Weighted]) -> list[tuple[str, str]]:
    """(name, model) of the rewards that ask a preference model."""
    return [(name, str(one.settings["model"])) for name, one in rewards.items() if one.kind(name) == "preference"]


def weights(rewards: dict[str, Weighted]) -> dict[str, float]:
    return {name: reward.weight for name, reward in rewards.items()}


def check_settings(name: str, settings: dict[str, Any]) -> None:
    """ValueError for a setting that a reward does not have, or a value it cannot take."""
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


NEEDS = {
    "sft": (("sft",), "incidents"),
    "prompts": (("grpo", "sample", "distill"), "prompts"),
    "heldout": (("evaluate", "export"), "held-out rows"),
    "pairs": (("preference",), "ranked pairs"),
    "plain": (("sample", "grpo"), "rows without reasoning (plain_share)"),
}
"""Data key -> (stages that read it, what it holds)."""
USES = ("sft", "prompts", "heldout", "plain")
"""Data keys whose rows are examples."""


def reads(step: Step, key: str) -> bool:
    """Whether a step of a stage that may read a data key does so with its settings."""
    if isinstance(step.settings, (Sft, Preference)):
        return step.settings.data == key
    return key != "plain" or bool(getattr(step.settings, "plain_share", 0))


def nearest(word: str, words: Sequence[str] | dict[str, Any]) -> str:
    """` (did you mean 'x'?)`, or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
