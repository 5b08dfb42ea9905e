"""The data types that all folders share, and the two interfaces: Reward and Generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import AfterValidator

Messages = list[dict[str, str]]
"""Chat messages, each with `role` and `content`."""


@dataclass(frozen=True)
class Example:
    """One row of data: a prompt, its reference answer, and for SFT the reasoning."""

    id: str
    prompt: str
    reference: str
    accepted: tuple[str, ...] = ()
    """Other wordings of the reference that count as right."""
    reasoning: str | None = None
    category: str | None = None
    split: str | None = None
    tests: str | None = None
    """Python statements that the code of a reply must pass."""
    plain: bool = False
    """Asked without a shipped system prompt, and answered without reasoning and tags."""
    system: str | None = None
    """Its own system prompt, or that of `data.system`, in place of a shipped one."""
    history: tuple[tuple[str, str], ...] = ()
    """(role, content) of the turns before the prompt, as the model reads them."""
    unlearned: tuple[int, ...] = ()
    """Turns of the history, from 0, that SFT reads but does not learn."""
    form: str = ""
    """The format of its row (data/chats.py); empty for qreason's own columns."""
    source: str = ""
    """`file:line` for messages."""

    @property
    def references(self) -> tuple[str, ...]:
        """All accepted wordings, the reference first."""
        return (self.reference, *(text for text in self.accepted if text != self.reference))


@dataclass(frozen=True)
class Pair:
    """Two replies to a prompt, one of them preferred."""

    prompt: str
    chosen: str
    rejected: str
    about: str | None = None
    """The criterion of the preference, where the data name it."""
    source: str = ""
    """`file:line` for messages."""


@dataclass(frozen=True)
class Reply:
    """A generated text without special tokens; `finished` is False when it reached the token limit."""

    text: str
    token_ids: tuple[int, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    finished: bool = True


@dataclass(frozen=True)
class Score:
    """The rewards of a reply and their weighted sum; None where a reward could not be computed."""

    total: float | None
    parts: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch the filters off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_completion_length: int = 256
    max_num_seqs: int = 128
    """Replies that are decoded in parallel."""
    seed: int | None = None


class Reward(Protocol):
    """One number per reply, in order; None where it could not be computed, never 0 for that."""

    def __call__(self, replies: Sequence[Reply], examples: Sequence[Example]) -> list[float | None]: ...


class Generator(Protocol):
    """The only interface between qreason and an inference engine."""

    stops: Set[int]
    """Token ids that end a reply."""

    def generate(
        self,
        prompts: Sequence[Messages],
        *,
        n: int,
        sampling: Sampling,
        fast: bool = False,
        on_progress: Callable[[int], None] = ...,
    ) -> list[list[Reply]]:
        """n replies to each prompt, in order; `on_progress` gets the number of replies that were just finished.

        `fast` computes in the number format of training steps, bfloat16 on CPUs that have it; for rollouts.
        Raises DataError for a prompt that leaves no room for a reply of full length.
        """

    def extend(
        self, beginnings: Sequence[list[int]], *, n: int, sampling: Sampling, stop_at: Set[int]
    ) -> list[list[list[int]]]:
        """n continuations of each row of token ids, up to a stop token or one of `stop_at`, as token ids."""

    def expect(
        self,
        groups: Sequence[Sequence[Messages]],
        values: Mapping[str, float],
        *,
        adapter: Path | None = None,
        fast: bool = False,
    ) -> list[list[float]]:
        """For each chat the expected value of the next word; `values` has the value of each possible word.

        The policy's adapter is off; with `adapter`, that judge adapter is on. Chats of a group have a common prefix.
        `fast` computes as in `generate`. Words of several tokens are left out; raises ModelError if fewer than two
        different values are left.
        """

    def likelihoods(
        self, replies: Sequence[Reply], *, last: Sequence[int] | None = None, fast: bool = False
    ) -> list[float]:
        """The mean log-probability of each reply's tokens, in nats per token; minus infinity for an empty reply.

        With `last`, of so many tokens at the end of each reply. `fast` computes as in `generate`.
        """

    def prompt_ids(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[int]]:
        """The token ids of prompts. Raises DataError for one that leaves no room for a reply of full length."""

    def step_tokens(self, ends: tuple[str, ...]) -> set[int]:
        """The tokens whose text ends with one of `ends`, ignoring spaces."""

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens."""

    def text(self, tokens: Sequence[int]) -> str:
        """Token ids as text, without special tokens."""


def check_address(address: str) -> str:
    if any(character.isspace() for character in address):
        raise ValueError("an address has no spaces or line ends")
    return address


def check_variable(name: str) -> str:
    if not name.isidentifier():
        raise ValueError("the name of the environment variable that holds the key, not the key itself")
    return name


Address = Annotated[str, AfterValidator(check_address)]
"""Of a server, before /chat/completions."""
Variable = Annotated[str, AfterValidator(check_variable)]
"""The name of an environment variable."""
