"""Pushing to a Hub that fails now and then, and pulling from it: all of a push is there, or it says what is not."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from fake_hub import TOKEN, FakeHub
from huggingface_hub import constants
from safetensors.torch import load_file

from qreason.cli import main
from qreason.errors import RecipeError
from qreason.hub import access as talking
from qreason.hub.mirror import mirrored, open_mirror
from qreason.machine.files import write_json
from qreason.recipe.load import load_recipe
from qreason.recipe.sections import Lora
from qreason.run.session import Session
from qreason.stages.pull import recipe_of

WEIGHTS = "adapter/adapter_model.safetensors"
MEASURE = {"mean": 0.5, "low": 0.421, "high": 0.579}


def call(*arguments: str | Path, answer: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=answer)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder, with an adapter, a merged model, GGUF files that are none, and a report."""
    folder = tmp_path_factory.mktemp("made") / "run"
    overrides = ["steps=[sft, evaluate, merge]", "sampling.max_completion_length=16"]
    run = Session.open(load_recipe("smoke", overrides), folder, say=lambda line: None)
    run.resident.new_adapter(Lora(r=4))
    run.resident.model.peft_config["default"].base_model_name_or_path = "qreason/tiny"
    run.resident.model.save_pretrained(str(folder / "01-sft" / "adapter"), save_embedding_layers=False)
    for step in range(3):
        run.step = step
        run.disk.finish_step(run.step, 1.0)
    assert call("merge", folder, "--rows", "1", "--out", folder / "02-merge").exit_code == 0
    (folder / "03-export").mkdir()
    (folder / "03-export" / "smoke-q8_0.gguf").write_bytes(b"GGUF" * 1000)
    (folder / "03-export" / "Modelfile").write_text("FROM ./smoke-q8_0.gguf\n")
    (folder / "01-sft" / "judge.json").write_text("{}")
    keys = ("accuracy", "pass_at_1", "format", "reward")
    passes = [{"after": after, "rows": 40, **dict.fromkeys(keys, MEASURE)} for after in ("base", "01-sft")]
    names = ("own", "direct", "conclusion_only", "foreign", "filler", "worth", "worth_of_steps", "gain_nats")
    passes[1]["reasoning"] = {"rows": 40, **dict.fromkeys(names, MEASURE), "consistent": None}
    gain = {"from": "base", "to": "01-sft", **dict.fromkeys(keys, MEASURE)}
    write_json(folder / "report.json", {"rows": 40, "seed": 1, "passes": passes, "gains": [gain]})
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    server = FakeHub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    sleep = time.sleep  # huggingface_hub waits too before it tries again
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    yield server
    server.close()


def push(folder: Path, *options: str, to: str = "me/helper") -> Result:
    return call("push", folder, "--to", to, "--yes", *options)


def refused(result: Result, code: int = 2) -> str:
    """The one line a command ended with, in which the token is not."""
    assert result.exit_code == code, result.output
    assert TOKEN not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("qreason: ")]
    return line


# --- what is there afterwards ----------------------------------------------------------------------


def test_a_push_is_private_complete_and_one_commit(made: Path, hub: FakeHub) -> None:
    result = push(made, "--include", "adapter", "--include", "merged", "--include", "gguf")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == f"{hub.url}/me/helper"
    files = hub.files("me/helper")
    for path, local in {
        "adapter/adapter_model.safetensors": made / "01-sft" / "adapter" / "adapter_model.safetensors",
        "model.safetensors": made / "02-merge" / "model" / "model.safetensors",
        "tokenizer.json": made / "02-merge" / "model" / "tokenizer.json",
        "LICENSE": made / "02-merge" / "model" / "LICENSE",
        "smoke-q8_0.gguf": made / "03-export" / "smoke-q8_0.gguf",
        "Modelfile": made / "03-export" / "Modelfile",
    }.items():
        assert files[path] == local.read_bytes()
    assert {"README.md", "config.json", "chat_template.jinja", "qreason.json"} <= files.keys()
    assert hub.repos["me/helper"]["private"]
    assert hub.repos["me/helper"]["commits"] == 1


def test_the_token_is_nowhere_but_in_the_requests(made: Path, hub: FakeHub) -> None:
    result = push(made, "--include", "adapter", "--include", "merged")
    assert result.exit_code == 0
    assert TOKEN not in result.output
    contents = [*hub.files("me/helper").values(), *(file.read_bytes() for file in made.rglob("*") if file.is_file())]
    assert not any(TOKEN.encode() in content for content in contents)


def test_the_card_has_the_runs_own_numbers_and_no_local_path(made: Path, hub: FakeHub) -> None:
    assert push(made, "--include", "adapter", "--include", "merged").exit_code == 0
    files = hub.files("me/helper")
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "transformers"
    assert "base_model" not in front  # qreason/tiny is not on the Hub
    assert "| 01-sft | 50.0% [42.1, 57.9] |" in card
    assert "Gain from base to 01-sft" in card
    assert f"| 01-sft | {'50.0% [42.1, 57.9] | ' * 5}– | 0.50 [0.42, 0.58] |" in card
    assert "The steps carry the answer: without them 50 % instead of 50 %, -50 points [-58, -42]." in card
    assert 'PeftModel.from_pretrained(base, "me/helper", subfolder="adapter")' in card
    assert "heldout.jsonl" in card
    for name, content in files.items():
        if not name.endswith(".safetensors"):
            assert str(Path(__file__).parents[1]).encode() not in content, name
            assert str(made).encode() not in content, name


def test_python_in_the_card_imports_what_there_is(made: Path, hub: FakeHub) -> None:
    # The card named a module that had moved.
    card = call("push", made, "--to", "me/helper", "--include", "adapter", "--include", "merged", "--dry-run").stdout
    lines = [line for line in card.splitlines() if line.startswith("from ")]
    assert "from qreason.model.load import locate" in lines
    exec("\n".join(lines), {})


def test_the_card_says_what_was_not_measured(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "run"))
    (folder / "report.json").unlink()
    (folder / "03-export" / "Modelfile").unlink()
    (folder / "01-sft" / "judge.json").unlink()
    card = call("push", folder, "--to", "me/helper", "--include", "gguf", "--dry-run").stdout
    assert "nothing is known about how good the model is" in card
    assert "llama-server -m smoke-q8_0.gguf --jinja" in card
    assert not any(word in card for word in ("## The judge", "## Merging", "held-out rows", "PeftModel", "None"))
    assert "\n\n\n" not in card


def test_the_card_recommends_a_file_and_has_the_lines_for_ollama_and_lm_studio(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "run"))
    export = folder / "03-export"
    for name in ("smoke-adapter.gguf", "smoke-f16.gguf"):
        (export / name).write_bytes(b"GGUF")
    card = call("push", folder, "--to", "me/helper", "--include", "gguf", "--dry-run").stdout
    assert "lms import --copy --user-repo me/helper smoke-f16.gguf\n" in card  # no file of an adapter
    assert "Recommended" not in card
    accuracy = {"adapter": 0.5, "merged": 0.5, "f16": 0.5, "q8_0": 0.45}
    files = {
        kind: {"file": f"smoke-{kind}.gguf", "bytes": 4_000_000, "sha256": ""} for kind in ("adapter", "f16", "q8_0")
    }
    report = {"accuracy": accuracy, "rows": 100, "recommended": "q8_0", "files": files, "made_of": {}, "checks": []}
    write_json(export / "export.json", report)
    card = call("push", folder, "--to", "me/helper", "--include", "gguf", "--dry-run").stdout
    assert "| `smoke-f16.gguf` | 4 | 50.0% |\n| `smoke-q8_0.gguf` | 4 | 45.0% |\n" in card
    assert "Recommended is `smoke-q8_0.gguf`: the smallest file" in card
    assert "interval of the trained model's, 50.0% [40.4, 59.6] on the same 100 held-out rows" in card
    assert "ollama create helper -f Modelfile && ollama run helper\n" in card
    assert "lms import --copy --user-repo me/helper smoke-q8_0.gguf\n" in card
    assert "| `smoke-adapter.gguf`" not in card
    assert "\n\n\n" not in card


def test_a_local_base_is_named_without_its_path(made: Path, tmp_path: Path, hub: FakeHub) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "run"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["model"]["base"] = str(tmp_path / "secret" / "qwen")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert push(folder).exit_code == 0
    contents = hub.files("me/helper")
    assert json.loads(contents["adapter_config.json"])["base_model_name_or_path"] == "qwen"
    assert not any(b"secret" in content for content in contents.values())


def test_a_dry_run_shows_files_and_card_and_asks_nobody(made: Path, hub: FakeHub) -> None:
    result = call("push", made, "--to", "me/helper", "--dry-run")
    assert result.exit_code == 0
    assert "adapter_model.safetensors" in result.stderr
    assert "## Limits" in result.stdout
    assert hub.requests == []


def test_without_a_yes_nothing_is_published(made: Path, hub: FakeHub) -> None:
    for answer in ("n\n", ""):
        result = call("push", made, "--to", "me/helper", answer=answer)
        assert result.exit_code == 2
        assert "not pushed: it was not confirmed; --yes pushes without asking" in result.stderr
    assert hub.repos == {}
    assert call("push", made, "--to", "me/helper", answer="y\n").exit_code == 0
    assert hub.repos["me/helper"]["private"]


def test_a_public_repository_is_written_to_only_when_asked(made: Path, hub: FakeHub) -> None:
    assert push(made, "--public").exit_code == 0
    assert not hub.repos["me/helper"]["private"]
    assert "give --public" in refused(push(made))
    assert push(made, "--public").exit_code == 0
    assert hub.repos["me/helper"]["commits"] == 1  # the same files: no second commit


def test_a_private_repository_stays_private_and_is_called_so(made: Path, hub: FakeHub) -> None:
    assert push(made).exit_code == 0
    assert "(private)" in push(made, "--public").stderr
    assert hub.repos["me/helper"]["private"]


def test_a_run_never_publishes_by_itself(made: Path) -> None:
    with pytest.raises(RecipeError, match="a run publishes nothing by itself"):
        load_recipe("smoke", ["sft.trl={push_to_hub: true}"])


def test_the_environment_alone_leads_to_another_hub(made: Path, hub: FakeHub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "qreason", "push", str(made), "--to", "me/helper", "--yes"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "adapter_model.safetensors" in hub.files("me/helper")


# --- a Hub that fails ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        ("PUT", "/lfs/", "drop"),
        ("PUT", "/lfs/", "500"),
        ("PUT", "/lfs/", "lose"),
        ("GET", "/whoami", "500"),
        ("POST", "/create", "500"),
        ("POST", "/create", "lose"),
        ("POST", "/preupload", "drop"),
        ("POST", "/commit/", "500"),
        ("POST", "/commit/", "drop"),
        ("POST", "/commit/", "lose"),
        ("GET", "/tree/", "500"),
    ],
    ids=" ".join,
)
def test_one_failure_is_got_over_and_leaves_one_whole_commit(
    made: Path, hub: FakeHub, fault: tuple[str, str, str]
) -> None:
    hub.faults = [fault]
    result = push(made)
    assert result.exit_code == 0, result.output
    assert hub.faults == []
    assert hub.repos["me/helper"]["commits"] == 1
    assert "adapter_model.safetensors" in hub.files("me/helper")


def test_a_hub_that_stays_broken_leaves_nothing_published_and_the_next_push_goes_on(
    made: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults = [("POST", "/commit/", "500")] * talking.ATTEMPTS
    line = refused(push(made, "--include", "merged"), code=1)
    assert "publishing failed" in line
    assert "nothing was published: me/helper is empty" in line
    assert hub.files("me/helper") == {}
    sent = [request for request in hub.requests if request.startswith("PUT")]
    assert push(made, "--include", "merged").exit_code == 0
    assert [request for request in hub.requests if request.startswith("PUT")] == sent  # not sent a second time
    assert "model.safetensors" in hub.files("me/helper")


def test_an_earlier_push_stays_as_it_was_when_the_next_one_fails(made: Path, hub: FakeHub) -> None:
    assert push(made).exit_code == 0
    before = hub.files("me/helper")
    hub.faults = [("POST", "/commit/", "drop")] * talking.ATTEMPTS
    assert "nothing was published: me/helper is as it was" in refused(push(made, "--include", "gguf"), code=1)
    assert hub.files("me/helper") == before


def test_a_last_answer_that_was_lost_is_looked_up(made: Path, hub: FakeHub) -> None:
    hub.faults = [("POST", "/commit/", "500")] * (talking.ATTEMPTS - 1) + [("POST", "/commit/", "lose")]
    assert push(made).exit_code == 0
    hub.faults = [("POST", "/commit/", "500")] * talking.ATTEMPTS + [("GET", "/tree/", "500")] * talking.ATTEMPTS
    assert "whether it was published is not known" in refused(push(made, "--include", "merged"), code=1)


def test_an_interrupted_push_says_that_nothing_was_published(
    made: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", interrupted)
    line = refused(push(made), code=1)
    assert "publishing was interrupted" in line
    assert "nothing was published: me/helper is empty" in line


def test_a_file_that_arrived_otherwise_is_told(made: Path, hub: FakeHub) -> None:
    class Rotting(dict[str, bytes]):
        def __setitem__(self, oid: str, content: bytes) -> None:
            super().__setitem__(oid, content[:-1] + b"?")

    hub.objects = Rotting()
    line = refused(push(made), code=1)
    assert "was published, but not as sent: adapter_model.safetensors" in line


# --- what must be refused --------------------------------------------------------------------------


def test_a_wrong_token_is_refused_with_the_cure(made: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = refused(push(made))
    assert "refused the token (401); log in with `hf auth login`" in line
    assert "hf_wrong" not in line
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "no token for the Hub: log in" in refused(push(made))
    assert hub.repos == {}


def test_names_without_rights_and_bad_names_are_refused(made: Path, hub: FakeHub) -> None:
    assert "the token is for me, readers" in refused(push(made, to="other/helper"))
    assert "a token that may write to readers/helper" in refused(push(made, to="readers/helper"))
    for name in ("helper", "me/help er", "me/helper/more", "me/--x", ""):
        assert "USER/NAME" in refused(push(made, to=name))
    assert hub.repos == {}


def test_nothing_to_push_is_refused_with_what_makes_it(made: Path, hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Session.open(load_recipe("smoke"), folder, say=lambda line: None)
    assert "run sft or grpo first" in refused(push(folder))
    assert "make one with `qreason merge" in refused(push(folder, "--include", "merged"))
    assert "an export step" in refused(push(folder, "--include", "gguf"))
    assert "not a run folder" in refused(push(tmp_path))
    assert hub.requests == []


# --- pulling ---------------------------------------------------------------------------------------


def test_a_pulled_adapter_merges_like_the_one_that_was_pushed(made: Path, hub: FakeHub, tmp_path: Path) -> None:
    assert push(made, "--include", "adapter", "--include", "merged").exit_code == 0
    folder = tmp_path / "pulled"
    result = call("pull", "me/helper", "--out", folder)
    assert result.exit_code == 0, result.output
    assert (folder / "01-pull" / WEIGHTS).read_bytes() == (made / "01-sft" / WEIGHTS).read_bytes()
    merged = call("merge", folder)
    assert merged.exit_code == 0, merged.output
    ours, theirs = folder / "merged-float16" / "model", made / "02-merge" / "model"
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    again = call("pull", "me/helper", "--out", folder)
    assert again.exit_code == 0


def test_a_recipe_trains_a_pulled_adapter_further(made: Path, hub: FakeHub, tmp_path: Path) -> None:
    assert push(made).exit_code == 0
    train = "{from: 01-pull, rows: 4, max_steps: 2, warmup_steps: 0, per_device_train_batch_size: 4}"
    steps = f"steps=[{{pull: {{repo: me/helper}}}}, {{sft: {train}}}]"
    result = call("run", "smoke", "--out", tmp_path / "run", "--set", steps)
    assert result.exit_code == 0, result.output
    before, after = (load_file(tmp_path / "run" / name / WEIGHTS) for name in ("01-pull", "02-sft"))
    assert before.keys() == after.keys()
    moved = [float((after[name] - before[name]).abs().max()) for name in before]
    assert 0 < max(moved) < 0.01
    assert "me/helper" in call("lineage", tmp_path / "run").stdout


def test_an_adapter_in_a_folder_is_measured_merged_and_exported(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder as PEFT alone writes it: two files, and the base under the name that the other machine had for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(made / "01-sft" / "adapter" / name, tmp_path / "theirs" / name)
    file = tmp_path / "theirs" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/content/base"}))
    rows = Path(__file__).parents[1] / "data" / "helpdesk" / "heldout.jsonl"
    (tmp_path / "rows.jsonl").write_text("".join(rows.read_text("utf-8").splitlines(True)[:4]), "utf-8")
    assert "give it with --base" in refused(call("pull", "theirs"))
    assert "leave --revision out" in refused(call("pull", "theirs", "--revision", "main"))
    pulled = call("pull", "theirs", "--base", "qreason/tiny", "--heldout", "rows.jsonl")
    assert pulled.exit_code == 0, pulled.output
    assert pulled.stdout.strip() == "runs/theirs"
    assert load_recipe(tmp_path / "runs" / "theirs" / "recipe.yaml").data.prompt == "helpdesk"
    measured = call("evaluate", "runs/theirs", "--task", "rows.jsonl", "--rows", "1", "--samples", "1")
    assert measured.exit_code == 0, measured.output
    exported = call("export", "runs/theirs", "--gguf", "q8_0", "--rows", "1")
    assert exported.exit_code == 0, exported.output
    assert json.loads((tmp_path / "runs/theirs/export/export.json").read_text())["verified"]
    assert "qreason pull theirs" in refused(call("evaluate", "theirs", "--task", "rows.jsonl"))


@pytest.mark.parametrize(
    ("base", "quantization"), [("unsloth/llama-3.2-1b-instruct-bnb-4bit", "nf4"), ("qreason/tiny", "none")]
)
def test_an_adapter_of_a_4_bit_base_is_pulled_onto_it(made: Path, tmp_path: Path, base: str, quantization: str) -> None:
    folder = Path(shutil.copytree(made / "01-sft" / "adapter", tmp_path / "lora"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    recipe = recipe_of(str(folder), None, None, None, print)
    assert (recipe.name, recipe.model.base, recipe.model.quantization) == ("lora", base, quantization)


def test_a_recipe_trains_an_adapter_in_a_folder_further_and_an_export_needs_rows(made: Path, tmp_path: Path) -> None:
    theirs = made / "01-sft" / "adapter"
    train = "{from: 01-pull, rows: 4, max_steps: 1, warmup_steps: 0, per_device_train_batch_size: 4}"
    result = call(
        *("run", "smoke", "--out", tmp_path / "run", "--set"),
        f"steps=[{{pull: {{repo: {theirs}, other_base: true}}}}, {{sft: {train}}}]",
    )
    assert result.exit_code == 0, result.output
    before, after = (load_file(tmp_path / "run" / name / WEIGHTS) for name in ("01-pull", "02-sft"))
    assert any(not before[name].equal(after[name]) for name in before)
    assert call("pull", theirs, "--out", tmp_path / "bare", "--base", "qreason/tiny").exit_code == 0
    assert "pull the adapter with --heldout FILE" in refused(call("export", tmp_path / "bare"))


def test_a_pull_survives_a_failure_and_refuses_what_is_no_adapter(made: Path, hub: FakeHub, tmp_path: Path) -> None:
    assert push(made, "--include", "merged").exit_code == 0
    assert "no adapter there" in refused(call("pull", "me/helper", "--out", tmp_path / "a"))
    assert "not on the Hub, or private" in refused(call("pull", "me/nothing", "--out", tmp_path / "a"))
    assert "USER/NAME" in refused(call("pull", "nothing", "--out", tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    assert push(made, to="me/adapter").exit_code == 0
    hub.faults = [("GET", "/resolve/", "drop"), ("GET", "/api/models/", "500")]
    assert call("pull", "me/adapter", "--out", tmp_path / "b").exit_code == 0


def test_a_pulled_adapter_of_another_base_is_refused(made: Path, hub: FakeHub, tmp_path: Path) -> None:
    assert push(made).exit_code == 0
    about: dict[str, Any] = json.loads(hub.files("me/helper")["qreason.json"])
    about["base"]["fingerprint"] = "sha256:0"
    hub.repos["me/helper"]["files"]["qreason.json"] = (json.dumps(about).encode(), "regular")
    folder = tmp_path / "pulled"
    assert call("pull", "me/helper", "--out", folder).exit_code == 0
    assert "changed since this run began" in refused(call("merge", folder))


def test_a_run_is_mirrored_to_a_private_repository_and_fetched_from_it(
    hub: FakeHub, made: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(made, run)
    open_mirror("hf://me/runs", run, print)()
    there = {name.removeprefix("run/") for name in hub.files("me/runs") if name.startswith("run/")}
    assert there == {str(file.relative_to(run)) for file in mirrored(run)}
    assert hub.repos["me/runs"]["private"]
    before = (run / WEIGHTS.replace("adapter/", "01-sft/adapter/", 1)).read_bytes()
    shutil.rmtree(run)
    open_mirror("hf://me/runs", run, print).pull()
    assert (run / WEIGHTS.replace("adapter/", "01-sft/adapter/", 1)).read_bytes() == before
    assert {str(file.relative_to(run)) for file in mirrored(run)} == there
