"""Merging: what is stored is what was trained, for LoRA and QLoRA; several adapters; what must be refused."""

import dataclasses
import errno
import gc
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qreason.cli import main
from qreason.errors import TrainingError
from qreason.inference.generate import open_generator
from qreason.machine.hardware import GIB, Hardware, detect
from qreason.model import merging
from qreason.model.backends import Choice
from qreason.model.load import EMBEDDED, load_base
from qreason.model.merging import divergence, log_probabilities
from qreason.recipe.load import load_recipe
from qreason.recipe.sections import Model
from qreason.recipe.settings import Merge
from qreason.run.session import Session
from qreason.stages import merge as stage
from qreason.types import Reply

TINY = EMBEDDED["qreason/tiny"]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_with_adapters(
    folder: Path, *adapters: str, base: str = "qreason/tiny", steps: str = "steps=[sft, sft]", **model: Any
) -> Path:
    """A run folder whose stages have random adapters of the size that a short training gives."""
    overrides = [f"model.base={base}", steps, "sampling.max_completion_length=12", "rewards={format: 1}"]
    overrides += [f"model.{key}={value}" for key, value in model.items()]
    run = Session.open(load_recipe("smoke", overrides), folder, say=lambda line: None)
    for step, name in enumerate(adapters):
        run.step = step
        torch.manual_seed(step)
        run.resident.new_adapter(run.recipe.model.lora)
        for key, parameter in run.resident.model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.01)
        run.resident.model.peft_config["default"].base_model_name_or_path = base
        run.resident.model.save_pretrained(str(folder / name / "adapter"), save_embedding_layers=False)
        run.disk.finish_step(run.step, 1.0)
    return folder


@pytest.fixture(scope="module", params=["none", pytest.param("nf4", marks=pytest.mark.slow)])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run folder of LoRA or of QLoRA, merged once, and its quantization."""
    folder = run_with_adapters(tmp_path_factory.mktemp(request.param) / "run", "01-sft", quantization=request.param)
    result = call("merge", folder, "--rows", "4", "--max-shard-size", "4MB")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(folder / "merged-float16" / "model")
    return folder, request.param


@pytest.fixture(scope="module")
def two_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_with_adapters(tmp_path_factory.mktemp("two") / "run", "01-sft", "02-sft")


def ask(tokenizer: Any, model: Any, question: str) -> list[int]:
    asked = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids: list[int] = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0].tolist()
    return ids


# --- what is stored is what was trained ------------------------------------------------------------


def test_plainly_loaded_adapter_and_merged_model_predict_and_reply_alike(trained: tuple[Path, str]) -> None:
    folder, quantization = trained
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged-float16" / "model", dtype=torch.float32).eval()
    base = load_base(Model(base="qreason/tiny", quantization=quantization), detect())
    adapted = PeftModel.from_pretrained(base, folder / "01-sft" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged-float16" / "model")
    replies = []
    for question in ("My printer is offline.", "The disk of the mail server is full."):
        told = ask(tokenizer, adapted, question)
        assert told == ask(tokenizer, merged, question)
        replies.append(Reply("", tuple(told[-20:]), tuple(told[:-20])))
    assert divergence(log_probabilities(adapted, replies), log_probabilities(merged, replies)) <= 1e-4


def test_merge_reports_how_far_it_is_from_the_trained_model(trained: tuple[Path, str]) -> None:
    folder, quantization = trained
    report = json.loads((folder / "merged-float16" / "merge.json").read_text())
    assert report["bases"]["trained"]["kl"] <= 1e-4
    assert report["compared_tokens"] >= 4
    assert report["rows"] == 4
    if quantization == "nf4":  # both bases are measured on the same rows; the original one was not trained on
        assert report["bases"]["original"]["kl"] > 100 * report["bases"]["trained"]["kl"]
        assert isinstance(report["bases"]["original"]["right"], int)
    else:
        assert set(report["bases"]) == {"trained"}


def test_merged_folder_is_sharded_tied_and_complete(trained: tuple[Path, str]) -> None:
    model = trained[0] / "merged-float16" / "model"
    index = json.loads((model / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert "lm_head.weight" not in index["weight_map"]
    for name in ("LICENSE", "chat_template.jinja"):
        assert (model / name).read_bytes() == (TINY / name).read_bytes()
    kept, own = (json.loads((folder / "generation_config.json").read_text()) for folder in (model, TINY))
    assert kept == own | {"transformers_version": transformers.__version__}
    config = json.loads((model / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["tie_word_embeddings"]
    assert "quantization_config" not in config
    assert not list(trained[0].rglob("*.draft"))


def test_original_base_is_merged_on_request_and_both_are_printed(trained: tuple[Path, str]) -> None:
    folder, quantization = trained
    result = call("merge", folder, "--base", "original", "--rows", "4", "--dtype", "float32")
    if quantization == "none":
        assert result.exit_code == 2
        assert "leave out --base" in result.stderr
        return
    assert result.exit_code == 0, result.output
    told = " ".join(result.stderr.split())
    assert "on the original base: KL" in told
    assert "on the base as trained (not kept): KL" in told
    assert told.count("of 4 rows right") == 2
    assert (folder / "merged-float32-original" / "model" / "model.safetensors").is_file()


def test_merge_into_4_bit_loses_a_small_update_and_would_be_refused(tmp_path: Path) -> None:
    folder = run_with_adapters(tmp_path / "run", "01-sft", quantization="nf4")
    base = load_base(Model(base="qreason/tiny", quantization="nf4"), detect())
    model = PeftModel.from_pretrained(base, folder / "01-sft" / "adapter").eval()
    replies = [Reply("", tuple(range(300, 320)), tuple(range(200, 220)))]
    before = log_probabilities(model, replies)
    kl = divergence(before, log_probabilities(model.merge_and_unload(), replies))
    with pytest.raises(TrainingError, match="is not the trained one: KL"):
        stage.check_divergence({"rounding": kl, "kl": kl}, Merge(), "float32")
    with pytest.raises(ValidationError):
        Merge.model_validate({"dtype": "nf4"})


@pytest.mark.parametrize(("dtype", "most"), [("float16", 1e-4), ("bfloat16", 1e-2)])
def test_a_model_that_ran_in_16_bit_arithmetic_is_met_as_nearly_as_that_rounds(
    two_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, most: float
) -> None:
    sixteen = dataclasses.replace(detect(), dtype=dtype)
    monkeypatch.setattr("qreason.machine.hardware.detect", lambda: sixteen)
    stage.merge_again(Session.reopen(two_adapters), Merge(rows=1), tmp_path / "out")
    (figures,) = json.loads((tmp_path / "out" / "merge.json").read_text())["bases"].values()
    assert figures["rounding"] <= 1e-4
    assert figures["rounding"] < figures["kl"] <= most


def test_a_divergence_that_is_no_number_is_refused() -> None:
    with pytest.raises(TrainingError, match="try float32"):
        stage.check_divergence({"rounding": float("nan"), "kl": 0.0}, Merge(), None)


def test_an_adapter_on_the_output_layer_unties_it(tmp_path: Path) -> None:
    # Folded into a tied weight, it would change the embedding too.
    folder = run_with_adapters(tmp_path / "run", "01-sft", lora="{target_modules: [lm_head, q_proj]}")
    result = call("merge", folder, "--rows", "2")
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged-float16" / "model", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    assert torch.equal(merged.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    assert not torch.equal(merged.lm_head.weight, plain.lm_head.weight)


def test_the_base_has_left_memory_when_the_stored_model_enters(
    two_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Session.reopen(two_adapters)
    base = weakref.ref(run.resident.model)
    alive: list[bool] = []

    def watched(work: Any) -> Any:
        def wrapped(*given: Any) -> Any:
            gc.collect()
            alive.append(base() is not None)
            return work(*given)

        return wrapped

    monkeypatch.setattr(stage, "open_generator", watched(open_generator))
    monkeypatch.setattr(merging, "to_gpu", watched(merging.to_gpu))
    stage.merge_again(run, Merge(rows=1), tmp_path / "out")
    assert alive == [False] * 3  # the float32 copy, the stored model, and the generator on it


@pytest.mark.parametrize(
    ("device", "parameters", "free", "moved"),
    [
        ("cuda", 1.54e9, 14.5 * GIB, True),  # 1.5B on a T4
        ("cuda", 3.09e9, 14.5 * GIB, False),
        ("cuda", 1.54e9, 5.0 * GIB, False),
        ("cpu", 1.54e9, 14.5 * GIB, False),
    ],
)
def test_folding_and_comparing_are_done_on_a_gpu_that_has_room(
    monkeypatch: pytest.MonkeyPatch, device: Any, parameters: float, free: float, moved: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 15 * GIB))
    model = SimpleNamespace(num_parameters=lambda: parameters, to=lambda place: place)
    hardware = Hardware(device, "", "float16", "float16", "sdpa", 1)
    assert merging.to_gpu(model, hardware) == ("cuda" if moved else model)


@pytest.mark.slow
def test_a_merge_step_after_unsloth_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    steps = "steps=[sft, sft, {merge: {adapters: [01-sft, 02-sft], blend: cat, weights: [0.5, 0.5], rows: 1}}]"
    folder = run_with_adapters(tmp_path / "run", "01-sft", "02-sft", steps=steps)
    run = Session.reopen(folder)
    run.__dict__["backend"] = Choice("unsloth", "as if")
    run.step = 2
    artifact = stage.merge(run.recipe.steps[2], run)
    assert "resident" not in run.__dict__
    assert artifact.path == folder / "03-merge" / "model"
    assert artifact.summary.startswith("float16 on the base as trained: KL ")
    report = json.loads((folder / "03-merge" / "merge.json").read_text())
    assert report["adapters"] == ["01-sft/adapter", "02-sft/adapter"]
    assert (report["blend"], report["weights"]) == ("cat", [0.5, 0.5])


# --- several adapters ------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return {name: weight.detach() for name, weight in model.named_parameters() if "q_proj.weight" in name}


def test_adapters_folded_in_order_add_up(two_adapters: Path, tmp_path: Path) -> None:
    both = ("--adapter", "01-sft", "--adapter", two_adapters / "02-sft" / "adapter")
    result = call("merge", two_adapters, *both, "--rows", "1", "--dtype", "float32", "--out", tmp_path / "both")
    assert result.exit_code == 0, result.output
    base = AutoModelForCausalLM.from_pretrained(TINY).float()
    for stage_name in ("01-sft", "02-sft"):
        base = PeftModel.from_pretrained(base, two_adapters / stage_name / "adapter").merge_and_unload()
    one_after_the_other = dict(base.named_parameters())
    plain = dict(AutoModelForCausalLM.from_pretrained(TINY).float().named_parameters())
    for name, weight in weights(tmp_path / "both").items():
        assert torch.allclose(weight, one_after_the_other[name], atol=1e-6)
        assert not torch.allclose(weight, plain[name], atol=1e-4)


def test_adapters_blended_are_what_peft_makes_of_them(two_adapters: Path, tmp_path: Path) -> None:
    both = ("--adapter", "01-sft", "--adapter", "02-sft", "--blend", "ties", "--weights", "0.3,0.7", "--density", "0.5")
    result = call("merge", two_adapters, *both, "--rows", "1", "--dtype", "float32", "--out", tmp_path / "ties")
    assert result.exit_code == 0, result.output
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(TINY).float(), two_adapters / "01-sft" / "adapter", adapter_name="a"
    )
    model.load_adapter(str(two_adapters / "02-sft" / "adapter"), "b")
    model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "c", combination_type="ties", density=0.5)
    model.set_adapter("c")
    expected = dict(model.merge_and_unload().named_parameters())
    assert all(torch.allclose(expected[name], weight) for name, weight in weights(tmp_path / "ties").items())


def test_a_blend_without_weights_is_the_mean_of_its_adapters(two_adapters: Path, tmp_path: Path) -> None:
    both = ("--adapter", "01-sft", "--adapter", "02-sft", "--blend", "cat")
    result = call("merge", two_adapters, *both, "--rows", "1", "--dtype", "float32", "--out", tmp_path / "cat")
    assert result.exit_code == 0, result.output
    stored = [load_file(two_adapters / name / "adapter" / "adapter_model.safetensors") for name in ("01-sft", "02-sft")]
    plain = dict(AutoModelForCausalLM.from_pretrained(TINY).float().named_parameters())
    for name, weight in weights(tmp_path / "cat").items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        deltas = [2 * one[f"{key}.lora_B.weight"] @ one[f"{key}.lora_A.weight"] for one in stored]  # alpha / r is 2
        assert torch.allclose(weight - plain[name], (deltas[0] + deltas[1]) / 2, atol=1e-6)
        assert float((deltas[0] + deltas[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"blend": "ties"}, "two or more adapters"),
        ({"weights": [1.0]}, "only in a blend"),
        ({"adapters": ["a", "b"], "blend": "linear", "weights": [1.0]}, "1 for 2 adapters"),
        ({"adapters": ["a", "b"], "blend": "ties"}, "density"),
        ({"adapters": ["a", "b"], "blend": "linear", "density": 0.5}, "density"),
        ({"max_shard_size": "much"}, "pattern"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Merge.model_validate(settings)


# --- what must be refused, leaving everything as it was --------------------------------------------


def refused(folder: Path, *options: str | Path, code: int = 2) -> str:
    """The one line that refuses a merge of a run folder, which stays as it was."""
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    result = call("merge", folder, *options)
    assert result.exit_code == code, result.output
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    line = next(line for line in result.stderr.splitlines() if line.startswith("qreason: "))
    assert len(line) < 400
    return line


def test_a_second_merge_overwrites_nothing(trained: tuple[Path, str]) -> None:
    assert "already exists" in refused(trained[0])


def test_what_a_merge_that_was_cut_off_left_is_removed(two_adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(two_adapters, tmp_path / "run")
    left = tmp_path / "run" / "merged-float16" / "trained.draft"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    result = call("merge", tmp_path / "run", "--rows", "2")
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in left.parent.iterdir()) == ["merge.json", "model"]


def test_an_adapter_of_another_base_is_refused(two_adapters: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(two_adapters / "01-sft" / "adapter", tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/another"}))
    assert "an adapter for org/another, not for qreason/tiny" in refused(two_adapters, "--adapter", other)
    run = Path(shutil.copytree(two_adapters, tmp_path / "run"))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["base"]["fingerprint"] = "sha256:0"
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "trained on other weights" in refused(two_adapters, "--adapter", run / "01-sft")
    assert "no adapter there" in refused(two_adapters, "--adapter", "03-grpo")


def test_an_adapter_with_weights_that_have_no_place_is_refused(two_adapters: Path, tmp_path: Path) -> None:
    # PEFT would leave them out, with a warning.
    other = Path(shutil.copytree(two_adapters / "01-sft" / "adapter", tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    assert "does not fit the base" in refused(two_adapters, "--adapter", other)


def test_a_base_that_changed_since_training_is_refused(tmp_path: Path) -> None:
    base = Path(shutil.copytree(TINY, tmp_path / "base"))
    folder = run_with_adapters(tmp_path / "run", "01-sft", base=str(base))
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2] + b"\0\0")
    assert "changed since this run began" in refused(folder)


def test_a_full_disk_is_told_before_and_while_writing(
    two_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(merging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
        assert "are free; make room" in refused(two_adapters)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert "could not be written ([Errno 28] No space left on device); make room" in refused(two_adapters, code=1)


def test_a_run_without_an_adapter_and_a_folder_without_a_run_are_refused(tmp_path: Path) -> None:
    folder = run_with_adapters(tmp_path / "run")
    assert "nothing to merge yet" in refused(folder)
    assert "not a run folder" in refused(TINY)
    assert "--weights: Input should be a valid number" in refused(folder, "--weights", "a,b")
    assert "keeps the settings" in refused(folder, "--seed", "3")
