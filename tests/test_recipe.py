"""Recipes: strict, overridable, and every problem named with its line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from qreason.errors import RecipeError
from qreason.recipe.load import load_recipe
from qreason.recipe.schema import Recipe
from qreason.recipe.training import Grpo, Sft, Training
from qreason.rewards import registry
from qreason.types import Example, Reply

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
RecipeWriter = Callable[..., Path]


def problems(file: Path, *overrides: str) -> list[str]:
    """The lines of the error that loading a recipe gives."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    return str(caught.value).splitlines()


def line_of(file: Path, text: str) -> int:
    return next(number for number, line in enumerate(file.read_text().splitlines(), 1) if text in line)


# --- what loads ----------------------------------------------------------------------------------


def test_there_are_shipped_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_shipped_recipe_loads_and_says_what_it_is(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.name == "-".join(file.relative_to(FOLDER).with_suffix("").parts)  # its run folder is its own
    assert file.read_text(encoding="utf-8").startswith("# ")
    assert Recipe.model_validate(recipe.dump()) == recipe


def test_exponent_without_a_point_is_a_float(write_recipe: RecipeWriter) -> None:
    # PyYAML reads 1e-5 as a string.
    sft = load_recipe(write_recipe()).steps[1].sft
    assert sft is not None
    assert sft.learning_rate == 1e-5


def test_bare_step_takes_its_defaults(write_recipe: RecipeWriter) -> None:
    recipe = load_recipe(write_recipe(("- sft: {learning_rate: 1e-5}", "- sft:")))
    assert [step.stage for step in recipe.steps] == ["evaluate", "sft", "evaluate", "grpo", "merge"]
    assert recipe.steps[1].settings == Sft()


def test_data_lies_beside_the_recipe_wherever_it_is_loaded_from(
    write_recipe: RecipeWriter, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_recipe()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert load_recipe(file).data.sft == str(file.parent / "sft.jsonl")


def test_hub_ids_are_kept(write_recipe: RecipeWriter) -> None:
    data = load_recipe(write_recipe(("sft: sft.jsonl", "sft: openai/gsm8k"))).data
    assert data.sft == "openai/gsm8k"
    assert Path(str(data.heldout)).is_absolute()


def test_trl_fields_pass_through(write_recipe: RecipeWriter) -> None:
    recipe = load_recipe(write_recipe(("{num_generations: 4}", "{num_generations: 4, trl: {delta: 1.5}}")))
    assert recipe.steps[3].grpo == Grpo(num_generations=4, trl={"delta": 1.5})


def test_dump_loads_again_to_an_equal_recipe(write_recipe: RecipeWriter, workplace: Path) -> None:
    recipe = load_recipe(write_recipe(), ["grpo.trl.delta=1.5", "data.fields.prompt=issue"], seed=3)
    again = workplace / "again.yaml"
    again.write_text(yaml.safe_dump(recipe.dump()))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("stage", "teacher"),
    [
        ("distill", "{model: qreason/tiny}"),
        ("sample", "{model: qreason/tiny, quantization: nf4}"),
        ("sample", "{model: m, endpoint: 'http://host', retries: 2}"),
    ],
)
def test_a_teacher_comes_back_from_a_run_folder(write_recipe: RecipeWriter, stage: str, teacher: str) -> None:
    # A local teacher was refused when the run went on: its folder's recipe has the fields of a server, with defaults.
    recipe = load_recipe(write_recipe(), [f"steps=[{{{stage}: {{teacher: {teacher}}}}}]"])
    assert Recipe.model_validate(recipe.dump()) == recipe


# --- overrides -----------------------------------------------------------------------------------


def test_set_overrides_plain_fields(write_recipe: RecipeWriter) -> None:
    sets = ["model.base=org/model", "rewards.format=5e-1", "model.lora.r=4", "data.fields.prompt=issue"]
    recipe = load_recipe(write_recipe(), sets)
    assert recipe.model.base == "org/model"
    assert recipe.weights == {"correctness": 0.1, "format": 0.5}
    assert recipe.model.lora.r == 4
    assert recipe.data.fields == {"prompt": "issue"}


def test_set_reaches_every_step_of_a_stage(write_recipe: RecipeWriter) -> None:
    recipe = load_recipe(write_recipe(), ["evaluate.rows=7", "sft.learning_rate=3e-4", "sft.trl.neftune_noise_alpha=5"])
    measured = [step.evaluate.rows for step in recipe.steps if step.evaluate]
    assert measured == [7, 7]
    assert recipe.steps[1].sft == Sft(learning_rate=3e-4, trl={"neftune_noise_alpha": 5})


def test_later_set_wins(write_recipe: RecipeWriter) -> None:
    assert load_recipe(write_recipe(), ["seed=4", "seed=5"]).seed == 5


def test_seed_argument_wins_over_recipe_and_set(write_recipe: RecipeWriter) -> None:
    assert load_recipe(write_recipe(("name: small", "name: small\nseed: 2")), ["seed=4"], seed=9).seed == 9


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.lora.r=-1", "model.lora.r: Input should be greater than 0"),
        ("sft.learning_rate=fast", "steps.1.sft.learning_rate: Input should be a valid number"),
        ("model.lora.rank=4", "unknown key 'model.lora.rank'"),
        ("sampling={temperature: .nan}", "sampling.temperature: Input should be a finite number"),
    ],
)
def test_a_wrong_value_of_set_is_told_of_the_set_and_not_of_a_line(
    write_recipe: RecipeWriter, override: str, said: str
) -> None:
    (line,) = problems(write_recipe(), "seed=3", override)
    assert line.startswith(f"--set {override.partition('=')[0]}: {said}")


def test_a_temperature_that_makes_logits_infinite_is_refused(write_recipe: RecipeWriter) -> None:
    (line,) = problems(write_recipe(("temperature: 0.9", "temperature: 1e-40")))
    assert line.endswith("sampling.temperature: Input should be 0 (greedy) or at least 0.0001")


def test_set_of_a_stage_that_is_not_there_is_refused(write_recipe: RecipeWriter) -> None:
    assert problems(write_recipe(("  - merge\n", "")), "merge.dtype=float32") == [
        "--set merge.dtype=float32: the recipe has no merge step"
    ]


@pytest.mark.parametrize("override", ["seed", "=3", "model..base=x", ".=1", "sft=3", ""])
def test_set_in_another_form_is_refused(write_recipe: RecipeWriter, override: str) -> None:
    (problem,) = problems(write_recipe(), override)
    assert problem.startswith(f"--set {override}: write it as key=value")


def test_set_below_a_plain_value_is_refused(write_recipe: RecipeWriter) -> None:
    (problem,) = problems(write_recipe(), "name.first=x")
    assert "'name' holds a value, not a mapping" in problem


def test_set_of_a_step_hides_no_mistake_in_it(write_recipe: RecipeWriter) -> None:
    # The second stage of such a step was left out without a word, and a plain value was a traceback.
    step = "  - sft: {learning_rate: 1e-5}\n"
    with pytest.raises(RecipeError, match="start each stage with its own dash"):
        load_recipe(write_recipe((step, f"{step}    evaluate: {{}}\n")), ["sft.max_steps=1"])
    with pytest.raises(RecipeError, match=r"--set sft\.max_steps=1: the sft step holds a value, not a mapping"):
        load_recipe(write_recipe((step, "  - sft: 5\n")), ["sft.max_steps=1"])


def test_set_below_an_anchor_leaves_its_aliases(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe(  # both were changed
        ("- sft: {learning_rate: 1e-5}", "- sft: {trl: &shared {lr_scheduler_kwargs: {a: 1}}}"),
        ("num_generations: 4", "num_generations: 4, trl: *shared"),
    )
    steps = [step.settings for step in load_recipe(recipe, ["sft.trl.lr_scheduler_kwargs.a=2"]).steps]
    assert [step.trl["lr_scheduler_kwargs"]["a"] for step in steps if isinstance(step, Training)] == [2, 1]


def test_set_below_a_key_without_a_value_gives_it_one(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe(("- sft: {learning_rate: 1e-5}", "- sft: {trl: }"))
    assert load_recipe(recipe, ["sft.trl.max_length=64"]).steps[1].sft.trl == {"max_length": 64}  # type: ignore[union-attr]


def test_set_of_an_unknown_key_names_the_nearest(write_recipe: RecipeWriter) -> None:
    (problem,) = problems(write_recipe(), "sft.learning_rat=1")
    assert "unknown key 'steps.1.sft.learning_rat' (did you mean 'learning_rate'?)" in problem


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("rewards:", "reward:", "unknown key 'reward' (did you mean 'rewards'?)"),
        ("learning_rate:", "learningrate:", "unknown key 'steps.1.sft.learningrate' (did you mean 'learning_rate'?)"),
        ("- merge", "- merg", "unknown key 'steps.4.merg' (did you mean 'merge'?)"),
        ("heldout:", "held_out:", "unknown key 'data.held_out' (did you mean 'heldout'?)"),
        ("base:", "bas:", "unknown key 'model.bas' (did you mean 'base'?)"),
        ("temperature: 0.9", "temperature: hot", "sampling.temperature: "),
        ("format: 0.1", "format: -0.1", "rewards.format.weight: "),
        ("format: 0.1", "format: .nan", "rewards.format.weight: "),
        ("format: 0.1", "format: .inf", "rewards.format.weight: "),
        ("format: 0.1", "cosine_length: {weight: 1, right_long: .inf}", "right_long: Input should be a finite number"),
        ("format: 0.1", "judge: {weight: 1, timeout: .inf}", "timeout: Input should be a finite number"),
        ("temperature: 0.9", "temperature: .inf", "sampling.temperature: Input should be a finite number"),
        ("learning_rate: 1e-5", "learning_rate: .inf", "steps.1.sft.learning_rate: Input should be a finite number"),
        ("learning_rate: 1e-5", "num_train_epochs: 1e300", "steps.1.sft.num_train_epochs: Input should be less than"),
        ("correctness: 0.1, format: 0.1", "correctness: 0, format: 0.0", "all weights are 0"),
        ("{correctness: 0.1, format: 0.1}", "{}", "rewards: "),
        ("format: 0.1", "formats: 0.1", "unknown reward 'formats' (did you mean 'format'?)"),
        ("format: 0.1", "format: {weight: 0.1, n: 3}", "format: unknown setting 'n'; it has none but weight"),
        ("format: 0.1", "repetition: {weight: 1, m: 3}", "unknown setting 'm'; there are weight, n"),
        ("format: 0.1", "repetition: {n: 3}", "'rewards.repetition.weight' is missing"),
        ("format: 0.1", "repetition: {weight: 1, n: many}", "repetition: n: Input should be a valid integer"),
        ("format: 0.1", "judge: {weight: 1, endpont: x}", "unknown setting 'endpont' (did you mean 'endpoint'?)"),
        ("format: 0.1", "judge: {weight: 1, endpoint: x}", "judge: endpoint and model go together"),
        ("format: 0.1", "judge: {weight: 1, base: a, adapter: b}", "judge: adapter and base: a judge is one of them"),
        ("format: 0.1", "my_module:mine: 0.1", "my_module:mine: No module named 'my_module'"),
        ("num_generations: 4", "num_generations: 3", "must be a multiple of num_generations (3)"),
        ("num_generations: 4", "num_generations: 1", "steps.3.grpo.num_generations: "),
        ("- merge", "- {merge: , sft: }", "a step is one stage"),
        ("name: small", "name: ../small", "name: "),
    ],
)
def test_problem_is_named_with_its_line(write_recipe: RecipeWriter, old: str, new: str, said: str) -> None:
    file = write_recipe((old, new))
    assert any(line.startswith(f"{file}:{line_of(file, new)}: ") and said in line for line in problems(file))


@pytest.mark.parametrize(
    ("trl", "said"),
    [
        ("{max_length: abc}", "max_length: 'abc' is no whole number above 0"),  # was a traceback of plan and validate
        ("{max_length: -5}", "max_length: -5 is no whole number above 0"),
        ("{temperature: 0.5}", "temperature: set sampling.temperature"),  # ratios of another policy than the drawn one
        ("{reward_weights: [1, 2]}", "reward_weights: give the weights in rewards"),
        ("{eval_strategy: steps}", "eval_strategy: a run measures in its evaluate steps"),
        ("{use_vllm: true}", "use_vllm: replies are made by qreason"),
        ("{learning_rate: fast}", "learning_rate: 'fast': Input should be a valid number"),
    ],
)
def test_fields_of_trl_that_a_run_reads_or_decides_itself_are_checked(
    write_recipe: RecipeWriter, trl: str, said: str
) -> None:
    (line,) = problems(write_recipe(("{learning_rate: 1e-5}", f"{{trl: {trl}}}")))
    assert f"small.yaml:11: steps.1.sft.trl: {said}" in line


def test_seed_that_numpy_refuses_is_refused(write_recipe: RecipeWriter) -> None:
    # It was a traceback after the first evaluation.
    assert problems(write_recipe(), "seed=4294967296")[0].endswith("seed: Input should be less than 4294967296")


def test_all_problems_are_reported_at_once(write_recipe: RecipeWriter) -> None:
    file = write_recipe(("temperature: 0.9", "temperatur: 0.9"), ("format: 0.1", "format: -1"), ("- merge", "- merg"))
    assert sorted(line.split(":")[1] for line in problems(file)) == ["14", "7", "8"]


def test_missing_key_is_named(write_recipe: RecipeWriter) -> None:
    (problem,) = problems(write_recipe(("name: small\n", "")))
    assert problem.endswith(": 'name' is missing")


def test_every_missing_data_file_is_named_with_its_line(write_recipe: RecipeWriter) -> None:
    file = write_recipe(("sft: sft.jsonl", "sft: nowhere.jsonl"), ("heldout: heldout.jsonl", "heldout: ./gone"))
    first, second = problems(file)
    assert first.startswith(f"{file}:4: data.sft: no file nowhere.jsonl")
    assert second.startswith(f"{file}:6: data.heldout: no file ./gone")


def test_step_without_its_data_is_refused(write_recipe: RecipeWriter) -> None:
    (problem,) = problems(write_recipe(("  prompts: prompts.jsonl\n", "")))
    assert "data.prompts is missing: the grpo step needs prompts" in problem


def test_evaluating_twice_in_a_row_is_refused(write_recipe: RecipeWriter) -> None:
    (problem,) = problems(write_recipe(("- merge", "- evaluate\n  - evaluate")))
    assert "two evaluate steps in a row" in problem


def test_file_that_is_not_utf8_is_refused(workplace: Path) -> None:
    file = workplace / "latin.yaml"
    file.write_bytes("name: schön".encode("latin-1"))
    (problem,) = problems(file)
    assert problem.startswith(f"{file}: not UTF-8")


@pytest.mark.parametrize("text", ["name: x\nmodel: [1", "name: x\n\tmodel: y", "name: 'x\n"])
def test_file_that_is_not_yaml_is_refused_with_a_line(workplace: Path, text: str) -> None:
    file = workplace / "broken.yaml"
    file.write_text(text)
    (problem,) = problems(file)
    assert problem.startswith((f"{file}:1: not YAML", f"{file}:2: not YAML", f"{file}:3: not YAML"))


def test_binary_file_is_refused_in_one_line(workplace: Path) -> None:
    file = workplace / "binary.yaml"
    file.write_bytes(b"name: \x00\x01")
    (problem,) = problems(file)
    assert problem.startswith(f"{file}: not YAML")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("2020-13-01", "'2020-13-01' is no timestamp"),
        ("!!float x", "'x' is no float"),
        ("!!int ''", "'' is no int"),
        ("!!bool maybe", "'maybe' is no bool"),
        ("9" * 5000, "is no int"),
        ("[" * 3000 + "]" * 3000, "nest"),
        ("[" * 200 + "]" * 200, "nested too deeply"),
        ("&a [*a]", "a value that contains itself"),
    ],
)
def test_value_that_yaml_cannot_build_is_refused_with_its_line(
    write_recipe: RecipeWriter, value: str, said: str
) -> None:
    file = write_recipe(("max_completion_length: 12", f"max_completion_length: {value}"))
    (problem,) = problems(file)
    assert problem.startswith(f"{file}: not YAML" if "itself" in said else f"{file}:8: not YAML")
    assert said in problem
    assert len(problem) < len(str(file)) + 200


@pytest.mark.parametrize("value", ["2020-13-01", "!!float x", "[" * 3000, "9" * 5000])
def test_set_value_that_yaml_cannot_build_is_text(write_recipe: RecipeWriter, value: str) -> None:
    (problem,) = problems(write_recipe(), f"sampling.max_completion_length={value}")
    assert "sampling.max_completion_length: " in problem
    assert "integer" in problem
    (problem,) = problems(write_recipe(), "name=\ud800")
    assert "not UTF-8" in problem


def test_folder_is_no_recipe_and_an_overlong_path_no_traceback(write_recipe: RecipeWriter, workplace: Path) -> None:
    assert problems(workplace)[0].startswith(f"{workplace}: a folder; give a recipe file")
    assert problems(Path())[0].startswith(".: a folder")
    assert "no such recipe file" in problems(Path("x" * 5000))[0]
    for path in ("x" * 300 + ".jsonl", "~nobody/x.jsonl", "a\0b.csv"):
        assert "data.sft: no file" in problems(write_recipe(), f'data.sft="{path}"'.replace("\0", "\\0"))[0]


@pytest.mark.parametrize(
    "name", ["rows.json", "rows.tsv", "ROWS.JSONL", "rows.txt", "a/b/c", "C:\\rows.csv", "my rows"]
)
def test_what_looks_like_a_file_is_no_hub_id(write_recipe: RecipeWriter, workplace: Path, name: str) -> None:
    (problem,) = problems(write_recipe(), f"data.sft='{name}'")
    assert f"data.sft: no file {name} here" in problem


def test_null_survives_the_way_through_a_run_folder(write_recipe: RecipeWriter) -> None:
    # A null whose default is another value was left out, and the same recipe was then refused as changed.
    steps = "steps=[{sample: {language: null, keep: {}}}, {sft: {data: sampled}}]"
    recipe = load_recipe(write_recipe(), [steps])
    assert Recipe.model_validate(recipe.dump()) == recipe
    assert recipe.dump()["steps"][0]["sample"]["language"] is None


def test_no_secret_is_in_a_dumped_recipe(write_recipe: RecipeWriter) -> None:
    address = "http://me:planted@host/v1?api_key=planted"
    judge = f"rewards={{judge: {{weight: 1, endpoint: '{address}', model: m}}}}"
    recipe = load_recipe(write_recipe(), [judge])
    assert recipe.rewards["judge"].settings["endpoint"] == address
    assert recipe.dump()["rewards"]["judge"]["endpoint"] == "http://***@host/v1?api_key=***"


@pytest.mark.parametrize("setting", ["api_key: sk-planted", 'endpoint: "http://me:planted @host/v1"'])
def test_a_key_in_place_of_its_name_is_refused_and_not_shown(write_recipe: RecipeWriter, setting: str) -> None:
    given = {"endpoint": "'http://h/v1'"} if "api_key" in setting else {}
    inner = ", ".join([setting, "model: m", *(f"{key}: {value}" for key, value in given.items())])
    (problem,) = problems(write_recipe(), f"rewards={{judge: {{weight: 1, {inner}}}}}")
    assert "planted" not in problem
    assert "not the key itself" in problem or "no spaces" in problem


@pytest.mark.parametrize("text", ["", "just words", "- a\n- list\n"])
def test_file_that_is_no_mapping_is_refused(workplace: Path, text: str) -> None:
    file = workplace / "other.yaml"
    file.write_text(text)
    (problem,) = problems(file)
    assert problem.startswith(f"{file}: a recipe is a mapping")


def test_unknown_recipe_name_gives_the_nearest(workplace: Path) -> None:
    (problem,) = problems(Path("quickstrat"))
    assert "(did you mean 'quickstart'?)" in problem


def test_loaded_recipe_cannot_be_changed(write_recipe: RecipeWriter) -> None:
    recipe = load_recipe(write_recipe())
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 2  # type: ignore[misc]


def test_a_key_that_is_there_twice_is_named_with_its_line(write_recipe: RecipeWriter) -> None:
    # The last value won, silently.
    file = write_recipe(("sampling:", "rewards: {length: 1}\nsampling:"))
    with pytest.raises(RecipeError, match=r"small.yaml:8: not YAML: duplicate key 'rewards'"):
        load_recipe(file)


def test_evaluations_with_different_settings_are_refused(write_recipe: RecipeWriter) -> None:
    # Comparing them ended in a traceback after training.
    file = write_recipe(("  - evaluate\n  - sft", "  - evaluate: {rows: 1}\n  - sft"))
    with pytest.raises(RecipeError, match="cannot be compared"):
        load_recipe(file)


# --- rewards with settings, and of one's own -------------------------------------------------------


def test_a_reward_with_settings_loads_again_as_it_was(write_recipe: RecipeWriter, workplace: Path) -> None:
    recipe = load_recipe(write_recipe(("format: 0.1", "repetition: {weight: 0.1, n: 4}")))
    assert recipe.weights == {"correctness": 0.1, "repetition": 0.1}
    assert recipe.dump()["rewards"] == {"correctness": 0.1, "repetition": {"weight": 0.1, "n": 4}}
    again = workplace / "again.yaml"
    again.write_text(yaml.safe_dump(recipe.dump()))
    assert load_recipe(again) == recipe


def test_settings_of_a_reward_are_overridden_by_set(write_recipe: RecipeWriter) -> None:
    recipe = load_recipe(write_recipe(("format: 0.1", "repetition: {weight: 0.1}")), ["rewards.repetition.n=5"])
    assert recipe.rewards["repetition"].settings == {"n": 5}


def test_a_reward_of_ones_own_lies_beside_the_recipe(write_recipe: RecipeWriter, workplace: Path) -> None:
    (workplace / "my_rewards.py").write_text(
        "def short(replies, examples, *, most: int = 10):\n"
        "    return [float(len(reply.text.split()) <= most) for reply in replies]\n"
    )
    recipe = load_recipe(write_recipe(("format: 0.1", "my_rewards:short: {weight: 0.3, most: 2}")))
    built = registry.build({name: reward.settings for name, reward in recipe.rewards.items()}, lambda settings: None, 9)
    example = Example("x", "p", "r")
    assert built["my_rewards:short"]([Reply("one two"), Reply("one two three")], [example, example]) == [1.0, 0.0]
    with pytest.raises(RecipeError, match="unknown setting 'least'; there are weight, most"):
        load_recipe(write_recipe(("format: 0.1", "my_rewards:short: {weight: 0.3, least: 2}")))
    with pytest.raises(RecipeError, match="my_rewards has no function 'long'"):
        load_recipe(write_recipe(("format: 0.1", "my_rewards:long: 0.3")))


def test_the_folder_of_a_judge_adapter_comes_back_absolute(write_recipe: RecipeWriter, workplace: Path) -> None:
    recipe = load_recipe(write_recipe(("format: 0.1", "judge: {weight: 0.4, adapter: ./judge/adapter}")))
    assert recipe.rewards["judge"].settings["adapter"] == str(workplace / "judge" / "adapter")
