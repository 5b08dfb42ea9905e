"""What a report reads back of a run folder beside the shapes of machine/records.py, and of report.json itself."""

from __future__ import annotations

from typing import Annotated, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from qreason.machine.records import Count, Gain, Interval, Measured, Number, Told, Worth


class Raised(TypedDict):
    """A line of alarms.jsonl."""

    step: Count
    text: str
    replies: list[str]


class Live(TypedDict):
    """Where a run is: a task, the steps of it, the seconds that are left of it, and when this was so."""

    phase: str
    done: Number
    total: Number | None
    left: Number | None
    at: Number


class Rollout(TypedDict):
    """A line of replies.jsonl of a GRPO step."""

    step: Count
    id: str | int
    prompt: str
    reply: str
    parts: dict[str, Number | None]
    total: Number | None


class Bin(TypedDict):
    """The pairs whose verdicts lie in a fifth of the range."""

    pairs: Count
    verdict: Number | None
    right: Number | None


class Injected(TypedDict):
    attempts: Count
    successes: Count


class Calibrated(Told):
    """What a page says of judge.json."""

    pairs: NotRequired[Count]
    unanswered: NotRequired[Count]
    auc: NotRequired[Number | None]
    rank_correlation: NotRequired[Number | None]
    position_bias: NotRequired[Number | None]
    verbosity_bias: NotRequired[Number | None]
    self_consistency: NotRequired[Number | None]
    injections: NotRequired[Injected]
    judgements_per_second: NotRequired[Number | None]
    calibration_curve: NotRequired[list[Bin]]


class Scaled(Measured):
    tokens: Number
    gain: Interval


class ShownWorth(Worth):
    rows: Count


class ShownPass(TypedDict):
    after: str
    unjudged: Count
    accuracy: Interval
    answer_anywhere: Interval
    pass_at_1: Interval
    format: Interval
    reward: Interval
    reply_words: Interval
    reference_nats: NotRequired[Interval]
    reasoning: ShownWorth
    scaling: dict[str, Scaled]


class ShownGain(Gain):
    reward: Interval
    reference_nats: NotRequired[Interval]


class Drawn(TypedDict):
    """The rewards of a GRPO step over its steps."""

    folder: str
    reward: list[Number | None]
    parts: dict[str, list[Number | None]]


class Shown(TypedDict):
    """What the table in the terminal shows of report.json."""

    rows: Count
    seed: int
    passes: Annotated[list[ShownPass], Field(min_length=1)]
    gains: list[ShownGain]
    curves: list[Drawn]
