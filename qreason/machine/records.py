"""What the files of a run folder hold, as far as they are read back: shapes for `read_json` and `read_jsonl`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

MOST = 1e30
Number = Annotated[float, Field(ge=-MOST, le=MOST)]
"""Small enough for sums and shares of it."""
Logged = Annotated[float, Field(allow_inf_nan=True)] | None
"""TRL logs the mean over nothing as NaN."""
Count = Annotated[int, Field(ge=0, le=2**53)]


class Measured(TypedDict):
    mean: Number
    low: Number
    high: Number
    p: NotRequired[Number]


class Unmeasured(TypedDict):
    mean: None


Interval = Measured | Unmeasured


class Mean(TypedDict):
    mean: Number | None


# --- manifest.json ---------------------------------------------------------------------------------


class Done(TypedDict):
    """A finished step."""

    step: Count
    stage: str
    folder: str
    seconds: Number


class Base(TypedDict):
    id: str
    fingerprint: str


class Memory(TypedDict):
    """Bytes of GPU memory by the number of a step."""

    planned_bytes: NotRequired[dict[str, Count]]
    peak_bytes: NotRequired[dict[str, Count]]


class Manifest(TypedDict):
    recipe: str
    steps: list[Done]
    data: dict[str, str]
    base: NotRequired[Base]
    versions: NotRequired[dict[str, str]]
    hardware: NotRequired[dict[str, Any]]
    memory: NotRequired[Memory]
    fit: NotRequired[list[str]]
    command: NotRequired[str]


# --- evaluations -----------------------------------------------------------------------------------


class Tested(TypedDict):
    """A row whose reasoning was tested by intervention."""

    own: bool | None
    direct: bool | None
    conclusion_only: bool | None
    foreign: bool | None
    foreign_followed: bool | None
    filler: bool | None
    early: Annotated[list[bool | None], Field(min_length=1)]
    gain_nats: Annotated[list[Number], Field(min_length=1)]
    reference_nats: NotRequired[Number | None]


class Untested(TypedDict):
    why: str


class Method(TypedDict):
    value: Number
    tokens: Number


class Row(TypedDict):
    """A line of evaluation.jsonl; what is not required, earlier versions lack."""

    id: str | int
    prompt: str
    reply: str
    reference: str
    parts: dict[str, Number | None]
    total: Number | None
    split: str | None
    accurate: bool | None
    pass_at_1: Number | None
    well_formed: bool
    words: Number
    finished: bool
    answer_anywhere: NotRequired[bool | None]
    consistent: NotRequired[bool | None]
    reasoning: NotRequired[Tested | Untested | None]
    scaling: NotRequired[dict[str, Method] | None]


class Counted(TypedDict):
    """How many rows evaluation.json is about."""

    rows: Count


class Figures(TypedDict):
    """What lineage draws of evaluation.json."""

    accuracy: Mean
    pass_at_1: Mean
    reward: Mean


class Marked(TypedDict):
    """What an export needs of evaluation.jsonl."""

    id: str | int
    accurate: bool | None


class Kept(TypedDict):
    """A line of evaluation.part: a batch of an evaluation that is not finished."""

    sum: str
    key: str
    most: Annotated[int, Field(ge=1)]
    seconds: Number
    random: Annotated[str, Field(pattern="^([0-9a-f]{2})+$")] | None
    made: list[Any]


class File(TypedDict):
    """A finished file of an export."""

    file: str
    sha256: str
    bytes: Count


class Verified(TypedDict):
    """A check of an export."""

    file: str
    name: str
    passed: bool
    figures: dict[str, Any]
    bound: str


class Exported(TypedDict):
    """What an export needs of export.part or export.json to go on with its files, and what a card says of it."""

    made_of: dict[str, str]
    files: dict[str, File]
    accuracy: dict[str, Number]
    checks: list[Verified]
    verified: NotRequired[bool]
    rows: NotRequired[Count]
    recommended: NotRequired[str | None]


class Log(TypedDict):
    """A line of metrics.jsonl of a GRPO step."""

    step: Count
    reward: NotRequired[Logged]


# --- other files -----------------------------------------------------------------------------------


class Sampled(TypedDict):
    replies: Count
    kept: Count
    plain: Count
    completion_tokens: Count


class Draw(TypedDict):
    """A line of draws.jsonl."""

    id: str
    number: Count
    prompt: str
    reply: str
    parts: dict[str, Number | None]
    total: Number | None
    finished: bool
    prompt_tokens: Count
    seconds: Number


class PassRate(TypedDict):
    """A line of pass_rates.jsonl."""

    id: str
    pass_rate: Annotated[float, Field(ge=0, le=1)] | None


class Compared(TypedDict):
    accuracy: Mean


class Fold(TypedDict):
    kl: Number
    right: Count | None


class Merged(TypedDict):
    """What a card says of merge.json."""

    dtype: str
    base: Literal["trained", "original"]
    bases: dict[str, Fold]
    rows: Count
    right: Count | None


class Origin(TypedDict):
    """What a merge was made of."""

    base: str
    adapters: list[str]


class Told(TypedDict):
    """What a card and a resumed step read of judge.json."""

    told: str
    dropped: NotRequired[bool]


class Worth(TypedDict):
    own: Interval | None
    direct: Interval | None
    conclusion_only: Interval | None
    foreign: Interval | None
    filler: Interval | None
    consistent: Interval | None
    worth: Interval | None
    worth_of_steps: Interval | None
    gain_nats: Interval | None
    why: NotRequired[dict[str, str]]


class Pass(TypedDict):
    after: str
    accuracy: Interval
    pass_at_1: Interval
    format: Interval
    reward: Interval
    reasoning: NotRequired[Worth | None]


Gain = TypedDict("Gain", {"from": str, "to": str, "accuracy": Interval, "pass_at_1": Interval})


class Report(TypedDict):
    """What a card says of report.json."""

    rows: Count
    seed: int
    passes: Annotated[list[Pass], Field(min_length=1)]
    gains: list[Gain]


class Adapter(TypedDict):
    """adapter_config.json of a preference model."""

    base_model_name_or_path: str


class Peft(TypedDict):
    """adapter_config.json of any adapter."""

    peft_type: str


class LoraFile(TypedDict):
    """adapter_config.json of a LoRA."""

    bias: str
    lora_alpha: Number
    r: Count
    use_rslora: bool


class Level(TypedDict):
    """The mean output of a preference model."""

    level: Number


class Holder(TypedDict):
    """Who holds the lock of a run folder."""

    process: int
    host: str
    since: str


class Header(TypedDict):
    """What draws were made with, as far as it must be there."""

    sampling: Any


# --- checkpoints of a training stage ---------------------------------------------------------------


class State(TypedDict):
    """trainer_state.json."""

    epoch: Number


class Progress(TypedDict):
    """progress.json."""

    settings: dict[str, Any]
    lengths: dict[Literal["metrics.jsonl", "replies.jsonl", "alarms.jsonl"], Count]
    sums: dict[str, Number]
    loss: list[Logged]
    metrics: dict[str, list[Any]]
    memory: dict[str, Any]
