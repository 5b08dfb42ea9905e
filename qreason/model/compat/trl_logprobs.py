"""TRL: log-probabilities in little time and memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from qreason.errors import kind_and_line
from qreason.machine.rows import Rows
from qreason.model.compat.peft import base_of

if TYPE_CHECKING:
    import torch

MOST_LOGITS = 2**26
"""Logits of a micro-batch that are computed at once on a CPU: a gigabyte with their gradient."""


class LogProbabilities:
    """TRL's GRPO trainer, with log-probabilities that need less time and memory. Mixed in by `frugal`.

    On a CPU each prompt is read once per micro-batch. The replies of a group share it, and it is often longer than they
    are. Its keys and values are computed once for all its replies; gradients flow back through them, so the step's
    gradient is the same up to rounding.

    The logits of all tokens are not held, except few on a CPU: they are computed in tiles, forward and backward. Those
    of a whole generation batch, which need no gradient, are computed for a micro-batch at a time, or for fewer rows
    once memory ran out.

    Read in TRL 1.14.2 and 1.16.0: log-probabilities come from `_get_per_token_logps_and_entropies`, which calls the
    model it is given with input_ids and attention_mask. 1.14.2 expects logits; 1.16.0, whose models have a fused LM
    head, expects log-probabilities and entropies. In 1.14.2 `_chunked_logps` is used with Liger only, whose kernels it
    does not need; it reads the matrix of the LM head, without an adapter on it.
    """

    args: Any
    accelerator: Any
    temperature: float
    tiled: bool
    vocabulary: int
    say: Callable[[str], None]
    rows: Rows | None = None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        import torch

        if torch.is_grad_enabled():
            return self.score(model, input_ids, attention_mask, logits_to_keep, **kwargs)
        self.rows = self.rows or Rows(batch_size or len(input_ids), "replies to score", self.say)
        found: list[Any] = []
        done = 0
        while done < len(input_ids):
            part = slice(done, done + self.rows.most)
            ids, mask = input_ids[part], attention_mask[part]
            some = self.rows.attempt(partial(self.score, model, ids, mask, logits_to_keep, **kwargs), len(ids))
            if some is not None:
                found.append(some)
                done += len(ids)
        return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*found, strict=True))

    def score(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, **kwargs: Any
    ) -> Any:
        compute = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        if not kwargs.get("compute_aux_loss") and not getattr(self, "use_liger_kernel", False):
            shared = can_share_prompts(self.args)
            if self.tiled and not (shared and are_few(input_ids.shape[0] * logits_to_keep * self.vocabulary)):
                kwargs.pop("compute_aux_loss", None)
                compute, model = self._chunked_logps, self.accelerator.unwrap_model(model)  # type: ignore[attr-defined]
                model = with_shared_prompts(model, logits_to_keep) if shared else model
            elif shared:
                model = partial(answer_once, model, logits_to_keep, self.temperature)
        return compute(model, input_ids, attention_mask, logits_to_keep, **kwargs)


def are_few(logits: int) -> bool:
    """Whether a CPU computes the logits of a micro-batch at once."""
    return logits <= MOST_LOGITS


def answer_once(
    model: Any, completion: int, temperature: float, *, fused_lm_head: bool = False, **inputs: Any
) -> SimpleNamespace:
    """What model(...) returns: logits, or what a fused LM head gives, for the last `completion` tokens of each row."""
    if not fused_lm_head:
        return read_prompts_once(model, **inputs)
    from trl.trainer.utils import selective_log_softmax_and_entropy

    labels = inputs.pop("labels")[:, -completion:]
    logits = read_prompts_once(model, logits_to_keep=completion + 1, **inputs).logits[:, :-1]
    scored = selective_log_softmax_and_entropy(
        logits, labels.clamp(min=0), temperature=temperature, row_mask=(labels != -100).int()
    )
    return SimpleNamespace(log_probs=scored[0], entropy=scored[1])


def can_share_prompts(args: Any) -> bool:
    """On a CPU only: a GPU reads repeated prompts at little cost; and checkpointed layers keep no cache."""
    return bool(args.use_cpu and not args.gradient_checkpointing)


def read_prompts_once(
    model: Any, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, use_cache: bool = False
) -> SimpleNamespace:
    """What model(...) returns: the last `logits_to_keep` logits of each row, (rows, logits_to_keep, vocabulary)."""
    import torch

    first, which, rest = read_apart(model, input_ids, attention_mask, logits_to_keep - 1, logits_to_keep=1)
    return SimpleNamespace(logits=torch.cat([first.logits[which], rest.logits], 1))


def with_shared_prompts(model: Any, completion: int) -> torch.nn.Module:
    """As much of a model as `_chunked_logps` uses; its hidden states are those of the last `completion` + 1 tokens."""
    import torch

    model = model.get_base_model() if hasattr(model, "get_base_model") else model

    def backbone(*, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        first, which, rest = read_apart(model.base_model, input_ids, attention_mask, completion)
        hidden = torch.cat([first.last_hidden_state[:, -1:][which], rest.last_hidden_state], 1)
        return SimpleNamespace(last_hidden_state=hidden)

    shell: Any = torch.nn.Module()
    shell.base_model, shell.get_output_embeddings, shell.config = backbone, model.get_output_embeddings, model.config
    return cast("torch.nn.Module", shell)


def read_apart(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion: int, **of_prompts: Any
) -> tuple[Any, torch.Tensor, Any]:
    """What model(...) returns for the different prompts, which of them each row has, and what it returns for the rest.

    input_ids and attention_mask are (rows, tokens); all but the last `completion` tokens of a row are prompt.
    """
    import torch
    from transformers import DynamicCache

    length = input_ids.shape[1] - completion
    prompts = torch.stack([input_ids, attention_mask], 1)[:, :, :length]
    each, which = torch.unique(prompts, dim=0, return_inverse=True)
    cache = DynamicCache(config=model.config)
    reading: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    first = model(input_ids=each[:, 0], attention_mask=each[:, 1], **reading, **of_prompts)
    cache.batch_select_indices(which)
    rest = model(input_ids=input_ids[:, length:], attention_mask=attention_mask, **reading)
    return first, which, rest


def frugal(trainer: type, model: Any, say: Callable[[str], None]) -> Any:
    """TRL's GRPO trainer class, with LogProbabilities of this model; not for Unsloth's, which has its own."""
    head = model.get_output_embeddings()
    vocabulary = model.config.get_text_config().vocab_size
    parts = {"tiled": base_of(head) is head, "vocabulary": vocabulary, "say": staticmethod(say)}
    return type(trainer.__name__, (LogProbabilities, trainer), parts)


def check_kernel(device: str) -> str | None:
    """Why TRL's fused log-probabilities fail on a device, which are then left out; None where they do not.

    Read in TRL 1.14.2: where Triton is there, `_fused_logprob_entropy` of trl.trainer.utils is its kernel, else None,
    and all log-probabilities and entropies of logits are computed in plain torch.
    """
    import torch
    from trl.trainer import utils

    if utils._fused_logprob_entropy is None or device != "cuda":
        return None
    try:
        logits, index = torch.zeros(1, 8, device=device), torch.zeros(1, dtype=torch.long, device=device)
        utils._fused_logprob_entropy(logits, index)
    except Exception as error:  # a compiler, headers or a library is missing, each with its own error
        utils._fused_logprob_entropy = None
        return kind_and_line(error)
    return None
