"""One export from the merged model to files with names: what is written, in which order, what passed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from qreason.data.prompts import SYSTEM_PROMPTS
from qreason.errors import ExportError, ModelError, RunFolderError, first_line
from qreason.export import engine, lora, ollama, writer
from qreason.export.original import Original
from qreason.export.reference import Heldout
from qreason.export.verify import DRAFT, Check
from qreason.machine.progress import progress_bar
from qreason.model.load import fingerprint, load_tokenizer, locate
from qreason.model.merging import check_adapter
from qreason.recipe.settings import Export
from qreason.run.session import Run


class Exporter:
    """Files are drafts until their checks have passed; then they take the place of earlier ones of their name."""

    def __init__(self, folder: Path, work: Path, merged: Path, settings: Export, run: Run) -> None:
        self.folder, self.work, self.merged, self.settings, self.run = folder, work, merged, settings, run
        self.config = writer.read_config(merged)
        self.native = writer.native_type(self.config)
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
        self.check_inputs()
        if self.settings.verify:
            self.original = Original(self)
        lossless = self.make_float(self.native)
        for kind in self.settings.gguf:
            if kind in writer.FLOATS and kind != self.native:
                self.make_float(kind)
        for kind in self.settings.gguf:
            if kind not in writer.FLOATS:
                self.make_quantized(kind, lossless)
        self.make_adapter()
        if self.settings.ollama:
            self.make_modelfile()

    def check_inputs(self) -> None:
        """What cannot end well is told before anything is written."""
        base, tokenizer, adapter = self.run.recipe.model.base, self.heldout.tokenizer, self.run.adapter()
        assert adapter is not None, "a merge has an adapter"
        check_adapter(adapter, self.run.manifest["base"])
        lora.check_fits(adapter, self.merged)
        if fingerprint(base) != self.run.manifest["base"]["fingerprint"] and Path(locate(base)).is_dir():
            raise RunFolderError(
                f"{self.run.folder}: the weights of {base} changed since this run began; put the earlier ones back, or "
                "train again with --fresh"
            )
        if added := sorted(tokenizer.get_vocab().keys() - load_tokenizer(base).get_vocab().keys()):
            raise ModelError(
                f"{self.merged}: the tokenizer was extended ('{added[0]}' is not in that of {base}), and an adapter "
                "has no weights for new tokens; put the base's tokenizer there, or train on a base that has them"
            )
        kinds = {self.native, *self.settings.gguf}
        logits = engine.logits_bytes(self.config.vocab_size) * 4 if self.settings.verify else 0
        weights = sum(file.stat().st_size for file in self.merged.glob("*.safetensors"))
        share = writer.BYTES[self.native]
        writer.check_space(self.folder, int(sum(weights * writer.BYTES[kind] / share for kind in kinds)) + logits)

    # --- files ---------------------------------------------------------------------------------

    def draft(self, kind: str) -> Path:
        """Where a file is written first; one that was not asked for vanishes with the work folder."""
        folder = self.folder if kind in (*self.settings.gguf, "adapter") else self.work
        return folder / f"{self.run.recipe.name}-{kind}.gguf{DRAFT}"

    def keep(self, kind: str, draft: Path) -> Path:
        """The draft under its own name, in place of an earlier one."""
        kept = draft.replace(draft.with_suffix(""))
        if draft.parent == self.folder:
            self.finished[kind] = kept
        return kept

    def write(self, source: Path, kind: str, draft: Path) -> None:
        with progress_bar(f"write {kind}") as bar:
            writer.write_model(source, draft, kind, self.run.recipe.name, on_start=bar.total, on_tensor=bar.advance)

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
            lora.write_adapter(adapter, base, draft, self.run.recipe.name)
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

    # --- what passed ---------------------------------------------------------------------------

    def passed(self, check: Check) -> None:
        """Keep a check and say it; ExportError where it failed."""
        self.checks.append(check)
        self.run.say(check.line)
        if not check.passed:
            raise ExportError(
                f"{check.file}: failed '{check.name}' ({self.folder / 'export.json'} has the figures); what was "
                f"written is kept as *{DRAFT}, not to be used"
            )

    @property
    def summary(self) -> str:
        files = ", ".join(f"{file.name} {file.stat().st_size / 1e6:.0f} MB" for file in self.finished.values())
        if not self.original:
            return f"{files}; nothing was verified"
        right = ", ".join(f"{name} {share:.1%}" for name, share in self.accuracy.items())
        return f"{files}; {len(self.checks)} checks passed; accuracy on {len(self.heldout.asked)} rows: {right}"

    def report(self) -> dict[str, Any]:
        """`export.json`."""
        files = {kind: {"file": file.name, "bytes": file.stat().st_size} for kind, file in self.finished.items()}
        return {
            "model": str(self.merged),
            "verified": self.original is not None and all(check.passed for check in self.checks),
            "rows": len(self.heldout.asked),
            "accuracy": self.accuracy,
            "files": files,
            "checks": [check.as_dict() for check in self.checks],
        }


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
