"""The trained and the merged model in transformers, and exported files compared with them."""

from __future__ import annotations

import shutil
from pathlib import Path

from qreason.export import architecture, engine, quality, reference, verify, writer
from qreason.export.verify import MERGED, Results
from qreason.machine.files import read_jsonl
from qreason.machine.hardware import detect
from qreason.machine.records import Exported, Marked
from qreason.run.session import Session

REPLIES = 20
TOKENS = 50
"""The replies that are compared token by token, and the tokens of each."""
ADAPTER_PROMPTS = 8


class Original:
    """Replies and logits of the merged model, after comparing it with the adapter; one method per kind of file.

    Raises ExportError, through `Results.passed`, for the first check that fails.
    """

    def __init__(
        self,
        run: Session,
        merged: Path,
        heldout: reference.Heldout,
        work: Path,
        results: Results,
        earlier: Exported | None = None,
    ) -> None:
        """`earlier`: the results of an export of the same model, in which the two were compared."""
        self.run, self.merged, self.heldout, self.work, self.results = run, merged, heldout, work, results
        self.passed = results.passed
        config = architecture.read_config(merged)
        self.native = architecture.native_type(config)
        known = verify.read_checks(earlier, MERGED) if earlier else []
        if earlier and known:
            results.accuracy = {name: earlier["accuracy"][name] for name in ("adapter", MERGED)}
            results.checks += known
        self.ask_merged()
        if not known:
            self.passed(verify.check_merged(self.ask_trained(), self.logits, detect().dtype))
        longest = max(map(len, heldout.asked)) + max(heldout.limit, TOKENS)
        self.context = min(-(-longest // 256) * 256, config.max_position_embeddings)

    # --- one model in memory after the other ---------------------------------------------------

    def ask_merged(self) -> None:
        """The merged model's replies, their logits, and its held-out accuracy."""
        questions = self.heldout.questions
        self.run.release()
        merged = reference.in_float32(self.merged)
        self.replies = reference.answer(merged, questions[:REPLIES], TOKENS, "merged replies")
        self.logits = reference.write_logits(merged.model, self.replies, self.work / "merged")
        if "merged" not in self.results.accuracy:
            whole = reference.answer(merged, questions, self.heldout.limit, "merged replies")
            self.results.accuracy["merged"] = self.heldout.accuracy([reply.text for reply in whole])

    def ask_trained(self) -> list[Path]:
        """The trained model's logits on the same replies; its accuracy from its evaluation, or measured now."""
        adapter, trained = self.run.disk.adapter(), self.run.resident
        assert adapter is not None, "a merge has an adapter"
        trained.load_adapter(adapter)
        with trained.inference() as model:
            logits = reference.write_logits(model, self.replies, self.work / "trained")
        file = adapter.parent / "evaluation.jsonl"
        rows = read_jsonl(file, Marked) if file.is_file() else []
        known = {row["id"]: row["accurate"] for row in rows if row["accurate"] is not None}
        ids = [row.id for row in self.heldout.examples[: self.heldout.rows]]
        if all(name in known for name in ids):
            share = sum(known[name] for name in ids) / len(ids)
        else:
            replies = reference.answer(trained, self.heldout.questions, self.heldout.limit, "adapter replies")
            share = self.heldout.accuracy([reply.text for reply in replies])
        self.results.accuracy = {"adapter": share, **self.results.accuracy}
        self.run.release()
        return logits

    # --- files ---------------------------------------------------------------------------------

    def measure_accuracy(self, kind: str, file: Path) -> None:
        """The accuracy of llama.cpp's greedy replies to the held-out rows."""
        with engine.Server(file, self.context) as server:
            replies = server.replies(self.heldout.asked, self.heldout.limit, f"{kind} replies")
        texts = self.heldout.tokenizer.batch_decode(replies, skip_special_tokens=True)
        self.results.accuracy[kind] = self.heldout.accuracy(texts)

    def compare_with(self, file: Path) -> None:
        """Quantized files are compared with this verified one."""
        self.verified = engine.logits(file, self.replies, self.work / self.native)

    def check_float(self, kind: str, file: Path) -> None:
        """Header, tokens, template, stop, logits and greedy replies of a float file against transformers."""
        heldout, passed = self.heldout, self.passed
        passed(verify.check_metadata(file, kind, self.merged, heldout.tokenizer))
        found = engine.logits(file, self.replies, self.work / kind)
        logits = verify.check_logits(file, kind, self.logits, found)
        passed(logits)
        with engine.Server(file, self.context) as server:
            passed(verify.check_tokens(file, server, heldout))
            passed(verify.check_template(file, server, heldout))
            passed(verify.check_stop(file, server, heldout))
            noise = logits.figures["logit_difference"]
            passed(verify.check_greedy(file, server, self.replies, self.logits, noise, TOKENS))
        self.measure_accuracy(kind, file)
        if kind == self.native:
            self.verified = found
        else:
            shutil.rmtree(self.work / kind)

    def check_quantized(self, kind: str, file: Path) -> None:
        """A quantized file against the verified one, against its own weights, and on the held-out rows."""
        self.passed(verify.check_metadata(file, kind, self.merged, self.heldout.tokenizer))
        found = engine.logits(file, self.replies, self.work / kind)
        self.measure_accuracy(kind, file)
        right = self.results.accuracy
        accuracy = {"accuracy": right[kind], "accuracy of the merged": right["merged"]}
        self.passed(quality.check_quantized(file, kind, self.verified, found, accuracy))
        model = reference.in_float32(self.merged).model
        quality.take_weights(model, file)
        own = reference.write_logits(model, self.replies, self.work / f"{kind}-own")
        self.passed(quality.check_own_weights(file, own, found))
        for folder in (self.work / kind, self.work / f"{kind}-own"):
            shutil.rmtree(folder)

    def check_adapter(self, file: Path, adapter: Path, base: Path) -> None:
        """The adapter's file on a temporary file of its base, in llama.cpp and in PEFT."""
        kind = architecture.native_type(architecture.read_config(base))
        floats = self.work / f"base-{kind}.gguf"
        writer.write_model(base, floats, kind, self.run.recipe.name)
        model = reference.with_adapter(base, adapter)
        prompts = self.heldout.asked[:ADAPTER_PROMPTS]
        self.passed(quality.check_adapter_file(file, floats, model, prompts, self.context))
