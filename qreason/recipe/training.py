"""The settings of the stages that train, as they stand in a step of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from qreason.recipe.sections import Data, Draw, Rewards, Strict, Weighted
from qreason.recipe.stage import Processes, Start, Work
from qreason.types import Address, Variable


def plain_rows(share: float) -> dict[str, str]:
    """The data that a stage reads for a share of rows without reasoning."""
    return {"plain": "rows without reasoning (plain_share)"} if share else {}


WHOLE = ("max_length", "steps_per_generation", "generation_batch_size")
"""Fields of TRL's configs that the plan reads."""
ELSEWHERE = {
    **{key: f"set sampling.{key}, by which replies are drawn" for key in Draw.model_fields},
    "reward_weights": "give the weights in rewards",
    "eval_strategy": "a run measures in its evaluate steps; leave it out",
    "load_best_model_at_end": "a run measures in its evaluate steps; leave it out",
    "use_vllm": "replies are made by qreason; leave it out",
}
"""Fields of TRL's configs that a run decides itself: set to anything else, TRL would compute with other values."""


class Training(Start):
    """What the training stages share, in TRL's terms; `trl` passes any further field of TRL's config through."""

    not_trls: ClassVar[frozenset[str]] = frozenset({"rows", "trl", "start", "save_steps", "keep"})
    """Settings that are not fields of TRL's config."""

    per_device_train_batch_size: int = Field(8, gt=0)
    """Rows of a micro-batch; of a grpo step, replies."""
    gradient_accumulation_steps: int = Field(1, gt=0)
    """Micro-batches per optimizer step."""
    num_train_epochs: float = Field(1.0, gt=0, le=1e6)
    """Times that all rows are read, where `max_steps` is not given."""
    max_steps: int = -1
    """Optimizer steps; -1: as many as `num_train_epochs` takes."""
    learning_rate: float = Field(2e-4, gt=0)
    """The highest one of the schedule."""
    lr_scheduler_type: str = "cosine"
    """How the learning rate falls."""
    warmup_steps: float = Field(0.03, ge=0)
    """A number of steps, or, below 1, a share of all steps."""
    weight_decay: float = Field(0.0, ge=0)
    """Of the adapter's weights, per step."""
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=True)
    """Longer gradients are cut to this norm."""
    optim: str = "adamw_torch"
    """The optimizer, by transformers' name."""
    gradient_checkpointing: bool = False
    """Compute activations twice in place of storing them: less memory, more time."""
    logging_steps: int = Field(5, gt=0)
    """Steps between two rows of metrics.jsonl."""
    rows: int | None = Field(None, gt=0)
    """Use only the first rows."""
    save_steps: int | None = Field(None, gt=0)
    """Steps between two checkpoints, from which a stage that is cut off continues; about five minutes if not given."""
    keep: int = Field(2, gt=0)
    """Checkpoints that stay while the stage is trained; a finished stage has none."""
    trl: dict[str, Any] = Field({})
    """Any further field of TRL's config, by its name."""

    @field_validator("max_steps")
    @classmethod
    def trains(cls, steps: int) -> int:
        if steps == 0 or steps < -1:
            raise ValueError(
                f"{steps} trains nothing, and TRL would take it for no limit; leave the step out to train nothing, or "
                "leave max_steps out to train num_train_epochs"
            )
        return steps

    @field_validator("trl")
    @classmethod
    def publishes_nothing(cls, trl: dict[str, Any]) -> dict[str, Any]:
        if trl.get("push_to_hub"):
            raise ValueError("push_to_hub: a run publishes nothing by itself; use `qreason push` when it is done")
        if isinstance(steps := trl.get("max_steps"), int):
            cls.trains(steps)
        return trl

    @field_validator("trl")
    @classmethod
    def changes_nothing_that_is_decided_elsewhere(cls, trl: dict[str, Any]) -> dict[str, Any]:
        for key, value in trl.items():
            if key in ELSEWHERE and value not in (None, False, "no"):
                raise ValueError(f"{key}: {ELSEWHERE[key]}")
            if key in WHOLE and (value is not None and not (type(value) is int and value > 0)):
                raise ValueError(f"{key}: {value!r} is no whole number above 0")
            if (field := cls.model_fields.get(key)) is not None:
                try:
                    TypeAdapter(Annotated[field.annotation, field]).validate_python(value)  # type: ignore[arg-type]
                except ValidationError as error:
                    raise ValueError(f"{key}: {value!r}: {error.errors()[0]['msg']}") from None
        return trl

    def trl_arguments(self) -> dict[str, Any]:
        """The settings that are fields of TRL's config."""
        return self.model_dump(exclude=set(self.not_trls))


class Sft(Training):
    """Supervised fine-tuning on data.sft, or on what was sampled."""

    leaves_adapter: ClassVar[bool] = True
    processes: ClassVar[Processes] = "all"
    not_trls: ClassVar[frozenset[str]] = Training.not_trls | {"data", "turns"}

    data: Literal["sft", "sampled"] = "sft"
    """`data.sft`, or what the newest sample step kept."""
    turns: Literal["all", "last"] = "all"
    """The assistant's turns of a chat that the loss covers: all, or only the last."""
    packing: bool = False
    """Fill every row up to `max_length` with several examples."""

    def reads(self) -> dict[str, str]:
        return {} if self.reads_sampled else {"sft": "worked examples"}

    def work(self, sampling: Draw, data: Data) -> Work:
        return Work(
            rows=self.per_device_train_batch_size,
            text="reply" if self.reads_sampled else "example",
            most_tokens=self.trl.get("max_length"),
            fills_rows=self.packing,
            logits="whole" if self.trl.get("loss_type") == "nll" else "chunked",
        )


PREFLIGHT_PROMPTS = 8
"""Prompts that are sampled before GRPO."""


RIGHT = ("correctness", "math", "code")
"""Rewards that are above 0 for right replies alone."""


class Grpo(Training):
    """Group relative policy optimization on data.prompts, against rewards."""

    leaves_adapter: ClassVar[bool] = True
    processes: ClassVar[Processes] = "all"
    draws: ClassVar[str] = "grpo compares different replies"
    not_trls: ClassVar[frozenset[str]] = Training.not_trls.union(
        (
            *("rewards", "plain_share", "pods", "preflight", "difficulty_filtering"),
            *("stop_on_reward_hacking", "stop_on_unjudged"),
        )
    )

    rewards: Rewards | None = None
    """Rewards of this step; those of the recipe where not given."""
    plain_share: float = Field(0.0, ge=0, lt=1)
    """The share of its prompts that are rows of data.plain, asked without the system prompt."""
    num_generations: int = Field(8, ge=2)
    """Replies per prompt: the group."""
    pods: int | None = Field(None, ge=2)
    """Train on so many of them, those whose rewards vary most (PODS, arXiv 2504.13818); on all where not given."""
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
    """One ratio per token, or per sequence (GSPO)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the standard deviation of the group, of the batch, or nothing (Dr. GRPO)."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """How the loss is averaged over tokens, or another loss; docs/grpo.md has the formulas."""
    mask_truncated_completions: bool = False
    """Leave replies that did not end out of the loss."""
    preflight: bool = True
    """Before training, score the references and a few completions, and stop where GRPO could not learn."""
    difficulty_filtering: int | None = Field(None, ge=2)
    """Before training, draw so many replies per prompt, and leave out prompts whose replies are all right or all wrong
    (offline difficulty filtering by pass rate, as in Kimi k1.5, arXiv 2501.12599, section 2.1)."""
    stop_on_reward_hacking: bool = False
    """Stop, without an adapter, at a sign of reward hacking; otherwise it is only reported."""
    stop_on_unjudged: bool = True
    """Stop, without an adapter, when most replies of three steps in a row could not be judged."""

    @property
    def plain_backend(self) -> str | None:
        return "a grpo step with pods" if self.pods else None

    @model_validator(mode="after")
    def fewer_than_the_group(self) -> Grpo:
        if self.pods and self.pods >= self.num_generations:
            raise ValueError(
                f"pods: {self.pods} is not less than num_generations ({self.num_generations}); raise num_generations, "
                "or leave pods out to train on all replies"
            )
        if self.pods and self.trl.get("multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
            raise ValueError(
                "pods chooses by the total of a reply's rewards; leave trl.multi_objective_aggregation out, or pods"
            )
        return self

    @model_validator(mode="after")
    def whole_groups(self) -> Grpo:
        if self.per_device_train_batch_size * self.gradient_accumulation_steps % self.num_generations:
            raise ValueError(
                "per_device_train_batch_size x gradient_accumulation_steps must be a multiple of "
                f"num_generations ({self.num_generations})"
            )
        return self

    def reads(self) -> dict[str, str]:
        return {"prompts": "prompts"} | plain_rows(self.plain_share)

    @property
    def own_rewards(self) -> dict[str, Weighted] | None:
        return self.rewards

    @property
    def replies_at_a_time(self) -> int:
        """TRL's generation_batch_size."""
        rounds = self.trl.get("steps_per_generation") or self.gradient_accumulation_steps
        return int(self.trl.get("generation_batch_size") or self.per_device_train_batch_size * rounds)

    def replies_of_launch(self, processes: int) -> int:
        """Replies that all processes of a launch make at a time; a `generation_batch_size` is over all of them."""
        return self.replies_at_a_time * (1 if self.trl.get("generation_batch_size") else processes)

    @property
    def prompts_at_a_time(self) -> int:
        """Prompts per call of the generator: those of a generation batch, or of the preflight."""
        return max(self.replies_at_a_time // self.num_generations, PREFLIGHT_PROMPTS if self.preflight else 1)

    def work(self, sampling: Draw, data: Data) -> Work:
        micro, prompts, n = self.per_device_train_batch_size, self.prompts_at_a_time, self.num_generations
        return Work(
            rollouts=((prompts, n), (prompts, self.difficulty_filtering or n)),
            judged=(prompts * n, n),
            fills_judge=self.preflight and data.labels is not None,
            rows=micro,
            text="reply",
            logits="completion",
            reference=self.beta > 0,
            interrupted=self.replies_at_a_time < micro * self.gradient_accumulation_steps,
        )


class Preference(Training):
    """A reward model from ranked pairs: an adapter with a scalar head, for the `preference` reward of later steps."""

    processes: ClassVar[Processes] = "one"
    not_trls: ClassVar[frozenset[str]] = Training.not_trls | {"data", "about", "heldout_share"}

    data: Literal["pairs", "sampled"] = "pairs"
    """`data.pairs`, or the best against the worst draw, by total, for each prompt of the newest sample step."""
    about: str | None = None
    """Use only the pairs with this value in their `about` column."""
    heldout_share: float = Field(0.1, gt=0, lt=1)
    """The share of the prompts whose pairs are held out."""

    @property
    def plain_backend(self) -> str | None:
        return "a preference step"

    def reads(self) -> dict[str, str]:
        return {} if self.reads_sampled else {"pairs": "ranked pairs"}

    def work(self, sampling: Draw, data: Data) -> Work:
        rows = 2 * self.per_device_train_batch_size  # both sides of a pair
        return Work(rows=rows, text="reply" if self.reads_sampled else "pair")


class Teacher(Strict):
    """The model that replies in place of the run's own: loaded locally, or on an OpenAI-compatible server."""

    model: str
    """A Hub id, a model's folder, or a run folder (its newest adapter); with an endpoint, the model's name there."""
    quantization: Literal["none", "nf4"] = "none"
    """Of a local model; a run folder has its own setting."""
    endpoint: Address | None = None
    """The server's address without /chat/completions."""
    api_key: Variable = "OPENAI_API_KEY"
    """The environment variable that holds the key; it may be unset."""
    timeout: float = Field(120.0, gt=0)
    """Seconds per reply at most."""
    retries: int = Field(5, ge=0)
    """Further attempts after a timeout, a 429 or a 5xx; the wait doubles each time."""
    concurrency: int = Field(8, ge=1)
    """Requests in flight."""

    @model_validator(mode="after")
    def here_or_there(self) -> Teacher:
        given = self.model_dump(exclude_defaults=True)  # a run folder's recipe has the defaults too
        elsewhere = sorted(given.keys() - {"model", "quantization", "endpoint"})
        if self.endpoint is None and elsewhere:
            raise ValueError(f"{elsewhere[0]}: only for a server; give its endpoint, or leave it out")
        if self.endpoint is not None and self.quantization != "none":
            raise ValueError("quantization: only for a model that is loaded here, not for one behind an endpoint")
        return self


class Distill(Training):
    """On-policy distillation: the student learns the teacher's distribution on its own replies to data.prompts."""

    leaves_adapter: ClassVar[bool] = True
    processes: ClassVar[Processes] = "one"
    draws: ClassVar[str] = "distill draws replies"
    not_trls: ClassVar[frozenset[str]] = Training.not_trls | {"teacher"}

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

    def reads(self) -> dict[str, str]:
        return {"prompts": "prompts"}

    @property
    def origin(self) -> str | None:
        return self.teacher.model
