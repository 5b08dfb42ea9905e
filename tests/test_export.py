"""Export of the embedded model through a real llama.cpp: what is written, and that each mistake is caught."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import give_weights
from safetensors.torch import load_file, save_file

from qreason.cli import main
from qreason.errors import ExportError, ModelError, RunFolderError
from qreason.export import architecture, engine, lora, quality, reference, verify, writer
from qreason.export.exporter import Exporter
from qreason.export.original import Original
from qreason.model.load import EMBEDDED
from qreason.model.merging import check_adapter
from qreason.recipe.load import load_recipe
from qreason.recipe.sections import Lora
from qreason.recipe.settings import Export
from qreason.run.session import Session
from qreason.stages import run_stage
from qreason.types import Reply

ROOT = Path(__file__).parents[1]
TINY = EMBEDDED["qreason/tiny"]
STEPS = "steps=[{sft: {max_steps: 1}}, {merge: {rows: 4}}, {export: {gguf: [f16, q4_k_m], ollama: true, rows: 4}}]"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def write_random_adapter(run: Session, folder: Path, strength: float = 0.1, **options: Any) -> None:
    """An adapter that changes what the model says, without the minutes of training one."""
    torch.manual_seed(1)
    run.resident.new_adapter(Lora(r=8, alpha=32))
    give_weights(run.resident, strength)
    model = run.resident.model
    model.peft_config["default"].base_model_name_or_path = run.recipe.model.base
    for key, value in options.items():
        setattr(model.peft_config["default"], key, value)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    run.resident.remove_adapter()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A run with an adapter, its merge, and an export of both; nothing is trained."""
    folder = tmp_path_factory.mktemp("run") / "smoke"
    rows = folder.parent / "heldout.jsonl"
    rows.write_text("".join((ROOT / "data" / "helpdesk" / "heldout.jsonl").read_text().splitlines(True)[:24]))
    opened = Session.open(load_recipe("smoke", [STEPS, f"data.heldout={rows}"]), folder, say=lambda line: None)
    write_random_adapter(opened, folder / "01-sft" / "adapter")
    opened.disk.finish_step(opened.step, 0)
    for step in (1, 2):
        opened.step = step
        run_stage(opened.recipe.steps[step], opened)
        opened.disk.finish_step(opened.step, 0)
    return opened


@pytest.fixture(scope="module")
def exported(run: Session) -> Path:
    return run.folder / "03-export"


@pytest.fixture(scope="module")
def exporter(run: Session, tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    work = tmp_path_factory.mktemp("work")
    return Exporter(work, work, run.folder / "02-merge" / "model", Export(rows=4), run)


@pytest.fixture(scope="module")
def original(run: Session, exporter: Exporter) -> Original:
    """The trained and the merged model, asked; files can be held against them."""
    return Original(run, exporter.merged, exporter.heldout, exporter.work, exporter.results)


# --- what an export leaves -------------------------------------------------------------------------


def test_every_file_of_an_export_has_passed_its_checks(exported: Path) -> None:
    report = json.loads((exported / "export.json").read_text())
    assert report["verified"]
    assert all(check["passed"] for check in report["checks"])
    assert set(report["accuracy"]) == {"adapter", "merged", "f16", "q4_k_m"}
    assert set(report["files"]) == {"f16", "q4_k_m", "adapter"}
    assert report["recommended"] == "q4_k_m"
    assert "FROM ./smoke-q4_k_m.gguf" in (exported / "Modelfile").read_text()
    assert {file.name for file in exported.iterdir()} == {
        "smoke-f16.gguf",
        "smoke-q4_k_m.gguf",
        "smoke-adapter.gguf",
        "Modelfile",
        "export.json",
    }


@pytest.mark.parametrize(
    ("accuracy", "recommended"),
    [
        ({"adapter": 0.5, "f16": 0.5, "q8_0": 0.5, "q4_k_m": 0.41}, "q4_k_m"),  # 50 % of 100 rows: [40.4, 59.6]
        ({"adapter": 0.5, "f16": 0.5, "q8_0": 0.41, "q4_k_m": 0.4}, "q8_0"),
        ({"adapter": 0.5, "f16": 0.2, "q8_0": 0.3, "q4_k_m": 0.9}, "q4_k_m"),  # more accurate is no fault
        ({"adapter": 0.5, "f16": 0.4, "q8_0": 0.3, "q4_k_m": 0.2}, None),
        ({"adapter": 0.5, "f16": 0.5}, "f16"),
        ({}, None),
    ],
)
def test_the_smallest_file_within_the_interval_of_the_original_is_recommended(
    accuracy: dict[str, float], recommended: str | None
) -> None:
    sizes = {"f16": 300, "q8_0": 200, "q4_k_m": 100}
    assert quality.recommend(sizes, accuracy | {"merged": 0.5}, rows=100) == recommended


def test_the_checks_of_an_export_are_those_documented(exported: Path) -> None:
    report = json.loads((exported / "export.json").read_text())
    names = [(check["file"], check["name"]) for check in report["checks"]]
    assert names == [
        ("merged", "same as the adapter"),
        ("smoke-f16.gguf", "metadata"),
        ("smoke-f16.gguf", "logits as in transformers"),
        ("smoke-f16.gguf", "tokenization"),
        ("smoke-f16.gguf", "chat template"),
        ("smoke-f16.gguf", "stops at <|im_end|>"),
        ("smoke-f16.gguf", "greedy replies"),
        ("smoke-q4_k_m.gguf", "metadata"),
        ("smoke-q4_k_m.gguf", "quantized as expected"),
        ("smoke-q4_k_m.gguf", "as its own weights"),
        ("smoke-adapter.gguf", "same as PEFT"),
        ("Modelfile", "renders like the chat template"),
    ]


def test_f32_logits_of_the_embedded_model_are_those_of_transformers_within_1e_4(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    file = tmp_path / "tiny-f32.gguf"
    writer.write_model(TINY, file, "f32", "tiny")
    spans = ((range(100, 110), range(110, 160)), (range(500, 510), range(510, 900)))
    asked = [Reply("", prompt_ids=tuple(prompt), token_ids=tuple(reply)) for prompt, reply in spans]
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    found = engine.logits(file, asked, tmp_path / "found")
    far = verify.distance(reference.write_logits(model, asked, tmp_path / "own"), found)
    assert far.tokens == 440
    assert far.logit_difference <= 1e-4
    assert far.top1 == 1
    exact = reference.write_logits(model.double(), asked, tmp_path / "exact")
    assert verify.distance(exact, found).logit_difference <= 4e-5  # 8e-5 with angles that are not the engine's


# --- mutations: each is caught by a check of the default verification ------------------------------


def rewrite(
    source: Path,
    out: Path,
    metadata: Mapping[str, Any] | None = None,
    change: Callable[[dict[str, Any]], None] = lambda tensors: None,
) -> Path:
    """A GGUF file with other values in its header (None: left out), or with other tensors."""
    reader = gguf.GGUFReader(source)
    values = {key: entry.contents() for key, entry in reader.fields.items() if not key.startswith("GGUF.")}
    values.update(metadata or {})
    tensors = {tensor.name: numpy.array(tensor.data) for tensor in reader.tensors}
    change(tensors)
    made = gguf.GGUFWriter(out, str(values.pop("general.architecture")))
    for key, value in values.items():
        if value is not None:
            writer.add_value(made, key, value)
    for name, data in tensors.items():
        made.add_tensor(name, data)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    return out


def test_a_file_that_is_only_rewritten_passes(exported: Path, original: Original, tmp_path: Path) -> None:
    file = rewrite(exported / "smoke-f16.gguf", tmp_path / "same.gguf")
    original.check_float("f16", file)


WRONG_HEADER = {
    "qwen2.attention.layer_norm_rms_epsilon": 1e-5,
    "qwen2.rope.freq_base": 1_000_000.0,
    "tokenizer.ggml.eos_token_id": 4093,
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": None,
    "general.sampling.temp": 0.7,
    "general.file_type": 15,
}


def test_each_wrong_value_of_a_header_is_caught_by_its_key(exported: Path, original: Original, tmp_path: Path) -> None:
    file = rewrite(exported / "smoke-f16.gguf", tmp_path / "wrong.gguf", WRONG_HEADER)
    with pytest.raises(ExportError, match="failed 'metadata'"):
        original.check_float("f16", file)
    told = original.results.checks[-1].figures["wrong"]
    assert [key for key in WRONG_HEADER if f"{key} " not in told] == []
    assert told.count(";") == len(WRONG_HEADER) - 1


def test_the_engine_itself_notices_a_wrong_header(exported: Path, exporter: Exporter, tmp_path: Path) -> None:
    values = {key: WRONG_HEADER[key] for key in ("tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token")}
    values["tokenizer.chat_template"] = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    file = rewrite(exported / "smoke-f16.gguf", tmp_path / "wrong.gguf", values)
    with engine.Server(file, 256) as server:
        assert not verify.check_tokens(file, server, exporter.heldout).passed
        assert not verify.check_template(file, server, exporter.heldout).passed
        assert server.tokenize("12345") != exporter.heldout.tokenizer("12345")["input_ids"]


def swap(tensors: dict[str, Any]) -> None:
    one, other = "blk.0.attn_k.weight", "blk.1.attn_k.weight"
    tensors[one], tensors[other] = tensors[other], tensors[one]


def transpose(tensors: dict[str, Any]) -> None:
    tensors["blk.2.attn_q.weight"] = numpy.ascontiguousarray(tensors["blk.2.attn_q.weight"].T)


def lose_bias(tensors: dict[str, Any]) -> None:
    tensors["blk.0.attn_v.bias"] = numpy.zeros_like(tensors["blk.0.attn_v.bias"])


@pytest.mark.parametrize("change", [swap, transpose, lose_bias])
def test_a_wrong_tensor_is_caught(
    change: Callable[[dict[str, Any]], None], exported: Path, original: Original, tmp_path: Path
) -> None:
    file = rewrite(exported / "smoke-f16.gguf", tmp_path / "wrong.gguf", change=change)
    with pytest.raises(ExportError, match="failed 'logits as in transformers'"):
        original.check_float("f16", file)


def merged_weights(run: Session, scale: float) -> dict[str, torch.Tensor]:
    """The base with its adapter added `scale` times."""
    base = load_file(TINY / "model.safetensors")
    merged = load_file(run.folder / "02-merge" / "model" / "model.safetensors")
    return {name: base[name].float() + scale * (merged[name].float() - base[name].float()) for name in merged}


def four_bit(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as a merge into a 4-bit base leaves them."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return {
        name: dequantize_4bit(*quantize_4bit(weight.contiguous(), quant_type="nf4"))
        if weight.dim() == 2 and "embed" not in name
        else weight
        for name, weight in weights.items()
    }


@pytest.mark.parametrize(
    "weights",
    [
        lambda run: merged_weights(run, 0.0),
        lambda run: merged_weights(run, 8 / 32),
        lambda run: merged_weights(run, 2.0),
        lambda run: four_bit(merged_weights(run, 1.0)),
    ],
    ids=["not merged", "adapter's scale lost", "merged twice", "merged into 4-bit"],
)
def test_a_wrong_merge_is_caught(
    weights: Callable[[Session], dict[str, torch.Tensor]], run: Session, exporter: Exporter, original: Original
) -> None:
    own = [original.work / "trained" / file.name for file in original.logits]
    model = reference.in_float32(original.merged).model
    model.load_state_dict(weights(run), strict=False)
    found = reference.write_logits(model, original.replies, original.work / "wrong")
    assert verify.check_merged(own, original.logits).passed
    assert not verify.check_merged(own, found).passed


def test_a_quantized_file_of_other_weights_is_caught(exported: Path, original: Original, tmp_path: Path) -> None:
    other = tmp_path / "base-f16.gguf"
    writer.write_model(TINY, other, "f16", "smoke")
    engine.quantize(other, tmp_path / "other-q4_k_m.gguf", "q4_k_m")
    original.verified = engine.logits(exported / "smoke-f16.gguf", original.replies, original.work / "verified")
    with pytest.raises(ExportError, match="failed 'quantized as expected'"):
        original.check_quantized("q4_k_m", tmp_path / "other-q4_k_m.gguf")


@pytest.mark.parametrize("alpha", [8.0, pytest.param(64.0, marks=pytest.mark.slow)])
def test_an_adapter_file_with_another_scale_is_caught(
    alpha: float, run: Session, exported: Path, original: Original, tmp_path: Path
) -> None:
    file = rewrite(exported / "smoke-adapter.gguf", tmp_path / "wrong.gguf", {"adapter.lora.alpha": alpha})
    with pytest.raises(ExportError, match="failed 'same as PEFT'"):
        original.check_adapter(file, run.folder / "01-sft" / "adapter", TINY)


def test_an_adapter_with_rslora_keeps_its_scale(run: Session, original: Original, tmp_path: Path) -> None:
    write_random_adapter(run, tmp_path / "adapter", use_rslora=True)
    lora.write_adapter(tmp_path / "adapter", TINY, tmp_path / "rslora.gguf", "smoke")
    original.check_adapter(tmp_path / "rslora.gguf", tmp_path / "adapter", TINY)


def test_probabilities_stay_at_their_tokens_where_the_server_leaves_some_out() -> None:
    # It leaves out those of a token that is half a character; all later ones were compared with other tokens.
    told = [{"id": token, "top_logprobs": [{"id": token, "logprob": -0.5}]} for token in (7, 9)]
    found = engine.logprobs_by_place({"tokens": [7, 8, 9], "completion_probabilities": told})
    assert found == [{7: -0.5}, {}, {9: -0.5}]
    assert engine.logprobs_by_place({"tokens": [7]}) == [{}]


# --- a failed check, and bad input -----------------------------------------------------------------


def test_a_failed_check_keeps_the_draft_and_the_earlier_file(
    run: Session, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / "export").mkdir()
    (folder / "export" / "smoke-f16.gguf").write_bytes(b"earlier")
    monkeypatch.setattr(verify, "FLOAT_KL", dict.fromkeys(verify.FLOAT_KL, 0.0))
    result = call("export", str(folder), "--gguf", "f16", "--rows", "2")
    assert result.exit_code == 1
    assert "failed 'logits as in transformers'" in result.stderr
    assert (folder / "export" / "smoke-f16.gguf").read_bytes() == b"earlier"
    assert (folder / "export" / "smoke-f16.gguf.unverified").stat().st_size > 1e6
    report = json.loads((folder / "export" / "export.json").read_text())
    assert not report["verified"]
    assert report["checks"][-1]["figures"]["kl"] > 0


def test_a_quantized_type_that_falls_short_costs_no_other(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It used to end the export, and with it the run, although all other files were good.
    monkeypatch.setitem(quality.QUANTIZED_KL, "q4_k_m", 1e-9)
    result = call("export", str(copied), "--gguf", "f16,q4_k_m,q8_0", "--rows", "2", "--ollama")
    assert result.exit_code == 0, result.output
    assert "not to be used: q4_k_m: quantized as expected: types " in result.stderr
    assert "(bound: kl 1e-09)" in result.stderr
    folder = copied / "export"
    report = json.loads((folder / "export.json").read_text())
    assert set(report["files"]) == {"f16", "q8_0", "adapter"}
    assert (report["failed"], report["verified"]) == ({"q4_k_m": "quantized as expected"}, True)
    assert report["recommended"] in ("f16", "q8_0")
    assert "q4_k_m" not in report["accuracy"]
    assert f"FROM ./smoke-{report['recommended']}.gguf" in (folder / "Modelfile").read_text()
    assert (folder / "smoke-q4_k_m.gguf.unverified").is_file()
    assert not (folder / "smoke-q4_k_m.gguf").exists()
    result = call("export", str(copied), "--gguf", "q4_k_m", "--rows", "2")
    assert result.exit_code == 1
    assert "no file passed its checks: q4_k_m: quantized as expected" in result.stderr


@pytest.mark.slow
def test_an_export_that_is_cut_off_goes_on_with_the_files_that_are_left(
    run: Session, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(BaseException):
        pass

    shutil.copytree(run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("03-export"))
    manifest = tmp_path / "run" / "manifest.json"
    done = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**done, "steps": done["steps"][:2]}))
    whole = {file.name: file.read_bytes() for file in exported.iterdir()}
    written: list[str] = []
    keep, write_model, compare_with = Exporter.keep, writer.write_model, Original.compare_with

    def keep_or_end(self: Exporter, kind: str, draft: Path) -> Path:
        if kind == place:
            raise Cut
        return keep(self, kind, draft)

    def compare_or_end(self: Original, file: Path) -> None:
        if place == "f16 again":
            raise Cut
        compare_with(self, file)

    def noting(merged: Path, out: Path, *given: Any) -> None:
        written.append(out.name.removeprefix("smoke-").partition(".")[0])
        write_model(merged, out, *given)

    monkeypatch.setattr(Exporter, "keep", keep_or_end)
    monkeypatch.setattr(Original, "compare_with", compare_or_end)
    monkeypatch.setattr(writer, "write_model", noting)
    for place in ("q4_k_m", "f16 again", "adapter", None):
        opened = Session.open(run.recipe, tmp_path / "run")
        opened.step, settings = 2, run.recipe.steps[2]
        if place is None:
            run_stage(settings, opened)
        else:
            with pytest.raises(Cut):
                run_stage(settings, opened)
    assert written == ["f16", "base-f16", "base-f16"], "a finished file is written once"
    made = {file.name: file.read_bytes() for file in (tmp_path / "run" / "03-export").iterdir()}
    reports = [json.loads(files.pop("export.json")) for files in (made, whole)]
    assert made == whole
    assert reports[0] == {**reports[1], "model": reports[0]["model"]}


def test_a_finished_file_of_another_model_or_damaged_is_made_again(copied: Path) -> None:
    said = call("export", str(copied), "--gguf", "f16", "--no-verify").stderr
    assert "is there already" not in said
    file = copied / "export" / "smoke-f16.gguf"
    made = file.read_bytes()
    said = call("export", str(copied), "--gguf", "f16", "--no-verify").stderr
    assert "smoke-f16.gguf is there already" in said
    file.write_bytes(made[:-1])
    said = call("export", str(copied), "--gguf", "f16", "--no-verify").stderr
    assert "smoke-f16.gguf is there already" not in said
    assert "smoke-adapter.gguf is there already" in said
    assert file.read_bytes() == made


@pytest.fixture
def copied(run: Session, tmp_path: Path) -> Path:
    """The run folder, for a test that changes something in it."""
    shutil.copytree(run.folder, tmp_path / "run")
    return tmp_path / "run"


def unchanged(folder: Path, *arguments: str, told: str, code: int = 2) -> None:
    """The command ends with one line that says why, and the earlier export is as it was."""
    earlier = {file.name: file.read_bytes() for file in (folder / "03-export").iterdir()}
    result = call("export", str(folder), *arguments)
    assert result.exit_code == code, result.output
    assert told in result.stderr
    assert result.stderr.count("qreason:") == 1
    assert {file.name: file.read_bytes() for file in (folder / "03-export").iterdir()} == earlier
    assert [file for file in folder.glob("export/*") if file.suffix == ".gguf"] == []


def test_an_unknown_type_is_named_with_the_nearest_one(copied: Path, tmp_path: Path) -> None:
    unchanged(copied, "--gguf", "f16,q4_km", told="--gguf: unknown type 'q4_km' (did you mean 'q4_k_m'?)")
    result = call("run", "smoke", "--out", str(tmp_path / "new"), "--set", STEPS.replace("q4_k_m", "q4"))
    assert result.exit_code == 2
    assert "unknown type 'q4'" in result.stderr


def test_an_export_step_without_a_merge_before_it_is_no_recipe() -> None:
    for steps in ("[sft, export]", "[sft, merge, grpo, export]", "[export]"):
        result = call("validate", "smoke", "--set", f"steps={steps}")
        assert result.exit_code == 2
        assert "put a merge step before it" in result.stderr
    assert call("validate", "smoke", "--set", "steps=[sft, merge, export]").exit_code == 0


def test_an_adapter_for_another_base_is_refused(copied: Path) -> None:
    file = copied / "01-sft" / "adapter" / "adapter_model.safetensors"
    weights = {name: torch.cat([weight, weight], -1) for name, weight in load_file(file).items()}
    save_file(weights, file)
    unchanged(copied, told="made for another base")


def test_a_base_that_changed_since_training_is_refused(copied: Path) -> None:
    file = copied / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["base"]["fingerprint"] = "sha256:0"
    file.write_text(json.dumps(manifest))
    unchanged(copied, told="the weights of qreason/tiny changed since this run began")


def test_a_tokenizer_that_was_extended_is_refused(copied: Path) -> None:
    from transformers import AutoTokenizer

    folder = copied / "02-merge" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>!"])
    tokenizer.save_pretrained(folder)
    unchanged(copied, told="the tokenizer was extended ('<think>!' is not in that of qreason/tiny)")


def test_a_full_disk_is_told_before_anything_is_written(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    unchanged(copied, told="no disk space")


def test_without_the_extra_the_package_to_install_is_named(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    unchanged(copied, told="pip install 'qreason[gguf]'")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "bias: all"),
    ],
)
def test_an_adapter_that_gguf_cannot_hold_is_refused_by_name(
    changed: dict[str, Any], named: str, run: Session, tmp_path: Path
) -> None:
    shutil.copytree(run.folder / "01-sft" / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(ModelError, match=f"{named} cannot be an adapter in GGUF"):
        lora.write_adapter(tmp_path / "adapter", TINY, tmp_path / "adapter.gguf", "x")
    assert not (tmp_path / "adapter.gguf").exists()


def test_an_output_layer_that_is_tied_by_name_only_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "tiny")
    weights = load_file(TINY / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "tiny" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from the embedding"):
        writer.write_model(tmp_path / "tiny", tmp_path / "x.gguf", "f16", "x")


def test_a_model_of_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "olmo2"}')
    with pytest.raises(ModelError, match=r"a olmo2 model; export writes Qwen2, Qwen2\.5 and their kin"):
        architecture.read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\x00", b'{"model_type": "qwen2", "hidden_size": "x"}'])
def test_a_damaged_config_of_a_merged_model_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config.json: damaged \(.*restore it"):
        architecture.read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{]", b"\xff" * 64])
def test_damaged_weights_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model.safetensors: damaged \(.*restore it"):
        writer.open_tensors(tmp_path)


def test_an_adapter_config_of_another_shape_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(RunFolderError, match=r"adapter_config.json: Input should be a valid dictionary"):
        lora.read_alpha(tmp_path)
    with pytest.raises(ModelError, match=r"no adapter there \(adapter_config.json\)"):
        check_adapter(tmp_path, {"id": "x", "fingerprint": "y"})


def test_an_engine_that_cannot_read_a_file_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ExportError, match=r"llama\.cpp ended with"):
        engine.logits(tmp_path / "broken.gguf", [Reply("", prompt_ids=(1,), token_ids=(2, 3))], tmp_path / "out")
    with pytest.raises(ExportError, match=r"llama\.cpp ended with"), engine.Server(tmp_path / "broken.gguf", 64):
        pass


def test_ollama_is_asked_where_it_is(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ollama = tmp_path / "bin" / "ollama"
    ollama.parent.mkdir()
    ollama.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n[ "$1" = run ] && echo "restart it"\nexit 0\n')
    ollama.chmod(0o755)
    monkeypatch.setenv("PATH", str(ollama.parent), prepend=":")
    result = call("export", str(copied), "--gguf", "q8_0", "--ollama", "--no-verify")
    assert result.exit_code == 0, result.output
    assert "nothing was verified" in result.stderr
    assert "restart it" in result.stderr
    created, asked = (tmp_path / "called").read_text().splitlines()
    assert created == f"create smoke -f {copied}/export/Modelfile"
    assert asked.startswith("run smoke ")
    assert f"ollama create smoke -f {copied}/export/Modelfile" in result.stderr
    assert "FROM ./smoke-q8_0.gguf" in (copied / "export" / "Modelfile").read_text()
    assert f"lms import --copy --user-repo qreason/smoke {copied}/export/smoke-q8_0.gguf" in result.stderr
    report = json.loads((copied / "export" / "export.json").read_text())
    assert (report["verified"], report["recommended"]) == (False, None)
