"""What every stage's settings say of themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from qreason.recipe.sections import Data, Draw, Strict, Weighted

NEWEST = "newest"
BASE = "base"
"""What the untrained base is called where stages are named."""


@dataclass(frozen=True)
class Work:
    """What a stage holds in memory at a time beyond the base, for the memory plan; counts are of rows."""

    rollouts: tuple[tuple[int, int], ...] = ()
    """(prompts, replies to each) that are decoded side by side."""
    judged: tuple[int, int] | None = None
    """(replies that are scored together, replies per prompt)."""
    fills_judge: bool = False
    """Whether the judge also sees a full batch of its own."""
    rows: int = 0
    """Of a micro-batch that is trained on; 0: nothing is trained."""
    text: Literal["example", "reply", "pair"] = "example"
    """What a trained row is: an SFT example, a prompt with a reply, one side of a pair."""
    most_tokens: int | None = None
    """Longer rows are cut."""
    fills_rows: bool = False
    """Whether every row is filled up to the limit (packing)."""
    logits: Literal["chunked", "whole", "completion", "none"] = "none"
    """What logits the loss holds: a chunk, those of all tokens, those of the completions."""
    reference: bool = False
    """Whether a copy of the adapter is kept as the reference."""
    interrupted: bool = False
    """Whether replies are made between micro-batches, with gradients in memory."""


class Stage(Strict):
    """The settings of a stage. Subclasses say what the stage reads, makes and needs."""

    leaves_adapter: ClassVar[bool] = False
    """Whether later stages may start from the adapter it writes."""
    draws: ClassVar[str] = ""
    """Why it cannot do with temperature 0; empty where it can."""
    follows: ClassVar[tuple[str, ...]] = ()
    """The stages of which one must come right before it, evaluations aside; empty for any."""

    def reads(self) -> dict[str, str]:
        """Data key -> what it holds, for the data that the stage reads with these settings."""
        return {}

    @property
    def reads_sampled(self) -> bool:
        """Whether it reads what the newest sample step drew."""
        return False

    @property
    def origin(self) -> str | None:
        """What it takes from outside the run: a teacher, a repository."""
        return None

    @property
    def own_rewards(self) -> dict[str, Weighted] | None:
        """Rewards in place of the recipe's."""
        return None

    def rankings(self) -> dict[str, str]:
        """Name of what ranks or sifts replies -> the setting that names it, as `best_by`."""
        return {}

    def work(self, sampling: Draw, data: Data) -> Work | None:
        """What it needs in memory beyond the base; None: nothing that is planned."""
        return None


class Start(Stage):
    """A stage that starts from a checkpoint of the run."""

    start: str = Field(NEWEST, alias="from")
    """`newest` adapter, `base` (no adapter), or the folder of an earlier stage, as `01-sft`."""
