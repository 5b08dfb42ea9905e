"""Export: the merged model as GGUF files and a Modelfile, each of them run and compared before it gets its name."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qreason.errors import ExportError, ModelError, RunFolderError, first_line
from qreason.export import engine, ollama, quality, reference, verify, writer
from qreason.export.reference import Heldout
from qreason.export.verify import Check
from qreason.models import load_tokenizer, locate
from qreason.progress import progress_bar
from qreason.prompts import SYSTEM_PROMPTS
from qreason.recipe import Export, Step
from qreason.run import Artifact, Run, read_jsonl, write_json

DRAFT = ".unverified"
"""What a file's name ends with until it has passed its checks."""
ADAPTER_PROMPTS = 8


def export(step: Step, run: Run) -> Artifact:
    """The newest merge of the run as GGUF files in the step's folder."""
    settings = step.settings
    assert isinstance(settings, Export)
    merged = find_merged(run)
    return export_into(run.clear_stage_folder(), merged, settings, run)


def find_merged(run: Run) -> Path:
    """The merged model of the newest adapter; RunFolderError where the run has none."""
    for entry in reversed(run.manifest["steps"]):
        folder = run.folder / entry["folder"]
        if entry["stage"] == "merge" and (folder / "model" / "config.json").is_file():
            return folder / "model"
        if (folder / "adapter").exists():
            break
    raise RunFolderError(f"{run.folder}: no merged model of the newest adapter; put a merge step before the export")


def export_into(folder: Path, merged: Path, settings: Export, run: Run) -> Artifact:
    """All files of an export in a folder; ExportError for the first one that fails a check, which stays a draft."""
    engine.need_engine()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".work-", dir=folder) as work:
        exporter = Exporter(folder, Path(work), merged, settings, run)
        try:
            exporter.make_all()
        finally:
            if exporter.checks:
                write_json(folder / "export.json", exporter.report())
    names = [file.name for file in exporter.finished.values()]
    return Artifact(folder, f"{', '.join(names)}; {len(exporter.checks)} checks passed")


class Exporter:
    """One export on its way: what is written, what transformers says, and the checks so far."""

    def __init__(self, folder: Path, work: Path, merged: Path, settings: Export, run: Run) -> None:
        self.folder, self.work, self.merged, self.settings, self.run = folder, work, merged, settings, run
        self.config = writer.read_config(merged)
        self.native = writer.NATIVE[str(self.config.dtype).removeprefix("torch.")]
        self.checks: list[Check] = []
        self.finished: dict[str, Path] = {}
        self.accuracy: dict[str, float] = {}
        self.heldout = Heldout(
            run.examples("heldout"),
            SYSTEM_PROMPTS[run.recipe.data.prompt],
            load_tokenizer(str(merged)),
            run.recipe.sampling.max_completion_length,
            settings.rows,
        )
        self.original: Original | None = None

    def make_all(self) -> None:
        """The lossless float file first: all others are made from it, or held against it."""
        if self.settings.verify:
            self.original = Original(self)
        lossless = self.make_float(self.native)
        for kind in self.settings.gguf:
            if kind in writer.FLOATS and kind != self.native:
                self.make_float(kind)
        for kind in self.settings.gguf:
            if kind not in writer.FLOATS:
                self.make_quantized(kind, lossless)
        if self.native not in self.settings.gguf:
            self.finished.pop(self.native).unlink()
        self.make_adapter()
        if self.settings.ollama:
            self.make_modelfile()

    # --- files ---------------------------------------------------------------------------------

    def draft(self, kind: str) -> Path:
        return self.folder / f"{self.run.recipe.name}-{kind}.gguf{DRAFT}"

    def keep(self, kind: str, draft: Path) -> Path:
        """The draft under its own name, in place of an earlier one."""
        self.finished[kind] = draft.replace(draft.with_suffix(""))
        return self.finished[kind]

    def write(self, source: Path, kind: str, draft: Path) -> None:
        with progress_bar(f"write {kind}") as bar:
            writer.write_model(source, draft, kind, self.run.recipe.name, lambda count: bar.advance(count))

    def make_float(self, kind: str) -> Path:
        draft = self.draft(kind)
        self.write(self.merged, kind, draft)
        if self.original:
            self.original.check_float(kind, draft)
        return self.keep(kind, draft)

    def make_quantized(self, kind: str, lossless: Path) -> None:
        draft = self.draft(kind)
        if kind in writer.WRITTEN:
            self.write(self.merged, kind, draft)
        else:
            writer.check_space(draft, lossless.stat().st_size)
            with progress_bar(f"quantize {kind}"):
                engine.quantize(lossless, draft, kind)
        if self.original:
            self.original.check_quantized(kind, draft)
        self.keep(kind, draft)

    def make_adapter(self) -> None:
        """The newest adapter for the GGUF file of its base; kinds that GGUF cannot hold are named and left out."""
        adapter = self.run.adapter()
        assert adapter is not None, "a merge has an adapter"
        base = base_folder(self.run.recipe.model.base)
        draft = self.draft("adapter")
        try:
            writer.write_adapter(adapter, base, draft, self.run.recipe.name)
        except ModelError as error:
            self.run.say(f"no adapter file: {error}")
            return
        if self.original:
            self.original.check_adapter(draft, adapter, base)
        self.keep("adapter", draft)

    def make_modelfile(self) -> None:
        """A Modelfile for the last of the types asked for, and the model in Ollama where that is installed."""
        model, name = self.finished[self.settings.gguf[-1]], self.run.recipe.name
        context = self.config.max_position_embeddings
        self.passed(ollama.write_modelfile(self.folder, model, self.run.recipe, self.heldout, context, self.merged))
        question = self.heldout.examples[0].prompt
        reply = ollama.create(self.folder, name, question)
        if reply is not None:
            self.run.say(f"ollama: {question}\n{reply}")
        for command in ollama.commands(self.folder, name):
            self.run.say(shlex.join(command))

    # --- checks --------------------------------------------------------------------------------

    def passed(self, check: Check) -> None:
        """Keep a check and say it; ExportError where it failed."""
        self.checks.append(check)
        self.run.say(check.line)
        if not check.passed:
            raise ExportError(
                f"{check.file}: failed '{check.name}' ({self.folder / 'export.json'} has the figures); the file is kept "
                f"as *{DRAFT}, not to be used"
            )

    def report(self) -> dict[str, Any]:
        return {
            "model": str(self.merged),
            "verified": self.settings.verify and all(check.passed for check in self.checks),
            "rows": self.settings.rows,
            "accuracy": self.accuracy,
            "files": {kind: {"file": file.name, "bytes": file.stat().st_size} for kind, file in self.finished.items()},
            "checks": [check.as_dict() for check in self.checks],
        }


class Original:
    """The trained and the merged model as transformers runs them, and files held against them."""

    def __init__(self, export: Exporter) -> None:
        run = export.run
        self.export, self.run, self.work, self.heldout = export, run, export.work, export.heldout
        heldout, adapter, trained = export.heldout, run.adapter(), run.resident
        trained.load_adapter(adapter)
        self.merged = reference.in_float32(export.merged, trained)
        few = heldout.questions[: reference.REPLIES]
        with progress_bar("merged replies", total=len(few) + len(heldout.questions)) as bar:
            self.replies = reference.answer(self.merged, few, reference.TOKENS, bar.advance)
            whole = reference.answer(self.merged, heldout.questions, heldout.limit, bar.advance)
        self.exchanges = reference.exchanges(self.replies)
        self.logits = reference.write_logits(self.merged.model, self.exchanges, self.work / "merged")
        with trained.inference() as model:
            own = reference.write_logits(model, self.exchanges, self.work / "trained")
        self.accuracy("adapter", self.trained_right(adapter))
        self.accuracy("merged", heldout.right([reply.text for reply in whole]))
        export.passed(verify.check_merged(own, self.logits))
        longest = max(map(len, heldout.asked)) + heldout.limit
        self.context = min(-(-longest // 256) * 256, trained.context_length)

    def trained_right(self, adapter: Path | None) -> list[bool]:
        """Which rows the adapter answers rightly: as evaluated after its stage, or asked now."""
        heldout = self.heldout
        file = adapter.parent / "evaluation.jsonl" if adapter else None
        marks = {row["id"]: bool(row["accurate"]) for row in read_jsonl(file)} if file and file.is_file() else {}
        ids = [row.id for row in heldout.examples[: heldout.rows]]
        if all(name in marks for name in ids):
            return [marks[name] for name in ids]
        with progress_bar("adapter replies", total=len(ids)) as bar:
            replies = reference.answer(self.run.resident, heldout.questions, heldout.limit, bar.advance)
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
        passed(verify.check_metadata(file, self.export.merged, heldout.tokenizer))
        found = self.engine_logits(kind, file)
        check = verify.check_logits(file, kind, self.logits, found)
        passed(check)
        if kind == self.export.native:
            self.verified = found
        with engine.Server(file, self.context) as server:
            passed(verify.check_tokens(file, server, heldout))
            passed(verify.check_template(file, server, heldout))
            passed(verify.check_stop(file, server, heldout))
            noise = check.figures["logit_difference"]
            passed(verify.check_greedy(file, server, self.replies, self.logits, noise, reference.TOKENS))
        self.engine_accuracy(kind, file)

    def check_quantized(self, kind: str, file: Path) -> None:
        """A quantized file against the verified one, against its own weights, and on the held-out rows."""
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
        config = writer.read_config(base)
        kind = writer.NATIVE[str(config.dtype).removeprefix("torch.")]
        floats = self.work / f"base-{kind}.gguf"
        self.export.write(base, kind, floats)
        model = reference.with_adapter(base, adapter)
        prompts = self.heldout.asked[:ADAPTER_PROMPTS]
        self.export.passed(quality.check_adapter_file(file, floats, model, prompts, self.context))


def base_folder(base: str) -> Path:
    """Where the files of a base lie: its folder, or its snapshot in the cache of the Hub."""
    folder = Path(locate(base))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:
        raise ModelError(f"{base}: cannot be fetched for the adapter's file ({first_line(error)[:200]})") from error
