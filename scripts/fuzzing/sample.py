"""A recipe, its data and a finished run, whose files are then damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

from fuzzing.strange import as_yaml
from qreason.machine.files import write_json, write_jsonl
from qreason.model.load import EMBEDDED
from qreason.recipe.load import load_recipe
from qreason.report import build as report
from qreason.run.folder import RunFolder

RECIPE = {
    "name": "small",
    "model": {"base": "qreason/tiny", "lora": {"r": 4}},
    "data": dict.fromkeys(("sft", "prompts", "heldout"), "rows.jsonl") | {"pairs": "pairs.jsonl"},
    "rewards": {"correctness": 0.1, "format": {"weight": 0.1}, "cosine_length": 0.2},
    "sampling": {"temperature": 0.9, "max_completion_length": 12},
    "steps": [
        {"evaluate": {"samples": 2}},
        {"sft": {"learning_rate": 1e-5, "trl": {"logging_steps": 1}}},
        {"evaluate": {"samples": 2}},
        {"sample": {"n": 2}},
        {"grpo": {"num_generations": 4}},
        {"evaluate": {"samples": 2}},
        {"preference": {}},
        "merge",
        {"export": {"gguf": ["f16"]}},
    ],
}
ROW = {"id": "a", "issue": "printer is offline", "resolution": "Restart the spooler.", "steps": "Looked.", "split": "x"}
PAIR = {"prompt": "printer is offline", "chosen": "Restart it.", "rejected": "No.", "about": "tone"}
REPLY = {"id": "a", "prompt": "p", "reply": "<answer>r</answer>", "reference": "r", "label": 1, "accepted": ["s"]}


def write_data() -> None:
    """A recipe and its data in the current folder."""
    write_jsonl(Path("rows.jsonl"), [{**ROW, "id": str(number)} for number in range(3)])
    write_jsonl(Path("pairs.jsonl"), [PAIR])
    write_jsonl(Path("replies.jsonl"), [REPLY, {**REPLY, "label": 0}])
    Path("small.yaml").write_bytes(as_yaml(RECIPE))


def write_run() -> dict[str, bytes]:
    """A finished run in ./run, as far as no model is needed; its files."""
    import numpy
    from safetensors.numpy import save_file

    shutil.rmtree("run", ignore_errors=True)
    run = RunFolder.open(load_recipe("small.yaml"), Path("run"))
    base = {"id": "qreason/tiny", "fingerprint": "sha256:0"}
    run.record_base(base, {"device": "cpu", "name": None})
    tested = dict.fromkeys(("own", "direct", "conclusion_only", "foreign", "foreign_followed", "filler"), True)
    marks = {"parts": dict.fromkeys(run.recipe.rewards, 1.0), "total": 0.4, "split": "x", "accurate": True}
    row = {"id": "0", "prompt": "p", "reply": "r", "reference": "r", **marks, "pass_at_1": 0.5, "well_formed": True}
    row |= {"words": 1, "finished": True, "answer_anywhere": True, "consistent": None, "right": [True, False]}
    row |= {"reasoning": {**tested, "early": [True], "gain_nats": [0.5]}}
    row |= {"scaling": {key: {"value": 0.5, "tokens": 3.0} for key in ("pass@1", "pass@2")}}
    rows = [row, {**row, "id": "1", "accurate": False, "reasoning": {"why": "no"}, "consistent": True}]
    drawn = {"id": "0", "number": 0, "prompt": "p", "reply": "r", "reference": "r", **marks, "finished": True}
    for step, name in enumerate(run.stage_names):
        folder, stage = run.path / name, run.recipe.steps[step].stage
        folder.mkdir(exist_ok=True)
        if stage == "evaluate":
            write_jsonl(folder / "evaluation.jsonl", rows)
            write_json(folder / "evaluation.json", report.measure(rows, name, 1.0))
        elif stage in ("sft", "grpo"):
            (folder / "adapter").mkdir()
            settings = {"peft_type": "LORA", "base_model_name_or_path": "qreason/tiny", "r": 4, "lora_alpha": 8}
            write_json(folder / "adapter" / "adapter_config.json", settings | {"bias": "none", "use_rslora": False})
            key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
            save_file({key: numpy.zeros((4, 8), "float32")}, folder / "adapter" / "adapter_model.safetensors")
            logged = [{"step": 1, "loss": 0.1, "reward": 0.3, "rewards/format/mean": 0.3}, {"step": 2, "reward": 0.4}]
            write_jsonl(folder / "metrics.jsonl", logged)
            write_json(folder / "judge.json", {"told": "fit", "fit": True})
        elif stage == "sample":
            write_json(folder / "sample.json", dict.fromkeys(("replies", "kept", "plain", "completion_tokens"), 2))
            write_jsonl(folder / "draws.jsonl", [drawn, {**drawn, "number": 1}])
            write_jsonl(folder / "sampled.jsonl", [ROW])
        elif stage == "preference":
            write_json(folder / "preference.json", {"accuracy": {"mean": 0.5, "low": 0.4, "high": 0.6}})
        elif stage == "merge":
            (folder / "model").mkdir()
            shutil.copyfile(EMBEDDED["qreason/tiny"] / "config.json", folder / "model" / "config.json")
            save_file({"model.layers.0.mlp.up_proj.weight": numpy.zeros((8, 8), "float32")},
                      folder / "model" / "model.safetensors")  # fmt: skip
            write_json(
                folder / "merge.json",
                {"dtype": "float32", "base": "trained", "adapters": ["02-grpo/adapter"]}
                | {"bases": {"trained": {"kl": 0.1, "rounding": 0.1, "right": 1}}, "rows": 2, "right": 1},
            )
        if stage != "export":
            run.finish_step(step, 1.0)
    report.write_report(run)
    if run.lock:
        run.lock.release(force=True)
    return {
        str(file.relative_to("run")): file.read_bytes() for file in sorted(Path("run").rglob("*")) if file.is_file()
    }


def fill(folder: Path, files: dict[str, bytes]) -> None:
    """Make these the files of a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
