"""TRL: log-probabilities in little memory, chosen rows, micro-batches in pieces, resumable steps, float32 adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from qreason.errors import kind_and_line
from qreason.machine.rows import Rows
from qreason.model.compat.peft import base_of

if TYPE_CHECKING:
    import torch

# --- log-probabilities -----------------------------------------------------------------------------


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
            if self.tiled and not (shared and input_ids.shape[0] * logits_to_keep * self.vocabulary <= MOST_LOGITS):
                kwargs.pop("compute_aux_loss", None)
                compute, model = self._chunked_logps, self.accelerator.unwrap_model(model)  # type: ignore[attr-defined]
                model = with_shared_prompts(model, logits_to_keep) if shared else model
            elif shared:
                model = partial(answer_once, model, logits_to_keep, self.temperature)
        return compute(model, input_ids, attention_mask, logits_to_keep, **kwargs)


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


# --- rows that are trained on ----------------------------------------------------------------------


class SelectedRows:
    """TRL's GRPO trainer, which trains on the rollouts that a `selection` chooses. Mixed in by `select_rows`.

    Read in TRL 1.14.2 and 1.16.0: `_prepare_inputs` calls `_generate_and_score_completions`, shuffles its rows,
    splits them into micro-batches and keeps those as `_buffered_inputs`, for `_compute_loss`; advantages are made of
    what `_calculate_rewards` returns, (rollouts, rewards).
    """

    args: Any
    selection: Any
    rewards_per_function: torch.Tensor
    _buffered_inputs: list[dict[str, Any]] | None
    _step: int

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        self.rewards_per_function = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        return self.rewards_per_function

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        return self.selection.choose(self, super()._generate_and_score_completions(inputs))  # type: ignore[misc]

    def _prepare_inputs(self, inputs: Any) -> Any:
        before = self._buffered_inputs
        prepared = super()._prepare_inputs(inputs)  # type: ignore[misc]
        if self._buffered_inputs is None or self._buffered_inputs is before:
            return prepared
        self._buffered_inputs = self.selection.pack(self, self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        if not len(inputs["completion_ids"]):  # the gradient is zero, not missing: the optimizer makes its step
            return sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad) * 0.0
        return super()._compute_loss(model, inputs) * inputs["row_share"]  # type: ignore[misc]


def select_rows(trainer: type, selection: Any) -> Any:
    """TRL's GRPO trainer class, training on the rollouts that `selection` (of qreason.training) chooses."""
    return type(trainer.__name__, (SelectedRows, trainer), {"selection": selection})


# --- micro-batches in pieces -----------------------------------------------------------------------

Cut = Callable[[dict[str, Any]], Sequence[tuple[dict[str, Any], float]]]
"""A prepared micro-batch -> its pieces, and the weight of each in the loss of the micro-batch."""
Policy = Callable[[Any, Any, Callable[[Cut | None], Any]], Any]
"""(trainer, model, attempt) -> the loss of a micro-batch; attempt(None) computes it whole, attempt(cut) in pieces."""


class InPieces:
    """A TRL trainer whose `policy` decides how a micro-batch is computed. Mixed in before a trainer by `in_pieces`.

    Read in TRL 1.14.2 and 1.16.0, transformers 5.10.0 and 5.24.0: Trainer.training_step passes the result of
    `_prepare_inputs` to `compute_loss`. The GRPO and distillation trainers make rollouts in the first and count their
    micro-batches around the second, so the prepared batch is kept, and only the last piece is counted.
    """

    policy: Policy
    piece: dict[str, Any] | None = None
    share = 1.0
    """The weight of the current piece in the loss of its micro-batch."""
    prepared: dict[str, Any] | None = None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.prepared = None

        def attempt(cut: Cut | None) -> Any:
            if cut is None:
                return super(InPieces, self).training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
            return self.step_by_piece(cut, model, inputs, num_items_in_batch)

        return self.policy(self, model, attempt)

    def step_by_piece(self, cut: Cut, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        """The trainer's step for each piece; only the last one is counted."""
        from transformers import Trainer

        if self.prepared is None:
            model.train()
            self.prepared = self._prepare_inputs(inputs)
        pieces = cut(self.prepared)
        losses = []
        try:
            for number, (self.piece, self.share) in enumerate(pieces):
                last = number == len(pieces) - 1
                step = super().training_step if last else partial(Trainer.training_step, self)  # type: ignore[misc]
                losses.append(step(model, inputs, num_items_in_batch))
        finally:
            self.piece, self.share = None, 1.0
        return sum(losses)

    def _prepare_inputs(self, inputs: Any) -> Any:
        if self.piece is not None:
            return dict(self.piece)
        self.prepared = super()._prepare_inputs(inputs)  # type: ignore[misc]
        return dict(self.prepared)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        return loss if self.share == 1.0 else loss * self.share


def in_pieces(trainer: type, policy: Policy) -> Any:
    """TRL's trainer class, with micro-batches computed as the policy decides."""
    return type(trainer.__name__, (InPieces, trainer), {"policy": staticmethod(policy)})


# --- checkpoints -----------------------------------------------------------------------------------


class Resumable:
    """A TRL trainer that reports each step to `checkpoints` and starts from one. Mixed in by `resumable`.

    Read in transformers 5.17: `_save_checkpoint` is called after the step's logging where a callback set
    control.should_save; the others by train(resume_from_checkpoint). TRL's RepeatSampler goes on drawing from its own
    random source from epoch to epoch, so the draws of earlier epochs are repeated.
    """

    checkpoints: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.checkpoints.asked:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.checkpoints.step_done(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.checkpoints.load_weights(self, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint:
            self.checkpoints.load_optimizer(self, Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        pass  # with the optimizer

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint:
            self.checkpoints.load_random()

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        if hasattr(sampler, "mini_repeat_count"):
            for _ in range(self.checkpoints.finished_epochs()):
                next(iter(sampler), None)
        return sampler


def resumable(trainer: type, checkpoints: Any) -> Any:
    """TRL's trainer class, with checkpoints of its own."""
    return type(trainer.__name__, (Resumable, trainer), {"checkpoints": checkpoints})


# --- adapters --------------------------------------------------------------------------------------


@contextmanager
def float32_adapter(model: Any) -> Iterator[None]:
    """Within it, a trainer may be made; afterwards the trainable weights are float32, with the values they had.

    Read in TRL 1.14.2 and 1.16.0: the trainers' __init__ casts an adapter on a quantized base to bfloat16, which
    rounds it, loses small updates and does not work with a float16 scaler (TRL #4901).
    """
    before = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
    yield
    for parameter in model.parameters():
        if parameter in before or parameter.requires_grad:
            parameter.data = before.get(parameter, parameter.data).to(parameter.device).float()
