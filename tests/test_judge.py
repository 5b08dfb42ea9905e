"""The default judge: no weights of its own, no trace on the policy, and a verdict worth its weight."""

import json
from pathlib import Path

import torch

from qreason.judge import Judge
from qreason.models import Resident
from qreason.recipe import Lora

PAIRS = Path(__file__).parent.parent / "data" / "helpdesk" / "judge_pairs.jsonl"


def read_pairs() -> list[tuple[str, str, int]]:
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    return [(row["reference"], row["reply"], row["label"]) for row in rows]


def test_the_judge_reads_the_storage_the_policy_stands_on(own_resident: Resident) -> None:
    before = {name: parameter.data_ptr() for name, parameter in own_resident.model.named_parameters()}
    own_resident.new_adapter(Lora())
    judge = Judge(own_resident)
    judge([("a", "b")])
    base = judge.resident.model.get_base_model()
    after = {
        name.replace(".base_layer", ""): p.data_ptr() for name, p in base.named_parameters() if "lora_" not in name
    }
    assert after == before


def test_the_adapter_does_not_change_a_verdict(own_resident: Resident) -> None:
    pairs = [(reference, reply) for reference, reply, _ in read_pairs()[:6]]
    bare = Judge(own_resident)(pairs)
    own_resident.new_adapter(Lora())
    for name, parameter in own_resident.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    assert Judge(own_resident)(pairs) == bare


def test_judging_changes_neither_the_adapter_nor_the_optimizer(own_resident: Resident) -> None:
    own_resident.new_adapter(Lora())
    model = own_resident.model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()
    weights = [parameter.clone() for parameter in trained]
    state = [{key: value.clone() for key, value in optimizer.state[parameter].items()} for parameter in trained]
    Judge(own_resident)([("Restart the spooler.", "Restart the print spooler.")])
    assert model.training
    assert all(parameter.requires_grad for parameter in trained)
    assert all(torch.equal(old, new) for old, new in zip(weights, trained, strict=True))
    assert all(
        torch.equal(old[key], optimizer.state[parameter][key])
        for old, parameter in zip(state, trained, strict=True)
        for key in old
    )


def test_the_judge_tells_equal_fixes_from_others_on_pairs_it_never_saw(resident: Resident) -> None:
    pairs = read_pairs()
    verdicts = Judge(resident)([(reference, reply) for reference, reply, _ in pairs])
    good = [verdict for verdict, (_, _, label) in zip(verdicts, pairs, strict=True) if label]
    bad = [verdict for verdict, (_, _, label) in zip(verdicts, pairs, strict=True) if not label]
    auc = sum((g > b) + (g == b) / 2 for g in good for b in bad) / (len(good) * len(bad))
    assert len(pairs) == 200
    assert auc >= 0.9


def test_verdicts_lie_between_0_and_1_and_do_not_depend_on_the_batch(resident: Resident) -> None:
    pairs = [(reference, reply) for reference, reply, _ in read_pairs()[:5]]
    judge = Judge(resident)
    together = judge(pairs)
    assert all(0 <= verdict <= 1 for verdict in together)
    alone = [judge([pair])[0] for pair in pairs]
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-4)


def test_equal_pairs_are_judged_once_and_no_pairs_not_at_all(resident: Resident) -> None:
    seen: list[int] = []
    handle = resident.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        judge = Judge(resident)
        first, second, third = judge([("a b", "a b"), ("a b", "c"), ("a b", "a b")])
        assert seen == [2]
        assert first == third != second
        assert judge([]) == []
        assert seen == [2]
    finally:
        handle.remove()
