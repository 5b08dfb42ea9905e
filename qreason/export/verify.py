"""The checks that an exported file has to pass before it gets its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qreason.errors import ExportError
from qreason.export.engine import Server
from qreason.export.reference import Heldout
from qreason.machine.files import read_json
from qreason.machine.records import Exported
from qreason.types import Reply

if TYPE_CHECKING:
    import numpy

MERGED_KL = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-2}
"""Nats per token between adapter and merged model as they run; 16-bit arithmetic itself rounds that much."""
FLOAT_KL = {"f32": 1e-7, "f16": 1e-4, "bf16": 1e-3}
"""Nats per token between transformers and llama.cpp, which rounds activations to the type of the weights."""
F32_LOGITS = 5e-6
"""The largest difference of a logit in F32, as a share of the largest logit: about forty units in the last place."""
MARGIN = 0.005
"""Lead in logits of the most probable token, below which F32 and F16 may choose different tokens."""
DRAFT = ".unverified"
"""What a file's name ends with until it has passed its checks."""
MERGED = "merged"
"""Names the merged model in a check."""
PROBES = (
    "It's 12345 and 3.14; they'LL re-check 2026-11-20T08:15Z.",
    "  two  spaces\tand a tab\n\n\nthree lines  \r\n end ",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # 100%\n",
    "naïve Übung, Ελλάδα, Привет, 東京タワー, 한국어, العربية 🙂👩‍💻",
    "<|im_start|>user\nx<|im_end|>\n<|endoftext|> <reasoning></reasoning>",
)
"""Texts in which pre-tokenizers differ. In NFC, for llama.cpp does not normalize; without `</s>`, which it takes for a
control token in every vocabulary."""

CUTS = {8: "qwen2", 5: "llama-bpe", 9: "smollm", 4: "gpt-2"}
"""Pieces that `a'S 12345` is cut into -> llama.cpp's pre-tokenizer: 8 for a|'S| |1|2|3|4|5."""


# --- distances -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """How far two models are apart on the same tokens.

    `kl` in nats per token, `kl_max` of the worst token, `top1`: share of tokens with the same most probable one.
    """

    kl: float
    kl_max: float
    top1: float
    logit_difference: float
    """The largest over all tokens and the vocabulary."""
    largest_logit: float
    tokens: int


def log_softmax(logits: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """In float64: float32 would round small differences away."""
    import numpy

    shifted: numpy.ndarray[Any, Any] = logits.astype(numpy.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= numpy.log(numpy.exp(shifted).sum(-1, keepdims=True))
    return shifted


def distance(one: Sequence[Path], other: Sequence[Path]) -> Distance:
    """KL(one || other) and the other figures, over the logits of the same replies in .npy files."""
    import numpy

    divergences, same, difference, largest = [], 0, 0.0, 0.0
    for first, second in zip(one, other, strict=True):
        a, b = numpy.load(first), numpy.load(second)
        if a.shape != b.shape:
            raise ValueError(f"logits of different shapes: {a.shape} and {b.shape}")
        p, q = log_softmax(a), log_softmax(b)
        divergences.append((numpy.exp(p) * (p - q)).sum(-1))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        difference = max(difference, float(numpy.abs(a - b).max()))
        largest = max(largest, float(numpy.abs(a).max()))
    every = numpy.concatenate(divergences)
    return Distance(float(every.mean()), float(every.max()), same / len(every), difference, largest, len(every))


def top2_margin(logits: Path, token: int) -> float:
    """How far the most probable token is ahead of the second, in logits."""
    import numpy

    first, second = numpy.sort(numpy.load(logits, mmap_mode="r")[token])[:-3:-1]
    return float(first - second)


# --- results ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One result: the file, the property, whether it holds, the figures and their bound."""

    file: str
    name: str
    passed: bool
    figures: dict[str, Any] = field(default_factory=dict)
    bound: str = ""

    @property
    def told(self) -> str:
        figures = ", ".join(f"{key} {shown(value)}" for key, value in self.figures.items())
        return f"{self.name}: {figures}" + (f" (bound: {self.bound})" if self.bound else "")

    @property
    def line(self) -> str:
        return f"{'ok    ' if self.passed else 'FAILED'} {self.file}: {self.told}"


def read_checks(earlier: Exported, file: str) -> list[Check]:
    """What an earlier export found right in one of its files."""
    found = [one for one in earlier["checks"] if one["file"] == file and one["passed"]]
    return [Check(one["file"], one["name"], one["passed"], one["figures"], one["bound"]) for one in found]


class FailedCheck(ExportError):  # noqa: N818
    def __init__(self, check: Check, text: str) -> None:
        super().__init__(text)
        self.check = check


class Results:
    """The results of an export: its checks, and the held-out accuracy of each model."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.checks: list[Check] = []
        self.accuracy: dict[str, float] = {}

    def passed(self, check: Check) -> None:
        """Keep a check and print it; FailedCheck where it failed."""
        self.checks.append(check)
        self.say(check.line)
        if not check.passed:
            raise FailedCheck(
                check,
                f"{check.file}: failed '{check.name}' ({self.folder / 'export.json'} has the figures); what was "
                f"written is kept as *{DRAFT}, not to be used",
            )


def named(file: Path) -> str:
    return file.name.removesuffix(DRAFT)


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# --- (a) merged against adapter --------------------------------------------------------------------


def check_merged(trained: Sequence[Path], merged: Sequence[Path], arithmetic: str = "float32") -> Check:
    """The merged model against base and adapter, which ran in this number format."""
    found, most = distance(trained, merged), MERGED_KL[arithmetic]
    return Check(MERGED, "same as the adapter", found.kl <= most, asdict(found), f"kl {most:g}")


# --- (b) the float file against transformers -------------------------------------------------------


def bos_of(tokenizer: Any) -> str:
    """The BOS that every chat begins with; empty for none. llama.cpp adds it by itself."""
    first = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], return_dict=False)[0]
    return str(tokenizer.bos_token) if first == tokenizer.bos_token_id else ""


def expected_metadata(model: Path, tokenizer: Any) -> dict[str, Any]:
    """The expected header, from config.json and the tokenizer, independently of the writer."""
    config = read_json(model / "config.json")
    rows, length, added = config["vocab_size"], len(tokenizer), tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}
    kinds = [3 if number in special else 4 if number in added else 1 for number in range(length)]
    family, width = config["model_type"], config.get("head_dim")
    keys = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    }
    wide = ("attention.key_length", "attention.value_length") if family in ("qwen3", "llama") else ()
    begins = bos_of(tokenizer)
    return {
        "general.architecture": family,
        "general.type": "model",
        **{f"{family}.{key}": config[own] for key, own in keys.items()},
        **{f"{family}.{key}": width or config["hidden_size"] // config["num_attention_heads"] for key in wide},
        f"{family}.rope.freq_base": (config.get("rope_parameters") or config)["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": CUTS.get(len(tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a'S 12345"))),
        "tokenizer.ggml.tokens": [
            *tokenizer.convert_ids_to_tokens(list(range(length))),
            *(f"[PAD{number}]" for number in range(length, rows)),
        ],
        "tokenizer.ggml.token_type": kinds + [5] * (rows - length),
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": bool(begins),
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id if begins else tokenizer.pad_token_id,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def check_metadata(file: Path, kind: str, model: Path, tokenizer: Any) -> Check:
    """Every key of the header, and no key that would change how a server samples."""
    import numpy
    from gguf import GGUFReader, LlamaFileType

    found = {key: entry.contents() for key, entry in GGUFReader(file).fields.items()}
    file_type = LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]
    expected = {**expected_metadata(model, tokenizer), "general.file_type": int(file_type)}
    expected = {
        key: float(numpy.float32(value)) if isinstance(value, float) else value for key, value in expected.items()
    }
    wrong = [
        f"{key} is {shorten(found.get(key))}, not {shorten(value)}"
        for key, value in expected.items()
        if found.get(key) != value
    ]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    merges = sorted(pair if isinstance(pair, str) else " ".join(pair) for pair in merges)
    if sorted(found.get("tokenizer.ggml.merges") or []) != merges:
        wrong.append("tokenizer.ggml.merges differ")
    wrong += [f"{key} must not be there" for key in found if key.startswith("general.sampling.")]
    return Check(named(file), "metadata", not wrong, {"keys": len(expected) + 1, "wrong": "; ".join(wrong) or "none"})


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:37]}…"


def check_tokens(file: Path, server: Server, heldout: Heldout) -> Check:
    """The engine's token ids of every held-out prompt and of the probes are the tokenizer's."""
    texts, begin = [*heldout.texts, *PROBES], bos_of(heldout.tokenizer)
    probes = [begin + probe for probe in PROBES]
    ids = [*heldout.prompts, *heldout.tokenizer(probes, add_special_tokens=False)["input_ids"]]
    wrong = [text for text, own in zip(texts, ids, strict=True) if server.tokenize(text.removeprefix(begin)) != own]
    figures = {"texts": len(ids), "different": len(wrong), **({"first": shorten(wrong[0])} if wrong else {})}
    return Check(named(file), "tokenization", not wrong, figures)


def check_template(file: Path, server: Server, heldout: Heldout) -> Check:
    """The file's own template renders every held-out prompt, and one without a system message, as transformers does."""
    bare, begin = heldout.conversations[0][-1:], bos_of(heldout.tokenizer)
    pairs = list(zip([*heldout.conversations, bare], [*heldout.texts, heldout.render(bare)], strict=True))
    wrong = sum(server.render(messages) != text.removeprefix(begin) for messages, text in pairs)
    return Check(named(file), "chat template", not wrong, {"prompts": len(pairs), "different": wrong})


def check_stop(file: Path, server: Server, heldout: Heldout) -> Check:
    """A reply ends at the end-of-reply token: by itself in a dialogue, and at once where that token is forced."""
    eos = heldout.tokenizer.eos_token_id
    forced = server.complete(heldout.prompts[0], 8, logit_bias=[[eos, 1000.0]])
    ended, figures = forced.stopped and len(forced.tokens) <= 1, {"tokens after it": len(forced.tokens) - 1}
    return Check(named(file), f"stops at {heldout.tokenizer.eos_token}", ended, figures)


def check_logits(file: Path, kind: str, reference: Sequence[Path], found: Sequence[Path]) -> Check:
    """Teacher-forced logits of a float file against transformers in float32."""
    far = distance(reference, found)
    bound = f"kl {FLOAT_KL[kind]:g}"
    passed = far.kl <= FLOAT_KL[kind]
    if kind == "f32":
        most = F32_LOGITS * far.largest_logit
        passed, bound = passed and far.logit_difference <= most, f"{bound}, logit_difference {most:.2g}"
    return Check(named(file), "logits as in transformers", passed, asdict(far), bound)


def check_greedy(
    file: Path, server: Server, replies: Sequence[Reply], reference: Sequence[Path], noise: float, limit: int
) -> Check:
    """Greedy replies are those of transformers; where one differs, the two tokens were practically equal.

    Practically equal: a lead below MARGIN, or one that the file's largest logit difference (`noise`) can reverse.
    """
    found = server.replies([reply.prompt_ids for reply in replies], limit, "greedy replies")
    leads = []
    for reply, tokens, logits in zip(replies, found, reference, strict=True):
        pairs = zip(reply.token_ids, tokens, strict=False)
        first = next((place for place, (own, theirs) in enumerate(pairs) if own != theirs), None)
        if first is not None:
            leads.append(top2_margin(logits, first))
        elif len(reply.token_ids) != len(tokens):
            leads.append(float("inf"))  # the same tokens, but one of them did not stop
    worst, most = max(leads, default=0.0), max(MARGIN, 2 * noise)
    figures = {"replies": len(replies), "equal": len(replies) - len(leads), "lead where not": worst}
    return Check(named(file), "greedy replies", worst <= most, figures, f"lead {most:.3g}")
