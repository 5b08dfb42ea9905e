"""Reward models from ranked pairs, and rewards of a step's own, on the embedded model through `qreason run`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qreason.cli import main
from qreason.data.pairs import hold_out, rank_draws, read_pairs
from qreason.errors import DataError, ModelError
from qreason.model.classifier import PreferenceModel, with_head
from qreason.model.resident import Resident
from qreason.recipe.load import load_recipe
from qreason.recipe.sections import Data
from qreason.rewards import registry
from qreason.rewards.judged import PreferenceSettings, preference_reward
from qreason.rewards.scoring import Restricted, combine
from qreason.run.session import Session
from qreason.types import Example, Pair, Reply

RecipeWriter = Callable[..., Path]
STEPS = "  - evaluate\n  - sft: {learning_rate: 1e-5}\n  - evaluate\n  - grpo: {num_generations: 4}\n  - merge\n"
KIND = ("Thank you for writing. Please restart the spooler.", "Happy to help: please clear the queue.")
RUDE = ("Read the manual.", "Not my job.")


def write_jsonl(file: str, rows: list[dict[str, Any]]) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def pairs(workplace: Path) -> None:
    """Forty pairs, a friendly reply against a rude one, and rows without reasoning."""
    write_jsonl(
        "pairs.jsonl",
        [{"prompt": f"printer {i} is offline", "chosen": KIND[i % 2], "rejected": RUDE[i // 2 % 2]} for i in range(40)],
    )
    write_jsonl("plain.jsonl", [{"id": f"q{i}", "prompt": f"say {i}", "reference": str(i)} for i in range(4)])


def run(file: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["run", str(file), "--out", "out", *arguments])


def with_pairs(write: RecipeWriter, steps: str) -> Path:
    return write((STEPS, steps), ("  heldout: heldout.jsonl\n", "  pairs: pairs.jsonl\n  plain: plain.jsonl\n"))


# --- the stage -------------------------------------------------------------------------------------

LEARN = """\
  - preference: {max_steps: 12, per_device_train_batch_size: 8, learning_rate: 3e-3, logging_steps: 4}
"""
REINFORCE = """\
  - grpo:
      max_steps: 1
      num_generations: 2
      per_device_train_batch_size: 8
      preflight: false
      plain_share: 0.5
      rewards:
        format: {weight: 0.5, only: reasoning}
        helpfulness: {reward: preference, weight: 1, model: 01-preference, reads: answer, only: plain}
        harmlessness: {reward: preference, weight: 1, model: 01-preference, only: plain}
"""


def test_a_reward_model_tells_held_out_pairs_apart_and_a_later_step_is_paid_by_it(
    pairs: None, write_recipe: RecipeWriter
) -> None:
    file = with_pairs(write_recipe, LEARN + REINFORCE)
    result = run(file, "--set", "sampling.max_completion_length=8")
    assert result.exit_code == 0, result.output
    figures = json.loads(Path("out/01-preference/preference.json").read_text())
    assert (figures["pairs"], figures["heldout"]) == (36, 4)
    assert figures["accuracy"]["mean"] == 1.0
    assert abs(figures["level"]["mean"]) < figures["margin"]["mean"] / 2  # 0 lies between the better and the worse
    assert "of 4 held-out pairs 100.0%" in result.output
    rollouts = [json.loads(line) for line in Path("out/02-grpo/replies.jsonl").read_text().splitlines()]
    assert {row["id"][0] for row in rollouts} == {"p", "q"}
    for row in rollouts:
        parts = row["parts"]
        if row["id"].startswith("q"):
            assert parts["format"] is None
            assert row["total"] == pytest.approx(parts["helpfulness"] + parts["harmlessness"])
        else:
            assert parts["helpfulness"] is parts["harmlessness"] is None
            assert row["total"] == pytest.approx(0.5 * parts["format"])
    nodes = {node["name"]: node for node in json.loads(Path("out/lineage.json").read_text())["nodes"]}
    assert nodes["02-grpo"]["from"] == "base"  # a reward model is no policy
    assert nodes["01-preference"]["numbers"]["heldout_accuracy"] == 1.0
    saved = "out/01-preference/reward_model"
    opened = Session.reopen(Path("out"))
    model = PreferenceModel(saved, opened.resident)
    kind, rude = model([("printer 99 is offline", KIND[0]), ("printer 99 is offline", RUDE[0])])
    assert kind is not None
    assert rude is not None
    assert kind > 0.5 > rude
    level = json.loads(Path(saved, "level.json").read_text())["level"]
    (output,) = model.outputs([("printer 99 is offline", KIND[0])])
    assert kind == pytest.approx(1 / (1 + math.exp(level - output)))
    # the folder by itself, on a base of its own, says the same: nothing depends on sharing
    opened.resident.settings = opened.resident.settings.model_copy(update={"base": "another"})
    alone = PreferenceModel(saved, opened.resident)([("printer 99 is offline", KIND[0])])
    assert alone == pytest.approx([kind], abs=1e-5)


def test_a_reward_model_begins_with_the_weights_of_the_policy_it_starts_from(
    pairs: None, write_recipe: RecipeWriter
) -> None:
    idle = LEARN.replace("max_steps: 12", "max_steps: 1").replace("3e-3", "1e-12")
    assert (
        run(with_pairs(write_recipe, f"  - sft: {{num_train_epochs: 3, learning_rate: 1e-2}}\n{idle}")).exit_code == 0
    )
    from safetensors.torch import load_file

    policy = load_file("out/01-sft/adapter/adapter_model.safetensors")
    model = load_file("out/02-preference/reward_model/adapter_model.safetensors")
    assert policy.keys() == {key for key in model if "score" not in key}
    assert all((policy[key] - model[key]).abs().max() < 1e-6 for key in policy)
    assert any(policy[key].abs().max() > 0 for key in policy if "lora_B" in key)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_reward_model_shares_the_weights_of_the_base_and_leaves_the_policy_alone(quantization: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from qreason.machine.hardware import detect
    from qreason.recipe.sections import Lora, Model

    resident = Resident(Model(base="qreason/tiny", quantization=quantization), detect())  # type: ignore[arg-type]
    bare = {tensor.data_ptr() for tensor in resident.model.parameters()}
    resident.new_adapter(Lora())  # a policy is on the base
    before = sum(parameter.requires_grad for parameter in resident.model.parameters())
    ids = torch.arange(20, 40).unsqueeze(0)
    with resident.inference() as model:
        said = model(ids).logits
    classifier = with_head(resident)
    classifier = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=4))
    own = {name for name, tensor in classifier.named_parameters() if tensor.data_ptr() not in bare}
    assert all("lora_" in name or "score" in name for name in own)
    assert len(bare) - 1 <= len({tensor.data_ptr() for tensor in classifier.parameters()} & bare)  # lm_head, if untied
    for parameter in classifier.parameters():
        parameter.data.add_(0.1) if parameter.requires_grad else None
    assert classifier(ids).logits.shape == (1, 1)
    assert sum(parameter.requires_grad for parameter in resident.model.parameters()) == before
    with resident.inference() as model:
        assert torch.equal(model(ids).logits, said)


@pytest.mark.slow
def test_sampled_replies_become_pairs_of_best_and_worst(pairs: None, write_recipe: RecipeWriter) -> None:
    def draw(id_: str, number: int, total: float | None) -> dict[str, Any]:
        return {"id": id_, "prompt": f"P {id_}", "reply": f"reply {number}", "total": total}

    rows = [
        draw("a", 0, 0.2),
        draw("a", 1, 0.9),
        draw("a", 2, None),
        draw("a", 3, 0.1),
        draw("b", 4, 1),
        draw("b", 5, 1),
    ]
    assert rank_draws(Path("draws.jsonl"), rows) == [Pair("P a", "reply 1", "reply 3", source="draws.jsonl:2")]
    with pytest.raises(DataError, match="no prompt has replies that earned different totals"):
        rank_draws(Path("draws.jsonl"), rows[4:])
    sampled = LEARN.replace("max_steps: 12", "data: sampled, max_steps: 1")
    asked = [
        {"id": f"p{i}", "issue": f"printer {i} is offline", "resolution": "Restart the spooler."} for i in range(4)
    ]
    write_jsonl("prompts.jsonl", asked)
    steps = f"  - sft: {{num_train_epochs: 25, learning_rate: 1e-2}}\n  - sample: {{n: 2}}\n{sampled}"
    arguments = (str(with_pairs(write_recipe, steps)), "--out", "out", "--set", "sampling.max_completion_length=32")
    for stage in ("sft", "sample"):
        assert CliRunner().invoke(main, [stage, *arguments]).exit_code == 0
    draws = [json.loads(line) for line in Path("out/02-sample/draws.jsonl").read_text().splitlines()]
    worse = [row | {"reply": "No.", "total": row["total"] - 0.1} if row["number"] else row for row in draws]
    write_jsonl("out/02-sample/draws.jsonl", worse)
    result = CliRunner().invoke(main, ["preference", *arguments])
    assert result.exit_code == 0, result.output
    assert "of 1 held-out pairs" in result.output
    assert Path("out/03-preference/reward_model/adapter_config.json").exists()


def test_all_pairs_to_a_prompt_are_on_one_side() -> None:
    several = [Pair(f"p{i % 10}", f"good {i}", "bad") for i in range(40)]
    learnt, kept_out = hold_out(several, 0.2, seed=1)
    assert len(kept_out) == 8
    assert not {pair.prompt for pair in learnt} & {pair.prompt for pair in kept_out}
    with pytest.raises(DataError, match="1 prompts, a part of them held out"):
        hold_out([Pair("p", "a", "b", source="pairs.jsonl:1")] * 3, 0.1, seed=1)


# --- what a reward is for --------------------------------------------------------------------------


def test_a_reward_for_some_rows_does_not_touch_the_total_of_the_others() -> None:
    def unjudged(replies: Any, examples: Any) -> list[float | None]:
        return [None if reply.text == "odd" else 0.5 for reply in replies]

    limited = {"format": Restricted(registry.REWARDS["format"], plain=False)}
    limited["liked"] = Restricted(unjudged, plain=True)
    reasoned, plain = Example("a", "p", "r"), Example("b", "p", "r", plain=True)
    replies = [Reply("<answer>r</answer>"), Reply("<answer>r</answer>"), Reply("odd"), Reply("odd")]
    scores = combine(limited, {"format": 1, "liked": 1}, replies, [reasoned, plain, plain, reasoned])
    assert [score.total for score in scores] == [0.4, 0.5, None, 0.0]
    assert [score.parts for score in scores] == [
        {"format": 0.4, "liked": None},
        {"format": None, "liked": 0.5},
        {"format": None, "liked": None},
        {"format": 0.0, "liked": None},
    ]


def test_the_answer_alone_is_read_where_a_preference_model_is_told_so() -> None:
    seen: list[tuple[str, str]] = []

    def model(asked: Any) -> list[float | None]:
        seen.extend(asked)
        return [0.5] * len(asked)

    replies = [Reply("<reasoning>rude</reasoning><answer>kind</answer>"), Reply("no tags"), Reply("<answer>cut")]
    for reads in ("answer", "reply"):
        preference_reward(PreferenceSettings(model="m", reads=reads), model)(replies, [Example("x", "p", "r")] * 3)  # type: ignore[arg-type]
    assert [text for _, text in seen] == ["kind", "no tags", "", *(reply.text for reply in replies)]


def test_a_gold_check_asks_only_the_rows_that_a_reward_is_for(pairs: None, write_recipe: RecipeWriter) -> None:
    steps = REINFORCE.replace("preflight: false", "preflight: true").replace("01-preference", "02-preference")
    steps = steps.replace("        helpf", "        format_strict: {weight: 1}\n        helpf")
    result = run(with_pairs(write_recipe, f"  - sft: {{max_steps: 1}}\n{LEARN.replace('12', '1')}{steps}"))
    assert result.exit_code == 2
    assert "plain.jsonl:" in result.output
    assert "earns 0.0 of 1 from 'format_strict'" in result.output
    assert "give the reward `only: reasoning`" in result.output


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "p", "chosen": "a b", "rejected": "a  b "}, "chosen and rejected are the same reply"),
        ({"prompt": "p", "chosen": "a"}, "no column 'rejected'"),
        ({"prompt": "p", "chosen": "a", "rejected": ["b"]}, "'rejected' is list, not text"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "'prompt' is empty"),
    ],
)
def test_a_row_that_is_no_pair_is_refused_with_its_line(
    pairs: None, write_recipe: RecipeWriter, row: dict[str, Any], told: str
) -> None:
    write_jsonl("pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}, row])
    with pytest.raises(DataError, match=rf"pairs.jsonl:2: {told}"):
        read_pairs("pairs.jsonl", Data())
    result = CliRunner().invoke(main, ["validate", str(with_pairs(write_recipe, LEARN))])
    assert (result.exit_code, "pairs.jsonl:2" in result.output) == (2, True)


def test_a_model_that_is_no_classifier_is_no_preference_model(own_resident: Resident, tmp_path: Path) -> None:
    from transformers import AutoConfig

    with pytest.raises(ModelError, match="qreason/tiny: a Qwen2ForCausalLM; a preference model is a sequence classif"):
        PreferenceModel("qreason/tiny", own_resident)
    config = AutoConfig.from_pretrained(own_resident.model.config._name_or_path)
    config.architectures, config.num_labels = ["Qwen2ForSequenceClassification"], 3
    config.save_pretrained(tmp_path)
    own_resident.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="3 labels"):
        PreferenceModel(str(tmp_path), own_resident)
    (tmp_path / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM", "base_model_name_or_path": "m"}')
    with pytest.raises(ModelError, match="an adapter for CAUSAL_LM, not SEQ_CLS"):
        PreferenceModel(str(tmp_path), own_resident)


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (
            LEARN + REINFORCE.replace("01-pre", "02-pre"),
            "no earlier preference step '02-preference'; there are 01-pref",
        ),
        (REINFORCE, "no earlier preference step '01-preference'; there are none"),
        (LEARN + "  - sft: {from: 01-preference}\n", "from: no earlier '01-preference'; there are newest, base"),
        (LEARN.replace("max_steps", "data: sampled, max_steps"), "preference.data: sampled: there is no sample step"),
        (LEARN + REINFORCE.replace("only: reasoning", "only: rows"), "only: Input should be 'reasoning' or 'plain'"),
        (LEARN + REINFORCE.replace("reward: preference", "reward: preferense"), "unknown reward 'preferense' (did you"),
        (
            LEARN + REINFORCE.replace("reads: answer", "read: answer"),
            "preference: unknown setting 'read' (did you mean",
        ),
    ],
)
def test_what_cannot_be_is_said_before_the_run(pairs: None, write_recipe: RecipeWriter, steps: str, told: str) -> None:
    result = CliRunner().invoke(main, ["validate", str(with_pairs(write_recipe, steps))])
    assert result.exit_code == 2
    assert told in result.output


def test_a_recipe_with_rewards_of_a_step_loads_again_as_it_was_written(pairs: None, write_recipe: RecipeWriter) -> None:
    recipe = load_recipe(with_pairs(write_recipe, LEARN + REINFORCE))
    assert type(recipe).model_validate(recipe.dump()) == recipe
    assert list(recipe.rewards_of(recipe.steps[1])) == ["format", "helpfulness", "harmlessness"]
    assert recipe.rewards_of(recipe.steps[0]) == recipe.rewards
