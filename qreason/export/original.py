"""The trained and the merged model as transformers runs them, and exported files held against them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qreason.export import engine, quality, reference, verify, writer
from qreason.machine.files import read_jsonl
from qreason.machine.hardware import detect
from qreason.machine.progress import progress_bar

if TYPE_CHECKING:
    from qreason.export.exporter import Exporter

ADAPTER_PROMPTS = 8


class Original:
    """Replies and logits of the merged model, which had to be those of the adapter; each check of a file is one method.

    Raises ExportError, through `Exporter.passed`, for the first check that fails.
    """

    def __init__(self, export: Exporter) -> None:
        self.export, self.work, self.heldout = export, export.work, export.heldout
        adapter = export.run.disk.adapter()
        assert adapter is not None, "a merge has an adapter"
        self.ask_merged()
        own = self.ask_trained(adapter)
        export.passed(verify.check_merged(own, self.logits, detect().dtype))
        longest = max(map(len, self.heldout.asked)) + max(self.heldout.limit, engine.TOKENS)
        self.context = min(-(-longest // 256) * 256, export.config.max_position_embeddings)

    # --- one model in memory after the other ---------------------------------------------------

    def ask_merged(self) -> None:
        """Its replies, their logits, and how many held-out rows it gets right."""
        heldout = self.heldout
        few = heldout.questions[: engine.REPLIES]
        self.export.run.release()
        merged = reference.in_float32(self.export.merged)
        with progress_bar("merged replies", total=len(few) + len(heldout.questions)) as bar:
            self.replies = reference.answer(merged, few, engine.TOKENS, bar.advance)
            whole = reference.answer(merged, heldout.questions, heldout.limit, bar.advance)
        self.exchanges = reference.exchanges(self.replies)
        self.logits = reference.write_logits(merged.model, self.exchanges, self.work / "merged")
        self.accuracy("merged", heldout.right([reply.text for reply in whole]))

    def ask_trained(self, adapter: Path) -> list[Path]:
        """Its logits on the same replies; and how many rows it gets right, as evaluated after its stage, or now."""
        heldout, trained = self.heldout, self.export.run.resident
        trained.load_adapter(adapter)
        with trained.inference() as model:
            logits = reference.write_logits(model, self.exchanges, self.work / "trained")
        file = adapter.parent / "evaluation.jsonl"
        known = {row["id"]: bool(row["accurate"]) for row in read_jsonl(file)} if file.is_file() else {}
        ids = [row.id for row in heldout.examples[: heldout.rows]]
        if all(name in known for name in ids):
            marks = [known[name] for name in ids]
        else:
            with progress_bar("adapter replies", total=len(ids)) as bar:
                replies = reference.answer(trained, heldout.questions, heldout.limit, bar.advance)
            marks = heldout.right([reply.text for reply in replies])
        self.export.accuracy = {"adapter": sum(marks) / len(marks), **self.export.accuracy}
        self.export.run.release()
        return logits

    # --- files ---------------------------------------------------------------------------------

    def accuracy(self, name: str, marks: Sequence[bool]) -> float:
        self.export.accuracy[name] = sum(marks) / len(marks)
        return self.export.accuracy[name]

    def engine_logits(self, kind: str, file: Path) -> list[Path]:
        with progress_bar(f"{kind} logits", total=len(self.exchanges)) as bar:
            return engine.logits(file, self.exchanges, self.work / kind, partial(bar.advance, 1))

    def engine_accuracy(self, kind: str, file: Path) -> dict[str, float]:
        with progress_bar(f"{kind} replies", total=len(self.heldout.asked)) as bar:
            marks = quality.accuracy_of(file, self.heldout, self.context, partial(bar.advance, 1))
        return {"accuracy": self.accuracy(kind, marks), "accuracy of the merged": self.export.accuracy["merged"]}

    def check_float(self, kind: str, file: Path) -> None:
        """Header, tokens, template, stop, logits and greedy replies of a float file against transformers."""
        heldout, passed = self.heldout, self.export.passed
        passed(verify.check_metadata(file, kind, self.export.merged, heldout.tokenizer))
        found = self.engine_logits(kind, file)
        logits = verify.check_logits(file, kind, self.logits, found)
        passed(logits)
        with engine.Server(file, self.context) as server:
            passed(verify.check_tokens(file, server, heldout))
            passed(verify.check_template(file, server, heldout))
            passed(verify.check_stop(file, server, heldout))
            noise = logits.figures["logit_difference"]
            passed(verify.check_greedy(file, server, self.replies, self.logits, noise, engine.TOKENS))
        self.engine_accuracy(kind, file)
        if kind == self.export.native:
            self.verified = found
        else:
            shutil.rmtree(self.work / kind)

    def check_quantized(self, kind: str, file: Path) -> None:
        """A quantized file against the verified one, against its own weights, and on the held-out rows."""
        self.export.passed(verify.check_metadata(file, kind, self.export.merged, self.heldout.tokenizer))
        found = self.engine_logits(kind, file)
        accuracy = self.engine_accuracy(kind, file)
        self.export.passed(quality.check_quantized(file, kind, self.verified, found, accuracy))
        model = reference.in_float32(self.export.merged).model
        quality.take_weights(model, file)
        own = reference.write_logits(model, self.exchanges, self.work / f"{kind}-own")
        self.export.passed(quality.check_own_weights(file, own, found))
        for folder in (self.work / kind, self.work / f"{kind}-own"):
            shutil.rmtree(folder)

    def check_adapter(self, file: Path, adapter: Path, base: Path) -> None:
        """The adapter's file on a temporary file of its base, in llama.cpp and in PEFT."""
        kind = writer.native_type(writer.read_config(base))
        floats = self.work / f"base-{kind}.gguf"
        self.export.write(base, kind, floats)
        model = reference.with_adapter(base, adapter)
        prompts = self.heldout.asked[:ADAPTER_PROMPTS]
        self.export.passed(quality.check_adapter_file(file, floats, model, prompts, self.context))
