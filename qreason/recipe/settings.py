"""The settings of the stages that do not train."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from qreason.errors import nearest
from qreason.recipe.sections import Data, Draw, Strict, check_settings
from qreason.recipe.stage import Processes, Stage, Start, Work
from qreason.recipe.training import Teacher, plain_rows


class Beam(Strict):
    """Step-wise beam search: replies grow step by step, and the best partial replies are kept."""

    width: int = Field(4, ge=1)
    """Partial replies kept."""
    expand: int = Field(4, ge=1)
    """Continuations of each partial reply by one step."""
    by: str = "likelihood"
    """What ranks them: `likelihood`, `total`, or one of the recipe's rewards on the partial reply."""


class Sample(Start):
    """Rejection sampling: draw replies to data.prompts and keep the good ones as SFT data."""

    processes: ClassVar[Processes] = "all"
    teacher: Teacher | None = None
    """The model that replies in place of the run's own."""
    n: int = Field(4, ge=1)
    """Replies per prompt."""
    rows: int | None = Field(None, gt=0)
    """Use only the first prompts."""
    keep: dict[str, float] = Field({"correctness": 1.0})
    """The minimum score of a kept reply: rewards of the recipe by name, or `total`."""
    per_prompt: int | None = Field(None, ge=1)
    """Replies kept per prompt, at most."""
    least_words: int = Field(1, ge=0)
    """Words of the whole reply at least."""
    most_words: int | None = Field(None, ge=1)
    """Words of the whole reply at most."""
    language: str | None = "en"
    """The language a reply must be in; null for any."""
    language_share: float = Field(0.9, ge=0, le=1)
    """The minimum share of words in that language."""
    plain_share: float = Field(0.0, ge=0, lt=1)
    """The share of rows from data.plain in the written data."""

    @model_validator(mode="after")
    def known_language(self) -> Sample:
        if self.language is not None:
            check_settings("language_consistency", {"language": self.language})
        if self.most_words is not None and self.most_words < self.least_words:
            raise ValueError(f"most_words ({self.most_words}) is below least_words ({self.least_words})")
        return self

    def reads(self) -> dict[str, str]:
        return {"prompts": "prompts"} | plain_rows(self.plain_share)

    @property
    def origin(self) -> str | None:
        return self.teacher.model if self.teacher else None

    def rankings(self) -> dict[str, str]:
        return dict.fromkeys(self.keep, "keep")

    def work(self, sampling: Draw, data: Data) -> Work:
        prompts = max(1, sampling.max_num_seqs // self.n)
        own = () if self.teacher else ((prompts, self.n),)
        return Work(rollouts=own, judged=(self.n, self.n), fills_judge=True)


class Evaluate(Stage):
    """Measure the newest adapter on data.heldout."""

    rows: int | None = Field(None, gt=0)
    """Use only the first held-out rows."""
    samples: int = Field(4, ge=1)
    """Replies per row for pass@1, in addition to the greedy one."""
    chain_of_thought: bool = True
    """Ask for reasoning before the answer; otherwise for the answer alone."""
    shots: int = Field(0, ge=0)
    """Rows of data.sft that are shown as examples before each question: for a base that was not taught the format."""
    reasoning: int | None = Field(None, ge=0)
    """Held-out rows whose reasoning is tested by intervention: all of them if not given, none with 0."""
    right_by: Literal["correctness", "math"] = "correctness"
    """The rule that decides whether an answer is right."""
    pass_at: tuple[PositiveInt, ...] = ()
    """The k of pass@k: is one of k samples right?"""
    cons_at: tuple[PositiveInt, ...] = ()
    """The k of cons@k: is the majority answer of k samples right?"""
    best_of: tuple[PositiveInt, ...] = ()
    """The n of best-of-n: is the sample right that `best_by` ranks highest among n?"""
    best_by: str = "likelihood"
    """`likelihood` (mean log-probability per token), `total`, or one of the recipe's rewards."""
    beam: Beam | None = None
    """Also measure step-wise beam search."""

    @model_validator(mode="after")
    def enough_samples(self) -> Evaluate:
        for key in ("pass_at", "cons_at", "best_of"):
            if (most := max(getattr(self, key), default=0)) > self.samples:
                raise ValueError(
                    f"{key}: {most} is more than the {self.samples} samples per row; raise samples to {most}"
                )
        return self

    def reads(self) -> dict[str, str]:
        return {"heldout": "held-out rows"} | ({"sft": "examples for shots"} if self.shots else {})

    def rankings(self) -> dict[str, str]:
        return {self.best_by: "best_by"} | ({self.beam.by: "beam.by"} if self.beam else {})

    def work(self, sampling: Draw, data: Data) -> Work:
        rows = self.rows or sampling.max_num_seqs
        return Work(rollouts=((rows, 1), (rows, self.samples)), judged=(rows, 1))


SPARSE = ("ties", "dare_linear", "dare_ties")
"""Blends that keep a share of each adapter's weights."""


class Merge(Stage):
    """One plain 16-bit model of the base and its adapters."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """The number format of the stored weights: float16, bfloat16 or float32."""
    base: Literal["trained", "original"] = "trained"
    """Of a 4-bit run: the base it was trained on, dequantized, or the original one."""
    max_shard_size: str = Field("5GB", pattern=r"^\d+(\.\d+)?[KMG]B$")
    """The largest size of a weight file."""
    adapters: list[str] = Field([])
    """Stage folders of the run, or folders of adapters, in order; the newest one of the run when empty."""
    blend: Literal["linear", "ties", "dare_linear", "dare_ties", "cat"] | None = None
    """How several adapters become one first, by PEFT's `add_weighted_adapter`: linear, ties, dare_linear, dare_ties or
    cat; without it they are folded in order."""
    weights: list[float] = Field([])
    """Of the adapters in a blend; equal where not given."""
    density: float | None = Field(None, gt=0, le=1)
    """Share of each adapter that TIES and DARE keep."""
    rows: int = Field(32, gt=0)
    """Held-out rows for comparing the trained and the merged model."""

    @model_validator(mode="after")
    def blends_several(self) -> Merge:
        if self.blend and len(self.adapters) < 2:
            raise ValueError("blend: it takes two or more adapters; name them in adapters")
        if self.weights and not self.blend:
            raise ValueError("weights: adapters have weights only in a blend; set blend, for example to linear")
        if self.weights and len(self.weights) != len(self.adapters):
            raise ValueError(f"weights: {len(self.weights)} for {len(self.adapters)} adapters; give one for each")
        if (self.density is not None) != (self.blend in SPARSE):
            raise ValueError(f"density: the share of weights to keep, only for a blend by {', '.join(SPARSE)}")
        return self


class Pull(Stage):
    """An adapter made elsewhere that later steps start from."""

    leaves_adapter: ClassVar[bool] = True

    repo: str = Field(pattern=r"^([^/]+/[^/]+|[./~].*|[A-Za-z]:.*)$")
    """The repository on the Hub, USER/NAME, or a folder that PEFT wrote."""
    revision: str | None = None
    """A branch, tag or commit of the repository; the newest where not given."""
    other_base: bool = False
    """Accept an adapter that names another base: the same model under another name."""

    @property
    def origin(self) -> str | None:
        return self.repo


GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k")


class Export(Stage):
    """The merged model as GGUF files, and the adapter as one."""

    follows: ClassVar[tuple[str, ...]] = ("merge", "export")

    gguf: list[str] = Field(["f16", "q8_0", "q4_k_m"], min_length=1)
    """The types of the files."""
    ollama: bool = False
    """Also write a Modelfile for the recommended type, and create the model where Ollama is installed."""
    verify: bool = True
    """Check every file in llama.cpp before it gets its name."""
    rows: int = Field(100, gt=0)
    """Held-out rows for measuring the accuracy of each file."""

    @field_validator("gguf")
    @classmethod
    def known_types(cls, kinds: list[str]) -> list[str]:
        kinds = [kind.lower() for kind in kinds]
        for kind in kinds:
            if kind not in GGUF_TYPES:
                raise ValueError(f"unknown type '{kind}'{nearest(kind, GGUF_TYPES)}; there are {', '.join(GGUF_TYPES)}")
        return list(dict.fromkeys(kinds))

    def reads(self) -> dict[str, str]:
        return {"heldout": "held-out rows"}
