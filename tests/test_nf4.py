"""4-bit weights on the CPU, for real: training after an evaluation, saving, loading again, merging."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from conftest import jsonl
from safetensors.torch import load_file

from qreason.cli import main
from qreason.data.prompts import HELPDESK, render
from qreason.inference.generate import LocalGenerator
from qreason.machine.files import read_jsonl
from qreason.machine.hardware import detect
from qreason.model.compat.bitsandbytes import is_four_bit, to_float32
from qreason.model.compensation import compensate, correction
from qreason.model.load import EMBEDDED, load_base
from qreason.model.resident import Resident
from qreason.recipe.sections import Lora, Model
from qreason.run.session import Session
from qreason.training.trainer import compensate_quantization

INCIDENTS = Path(__file__).parents[1] / "data" / "helpdesk" / "sft.jsonl"
RECIPE = """\
name: four
model: {base: qreason/tiny, quantization: nf4, lora: {init: quantization_error}}
data: {sft: sft.jsonl, prompts: prompts.jsonl, heldout: heldout.jsonl}
rewards: {planted:letters: 1}
sampling: {max_completion_length: 16}
steps:
  - sft: {max_steps: 2, learning_rate: 5e-3, warmup_steps: 0}
  - evaluate
  - grpo: {num_generations: 4, per_device_train_batch_size: 4, max_steps: 3, learning_rate: 5e-3, preflight: false}
  - evaluate
  - merge: {dtype: float32}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: trained, evaluated, trained further, merged, on a 4-bit base."""
    folder = tmp_path_factory.mktemp("four")
    row = {"issue": "printer is offline", "resolution": "Restart the spooler.", "steps": "Looked at the queue."}
    for name in ("sft", "prompts", "heldout"):
        (folder / f"{name}.jsonl").write_text(jsonl([{"id": f"{name}{i}", **row} for i in range(4)]))
    (folder / "planted.py").write_text(
        "def letters(replies, examples):\n    return [reply.text.count('e') for reply in replies]\n"
    )
    (folder / "four.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(main, ["run", "four.yaml"])
    assert result.exit_code == 0, result.output
    assert result.stderr.count("NF4 changes the layers' outputs by 8") == 1  # GRPO goes on from SFT's adapter
    return folder / "runs" / "four"


def deltas(adapter: Path) -> dict[str, torch.Tensor]:
    """Layer -> what an adapter adds to its weight, alpha / r being 2."""
    weights = load_file(adapter / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): 2
        * (weights[name.replace("lora_A", "lora_B")].float() @ weights[name].float())
        for name in weights
        if "lora_A" in name
    }


@pytest.mark.slow
def test_training_after_an_evaluation_and_merging_are_exact(finished: Path) -> None:
    """bitsandbytes once repacked its weights during an evaluation, and merged to a relative error of 1.37."""
    base = load_base(Model(base="qreason/tiny", quantization="nf4"), detect()).dequantize().float()
    merged = load_file(finished / "03-merge/model/model.safetensors")
    sft, both = deltas(finished / "01-sft/adapter"), deltas(finished / "02-grpo/adapter")
    assert any(not torch.equal(both[layer], sft[layer]) for layer in sft)  # it was trained further
    for layer, delta in both.items():
        update = merged[f"{layer}.weight"] - base.get_submodule(layer).weight
        assert delta.norm() > 0
        assert (update - delta).norm() <= 0.01 * delta.norm(), layer


@pytest.mark.slow
def test_what_was_saved_answers_as_what_was_trained(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.parents[1])
    trained = [row["reply"] for row in read_jsonl(finished / "02-grpo/evaluation.jsonl")]
    run = Session.reopen(Path("runs/four"))
    run.resident.load_adapter(run.disk.adapter())
    assert run.resident.model.is_loaded_in_4bit
    prompts = [render(example, HELPDESK) for example in run.examples("heldout")]
    greedy = run.recipe.sampling.sampling(greedy=True)
    loaded = LocalGenerator(run.resident).generate(prompts, n=1, sampling=greedy)
    assert [replies[0].text for replies in loaded] == trained
    run.resident.remove_adapter()
    bare = LocalGenerator(run.resident).generate(prompts, n=1, sampling=greedy)
    assert [replies[0].text for replies in bare] != trained


# --- a base that is stored in 4 bits -----------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base as `…-bnb-4bit` repositories have theirs, for computing in bfloat16."""
    folder = tmp_path_factory.mktemp("stored") / "tiny-bnb-4bit"
    shutil.copytree(EMBEDDED["qreason/tiny"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    packed = load_base(Model(base="qreason/tiny", quantization="nf4"), detect())
    packed.config.quantization_config.bnb_4bit_compute_dtype = torch.bfloat16
    packed.save_pretrained(folder)
    return folder


def test_a_base_stored_in_4_bits_is_loaded_as_it_is(stored: Path) -> None:
    ours = load_base(Model(base=str(stored), quantization="nf4"), detect())
    same = load_base(Model(base="qreason/tiny", quantization="nf4"), detect())
    weights = dict(same.named_parameters())
    assert sum(is_four_bit(weight) for weight in weights.values()) == 28
    for name, weight in ours.named_parameters():
        assert torch.equal(to_float32(weight), to_float32(weights[name])), name
    layer = ours.model.layers[0].mlp.up_proj
    assert str(layer.compute_dtype) == f"torch.{detect().dtype}"  # this machine's, not that of the one it was made on


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.quantization=none", "its weights are stored in 4 bits; set model.quantization: nf4"),
        ("model.lora.init=quantization_error", "their quantization error is not known; leave model.lora.init out"),
    ],
)
def test_what_a_base_stored_in_4_bits_cannot_do_is_said_before(
    stored: Path, override: str, said: str, workplace: Path
) -> None:
    (workplace / "four.yaml").write_text(STORED.format(base=stored))
    told = CliRunner().invoke(main, ["validate", "four.yaml", "--set", override])
    assert told.exit_code == 2
    assert said in told.stderr


STORED = """\
name: stored
model: {{base: {base}, quantization: nf4}}
data: {{sft: sft.jsonl, heldout: heldout.jsonl}}
rewards: {{correctness: 1}}
sampling: {{max_completion_length: 8}}
steps:
  - sft: {{max_steps: 1, learning_rate: 5e-3, warmup_steps: 0}}
  - merge: {{dtype: float32}}
  - export: {{gguf: [f32], rows: 1}}
"""


def test_a_base_stored_in_4_bits_is_trained_merged_and_exported(stored: Path, workplace: Path) -> None:
    (workplace / "four.yaml").write_text(STORED.format(base=stored))
    result = CliRunner().invoke(main, ["run", "four.yaml"])
    assert result.exit_code == 0, result.output
    assert "no adapter file: " in result.stderr
    run = workplace / "runs" / "stored"
    base = load_base(Model(base="qreason/tiny", quantization="nf4"), detect()).dequantize().float()
    merged = load_file(run / "02-merge/model/model.safetensors")
    for layer, delta in deltas(run / "01-sft/adapter").items():
        update = merged[f"{layer}.weight"] - base.get_submodule(layer).weight
        assert delta.norm() > 0
        assert (update - delta).norm() <= 0.01 * delta.norm(), layer
    assert json.loads((run / "03-export/export.json").read_text())["verified"]
    told = CliRunner().invoke(main, ["merge", str(run), "--base", "original"])
    assert told.exit_code == 2
    assert "the base is trained as it is stored, there is no other" in told.stderr


QUESTIONS = [f"Our {thing} fails since this morning, what now?" for thing in ("backup", "VPN client", "mail server")]


def test_an_adapter_begins_with_what_4_bits_took() -> None:
    """On text that it was not fitted to, the base answers more like the unquantized one; no step has been taken."""
    resident = Resident(Model(base="qreason/tiny", quantization="nf4"), detect())
    resident.new_adapter(Lora(r=16))
    drawn = {name: float(w.detach().norm()) for name, w in resident.model.named_parameters() if "lora_A" in name}
    batch = resident.tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    whole = load_base(Model(base="qreason/tiny"), detect())(**batch).logits

    def distance() -> float:
        with resident.inference() as model:
            return float((model(**batch).logits - whole)[batch["attention_mask"].bool()].norm())

    bare = distance()
    texts = [f"{row['issue']} {row['steps']}" for row in read_jsonl(INCIDENTS)[:32]]
    before, after = compensate(resident, texts)
    assert distance() < 0.8 * bare
    assert after < 0.75 * before
    for name, weight in resident.model.named_parameters():
        if "lora_A" in name:
            assert float(weight.norm()) == pytest.approx(drawn[name], rel=1e-4)
            assert weight.requires_grad


def test_no_correction_of_the_rank_is_better_for_these_inputs() -> None:
    """Against the closed form of QERA, in float64: R^(-1/2) times the truncated SVD of R^(1/2) E'."""
    torch.manual_seed(5)  # the truncated SVD is a randomized one
    source = torch.Generator().manual_seed(5)
    error, read = (torch.randn(size, generator=source, dtype=torch.float64) for size in ((24, 32), (400, 32)))
    read = read @ torch.randn(32, 32, generator=source, dtype=torch.float64)  # inputs that go together
    down, up = correction(error, read, 4)
    values, vectors = torch.linalg.eigh(read.T @ read)
    root, inverse = (vectors @ torch.diag(values**power) @ vectors.T for power in (0.5, -0.5))
    left, sizes, right = torch.linalg.svd(root @ error.T)
    best = (inverse @ (left[:, :4] * sizes[:4]) @ right[:4]).T
    torch.testing.assert_close(up @ down, best, rtol=1e-4, atol=1e-4)


def test_unsloths_adapter_begins_at_zero_and_that_is_said() -> None:
    said: list[str] = []
    compensate_quantization(SimpleNamespace(resident=SimpleNamespace(backend="unsloth"), say=said.append))  # type: ignore[arg-type]
    assert said == ["model.lora.init: quantization_error is for model.backend: plain; Unsloth's adapter starts at zero"]
