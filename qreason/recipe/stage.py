"""What the settings of every stage declare: what it reads, writes and needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from qreason.recipe.sections import Data, Draw, Strict, Weighted

NEWEST = "newest"
BASE = "base"
"""The name of the untrained base among stages."""


Processes = Literal["first", "all", "one"]


@dataclass(frozen=True)
class Work:
    """What a stage holds in memory at a time beside the base, for the memory plan; counts are rows."""

    rollouts: tuple[tuple[int, int], ...] = ()
    """(prompts, replies per prompt) that are decoded at a time."""
    judged: tuple[int, int] | None = None
    """(replies that are scored at a time, replies per prompt)."""
    fills_judge: bool = False
    """Whether the judge also gets a full batch of its own."""
    rows: int = 0
    """Rows of a training micro-batch; 0: nothing is trained."""
    text: Literal["example", "reply", "pair"] = "example"
    """The content of a training row: an SFT example, a prompt with a reply, one side of a pair."""
    most_tokens: int | None = None
    """Longer rows are truncated."""
    fills_rows: bool = False
    """Whether every row is filled up to the limit (packing)."""
    logits: Literal["chunked", "whole", "completion", "none"] = "none"
    """The logits that the loss holds: a chunk, those of all tokens, those of the completions."""
    reference: bool = False
    """Whether a copy of the adapter is kept as the reference."""
    interrupted: bool = False
    """Whether replies are made between micro-batches, with gradients in memory."""


class Stage(Strict):
    """The settings of a stage. Subclasses declare what the stage reads, writes and needs."""

    model_config = ConfigDict(use_attribute_docstrings=True)  # the help of its options

    leaves_adapter: ClassVar[bool] = False
    """Whether it writes an adapter that later stages may start from."""
    processes: ClassVar[Processes] = "first"
    """Of a launch of several: the first alone works, all do, or there must be only one."""
    draws: ClassVar[str] = ""
    """Why it needs a temperature above 0; empty where it does not."""
    follows: ClassVar[tuple[str, ...]] = ()
    """The stages that may directly precede it, evaluations aside; empty for any."""

    def reads(self) -> dict[str, str]:
        """Data key -> its content, for the data that the stage reads with these settings."""
        return {}

    @property
    def plain_backend(self) -> str | None:
        """Its name where it trains on the plain backend only, such as `a preference step`."""
        return None

    @property
    def reads_sampled(self) -> bool:
        """Whether it reads the draws of the newest sample step."""
        return getattr(self, "data", None) == "sampled"

    @property
    def origin(self) -> str | None:
        """Its source outside the run: a teacher, a repository."""
        return None

    @property
    def own_rewards(self) -> dict[str, Weighted] | None:
        """Rewards in place of the recipe's."""
        return None

    def rankings(self) -> dict[str, str]:
        """Name of what ranks or filters replies -> the setting that names it, such as `best_by`."""
        return {}

    def work(self, sampling: Draw, data: Data) -> Work | None:
        """What it needs in memory beside the base; None: nothing that is planned."""
        return None


class Start(Stage):
    """A stage that starts from a checkpoint of the run."""

    start: str = Field(NEWEST, alias="from")
    """`newest` adapter, `base` (no adapter), or the folder of an earlier stage, such as `01-sft`."""
