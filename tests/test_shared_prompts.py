"""A GRPO step that reads each prompt once: the same logits and gradients as one that reads it beside every reply."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import give_weights

from qreason.model.compat.trl_logprobs import frugal, read_prompts_once
from qreason.model.resident import Resident
from qreason.recipe.sections import Lora

PROMPT, REPLY = 12, 7


def micro_batch() -> dict[str, Any]:
    """Two prompts, one padded on the left, with two and three replies in mixed order, one padded on the right."""
    source = torch.Generator().manual_seed(3)
    prompts = torch.randint(20, 900, (2, PROMPT), generator=source)
    replies = torch.randint(20, 900, (5, REPLY), generator=source)
    rows = torch.cat([prompts[[0, 1, 0, 1, 1]], replies], 1)
    mask = torch.ones_like(rows)
    mask[[1, 3, 4], :4] = 0
    mask[2, -3:] = 0
    return {"input_ids": rows, "attention_mask": mask, "logits_to_keep": REPLY + 1, "use_cache": False}


def gradient(logits: torch.Tensor, batch: dict[str, Any], model: Any) -> torch.Tensor:
    """Of the mean log-probability of the replies' tokens, by all adapter weights."""
    model.zero_grad()
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, -REPLY:, None]).squeeze(-1)
    chosen[batch["attention_mask"][:, -REPLY:].bool()].mean().backward()
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


def test_logits_and_gradients_are_the_same(own_resident: Resident) -> None:
    torch.manual_seed(1)
    own_resident.new_adapter(Lora(r=4))
    give_weights(own_resident, 0.02)
    model, batch = own_resident.model, micro_batch()
    beside, once = model(**batch).logits, read_prompts_once(model, **batch).logits
    real = batch["attention_mask"][:, -REPLY - 1 :].bool()
    torch.testing.assert_close(once[real], beside[real], rtol=1e-4, atol=1e-4)
    expected = gradient(beside, batch, model)
    assert (gradient(once, batch, model) - expected).norm() < 1e-4 * expected.norm()


def test_a_prompt_is_read_once(own_resident: Resident) -> None:
    read: list[tuple[int, ...]] = []
    own_resident.model.register_forward_pre_hook(
        lambda model, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    read_prompts_once(own_resident.model, **micro_batch())
    assert read == [(2, PROMPT), (5, REPLY)]


@pytest.mark.parametrize(
    ("args", "others", "shared"),
    [
        ({"use_cpu": True, "gradient_checkpointing": False}, {}, True),
        ({"use_cpu": False, "gradient_checkpointing": False}, {}, False),
        ({"use_cpu": True, "gradient_checkpointing": True}, {}, False),
        ({"use_cpu": True, "gradient_checkpointing": False}, {"compute_aux_loss": True}, False),
        ({"use_cpu": True, "gradient_checkpointing": False, "use_liger_kernel": True}, {}, False),
    ],
)
def test_only_where_it_helps_and_can_be_done(args: dict[str, bool], others: dict[str, bool], shared: bool) -> None:
    class Trainer:
        temperature = 1.0
        use_liger_kernel = args.get("use_liger_kernel", False)

        def _get_per_token_logps_and_entropies(self, model: Any, *rest: Any, **kwargs: Any) -> Any:
            return model

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=8))
    model = SimpleNamespace(get_output_embeddings=lambda: None, config=config)
    trainer = frugal(Trainer, model, print)()
    trainer.args, trainer.tiled = SimpleNamespace(**args), False
    assert (trainer._get_per_token_logps_and_entropies(model, None, None, 1, **others) is not model) == shared
