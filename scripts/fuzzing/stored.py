"""What a run folder holds: records and checkpoints."""

from __future__ import annotations

from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

from hypothesis import strategies as st

from fuzzing.sample import fill, write_run
from fuzzing.strange import Surface, as_json, attempt, call, changed, damaged
from qreason.cli.base import show
from qreason.data.pairs import rank_draws
from qreason.export.architecture import read_config
from qreason.export.exporter import read_earlier
from qreason.export.lora import check_fits, read_alpha
from qreason.export.verify import read_checks
from qreason.inference.journal import digest, read_kept
from qreason.machine.files import hash_files, read_jsonl
from qreason.machine.records import Draw
from qreason.model.merging import check_adapter
from qreason.recipe.load import load_recipe
from qreason.recipe.settings import Merge
from qreason.report import build as report
from qreason.report.table import report_table
from qreason.run.checkpoint import open_checkpoint
from qreason.run.folder import RunFolder, silent
from qreason.run.session import Session
from qreason.stages.export import find_merged
from qreason.stages.merge import find_adapters
from qreason.training.difficulty import PassRates
from qreason.training.resuming import Checkpoints
from qreason.types import Example


def folders() -> Surface:
    files = write_run()
    file = st.one_of(*(st.tuples(st.just(name), damaged(name, raw)) for name, raw in files.items()))

    def show_report() -> None:
        with redirect_stdout(StringIO()):
            show(report_table(report.write_report(RunFolder.reopen(Path("run")))))

    def go_on() -> None:
        run = Session.open(load_recipe("small.yaml"), Path("run"))
        attempt(run.disk.adapter, run.sampled, lambda: rank_draws(run.draws(), read_jsonl(run.draws(), Draw)))
        if run.disk.lock:
            run.disk.lock.release(force=True)

    def merge() -> None:
        run = Session.reopen(Path("run"))
        check_adapter(find_adapters(run, Merge())[0], run.disk.manifest.get("base", {"id": "x", "fingerprint": "y"}))

    def export() -> None:
        run = Session.reopen(Path("run"))
        merged, (adapter,) = find_merged(run), find_adapters(run, Merge())
        attempt(partial(read_config, merged), partial(check_fits, adapter, merged), partial(read_alpha, adapter))

    def read(drawn: tuple[str, bytes]) -> None:
        fill(Path("run"), files | dict([drawn]))
        call(["show", "run"])
        attempt(show_report, merge, export, partial(open_checkpoint, "run"))
        call(["lineage", "run"])
        call(["report", "run"])
        call(["push", "run", "--to", "me/x", "--dry-run", "--include", "adapter", "--include", "merged"])
        attempt(go_on)

    read(("recipe.yaml", files["recipe.yaml"]))  # imports the large libraries
    return file, read


def checkpoints() -> Surface:
    recipe, step = load_recipe("small.yaml"), 4
    run = RunFolder.unwritten(Path("run"), recipe)
    records = dict.fromkeys(("metrics.jsonl", "replies.jsonl", "alarms.jsonl"), 2)
    progress = {"settings": run.settings(step), "sums": {"current_flos": 1.0}, "loss": 0.1, "lengths": records}
    progress |= {"metrics": {"reward": [0.1]}, "memory": {}}
    files = {
        "weights.safetensors": b"weights",
        "progress.json": as_json(progress),
        "trainer_state.json": b'{"epoch": 1}',
    }
    file = st.one_of(*(st.tuples(st.just(name), damaged(name, raw)) for name, raw in files.items()))
    manifest = st.none() | changed(dict.fromkeys(files, "0" * 64)).map(as_json)

    def read(drawn: tuple[tuple[str, bytes], bytes | None]) -> None:
        damage, hashes = drawn
        folder, newest = run.stage(step), run.stage(step) / "resume" / "step-000002"
        fill(Path("run"), {f"{folder.name}/{name}": b"{}\n{}\n" for name in records})
        fill(newest, files | dict([damage]))  # by another version, if its hashes are right
        right = as_json({name: hash_files([newest / name]) for name in files})
        fill(newest, files | dict([damage]) | {"manifest.json": right if hashes is None else hashes})
        trainer = SimpleNamespace(_tr_loss=0.0, _metrics={"train": {}})

        def resume() -> None:
            kept = Checkpoints(*run.resume_stage(step, silent), run.settings(step), steps=1, keep=1, mirror=None)
            kept.finished_epochs()
            if kept.resumed:
                kept.load_progress(trainer, kept.resumed)

        attempt(resume)

    return st.tuples(file, manifest), read


def parts() -> Surface:
    """What evaluations, exports and pass rates that were cut off have left."""
    line = {"key": "0", "most": 4, "seconds": 0.5, "random": "00", "made": [[1, 2]]}
    check = {"file": "merged", "name": "same", "passed": True, "figures": {"kl": 0.1}, "bound": "kl 1"}
    made = {"small-f16.gguf": b"GGUF"}
    file = {"file": "small-f16.gguf", "bytes": 4, "sha256": "0" * 64}
    report = {"made_of": {"model": "0"}, "files": {"f16": file}, "accuracy": {"adapter": 0.5, "merged": 0.5}}
    journal = as_json({**line, "sum": digest(line)}) + b"\n"
    kept = damaged("evaluation.jsonl", journal * 2), damaged("export.json", as_json(report | {"checks": [check]}))
    names, row = ("pass_rates.json", "pass_rates.jsonl"), as_json({"id": "a", "pass_rate": 0.5}) + b"\n"
    rates = damaged(names[0], b'{"n": 2}'), damaged(names[1], row)

    def read(drawn: tuple[bytes, ...]) -> None:
        fill(Path("run"), made | {"evaluation.part": drawn[0], "export.part": drawn[1]})
        read_kept(Path("run/evaluation.part"))
        if earlier := read_earlier(Path("run"), {"model": "0"}):
            read_checks(earlier, "merged")
        fill(Path("run"), dict(zip(names, drawn[2:], strict=True)))
        attempt(lambda: PassRates(Path("run"), {"n": 2}).by_example([Example("a", "p", "r")]))

    return st.tuples(*kept, *rates), read
