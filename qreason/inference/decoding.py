"""Decoding: the token ids of n replies for each row of prompt ids, by our own loop or by the model's own generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qreason.errors import TrainingError
from qreason.inference.drawing import Drawing, draw, staying, up_to
from qreason.inference.reading import Ids, pad_left
from qreason.model.resident import Resident

if TYPE_CHECKING:
    import torch

READ_EVERY = {"cpu": 1, "cuda": 8}
"""Tokens that are drawn before the host reads them: a GPU would wait for the host at each, and the host for it. Rows
that end meanwhile go on, and what they add is left out."""


def decode(resident: Resident, model: Any, ids: list[Ids], n: int, drawing: Drawing) -> list[Ids]:
    """With a cache of our own. Nothing but the drawn tokens is read from the device, READ_EVERY tokens at a time."""
    import torch

    from qreason.model.compat.cache import RoomyLayer, keep_rows, roomy_cache
    from qreason.model.compat.transformers import takes_ready_mask

    most, every = drawing.sampling.max_completion_length, READ_EVERY[resident.device.type]
    inputs = pad_left(resident.tokenizer, ids, resident.device)
    cache = roomy_cache(model.config, most)
    logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(n)
    logits = logits.repeat_interleave(n, 0)
    position = inputs["position_ids"][:, -1:].repeat_interleave(n, 0)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, most), value=1).repeat_interleave(n, 0)
    hidden = len({len(row) for row in ids}) > 1  # the padding before shorter prompts
    ready = every > 1 and takes_ready_mask(model) and all(isinstance(layer, RoomyLayer) for layer in cache.layers)
    completions: list[Ids] = [[] for _ in range(len(ids) * n)]
    running, length = list(range(len(completions))), inputs["input_ids"].shape[1]
    drawn, finite = [], torch.ones((), dtype=torch.bool, device=logits.device)
    for made in range(1, most + 1):
        tokens = draw(logits, drawing.sampling, drawing.source)
        drawn.append(tokens)
        finite = finite & logits.amax(-1).isfinite().all()
        if made % every == 0 or made == most:
            for index, row in zip(running, read(drawn, finite, resident), strict=True):
                completions[index] += up_to(row, drawing.stops)
            drawn = []
            if drawing.on_tokens:
                drawing.on_tokens(completions)
            stay = staying([completions[index][-1] not in drawing.stops for index in running])
            if not stay or made == most:
                break
            if len(stay) < len(running):  # finished rows leave the batch
                running = [running[row] for row in stay]
                keep_rows(cache, stay, logits.device)
                chosen = torch.tensor(stay, device=logits.device)
                tokens, mask, position = tokens[chosen], mask[chosen], position[chosen]
        position, shown = position + 1, mask[:, : length + made]
        logits = model(
            input_ids=tokens.unsqueeze(1),
            attention_mask=(shown[:, None, None].bool() if hidden else None) if ready else shown,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return completions


def read(drawn: list[torch.Tensor], finite: torch.Tensor, resident: Resident) -> list[Ids]:
    """The tokens of each row. Raises TrainingError where logits were not finite."""
    import torch

    *tokens, sound = torch.cat([*drawn, finite.long().view(1)]).tolist()
    if not sound:
        raise not_finite(resident)
    rows = len(drawn[0])
    return [tokens[row::rows] for row in range(rows)]


def not_finite(resident: Resident) -> TrainingError:
    return TrainingError(
        f"{resident.settings.base}: the model's logits are not finite, so its replies would be noise. If it was being "
        "trained, lower the learning rate; an untrained base may be damaged, or made for other numbers than "
        f"{resident.hardware.dtype}, which this machine computes in: take another one"
    )


def decode_by_generate(resident: Resident, model: Any, ids: list[Ids], n: int, drawing: Drawing) -> list[Ids]:
    """By generate, for models that do not use the caches of transformers; with our sampling parameters alone."""
    import torch

    from qreason.model.compat.transformers import own_sampling

    sampling, source = drawing.sampling, drawing.source
    inputs = pad_left(resident.tokenizer, ids, resident.device)
    del inputs["position_ids"]  # generate makes them itself
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        names = ("temperature", "top_p", "top_k", "min_p")
        options = {"do_sample": True} | {name: getattr(sampling, name) for name in names}
    if source is not None:
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=source, device=source.device)))
    finite = torch.ones((), dtype=torch.bool, device=resident.device)

    def check(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """A logits processor; on a GPU drawing from what is not finite would end the process's use of it."""
        finite.logical_and_(logits.amax(-1).isfinite().all())
        if drawing.on_tokens:
            drawing.on_tokens(rows[:, inputs["input_ids"].shape[1] :].tolist())
        return logits.nan_to_num()

    with own_sampling(model):
        made = model.generate(
            **inputs,
            **options,
            logits_processor=[check],
            num_return_sequences=n if sampling.temperature else 1,
            max_new_tokens=sampling.max_completion_length,
            eos_token_id=sorted(drawing.stops),
            pad_token_id=resident.tokenizer.pad_token_id,
        )
    if not finite:
        raise not_finite(resident)
    rows = made[:, inputs["input_ids"].shape[1] :].tolist()
    if not sampling.temperature:
        rows = [row for row in rows for _ in range(n)]
    return [up_to(row, drawing.stops) for row in rows]
