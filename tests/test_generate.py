"""Replies of the embedded model, against transformers' own generate."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qreason.data.prompts import VERDICTS, render_judge
from qreason.errors import DataError, TrainingError
from qreason.inference import decoding
from qreason.inference.drawing import Drawing, draw
from qreason.inference.generate import LocalGenerator
from qreason.inference.reading import pad_left, render_ids
from qreason.model.resident import Resident
from qreason.types import Sampling

GREEDY = Sampling(temperature=0, max_completion_length=24)
PROMPTS = [
    [{"role": "user", "content": "Repeat this: backup job"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which fix helps when the disk is full?"}],
    [{"role": "user", "content": "Sort: 9 4 7"}],
]


@pytest.fixture(params=[1, 8])
def every(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Tokens between two looks of the host: on a CPU, and on a GPU."""
    monkeypatch.setitem(decoding.READ_EVERY, "cpu", request.param)
    return request.param


@pytest.mark.usefixtures("every")
def test_greedy_replies_equal_those_of_transformers(resident: Resident) -> None:
    ours = LocalGenerator(resident).generate(PROMPTS, n=1, sampling=GREEDY)
    for prompt, (reply,) in zip(PROMPTS, ours, strict=True):
        (ids,) = render_ids(resident.tokenizer, [prompt])
        theirs = resident.model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
        )[0, len(ids) :].tolist()
        assert list(reply.token_ids) == theirs


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["padded", "alone"])
def test_replies_do_not_depend_on_when_the_host_looks(
    resident: Resident, monkeypatch: pytest.MonkeyPatch, prompts: list[Any]
) -> None:
    ids = render_ids(resident.tokenizer, prompts)
    stops = LocalGenerator(resident).stops
    for sampling, ends in ((GREEDY, stops), (Sampling(top_p=0.9, max_completion_length=20, seed=1), set())):
        found = []
        for every in (1, 8):
            monkeypatch.setitem(decoding.READ_EVERY, "cpu", every)
            drawing = Drawing(sampling, torch.Generator().manual_seed(1), ends)
            with resident.inference() as model:
                found.append(decoding.decode(resident, model, ids, 3, drawing))
        assert found[0] == found[1]
        assert {len(row) for row in found[0]} != {0}


class Reads(TorchDispatchMode):  # type: ignore[misc]
    """Operations for which the host waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_dim", "_unique2"):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.1}]
)
def test_the_host_waits_for_a_gpu_at_most_every_eighth_token(
    resident: Resident, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setitem(decoding.READ_EVERY, "cpu", 8)
    reads, tolist, steps = Reads(), torch.Tensor.tolist, []
    hook = resident.model.lm_head.register_forward_pre_hook(lambda module, args: steps.append(len(args[0])))

    def counting(tensor: torch.Tensor) -> Any:
        reads.seen["tolist"] += 1
        return tolist(tensor)

    sampling = Sampling(max_completion_length=40, seed=1, **settings)
    ids = render_ids(resident.tokenizer, PROMPTS)
    with resident.inference() as model:
        endless = decoding.decode(resident, model, ids, 8, Drawing(sampling, torch.Generator().manual_seed(1), set()))
        stops = {*endless[0][:8]} - {*endless[-1]}  # so that rows leave, and not all
        drawing = Drawing(sampling, torch.Generator().manual_seed(1), stops)
        steps.clear()
        with monkeypatch.context() as patch, reads:
            patch.setattr(torch.Tensor, "tolist", counting)
            decoding.decode(resident, model, ids, 8, drawing)
    hook.remove()
    assert len(steps) >= 10
    assert len(set(steps[1:])) > 1
    assert reads.seen.pop("_local_scalar_dense") <= 2  # transformers, when the prompts are read
    assert set(reads.seen) == {"tolist"}
    assert reads.seen["tolist"] <= -(-len(steps) // 8)


def spoil(resident: Resident, call: int, value: float) -> Any:
    """From this call on, some logits of the model have this value."""
    calls = Counter[str]()

    def hook(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        calls["made"] += 1
        return logits.index_fill(-1, torch.tensor([7]), value) if calls["made"] >= call else logits

    return resident.model.lm_head.register_forward_hook(hook)


@pytest.mark.parametrize("backend", ["plain", "unsloth"])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0}])
@pytest.mark.parametrize(("call", "value"), [(1, float("nan")), (3, float("nan")), (2, float("inf"))])
def test_replies_are_never_drawn_from_what_is_not_finite(
    resident: Resident, monkeypatch: pytest.MonkeyPatch, backend: Any, settings: Any, call: int, value: float
) -> None:
    monkeypatch.setattr(resident, "backend", backend)
    hook = spoil(resident, call, value)
    sampling = Sampling(max_completion_length=6, seed=1, **settings)
    try:
        with pytest.raises(TrainingError, match=r"qreason/tiny: the model's logits are not finite.*learning rate"):
            LocalGenerator(resident).generate(PROMPTS, n=2, sampling=sampling)
    finally:
        hook.remove()


def test_words_that_may_not_be_said_are_no_fault(resident: Resident) -> None:
    hook = spoil(resident, 1, float("-inf"))
    assert LocalGenerator(resident).generate(PROMPTS, n=1, sampling=GREEDY)
    hook.remove()


def test_a_verdict_and_a_likelihood_that_are_no_numbers_are_none(resident: Resident) -> None:
    generator = LocalGenerator(resident)
    replies = [row[0] for row in generator.generate(PROMPTS, n=1, sampling=GREEDY)]
    hook = spoil(resident, 1, float("nan"))
    try:
        with pytest.raises(TrainingError, match="not finite"):
            generator.likelihoods(replies)
        resident.model.lm_head.register_forward_hook(lambda module, args, logits: logits * float("nan"))
        with pytest.raises(TrainingError, match="not finite"):
            generator.expect([[render_judge("restart the spooler", "restart it")]], VERDICTS)
    finally:
        hook.remove()
        resident.model.lm_head._forward_hooks.clear()


def test_every_prompt_gets_n_replies_in_its_own_place(resident: Resident) -> None:
    alone = [LocalGenerator(resident).generate([prompt], n=1, sampling=GREEDY)[0][0].text for prompt in PROMPTS]
    together = LocalGenerator(resident).generate(PROMPTS, n=3, sampling=GREEDY)
    assert [[reply.text for reply in replies] for replies in together] == [[text] * 3 for text in alone]


def test_equal_seeds_draw_equal_replies_and_other_seeds_others(resident: Resident) -> None:
    generator = LocalGenerator(resident)
    hot = Sampling(temperature=1.5, max_completion_length=16, seed=1)
    first, again = (generator.generate(PROMPTS, n=4, sampling=hot) for _ in range(2))
    other = generator.generate(PROMPTS, n=4, sampling=replace(hot, seed=2))
    assert first == again
    assert first != other


def test_a_reply_that_hits_the_limit_is_not_finished(resident: Resident) -> None:
    ((cut,),) = LocalGenerator(resident).generate(
        PROMPTS[:1], n=1, sampling=Sampling(temperature=0, max_completion_length=1)
    )
    assert not cut.finished
    assert len(cut.token_ids) == 1


def test_a_finished_reply_ends_with_the_stop_token_and_hides_it_from_the_text(resident: Resident) -> None:
    ((whole,),) = LocalGenerator(resident).generate(
        PROMPTS[:1], n=1, sampling=replace(GREEDY, max_completion_length=60)
    )
    assert whole.finished
    assert whole.token_ids[-1] == resident.tokenizer.eos_token_id
    assert "<|im_end|>" not in whole.text


def test_a_prompt_longer_than_the_context_is_named(resident: Resident) -> None:
    endless = [{"role": "user", "content": "disk full " * 1000}]
    with pytest.raises(DataError, match="disk full"):
        LocalGenerator(resident).generate([endless], n=1, sampling=GREEDY)


def test_padding_goes_to_the_left_and_positions_start_at_the_first_token(resident: Resident) -> None:
    inputs = pad_left(resident.tokenizer, [[5, 6, 7], [8]], torch.device("cpu"))
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert inputs["input_ids"][1, -1] == 8


LOGITS = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=0), {0}),
        (Sampling(top_k=2), {0, 1}),
        (Sampling(top_p=0.75), {0, 1}),
        (Sampling(min_p=0.25), {0, 1, 2}),
        (Sampling(), {0, 1, 2, 3}),
    ],
)
def test_truncation_keeps_exactly_the_likely_tokens(sampling: Sampling, allowed: set[int]) -> None:
    drawn = draw(LOGITS, sampling, torch.Generator().manual_seed(1))
    assert set(drawn.tolist()) == allowed


def test_tokens_are_drawn_with_their_probability() -> None:
    drawn = draw(LOGITS, Sampling(), torch.Generator().manual_seed(1))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03)
