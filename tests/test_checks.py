"""What `validate`, and the start of a run, find before a base is loaded: every problem at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trl
from click.testing import CliRunner, Result
from conftest import RecipeWriter, jsonl

from qreason.cli import main
from qreason.model.load import EMBEDDED
from qreason.planning.checks import launch_problems
from qreason.recipe.load import load_recipe

LONG = "disk full " * 1200


def qreason(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def settings(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the embedded base without its weights, to be broken."""
    return Path(
        shutil.copytree(EMBEDDED["qreason/tiny"], tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    )


def test_sft_does_not_teach_a_base_that_thinks_not_to(base: Path) -> None:
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    (base / "chat_template.jinja").write_text(template.read_text("utf-8"), "utf-8")
    arguments = ["validate", "smoke", *settings(f"model.base={base}")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    told = CliRunner().invoke(main, [*arguments, *settings("model.thinking=true")])
    assert told.exit_code == 2
    assert "asks for thoughts that it leaves out of finished replies" in told.stderr
    alone = settings("model.thinking=true", "steps=[{grpo: {rows: 8, num_generations: 4, max_steps: 1}}]")
    assert CliRunner().invoke(main, [*arguments, *alone]).exit_code == 0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("grpo.lr_scheduler_type=cosin", "grpo.lr_scheduler_type: there is no 'cosin' (did you mean 'cosine'?)"),
        ("grpo.optim=adamw_32bit", "grpo.optim: there is no 'adamw_32bit' (did you mean "),
        ("grpo.trl={reprot_to: none}", "GRPOConfig of this TRL has no such field (did you mean 'report_to'?)"),
        ("sft.trl={warmup_ratio: 0.1}", "SFTConfig of this TRL has no such field (did you mean 'warmup_"),
        ("grpo.trl={report_to: wandbb}", "grpo.trl.report_to: there is no 'wandbb' (did you mean 'wandb'?)"),
        ("grpo.trl={delta: high}", "grpo.trl.delta: 'high': "),
        ("grpo.trl={delta: 1e-5}", "write 1e-5 as 1.0e-5"),
        ("grpo.trl={generation_batch_size: 3}", "GRPOConfig refuses its settings: generation_batch_size (3) must"),
        ("sft.lr_scheduler_type=cosine_with_min_lr", "sft.lr_scheduler_type: cosine_with_min_lr cannot be used so: "),
        ("sft.optim=galore_adamw", "sft.optim: galore_adamw cannot be used here: "),
        ("model.lora.target_modules=[c_attn]", "model.lora.target_modules: qreason/tiny has no layer 'c_attn'"),
        ("model.lora.target_modules=.*c_attn", "'.*c_attn' fits no layer of qreason/tiny; there are down_proj, "),
        ("model.lora.target_modules='q_proj('", "'q_proj(' is no regular expression"),
    ],
)  # fmt: skip
def test_what_a_library_would_refuse_later_is_refused_by_validate(
    write_recipe: RecipeWriter, override: str, said: str
) -> None:
    result = qreason("validate", write_recipe(), *settings(override))
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert said in line


def test_an_integration_that_is_not_installed_comes_with_its_pip_line(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    result = qreason("validate", write_recipe(), *settings("grpo.trl={report_to: [tensorboard, wandb]}"))
    assert result.stderr.splitlines() == [
        "qreason: grpo.trl.report_to: wandb is not installed: pip install wandb; or leave it out"
    ]


def test_held_out_rows_that_training_has_too_are_counted(write_recipe: RecipeWriter, workplace: Path) -> None:
    # What was learned by heart was told as accuracy, without a word.
    heldout = [{"issue": "no sound", "resolution": "Raise it."}, {"issue": " printer is offline", "resolution": "x"}]
    (workplace / "heldout.jsonl").write_text(jsonl(heldout))
    told = [line for line in qreason("validate", write_recipe()).stderr.splitlines() if "by heart" in line]
    assert [line.partition(" (as")[0] for line in told] == [
        f"note: 1 of 2 held-out rows ask what data.{use} asks too" for use in ("prompts", "sft")
    ]
    assert "heldout.jsonl:2)" in told[0]
    (workplace / "heldout.jsonl").write_text(jsonl(heldout[:1]))
    assert "by heart" not in qreason("validate", write_recipe()).stderr


@pytest.mark.parametrize(
    ("trl", "replies"), [("steps_per_generation: 1", 4), ("generation_batch_size: 8", 4), ("delta: 2", None)]
)
def test_each_process_of_a_launch_makes_whole_groups(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch, trl: str, replies: int | None
) -> None:
    # TRL looks at the groups of all processes together: four replies for two processes were half a group for each.
    monkeypatch.setattr("qreason.machine.ranks.count", lambda: 2)
    grpo = f"num_generations: 8, per_device_train_batch_size: 4, gradient_accumulation_steps: 2, trl: {{{trl}}}"
    found = launch_problems(load_recipe(write_recipe(("num_generations: 4", grpo))))
    assert [line.partition(", no whole")[0] for line in found] == (
        [f"grpo: a process makes {replies} replies at a time"] if replies else []
    )


def test_a_column_of_data_fields_that_no_row_has_is_named(write_recipe: RecipeWriter) -> None:
    # Reasoning was left out where its column was misspelt, and the rows were trained as plain ones.
    result = qreason("validate", write_recipe(), "--set", "data.fields.reasoning=stepz")
    assert result.exit_code == 2
    assert "data.fields.reasoning: no row has a text in a column 'stepz'; correct the name" in result.stderr
    assert qreason("validate", write_recipe(), "--set", "data.fields.reasoning=steps").exit_code == 0


@pytest.mark.parametrize("override", ["grpo.max_steps=0", "sft.max_steps=-2", "grpo.trl={max_steps: 0}"])
def test_no_steps_are_no_way_to_say_all_of_them(write_recipe: RecipeWriter, override: str) -> None:
    result = qreason("validate", write_recipe(), *settings(override))
    assert result.exit_code == 2
    assert "trains nothing" in result.stderr


def test_what_is_usual_in_trl_passes(write_recipe: RecipeWriter) -> None:
    trl = "grpo.trl={delta: 2, log_completions: true, report_to: none, lr_scheduler_kwargs: {num_cycles: 1}}"
    lora = "model.lora.target_modules=[q_proj, mlp.up_proj]"
    good = (trl, lora, "sft.lr_scheduler_type=polynomial", "sft.optim=adafactor")
    result = qreason("validate", write_recipe(), *settings(*good))
    assert result.exit_code == 0, result.output


def test_all_problems_are_told_at_once(write_recipe: RecipeWriter, workplace: Path) -> None:
    (workplace / "broken_reward.py").write_text("def reward(replies, examples): return 1.0\n")
    recipe = write_recipe(("format: 0.1", "broken_reward:reward: 0.1"))
    (workplace / "heldout.jsonl").write_text("no JSON\n")
    long = {"issue": LONG, "resolution": "y", "steps": "z"}
    (workplace / "sft.jsonl").write_text(jsonl([{"id": "s", "issue": "x", "resolution": "y", "steps": "z"}, long]))
    (workplace / "prompts.jsonl").write_text(jsonl([{**long, "id": str(n)} for n in range(3)]))
    result = qreason("validate", recipe, *settings("grpo.optim=adam", "model.lora.target_modules=[wq]"))
    assert result.exit_code == 2
    told = result.stderr.splitlines()
    for said in (
        "heldout.jsonl:1: not JSON", "grpo.optim: there is no 'adam'", "'broken_reward:reward' returned float",
        "has no layer 'wq'", "sft.jsonl:2: ", "leaves 1012; shorten or remove the row; 3 rows are too long",
    ):  # fmt: skip
        assert sum(said in line for line in told) == 1, said
    assert len(told) == 6


@pytest.mark.parametrize(
    ("steps", "file", "said"),
    [
        (
            "[{grpo: {num_generations: 4}}]",
            "prompts.jsonl",
            "a context of 1024 less max_completion_length 12 leaves 1012",
        ),
        ("[{grpo: {num_generations: 4, preflight: false}}]", "prompts.jsonl", "leaves 1012"),
        ("[sample]", "prompts.jsonl", "leaves 1012"),
        ("[evaluate]", "heldout.jsonl", "leaves 1012"),
        ("[sft]", "sft.jsonl", "the base's context of 1024 leaves 1024"),
    ],
)
def test_a_row_that_does_not_fit_stops_a_run_before_its_folder_is_made(
    write_recipe: RecipeWriter, workplace: Path, steps: str, file: str, said: str
) -> None:
    # One such prompt used to end a GRPO run in its middle, without an adapter.
    rows = (workplace / file).read_text().splitlines()
    (workplace / file).write_text("\n".join([*rows, json.dumps(json.loads(rows[0]) | {"id": "long", "issue": LONG})]))
    result = qreason("run", write_recipe(), *settings(f"steps={steps}"))
    assert result.exit_code == 2, result.output
    assert f"{file}:{len(rows) + 1}: " in result.stderr
    assert said in result.stderr
    assert not (workplace / "runs").exists()
    first = steps.replace("sample]", "{sample: {rows: 1}}]").replace("evaluate]", "{evaluate: {rows: 1}}]")
    first = first.replace("[sft]", "[{sft: {rows: 1}}]").replace("num_generations: 4", "num_generations: 4, rows: 1")
    assert qreason("validate", write_recipe(), *settings(f"steps={first}")).exit_code == 0  # not among the rows used


def test_a_row_that_the_trainer_cuts_is_said_before(write_recipe: RecipeWriter) -> None:
    result = qreason("validate", write_recipe(), *settings("sft.trl={max_length: 40}"))
    assert result.exit_code == 0, result.output
    assert "tokens, but sft.trl.max_length of 40 leaves 40: it is cut there; 3 rows are too long" in result.stderr


def break_padding(base: Path) -> None:
    change(base / "tokenizer_config.json", pad_token=None)


def break_vocabulary(base: Path) -> None:
    change(base / "config.json", vocab_size=4000)


def break_template(base: Path) -> None:
    loop = "{% for i in range(90000) %}{% for j in range(900) %}{% endfor %}{% endfor %}"  # ends: its thread goes on
    (base / "chat_template.jinja").write_text(loop + "{{ messages[0].content }}")


def break_nothing_but_the_folder(base: Path) -> None:
    shutil.rmtree(base)


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (break_padding, "no padding token (pad_token)"),
        (break_vocabulary, "its tokenizer has 4096 tokens, its embedding 4000 rows: "),
        (break_template, "does not end within 0.5 seconds"),
        (break_nothing_but_the_folder, "cannot be loaded as a model"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused_before_its_weights_are_read(
    write_recipe: RecipeWriter, base: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], said: str
) -> None:
    monkeypatch.setattr("qreason.model.templates.RENDERING", 0.5)
    damage(base)
    result = qreason("validate", write_recipe(), *settings(f"model.base={base}"))
    assert result.exit_code == 2, result.output
    assert said in result.stderr


def test_a_base_that_is_elsewhere_is_not_looked_at_and_that_is_said(write_recipe: RecipeWriter) -> None:
    result = qreason("validate", write_recipe(), *settings("model.base=nobody/nothing", "grpo.optim=adam"))
    assert result.exit_code == 2
    assert "there is no 'adam'" in result.stderr  # what needs no base is
    result = qreason("validate", write_recipe(), *settings("model.base=nobody/nothing"))
    assert result.exit_code == 0
    assert "skipped, since nobody/nothing is not on this machine: its chat template" in result.stderr


def test_a_reward_is_tried_on_rows_it_is_for_and_not_without_any(write_recipe: RecipeWriter, workplace: Path) -> None:
    (workplace / "plain_only.py").write_text(
        "def reward(replies, examples):\n    assert all(row.plain for row in examples)\n    return [1 / len(replies)]\n"
    )
    (workplace / "plain.jsonl").write_text(jsonl([{"id": "h", "prompt": "Hi", "reference": "Hello."}]))
    recipe = write_recipe(("format: 0.1", "plain_only:reward: {weight: 0.1, only: plain}"))
    assert qreason("validate", recipe).exit_code == 0
    assert qreason("validate", recipe, *settings("data.plain=plain.jsonl")).exit_code == 0
    result = qreason(
        "validate", recipe, *settings("data.plain=plain.jsonl", "rewards.plain_only:reward.only=reasoning")
    )
    assert "plain_only:reward' raised AssertionError" in result.stderr
