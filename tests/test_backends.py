"""Who loads the base: the choice, and what a backend without caches of ours needs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from click.testing import CliRunner
from conftest import RecipeWriter

from qreason.cli import main
from qreason.data.prompts import VERDICTS, render_judge
from qreason.errors import MissingExtra, ModelError
from qreason.inference.generate import LocalGenerator
from qreason.judge.verdict import LocalModel
from qreason.machine.hardware import COMPILER, detect
from qreason.model import backends
from qreason.model.backends import Choice
from qreason.model.load import EMBEDDED, load_base
from qreason.model.resident import Resident
from qreason.recipe.load import load_recipe
from qreason.recipe.sections import Lora, Model
from qreason.run.folder import RunFolder
from qreason.run.session import Session
from qreason.types import Sampling

Wanted = Literal["auto", "plain", "unsloth"]


@pytest.mark.parametrize(
    ("wanted", "card", "installed", "name"),
    [
        ("auto", (8, 6), True, "unsloth"),
        ("unsloth", (7, 5), True, "unsloth"),
        ("plain", (8, 6), True, "plain"),
        ("auto", (8, 6), False, "plain"),
        ("auto", (6, 1), True, "plain"),
        ("auto", None, True, "plain"),
    ],
)
def test_unsloth_is_chosen_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, wanted: Wanted, card: tuple[int, int] | None, installed: bool, name: str
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda module: module if installed else None)
    monkeypatch.setattr(backends, "compiler_trouble", lambda: None)
    choice = backends.choose(wanted, card)
    assert choice.name == name
    assert choice.why


def test_unsloth_is_left_out_where_its_kernels_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda module: module)
    monkeypatch.setattr(backends, "compiler_trouble", lambda: "there is no C compiler (gcc or clang)")
    choice = backends.choose("auto", (7, 5))
    assert (choice.name, choice.cure) == ("plain", COMPILER)
    assert "no C compiler" in choice.why
    with pytest.raises(MissingExtra, match=r"no C compiler .*: apt install build-essential python3-dev"):
        backends.choose("unsloth", (7, 5))


def test_a_recipe_with_a_step_for_the_plain_backend_starts_on_it(
    monkeypatch: pytest.MonkeyPatch, write_recipe: RecipeWriter
) -> None:
    """A preference step used to fail when it was reached, hours later."""
    monkeypatch.setattr(backends, "find_spec", lambda module: module)
    monkeypatch.setattr(backends, "compiler_trouble", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    preference = ("- merge", "- preference: {from: base}"), ("sft: sft.jsonl", "sft: sft.jsonl\n  pairs: pairs.jsonl")
    for backend in ("auto", "unsloth"):
        recipe = load_recipe(
            write_recipe(("{base: qreason/tiny}", f"{{base: qreason/tiny, backend: {backend}}}"), *preference)
        )
        run = Session(recipe, RunFolder.unwritten(Path("run"), recipe))
        if backend == "auto":
            assert run.backend == Choice("plain", "a preference step trains on the plain backend only")
        else:
            with pytest.raises(ModelError, match="a preference step trains on the plain backend only; take backend"):
                _ = run.backend


def test_insisting_on_unsloth_without_it_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda module: None)
    with pytest.raises(MissingExtra, match="pip install unsloth=="):
        backends.choose("unsloth", (8, 6))
    with pytest.raises(ModelError, match="take backend: auto or plain"):
        backends.choose("unsloth", (6, 1))


def test_a_recipe_that_insists_on_unsloth_without_a_gpu_ends_with_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["run", "smoke", "--out", str(tmp_path / "run"), "--set", "model.backend=unsloth"]
    )
    assert result.exit_code == 2
    assert "need a GPU; take backend: auto or plain" in result.output.replace("\n", " ")


def test_unsloth_is_imported_before_trl_and_keeps_out_of_the_folder(tmp_path: Path) -> None:
    """In a process of its own, with a stand-in that notes what was there when it was imported."""
    (tmp_path / "unsloth.py").write_text(
        "import json, os, sys\n"
        "names = ('UNSLOTH_DISABLE_STATISTICS', 'UNSLOTH_COMPILE_LOCATION')\n"
        "heavy = [name for name in ('trl', 'transformers', 'peft') if name in sys.modules]\n"
        "print(json.dumps({'heavy': heavy, **{name: os.environ[name] for name in names}}))\n"
        "raise SystemExit\n"
    )
    code = (
        "import torch, sys\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.get_device_capability = lambda: (8, 6)\n"
        "from qreason.cli import main\n"
        f"main(['run', 'smoke', '--out', {str(tmp_path / 'run')!r}])\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    seen = json.loads(ended.stdout.splitlines()[-1])
    assert seen["heavy"] == []
    assert seen["UNSLOTH_DISABLE_STATISTICS"] == "1"
    assert seen["UNSLOTH_COMPILE_LOCATION"].startswith(str(tmp_path / ".cache"))


def test_replies_and_verdicts_are_the_same_without_caches_of_ours(own_resident: Resident) -> None:
    prompts = [[{"role": "user", "content": text}] for text in ("Repeat this: spooler", "What is a VPN?")]
    groups = [[render_judge("restart the spooler", reply) for reply in ("restart it", "buy a printer")]]
    greedy = Sampling(temperature=0, max_completion_length=12)
    replies = LocalGenerator(own_resident).generate(prompts, n=2, sampling=greedy)
    verdicts = LocalModel(LocalGenerator(own_resident)).ask(groups, VERDICTS)
    own_resident.backend = "unsloth"
    assert LocalGenerator(own_resident).generate(prompts, n=2, sampling=greedy) == replies
    other = LocalModel(LocalGenerator(own_resident)).ask(groups, VERDICTS)
    assert other[0] == pytest.approx(verdicts[0], abs=1e-4)
    drawn = LocalGenerator(own_resident).generate(
        prompts, n=3, sampling=Sampling(max_completion_length=12, min_p=0.1, seed=1)
    )
    assert len({reply.text for reply in drawn[1]}) > 1
    assert all(len(reply.token_ids) <= 12 for group in drawn for reply in group)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_bases_own_way_of_sampling_does_not_reach_replies(own_resident: Resident, adapted: bool) -> None:
    """generate takes what it is not given from the base's generation_config, such as Qwen2.5's repetition penalty."""
    if adapted:
        own_resident.new_adapter(Lora(r=2))
        own_resident.model.eval()
    prompts = [[{"role": "user", "content": text}] for text in ("Repeat this: spooler", "What is a VPN?")]
    greedy = Sampling(temperature=0, max_completion_length=16)
    expected = LocalGenerator(own_resident).generate(prompts, n=1, sampling=greedy)
    config = own_resident.model.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size, config.min_new_tokens = 5.0, 1, 16
    own_resident.backend = "unsloth"
    generator = LocalGenerator(own_resident)
    assert generator.generate(prompts, n=1, sampling=greedy) == expected
    inner = own_resident.model.get_base_model() if adapted else own_resident.model
    assert own_resident.model.generation_config is inner.generation_config is config
    groups = [[render_judge("restart the spooler", "restart it")]]
    verdict = generator.expect(groups, VERDICTS)
    own_resident.backend = "plain"
    assert verdict[0] == pytest.approx(generator.expect(groups, VERDICTS)[0], abs=1e-4)


class FakeUnsloth:
    """What Unsloth 2026.10.9 does to a model around generate, and how it is undone."""

    def __init__(self, model: Any) -> None:
        self.layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self.generate = model.generate
        self.arm(True)
        model.generate = partial(self.answer, model)

    def arm(self, armed: bool) -> None:
        for layer in self.layers:
            layer.gradient_checkpointing = armed

    def answer(self, model: Any, **given: Any) -> Any:
        training = model.training
        self.arm(False)
        model._flag_for_generation = True
        made = self.generate(**given)
        if training:
            self.for_training(model)
        return made

    def for_training(self, model: Any) -> None:
        del model._flag_for_generation
        self.arm(True)


def test_checkpointing_is_armed_again_after_replies_and_verdicts(
    own_resident: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every training step after a judgement kept all activations: 4 GiB in place of 0.13 for a 1.5B model."""
    own_resident.new_adapter(Lora(r=2))
    own_resident.backend = "unsloth"
    unsloth = FakeUnsloth(own_resident.model)
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=unsloth))
    generator, model = LocalGenerator(own_resident), own_resident.model.train()
    for work in (
        lambda: generator.generate(
            [[{"role": "user", "content": "a"}]], n=1, sampling=Sampling(max_completion_length=2)
        ),
        lambda: generator.expect([[render_judge("restart the spooler", "restart it")]], VERDICTS),
    ):
        work()
        assert all(layer.gradient_checkpointing for layer in unsloth.layers)
        assert not hasattr(model, "_flag_for_generation")
        assert model.training
    model.eval()  # an evaluation leaves training as it is
    generator.expect([[render_judge("restart the spooler", "restart it")]], VERDICTS)
    assert not model.training


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])  # bitsandbytes in 8 bits
def test_a_base_that_is_stored_quantized_is_refused(tmp_path: Path, method: str) -> None:
    folder = Path(shutil.copytree(EMBEDDED["qreason/tiny"], tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"stored quantized .{method}.*give the original 16-bit model"):
        load_base(Model(base=str(folder)), detect())


def test_nf4_without_bitsandbytes_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qreason.model.load.four_bit_trouble", lambda device: "bitsandbytes did not load its library")
    with pytest.raises(ModelError, match="did not load its library; `qreason doctor` shows the cure"):
        load_base(Model(base="qreason/tiny", quantization="nf4"), detect())
