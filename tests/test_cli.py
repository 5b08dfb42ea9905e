"""The command line through its real entry point: what it prints, its exit codes, and what it leaves alone."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors import SafetensorError

from qreason.cli import main
from qreason.cli.base import open_closed_streams
from qreason.recipe.load import load_recipe, recipe_name, shipped_recipes
from qreason.run.session import Session

RecipeWriter = Callable[..., Path]
ROW = '{"id": "a", "issue": "x", "resolution": "y", "steps": "z"}'


def qreason(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The one line of a command that ends with exit code 2, no traceback, and nothing on stdout."""
    result = qreason(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line.removeprefix("qreason: ")


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its bytes and the time it was written."""
    return {str(f): (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.rglob("*") if f.is_file()}


# --- cheap commands ------------------------------------------------------------------------------


PEER = "import click, yaml; from pydantic import BaseModel"
"""What every command needs; how long it takes says how fast the machine is now."""


def cpu_seconds(code: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """The CPU time of Python code in a process of its own, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done


def light(times: int, *arguments: str) -> str:
    """Run qreason in a process of its own: it imports no torch, which alone takes PEER's time more than ten times."""
    code = (
        "import sys\nfrom qreason.cli import main\n"
        f"sys.argv = ['qreason', *{list(arguments)!r}]\n"
        "try:\n    main()\nfinally:\n    sys.stderr.write(' '.join(sys.modules))"
    )
    pairs = [(cpu_seconds(PEER)[0], *cpu_seconds(code)) for _ in range(3)]
    done = pairs[0][2]
    assert not {"torch", "transformers", "trl", "peft", "datasets", "numpy"} & set(done.stderr.split())
    assert min(seconds / peer for peer, seconds, _ in pairs) < times
    return done.stdout


def test_help_is_light_and_names_every_command() -> None:
    told = light(5, "--help")
    assert all(f"  {command} " in told for command in main.commands)


def test_a_run_imports_only_what_it_needs_before_its_first_bar(tmp_path: Path) -> None:
    """`datasets`, with pandas, and torch's compiler took 5 of 14 seconds of computing."""
    code = (
        "import sys\nfrom qreason.cli import main\nfrom qreason.machine.progress import Bar\n"
        "def stop(*given):\n    print('reached', *sys.modules)\n    raise SystemExit\n"
        f"Bar.__init__, sys.argv = stop, ['qreason', 'run', 'smoke', '--out', {str(tmp_path / 'run')!r}]\nmain()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    reached, *modules = done.stdout.split() or [done.stderr]
    assert reached == "reached"
    assert "transformers" in modules
    needless = {"datasets", "pandas", "pyarrow", "trl", "torch._inductor.compile_fx", "altair", "vl_convert", "openai"}
    assert not needless & set(modules)


def test_validate_is_light_and_counts_rows() -> None:
    told = light(8, "validate", "quickstart")
    assert "rows: sft 1500, prompts 3240, heldout 360" in told
    assert told.endswith("valid\n")


def test_module_runs_like_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "qreason", "--version"], capture_output=True, text=True, check=True)
    assert "version" in done.stdout


def test_recipes_lists_each_with_what_it_is() -> None:
    lines = qreason("recipes").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [recipe_name(file) for file in shipped_recipes()]
    assert all(len(line.split()) > 3 for line in lines)
    column = max(len(line.split()[0]) for line in lines) + 1
    assert all(line[column - 1] == " " != line[column] for line in lines)  # what they give begins in one column


def test_validate_reads_overrides(write_recipe: RecipeWriter) -> None:
    assert "base org/model" in qreason("validate", write_recipe(), "--set", "model.base=org/model").stdout


# --- init ----------------------------------------------------------------------------------------


def test_init_copies_a_recipe_with_its_data_and_the_copy_validates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert qreason("init").exit_code == 0
    copy = load_recipe("quickstart.yaml")
    assert copy.data.sft == str(tmp_path / "data" / "helpdesk" / "sft.jsonl")
    assert qreason("validate", "quickstart.yaml").stdout.endswith("valid\n")


def test_init_copies_into_the_folder_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert qreason("init", "quickstart", "--to", "mine").exit_code == 0
    assert (tmp_path / "mine" / "quickstart.yaml").is_file()
    assert load_recipe("mine/quickstart.yaml").data.sft == str(tmp_path / "mine" / "data" / "helpdesk" / "sft.jsonl")


def test_init_refuses_to_overwrite_what_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The second init found the data of the first one in the current folder and ended in a traceback.
    monkeypatch.chdir(tmp_path)
    qreason("init")
    with (tmp_path / "quickstart.yaml").open("a") as recipe:
        recipe.write("# mine")
    before = content(tmp_path)
    assert "quickstart.yaml already exists" in refused("init")
    assert content(tmp_path) == before


def test_a_second_recipe_shares_the_data_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    qreason("init", "quickstart")
    assert qreason("init", "smoke").exit_code == 0
    assert (tmp_path / "smoke.yaml").is_file()


def test_init_leaves_nothing_where_one_file_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "helpdesk").mkdir(parents=True)
    (tmp_path / "data" / "helpdesk" / "heldout.jsonl").write_text("mine")
    assert "heldout.jsonl already exists" in refused("init")
    assert not (tmp_path / "quickstart.yaml").exists()


def test_init_of_what_is_there_already_leaves_it(write_recipe: RecipeWriter, workplace: Path) -> None:
    # A file copied onto itself was a traceback: a recipe that is here, or data by an absolute path.
    recipe = write_recipe()
    assert qreason("init", recipe, "--to", recipe.parent).exit_code == 0
    sft = str(recipe.parent / "sft.jsonl")
    recipe.write_text(recipe.read_text().replace("sft: sft.jsonl", f"sft: {sft}"))
    result = qreason("init", recipe, "--to", workplace / "other")
    assert result.exit_code == 0, result.output
    assert load_recipe(workplace / "other" / recipe.name).data.sft == sft


def test_init_writes_nothing_outside_of_the_folder_it_is_given(write_recipe: RecipeWriter, workplace: Path) -> None:
    recipe = write_recipe()
    (workplace / "data").mkdir()
    (recipe.parent / "sft.jsonl").rename(workplace / "data" / "sft.jsonl")
    (workplace / "recipes").mkdir()
    for file in (recipe, *recipe.parent.glob("*.jsonl")):
        file.rename(workplace / "recipes" / file.name)
    recipe = workplace / "recipes" / recipe.name
    recipe.write_text(recipe.read_text().replace("sft: sft.jsonl", "sft: ../data/sft.jsonl"))
    (workplace / "far").mkdir()
    before = content(workplace)
    said = refused("init", recipe, "--to", workplace / "far" / "new")
    assert f"{workplace / 'far' / 'new' / '..' / 'data' / 'sft.jsonl'}, outside of" in said
    assert content(workplace) == before
    assert qreason("init", recipe, "--to", recipe.parent).exit_code == 0  # all are there


def test_init_into_another_folder_after_init_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    qreason("init")
    assert qreason("init", "--to", "second").exit_code == 0
    assert (tmp_path / "second" / "data" / "helpdesk" / "sft.jsonl").is_file()


def test_init_of_a_benchmark_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two recipes are called gsm8k.yaml.
    monkeypatch.chdir(tmp_path)
    assert qreason("init", "gsm8k").exit_code == 0
    assert qreason("init", "bench/gsm8k").exit_code == 0
    assert load_recipe("bench/gsm8k.yaml").name == "bench-gsm8k"
    assert "(did you mean 'bench/gsm8k'?)" in refused("init", "bench/gsm8")


def test_init_of_an_unknown_recipe_names_the_nearest() -> None:
    assert "(did you mean 'quickstart'?)" in refused("init", "quickstrat")


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["validate", "run"])
@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("rewards:", "reward_:", None),
        (
            "temperature:",
            "temperatur:",
            "small.yaml:8: unknown key 'sampling.temperatur' (did you mean 'temperature'?)",
        ),
        ("format: 0.1", "format: -0.1", "small.yaml:7: rewards.format.weight: "),
        ("format: 0.1", "format: .nan", "small.yaml:7: rewards.format.weight: "),
        ("format: 0.1", "formal: 0.1", "small.yaml:7: rewards: unknown reward 'formal' (did you mean 'format'?)"),
        ("num_generations: 4", "num_generations: 5", "small.yaml:13: steps.3.grpo: "),
        ("sft: sft.jsonl", "sft: gone.jsonl", "small.yaml:4: data.sft: no file gone.jsonl"),
        ("  - merge", " - merge", "small.yaml:14: not YAML"),
        ("temperature: 0.9", "temperature: 0.9\x00", "small.yaml: not YAML"),
    ],
)
def test_bad_recipe_gives_a_line_that_names_the_key(
    write_recipe: RecipeWriter, workplace: Path, command: str, old: str, new: str, named: str | None
) -> None:
    file = write_recipe((old, new))
    if named is None:  # two problems, two lines: the unknown key and the missing one
        assert len(qreason(command, file).stderr.splitlines()) == 2
    else:
        assert named in refused(command, file)
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize("command", ["validate", "run"])
@pytest.mark.parametrize("use", ["sft", "prompts", "heldout"])
@pytest.mark.parametrize(
    ("text", "named"),
    [
        (f"{ROW}\n{{'id': 2}}\n".encode(), ":2: not JSON at column 2"),
        (f'{ROW}\n{{"id": "b", "issue": "x", "steps": "z"}}\n'.encode(), ":2: no reference: "),
        (f'{ROW}\n{{"id": "b", "issue": 1.5, "resolution": [], "steps": "z"}}\n'.encode(), ":2: 'resolution' is list"),
        (b"", ": no rows"),
        (f"{ROW}\n\xfc\n".encode("latin-1"), ":2: not UTF-8"),
        (f"{ROW}\n\n{ROW}\n".encode(), ":3: id 'a' was used at "),
    ],
    ids=["malformed", "missing field", "wrong type", "empty", "not UTF-8", "duplicate id"],
)
def test_bad_data_gives_one_line_that_names_file_and_line(
    write_recipe: RecipeWriter, workplace: Path, command: str, use: str, text: bytes, named: str
) -> None:
    file = write_recipe()
    (workplace / f"{use}.jsonl").write_bytes(text)
    assert refused(command, file).startswith(f"{workplace / use}.jsonl{named}")
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize("override", ["seed", "sft.rows=0", "nonsense=1", "export.gguf=q8_0", "model.base.x=1"])
def test_bad_override_gives_one_line(write_recipe: RecipeWriter, override: str) -> None:
    assert refused("validate", write_recipe(), "--set", override)


def test_unknown_recipe_gives_one_line() -> None:
    assert refused("run", "no-such-recipe").startswith("no-such-recipe: no such recipe file")


def test_unknown_option_is_bad_input() -> None:
    assert qreason("run", "quickstart", "--nonsense").exit_code == 2


def test_folder_of_another_recipe_is_left_as_it_was(write_recipe: RecipeWriter, workplace: Path) -> None:
    Session.open(load_recipe(write_recipe()), workplace / "out").disk.finish_step(0, 1.0)
    before = content(workplace / "out")
    other = write_recipe(("name: small", "name: other"), name="other.yaml")
    for command in ("run", "sft", "grpo", "merge"):
        assert "belongs to the recipe 'small', not 'other'" in refused(command, other, "--out", workplace / "out")
    assert content(workplace / "out") == before


def test_folder_that_is_no_run_is_left_as_it_was(write_recipe: RecipeWriter, workplace: Path) -> None:
    (workplace / "out").mkdir()
    (workplace / "out" / "thesis.txt").write_text("years of work")
    before = content(workplace / "out")
    assert "not a run folder" in refused("run", write_recipe(), "--out", "out")
    assert "not a run folder" in refused("run", write_recipe(), "--out", "out", "--fresh")
    assert content(workplace / "out") == before


def test_stage_out_of_turn_is_refused(write_recipe: RecipeWriter) -> None:
    file = write_recipe()
    assert ", not grpo" in refused("grpo", file)


def test_stage_of_a_finished_run_is_refused(write_recipe: RecipeWriter, workplace: Path) -> None:
    file = write_recipe(("  - evaluate\n", ""), ("  - grpo: {num_generations: 4}\n  - merge\n", ""))
    run = Session.open(load_recipe(file), workplace / "runs" / "small", say=lambda line: None)
    (run.folder / "01-sft").mkdir()
    run.disk.finish_step(run.step, 1.0)
    result = qreason("sft", file)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith("no sft step is left; --fresh starts over")


@pytest.mark.parametrize("task", ["gone.jsonl", "heldout.jsonl"])
def test_evaluate_on_a_bad_task_file_gives_one_line(workplace: Path, task: str) -> None:
    (workplace / "heldout.jsonl").write_text(f"{ROW}\nbroken\n")
    assert refused("evaluate", "some/model", "--task", workplace / task).startswith(str(workplace / task))


def test_evaluate_of_an_adapter_names_the_cure(workplace: Path) -> None:
    (workplace / "adapter").mkdir()
    (workplace / "adapter" / "adapter_config.json").write_text("{}")
    assert "is an adapter; give its run folder" in refused("evaluate", "adapter", "--task", "heldout.jsonl")


def test_finished_run_prints_its_report_as_json_and_continues_nothing(
    write_recipe: RecipeWriter, workplace: Path
) -> None:
    file = write_recipe(
        ("  - sft: {learning_rate: 1e-5}\n  - evaluate\n  - grpo: {num_generations: 4}\n  - merge\n", "")
    )
    run = Session.open(load_recipe(file), workplace / "out", say=lambda line: None)
    (run.folder / "base").mkdir()
    row = {"id": "h0", "prompt": "x", "reply": "y", "reference": "z", "parts": {"format": 0.0}, "total": 0.0}
    numbers = {"split": None, "accurate": False, "well_formed": False, "words": 1, "finished": True, "pass_at_1": 0.5}
    (run.folder / "base" / "evaluation.jsonl").write_text(json.dumps(row | numbers) + "\n")
    run.disk.finish_step(run.step, 1.0)
    result = qreason("run", file, "--out", "out", "--json")
    assert result.exit_code == 0
    assert "1 of 1 steps are done" in result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((run.folder / "report.json").read_text())
    assert report["passes"][0]["after"] == "base"
    assert report["passes"][0]["pass_at_1"] == {"mean": 0.5, "low": 0.1033, "high": 0.8967}
    assert report["gains"] == []
    assert os.listdir(run.folder / "base") == ["evaluation.jsonl"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0: PytorchStreamWriter failed"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, write_recipe: RecipeWriter, error: Exception) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        try:
            raise error
        except Exception as first:
            raise ValueError("what followed from it") from first

    monkeypatch.setattr("qreason.run.session.Session.open", fail)
    result = CliRunner().invoke(main, ["run", str(write_recipe())])
    assert result.exit_code == 1
    assert (
        result.stderr
        == "qreason: no space is left on the disk; make room, and run the same command again to continue\n"
    )


def test_a_closed_stream_changes_no_exit_code_and_reads_as_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    # A chat without stdin, as under some services, was a traceback; without stderr bad input ended with 1.
    command = [sys.executable, "-m", "qreason", "validate", "no-such-recipe"]
    done = subprocess.run(["sh", "-c", 'exec "$@" 0<&- 2>&-', "sh", *command], capture_output=True)
    assert done.returncode == 2
    monkeypatch.setattr(sys, "stdin", None)
    open_closed_streams()
    assert not sys.stdin.isatty()
    assert sys.stdin.read() == ""
    sys.stdin.close()
