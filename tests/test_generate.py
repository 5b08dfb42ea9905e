"""Replies of the embedded model, against transformers' own generate."""

from dataclasses import replace

import pytest
import torch

from qreason.errors import DataError
from qreason.inference.drawing import draw
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
