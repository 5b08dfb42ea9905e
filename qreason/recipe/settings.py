"""The settings of each stage, as they stand in a step of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from qreason.errors import nearest
from qreason.recipe.sections import Strict, Weighted, check_rewards, check_settings

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
    trl: dict[str, Any] = Field({})

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
    keep: dict[str, float] = Field({"correctness": 1.0})
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


SPARSE = ("ties", "dare_linear", "dare_ties")
"""Blends that keep only a part of each adapter."""


class Merge(Strict):
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    base: Literal["trained", "original"] = "trained"
    """Of a 4-bit run: the base it was trained on, dequantized, or the original one."""
    max_shard_size: str = Field("5GB", pattern=r"^\d+(\.\d+)?[KMG]B$")
    adapters: list[str] = Field([])
    """Stage folders of the run, or folders of adapters, in order; the newest one of the run when empty."""
    blend: Literal["linear", "ties", "dare_linear", "dare_ties", "cat"] | None = None
    """How several adapters become one first (PEFT's `add_weighted_adapter`); without it they are folded in order."""
    weights: list[float] = Field([])
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
