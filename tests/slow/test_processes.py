"""Several processes of one launch: the same adapter as one process, one writer, and what is left when one dies."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import jsonl

from qreason.run.resume import newest_checkpoint, step_of

pytestmark = pytest.mark.slow
PROGRAM = """
import os, random, signal, sys
from qreason.inference.generate import LocalGenerator
from qreason.machine import hardware, ranks
from qreason.training.resuming import Checkpoints

hardware.fast_bfloat16 = lambda: False  # in bfloat16 an order of sums is worth 1e-3

def decode(self, model, ids, n, drawing):
    drawn = []
    for row in ids:
        source = random.Random(str(row))
        drawn += [[source.randrange(300, 400) for _ in range(source.randrange(2, 9))] for _ in range(n)]
    return drawn

LocalGenerator.decode = decode  # the same replies, however prompts are split
done = Checkpoints.step_done

def step_done(self, trainer):
    done(self, trainer)
    if f"{trainer.state.global_step} {ranks.number()}" == os.environ.get("DIES_AFTER"):
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.step_done = step_done
from qreason.rewards import registry

def correctness(replies, examples):  # of two replies the second one, of some prompts both
    return [float(example.id in "r0 r1 r2" or place % 2) for place, example in enumerate(examples)]

if "GRADES" in os.environ:
    registry.REWARDS["correctness"] = correctness
from qreason.cli import main
main()
"""
RECIPE = """\
name: ranks
model: {base: qreason/tiny, lora: {r: 4, alpha: 8}}
data: {sft: sft.jsonl, prompts: prompts.jsonl, heldout: heldout.jsonl}
rewards: {rouge_l: 0.1, length: 1.0}
sampling: {temperature: 0.9, max_completion_length: 12}
steps:
  - evaluate: {rows: 2, samples: 1}
  - sft: {max_steps: 3, per_device_train_batch_size: 4, learning_rate: 1e-2, logging_steps: 1, save_steps: 1}
  - grpo: {max_steps: 2, per_device_train_batch_size: 8, num_generations: 4, learning_rate: 1e-2, preflight: false}
"""
HALVED = ("--set", "sft.per_device_train_batch_size=2", "--set", "grpo.per_device_train_batch_size=4")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"id": f"r{i}", "issue": f"printer {i} is " + "very " * i + "old", "resolution": "Restart " * (i % 4 + 1)}
        for i in range(12)
    ]
    Path("sft.jsonl").write_text(jsonl([{**row, "steps": f"Looked {'again ' * i}."} for i, row in enumerate(rows)]))
    Path("prompts.jsonl").write_text(jsonl(rows[:8]))
    Path("heldout.jsonl").write_text(jsonl(rows[8:]))
    Path("ranks.yaml").write_text(RECIPE)
    return Path("ranks.yaml")


def launch(count: int, *arguments: str, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """`qreason` in so many processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | shared if count > 1 else {}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *arguments],
                env={**os.environ, **own, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=1500) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]


def test_two_processes_train_the_adapters_of_one(recipe: Path) -> None:
    from safetensors.torch import load_file

    (one,) = launch(1, "run", str(recipe), "--out", "one")
    assert one.returncode == 0, one.stderr
    first, second = launch(2, "run", str(recipe), "--out", "two", *HALVED)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert (second.stdout, "sft " in first.stderr, "sft " in second.stderr) == ("", True, False)
    for stage in ("01-sft", "02-grpo"):
        alone, together = (load_file(f"{run}/{stage}/adapter/adapter_model.safetensors") for run in ("one", "two"))
        assert alone.keys() == together.keys()
        for name, weight in alone.items():
            assert weight.norm() > 0
            assert (weight - together[name]).norm() <= 1e-4 * weight.norm(), f"{stage} {name}"
        logged = [Path(run, stage, "metrics.jsonl").read_text().splitlines() for run in ("one", "two")]
        assert len(logged[0]) == len(logged[1])
    replies = [Path(run, "02-grpo/replies.jsonl").read_text().splitlines() for run in ("one", "two")]
    rows = [[json.loads(line) for line in lines] for lines in replies]
    assert len(rows[0]) == 16
    for row in rows[0] + rows[1]:
        row["total"] = round(row["total"], 6)
        row["parts"] = {name: round(value, 6) for name, value in row["parts"].items()}
    assert rows[0] == rows[1]


def test_the_first_process_decides_for_all_which_prompts_are_left_out(recipe: Path) -> None:
    rewards = ("--set", "rewards={length: 1.0, correctness: 0}", "--set", "grpo.difficulty_filtering=2")
    first, second = launch(2, "run", str(recipe), "--out", "left", *HALVED, *rewards, GRADES="1")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "3 of 8 prompts are left out, 3 always and 0 never solved in 2 replies" in first.stderr
    assert "left out" not in second.stderr
    rates = [json.loads(line) for line in Path("left/02-grpo/pass_rates.jsonl").read_text().splitlines()]
    assert rates == [{"id": f"r{place}", "pass_rate": 1.0 if place < 3 else 0.5} for place in range(8)]
    replies = [json.loads(line) for line in Path("left/02-grpo/replies.jsonl").read_text().splitlines()]
    assert len(replies) == 16
    assert {reply["id"] for reply in replies} <= {f"r{place}" for place in range(3, 8)}


@pytest.mark.parametrize("dying", [0, 1])
def test_where_one_process_dies_the_other_ends_and_the_run_goes_on(recipe: Path, dying: int) -> None:
    command = ("sft", str(recipe), "--out", "cut", *HALVED)
    ended = launch(2, *command, DIES_AFTER=f"2 {dying}")
    assert ended[dying].returncode == -9
    left = ended[1 - dying]
    assert left.returncode == 1
    assert "another process of this launch ended; the same command continues" in left.stderr.splitlines()[-1]
    assert "Traceback" not in left.stderr
    checkpoint = newest_checkpoint(Path("cut/01-sft"))
    assert checkpoint
    assert step_of(checkpoint) == 2
    if dying:
        alone = launch(1, *command)[0]
        assert (alone.returncode, "made by 2 processes; continue with as many" in alone.stderr) == (2, True)
        first, second = launch(2, *command)
        assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
        assert "continuing after step 2" in first.stderr
        assert [json.loads(line)["step"] for line in Path("cut/01-sft/metrics.jsonl").read_text().splitlines()][:3] == [
            1,
            2,
            3,
        ]


def test_two_processes_draw_a_shard_each_and_the_first_joins_them(recipe: Path) -> None:
    step = ("--set", "steps=[{sample: {n: 64, rows: 4, keep: {}}}]")  # two batches of two prompts
    first, second = launch(2, "sample", str(recipe), "--out", "drawn", *step)
    # Replies of random tokens have no form, so the step ends without data.
    assert "none of 256 replies was kept" in first.stderr, first.stderr + second.stderr
    assert "process 0 of this launch stopped, and says why" in second.stderr
    rows = [json.loads(line) for line in Path("drawn/01-sample/draws.jsonl").read_text().splitlines()]
    assert sorted((row["id"], row["number"]) for row in rows) == [(f"r{i}", n) for i in range(4) for n in range(64)]
    shards = [file.read_text().count("\n") for file in Path("drawn").glob("01-sample/shards/*/draws.jsonl")]
    assert shards == [128, 128]


def test_what_several_processes_cannot_do_ends_both_before_the_folder_is_made(recipe: Path) -> None:
    first, second = launch(2, "run", str(recipe), "--out", "none", ACCELERATE_USE_FSDP="true")
    assert (first.returncode, second.returncode) == (2, 2), first.stderr + second.stderr
    assert "accelerate's FSDP is not supported" in first.stderr
    assert "process 0 of this launch stopped, and says why" in second.stderr
    assert not Path("none").exists()
