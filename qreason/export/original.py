"""The trained and the merged model as transformers runs them, and exported files held against them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qreason.errors import ModelError
from qreason.export import engine, quality, reference, verify, writer
from qreason.models import locate
from qreason.progress import progress_bar
from qreason.run import read_jsonl

if TYPE_CHECKING:
    from qreason.export.exporter import Exporter

ADAPTER_PROMPTS = 8


class Original:
    """Replies and logits of the merged model, which had to be those of the adapter; each check of a file is one method.

    Raises ExportError, through `Exporter.passed`, for the first check that fails.
    """

    def __init__(self, export: Exporter) -> None:
        self.export, self.work, self.heldout = export, export.work, export.heldout
        heldout, adapter = export.heldout, export.run.adapter()
        assert adapter is not None, "a merge has an adapter"
        check_base(adapter, export.run.recipe.model.base)
        trained = export.run.resident
        trained.load_adapter(adapter)
        self.merged = reference.in_float32(export.merged, trained)
        few = heldout.questions[: engine.REPLIES]
        with progress_bar("merged replies", total=len(few) + len(heldout.questions)) as bar:
            self.replies = reference.answer(self.merged, few, engine.TOKENS, bar.advance)
            whole = reference.answer(self.merged, heldout.questions, heldout.limit, bar.advance)
        self.exchanges = reference.exchanges(self.replies)
        self.logits = reference.write_logits(self.merged.model, self.exchanges, self.work / "merged")
        with trained.inference() as model:
            own = reference.write_logits(model, self.exchanges, self.work / "trained")
        self.accuracy("adapter", self.trained_right(adapter))
        self.accuracy("merged", heldout.right([reply.text for reply in whole]))
        export.passed(verify.check_merged(own, self.logits))
        longest = max(map(len, heldout.asked)) + max(heldout.limit, engine.TOKENS)
        self.context = min(-(-longest // 256) * 256, trained.context_length)

    def trained_right(self, adapter: Path) -> list[bool]:
        """Which rows the adapter answers rightly: as evaluated after its stage, or asked now."""
        heldout = self.heldout
        file = adapter.parent / "evaluation.jsonl"
        marks = {row["id"]: bool(row["accurate"]) for row in read_jsonl(file)} if file.is_file() else {}
        ids = [row.id for row in heldout.examples[: heldout.rows]]
        if all(name in marks for name in ids):
            return [marks[name] for name in ids]
        with progress_bar("adapter replies", total=len(ids)) as bar:
            replies = reference.answer(self.export.run.resident, heldout.questions, heldout.limit, bar.advance)
        return heldout.right([reply.text for reply in replies])

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
        quality.take_weights(self.merged.model, file)
        own = reference.write_logits(self.merged.model, self.exchanges, self.work / f"{kind}-own")
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


def check_base(adapter: Path, base: str) -> None:
    """ModelError for an adapter that says it belongs to another base."""
    told = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if told and locate(told) != locate(base):
        raise ModelError(f"{adapter}: an adapter for {told}, not for {base}; give the adapter that this run trained")
