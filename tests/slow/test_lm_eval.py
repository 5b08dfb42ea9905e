"""The merged folder in EleutherAI's lm-evaluation-harness, on a task of our own.

Not among the development dependencies: it brings scipy and scikit-learn. `pip install lm-eval` to run this.
"""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from qreason.cli import main

TASK = """\
task: helpdesk_fixes
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{issue}}\\n"
doc_to_target: "{{resolution}}"
metric_list: [{metric: perplexity}]
"""


@pytest.mark.slow
def test_lm_eval_reads_the_merged_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lm-eval)")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    steps = "steps=[{sft: {rows: 16, max_steps: 2, per_device_train_batch_size: 4}}, {merge: {rows: 2}}]"
    result = CliRunner().invoke(main, ["run", "smoke", "--out", str(tmp_path / "run"), "--set", steps])
    assert result.exit_code == 0, result.output
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"issue": f"Printer {i} is offline.", "resolution": "Restart it."}) + "\n" for i in range(4))
    )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "helpdesk_fixes.yaml").write_text(TASK.replace("FILE", str(rows)))
    numbers = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "run" / "02-merge" / "model"), "dtype": "float32"},
        tasks=["helpdesk_fixes"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )["results"]["helpdesk_fixes"]
    assert 1 < numbers["perplexity,none"] < float("inf")
