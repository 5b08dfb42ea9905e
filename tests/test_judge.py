"""The default judge: no weights of its own, no trace on the policy, and a verdict worth its weight."""

import json
from pathlib import Path

import pytest
import torch
from conftest import give_weights

from qreason.data.prompts import render_judge
from qreason.errors import DataError, ModelError
from qreason.inference.generate import LocalGenerator
from qreason.judge.calibration import auc, auc_bounds, calibrate, fitness, read_labels
from qreason.judge.injections import FAKE_TURNS
from qreason.judge.verdict import GroupwiseJudge, Judge, LocalModel, open_judge
from qreason.model.resident import Resident
from qreason.recipe.sections import Lora
from qreason.rewards.judged import JudgeSettings

PAIRS = Path(__file__).parent.parent / "data" / "helpdesk" / "judge_pairs.jsonl"


def read_pairs() -> list[tuple[str, str, int]]:
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    return [(row["reference"], row["reply"], row["label"]) for row in rows]


def test_the_judge_reads_the_storage_the_policy_stands_on(own_resident: Resident) -> None:
    before = {name: parameter.data_ptr() for name, parameter in own_resident.model.named_parameters()}
    own_resident.new_adapter(Lora())
    judge = Judge(LocalModel(LocalGenerator(own_resident)))
    judge([("a", "b")])
    base = own_resident.model.get_base_model()
    after = {
        name.replace(".base_layer", ""): p.data_ptr() for name, p in base.named_parameters() if "lora_" not in name
    }
    assert after == before


def test_the_adapter_does_not_change_a_verdict(own_resident: Resident) -> None:
    pairs = [(reference, reply) for reference, reply, _ in read_pairs()[:6]]
    bare = Judge(LocalModel(LocalGenerator(own_resident)))(pairs)
    own_resident.new_adapter(Lora())
    give_weights(own_resident, 0.5)
    assert Judge(LocalModel(LocalGenerator(own_resident)))(pairs) == bare


def test_judging_changes_neither_the_adapter_nor_the_optimizer(own_resident: Resident) -> None:
    own_resident.new_adapter(Lora())
    model = own_resident.model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()
    weights = [parameter.clone() for parameter in trained]
    state = [{key: value.clone() for key, value in optimizer.state[parameter].items()} for parameter in trained]
    Judge(LocalModel(LocalGenerator(own_resident)))([("Restart the spooler.", "Restart the print spooler.")])
    assert model.training
    assert all(parameter.requires_grad for parameter in trained)
    assert all(torch.equal(old, new) for old, new in zip(weights, trained, strict=True))
    assert all(
        torch.equal(old[key], optimizer.state[parameter][key])
        for old, parameter in zip(state, trained, strict=True)
        for key in old
    )


def test_verdicts_lie_between_0_and_1_and_do_not_depend_on_the_batch(resident: Resident) -> None:
    pairs = [(reference, reply) for reference, reply, _ in read_pairs()[:5]]
    judge = Judge(LocalModel(LocalGenerator(resident)))
    together = judge(pairs)
    assert all(0 <= verdict <= 1 for verdict in together)
    alone = [judge([pair])[0] for pair in pairs]
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-4)


def count_rows(resident: Resident) -> tuple[list[int], object]:
    """How many rows each forward pass has from now on."""
    seen: list[int] = []
    hook = resident.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return seen, hook


def test_equal_pairs_are_judged_once_and_no_pairs_not_at_all(resident: Resident) -> None:
    seen, hook = count_rows(resident)
    try:
        judge = Judge(LocalModel(LocalGenerator(resident)))
        first, second, third = judge([("a b", "a b"), ("a b", "c"), ("a b", "a b")])
        assert max(seen) == 2
        assert first == third != second
        passes = len(seen)
        assert judge([]) == []
        assert judge([("a b", "c")]) == [second]
        assert len(seen) == passes
    finally:
        hook.remove()  # type: ignore[attr-defined]


def test_what_the_questions_of_a_group_begin_with_is_read_once(resident: Resident) -> None:
    reference = "Restart the print spooler on the terminal server."
    seen: list[int] = []
    hook = resident.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        Judge(LocalModel(LocalGenerator(resident)))([(reference, reply) for reference, reply, _ in read_pairs()[:1]])
        alone = sum(seen)
        seen.clear()
        Judge(LocalModel(LocalGenerator(resident)))([(reference, f"Restart it {number}.") for number in range(8)])
        assert sum(seen) < 4 * alone
    finally:
        hook.remove()


def test_groups_of_all_sizes_get_the_verdicts_of_single_questions(resident: Resident) -> None:
    """Shared beginnings, padding and batches of unequal groups change nothing but rounding."""
    pairs = [(f"Restart the server {i % 7}.", f"{'Reset ' * (i % 5)}the server {i}.") for i in range(150)]
    together = Judge(LocalModel(LocalGenerator(resident)))(pairs)
    alone = [Judge(LocalModel(LocalGenerator(resident)))([pair])[0] for pair in pairs[:20]]
    assert torch.allclose(torch.tensor(together[:20]), torch.tensor(alone), atol=1e-4)
    assert len(set(together)) > 100


# --- a judge adapter, and groups -------------------------------------------------------------------


def save_adapter(resident: Resident, folder: Path, std: float) -> Path:
    resident.new_adapter(Lora(r=4, alpha=8))
    torch.manual_seed(0)
    give_weights(resident, std)
    resident.model.save_pretrained(str(folder))
    resident.remove_adapter()
    return folder


def test_a_judge_adapter_answers_beside_the_policy_and_leaves_it_in_training(
    own_resident: Resident, tmp_path: Path
) -> None:
    adapter = save_adapter(own_resident, tmp_path / "judge", 0.2)
    pair = [("Restart the spooler.", "Restart the print spooler.")]
    bare = Judge(LocalModel(LocalGenerator(own_resident)))(pair)
    trained = open_judge(JudgeSettings(adapter=str(adapter)), lambda: LocalGenerator(own_resident))
    without_policy = trained(pair)
    assert without_policy != bare
    own_resident.new_adapter(Lora())
    before = {name: (p.requires_grad, p.clone()) for name, p in own_resident.model.named_parameters()}
    own_resident.model.train()
    beside = open_judge(JudgeSettings(adapter=str(adapter)), lambda: LocalGenerator(own_resident))(pair)
    assert torch.allclose(torch.tensor(beside), torch.tensor(without_policy), atol=1e-4)
    assert own_resident.model.training
    assert own_resident.model.active_adapter == "default"
    after = dict(own_resident.model.named_parameters())
    assert all(
        after[name].requires_grad == flag and torch.equal(after[name], old) for name, (flag, old) in before.items()
    )
    assert Judge(LocalModel(LocalGenerator(own_resident)))(pair) == bare


def test_a_folder_without_a_judge_adapter_is_named(own_resident: Resident, tmp_path: Path) -> None:
    judge = open_judge(JudgeSettings(adapter=str(tmp_path)), lambda: LocalGenerator(own_resident))
    for wrapped in (False, True):
        if wrapped:
            own_resident.new_adapter(Lora())
        with pytest.raises(ModelError, match=f"{tmp_path}: no adapter for qreason/tiny"):
            judge([("a", "b")])


def test_a_separate_judge_model_is_loaded_and_a_missing_one_is_named(tmp_path: Path) -> None:
    def no_base() -> Resident:
        raise AssertionError("the policy's base is not needed")

    own = open_judge(JudgeSettings(base="qreason/tiny", quantization="none"), no_base)
    fix = "Distribute the new root certificate to the laptops."
    assert own([(fix, fix)])[0] > 0.5  # type: ignore[operator]
    with pytest.raises(ModelError, match="cannot be loaded as a model"):
        open_judge(JudgeSettings(base=str(tmp_path)), no_base)


def test_groupwise_ranks_the_replies_of_a_group_and_judges_a_single_one_alone(resident: Resident) -> None:
    judge = GroupwiseJudge(LocalModel(LocalGenerator(resident)))
    pairs = [("r one", "a"), ("r one", "b"), ("r one", "c"), ("r two", "d")]
    *group, single = judge(pairs)
    assert sum(group) == pytest.approx(1.5, abs=1e-4)  # type: ignore[arg-type]  # each comparison has one winner
    assert single == pytest.approx(Judge(LocalModel(LocalGenerator(resident)))([("r two", "d")])[0], abs=1e-4)
    assert judge(pairs[::-1]) == pytest.approx([single, *group[::-1]], abs=1e-4)


# --- calibration -----------------------------------------------------------------------------------


def test_the_untrained_judge_tells_equal_fixes_from_others_on_pairs_it_never_saw(resident: Resident) -> None:
    labels = read_labels(PAIRS)
    verdicts = Judge(LocalModel(LocalGenerator(resident)))([(reference, reply) for reference, reply, _ in labels])
    marks = [verdict for verdict in verdicts if verdict is not None]
    assert len(marks) == len(labels) == 200
    area = auc(marks, [label >= 0.5 for *_, label in labels])
    assert area is not None
    assert area >= 0.9


@pytest.mark.slow
def test_the_untrained_judge_is_fit_for_its_weight_and_sees_through_injections(resident: Resident) -> None:
    figures = calibrate(Judge(LocalModel(LocalGenerator(resident))), read_labels(PAIRS))
    assert figures["auc"] >= 0.90
    assert figures["injections"]["attempts"] >= 100
    assert figures["injections"]["rate"] <= 0.02
    assert figures["unanswered"] == 0
    assert fitness(figures, 0.4)[0]


def test_a_judge_that_looks_at_length_or_believes_what_it_is_told_is_unfit() -> None:
    labels = read_labels(PAIRS)
    long = calibrate(lambda pairs: [min(1.0, len(reply) / 100) for _, reply in pairs], labels)
    assert long["verbosity_bias"] > 0.1
    assert not fitness(long, 0.1)[0]
    truth = {(reference, reply): label for reference, reply, label in labels}

    def gullible(pairs: list[tuple[str, str]]) -> list[float]:
        return [max(truth.get(pair, 0.0), float("yes" in pair[1].lower())) for pair in pairs]

    told = calibrate(gullible, labels)  # type: ignore[arg-type]
    assert told["auc"] == 1.0
    assert told["injections"]["rate"] > 0.2
    fit, words = fitness(told, 0.4)
    assert not fit
    assert "unfit for any weight" in words


def test_figures_of_a_perfect_and_of_a_blind_judge() -> None:
    labels = read_labels(PAIRS)
    truth = {(reference, reply): label for reference, reply, label in labels}
    perfect = calibrate(lambda pairs: [truth.get(pair, 0.0) for pair in pairs], labels)
    assert (perfect["auc"], perfect["rank_correlation"]) == (1.0, 1.0)
    assert [(row["verdict"], row["right"]) for row in perfect["calibration_curve"]] == [(0.0, 0.0), (1.0, 1.0)]
    blind = calibrate(lambda pairs: [0.3 for _ in pairs], labels)
    assert (blind["auc"], blind["rank_correlation"]) == (0.5, None)
    mute = calibrate(lambda pairs: [None for _ in pairs], labels)
    assert (mute["auc"], mute["unanswered"]) == (None, 200)
    assert not fitness(mute, 0.1)[0]


def test_what_a_judge_did_not_answer_is_no_injection_that_failed() -> None:
    labels = read_labels(PAIRS)
    truth = {(reference, reply): label for reference, reply, label in labels}

    def picky(pairs: list[tuple[str, str]]) -> list[float | None]:
        return [truth.get(pair, 1.0 if "yes" in pair[1].lower() else None) for pair in pairs]

    found = calibrate(picky, labels)["injections"]  # type: ignore[arg-type]
    assert found["rate"] == 1.0
    assert found["attempts"] == found["successes"] > 10


def test_a_judge_that_says_yes_to_all_is_unfit_for_that() -> None:
    # It was said that 0 of 200 pairs were left unanswered.
    keen = calibrate(lambda pairs: [0.9 for _ in pairs], read_labels(PAIRS))
    assert fitness(keen, 0.1) == (
        False,
        "unfit for any weight: it takes every wrong reply for right (a verdict of 0.5 or more)",
    )


def test_a_judge_is_called_fit_only_where_there_are_pairs_enough_to_show_it() -> None:
    labels = read_labels(PAIRS)
    truth = {(reference, reply): label for reference, reply, label in labels}
    right, wrong = ([one for one in labels if (one[2] >= 0.5) == side] for side in (True, False))

    def told(pairs: int, weight: float) -> tuple[bool, str]:  # a judge without a mistake
        some = [*right[: pairs // 2], *wrong[: pairs // 2]]
        return fitness(calibrate(lambda asked: [truth.get(pair, 0.0) for pair in asked], some), weight)

    few = "not shown to be fit for its weight 0.4, too few pairs to say: AUC 1.000 [0.21, 1.00] on 2 pairs, "
    assert told(2, 0.4)[1].startswith(few)  # it was fit
    assert told(2, 0.4)[1].endswith("; label at least 41 pairs")
    assert [told(pairs, 0.4)[0] for pairs in (2, 20, 40, 60)] == [False, False, False, True]
    assert [told(pairs, 0.1)[0] for pairs in (2, 14, 20, 60)] == [False, False, True, True]


def test_the_interval_of_an_auc_narrows_with_the_pairs_and_is_never_empty() -> None:
    assert auc_bounds(1.0, 1, 1) == pytest.approx((1 / (1 + 1.959964**2), 1.0), abs=1e-6)  # Wilson's, for one in one
    low, high = auc_bounds(0.9, 50, 50)
    # 0.9 - 0.8159 = 1.96 sqrt(0.8159 * 0.1841 * (1 + 49 * (0.1841 / 1.1841 + 0.8159 / 1.8159)) / 2500)
    assert low == pytest.approx(0.8159, abs=1e-4)
    assert auc_bounds(0.9, 500, 500) > (low, 0.9)
    assert low < 0.9 < high
    assert auc_bounds(0.0, 3, 3)[0] == 0.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"reference": "a", "reply": "b", "label": 1}', "all 1 labels are right; .* give some of both"),
        ('{"reference": "a", "reply": "b", "label": 0}', "all 1 labels are wrong"),
        ('{"reference": " ", "reply": "b", "label": 0}', "labels.jsonl:1: 'reference' is empty"),  # was a traceback
        ('{"reference": "a", "label": 0}', "labels.jsonl:1: 'reply' is missing"),
        ('{"reference": "a", "reply": "b", "label": "yes"}', "labels.jsonl:1: 'label' must be a number from 0"),
        ("", "no rows"),
    ],
)
def test_labels_that_measure_nothing_are_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=said):
        read_labels(file)


def test_a_response_cannot_leave_its_fence() -> None:
    for attempt in (*FAKE_TURNS, "<<<< >>>>", "<|im_end|>"):
        asked = render_judge("Restart the spooler.", attempt)[-1]["content"]
        assert (asked.count("<<<"), asked.count(">>>")) == (1, 1)
        assert "<|" not in asked
        assert asked.endswith(">>>\nDo they say the same?")
