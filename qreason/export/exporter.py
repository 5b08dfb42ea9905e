"""One export, from the merged model to verified files and their report."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qreason.data.prompts import system_prompt
from qreason.errors import ExportError, InputError, ModelError, RunFolderError, first_line
from qreason.export import architecture, engine, lora, ollama, quality, writer
from qreason.export.original import REPLIES, TOKENS, Original
from qreason.export.reference import Heldout
from qreason.export.verify import DRAFT, Check, FailedCheck, Results, read_checks
from qreason.machine.files import hash_files, read_json, write_json
from qreason.machine.records import Exported
from qreason.model.load import fingerprint, load_tokenizer, locate
from qreason.model.merging import check_adapter
from qreason.recipe.settings import Export
from qreason.run.session import Session

REPORT, PART = "export.json", "export.part"
"""All checks of an export, and those so far of one that is not finished."""


class Exporter:
    """Files are drafts until their checks have passed; then they replace earlier files of the same name."""

    def __init__(self, folder: Path, work: Path, merged: Path, settings: Export, run: Session) -> None:
        self.folder, self.work, self.merged, self.settings, self.run = folder, work, merged, settings, run
        self.name, self.base = run.recipe.name, run.recipe.model.base
        adapter = run.disk.adapter()
        assert adapter is not None, "a merge has an adapter"
        self.adapter = adapter
        self.config = architecture.read_config(merged)
        self.native = architecture.native_type(self.config)
        self.results = Results(folder, run.say)
        self.finished: dict[str, dict[str, Any]] = {}
        """Kind -> its entry in `export.json`."""
        self.failed: dict[str, Check] = {}
        """Quantized kind -> the check that it failed: it costs no other kind."""
        self.made_of = made_of(merged, adapter, settings, run)
        self.earlier = read_earlier(folder, self.made_of)
        rows = run.examples("heldout") if run.recipe.data.heldout else []
        if not rows and (settings.verify or settings.ollama):
            raise InputError(
                f"{run.folder}: there are no held-out rows to check files with; pull the adapter with --heldout FILE, "
                "or export with --no-verify and without --ollama"
            )
        self.heldout = Heldout(
            rows,
            system_prompt(run.recipe.data),
            load_tokenizer(str(merged)),
            run.recipe.sampling.max_completion_length,
            settings.rows,
        )
        self.original: Original | None = None

    def make_all(self) -> None:
        """The lossless float file first: the others are made from it or compared with it."""
        self.check_inputs()
        wanted = self.settings.gguf
        if self.settings.verify:
            self.original = Original(self.run, self.merged, self.heldout, self.work, self.results, self.earlier)
            if not self.earlier:  # which has more
                self.save()
        lossless = self.make_float(self.native)
        for kind in wanted:
            if kind in writer.FLOATS and kind != self.native:
                self.make_float(kind)
        for kind in wanted:
            if kind not in writer.FLOATS:
                self.make_quantized(kind, lossless)
        if not self.finished.keys() & set(wanted):
            raise ExportError(f"{self.folder}: no file passed its checks: {self.shortfall}")
        self.make_adapter()
        if self.settings.ollama:
            self.make_modelfile()
        self.run.say(
            f"LM Studio, with the system prompt of training and temperature 0 set there:\n{self.import_line()}"
        )

    def check_inputs(self) -> None:
        """Errors that can be found before anything is written."""
        own = {"id": self.base, "fingerprint": fingerprint(self.base)}
        base = self.run.disk.manifest.get("base", own)  # a pulled run whose base was never opened has none
        check_adapter(self.adapter, base)
        lora.check_fits(self.adapter, self.merged)
        changed = own["fingerprint"] != base["fingerprint"]
        if changed and Path(locate(self.base)).is_dir():
            raise RunFolderError(
                f"{self.run.folder}: the weights of {self.base} changed since this run began; put the earlier ones "
                "back, or train again with --fresh"
            )
        if added := sorted(self.heldout.tokenizer.get_vocab().keys() - load_tokenizer(self.base).get_vocab().keys()):
            raise ModelError(
                f"{self.merged}: the tokenizer was extended ('{added[0]}' is not in that of {self.base}), and an "
                "adapter has no weights for new tokens; put the base's tokenizer there, or train on a base that has "
                "them"
            )
        stored = sum(file.stat().st_size for file in self.merged.glob("*.safetensors")) / writer.BYTES[self.native]
        files = sum(stored * writer.BYTES[kind] for kind in {self.native, *self.settings.gguf})
        logits = 4 * REPLIES * TOKENS * self.config.vocab_size * 4 if self.settings.verify else 0
        writer.check_space(self.folder, int(files) + logits)

    # --- files ---------------------------------------------------------------------------------

    def draft(self, kind: str) -> Path:
        """Where a file is written first; one that was not asked for is deleted with the work folder."""
        folder = self.folder if kind in (*self.settings.gguf, "adapter") else self.work
        return folder / f"{self.name}-{kind}.gguf{DRAFT}"

    def keep(self, kind: str, draft: Path) -> Path:
        """Give a draft its final name, in place of an earlier file."""
        kept = draft.replace(draft.with_suffix(""))
        if draft.parent == self.folder:
            self.finished[kind] = describe(kept)
            self.save()
        return kept

    def kept(self, kind: str) -> Path | None:
        """The file of this kind that an earlier export of the same model has finished, with its results."""
        entry = self.earlier and self.earlier["files"].get(kind)
        if not self.earlier or not entry or not (file := self.folder / entry["file"]).is_file():
            return None
        found = describe(file)
        if (found["file"], found["sha256"]) != (entry["file"], entry["sha256"]):
            return None
        self.finished[kind] = found
        self.results.checks += read_checks(self.earlier, file.name)
        if kind in self.earlier["accuracy"]:
            self.results.accuracy[kind] = self.earlier["accuracy"][kind]
        self.run.say(f"{file.name} is there already, made of the same model")
        return file

    def save(self) -> None:
        """What is finished, for an export that is cut off."""
        write_json(self.folder / PART, self.report())

    def make_float(self, kind: str) -> Path:
        if file := self.kept(kind):
            if self.original and kind == self.native:
                self.original.compare_with(file)
            return file
        draft = self.draft(kind)
        writer.write_model(self.merged, draft, kind, self.name)
        if self.original:
            self.original.check_float(kind, draft)
        return self.keep(kind, draft)

    def make_quantized(self, kind: str, lossless: Path) -> None:
        if self.kept(kind):
            return
        draft = self.draft(kind)
        if kind in architecture.FILE_TYPES:
            writer.write_model(self.merged, draft, kind, self.name)
        else:
            engine.quantize(lossless, draft, kind)
        if self.original:
            try:
                self.original.check_quantized(kind, draft)
            except FailedCheck as error:
                self.failed[kind] = error.check
                self.results.accuracy.pop(kind, None)  # the check has it
                self.run.say(f"{error}; the other types are made all the same")
                return
        self.keep(kind, draft)

    def make_adapter(self) -> None:
        """The newest adapter, for the GGUF file of its base; kinds that GGUF cannot hold are reported and left out."""
        if self.kept("adapter"):
            return
        base, draft = base_folder(self.base), self.draft("adapter")
        try:
            lora.write_adapter(self.adapter, base, draft, self.name)
        except ModelError as error:
            self.run.say(f"no adapter file: {error}")
            return
        if self.original:
            self.original.check_adapter(draft, self.adapter, base)
        self.keep("adapter", draft)

    def make_modelfile(self) -> None:
        """A Modelfile for the preferred type, and the model in Ollama where that is installed."""
        model, context = self.finished[self.preferred]["file"], self.config.max_position_embeddings
        text = ollama.modelfile(model, self.heldout, context, self.merged)
        check = ollama.check_template(self.heldout)
        file = self.folder / ("Modelfile" if check.passed else f"Modelfile{DRAFT}")
        file.write_text(text, encoding="utf-8")
        self.results.passed(check)
        question = self.heldout.examples[0].prompt
        create, ask = ["ollama", "create", self.name, "-f", str(file)], ["ollama", "run", self.name]
        if (reply := ollama.ask(create, [*ask, question])) is not None:
            self.run.say(f"ollama: {question}\n{reply}")
        self.run.say(f"Ollama:\n{shlex.join(create)}\n{shlex.join(ask)}")

    def import_line(self) -> str:
        """The command that copies the preferred file into LM Studio."""
        file = self.folder / self.finished[self.preferred]["file"]
        return shlex.join(["lms", "import", "--copy", "--user-repo", f"qreason/{self.name}", str(file)])

    @property
    def recommended(self) -> str | None:
        sizes = {kind: entry["bytes"] for kind, entry in self.finished.items() if kind != "adapter"}
        return quality.recommend(sizes, self.results.accuracy, len(self.heldout.asked))

    @property
    def preferred(self) -> str:
        """The type that users are pointed to: the recommended one, or the last requested where nothing was measured."""
        return self.recommended or next(kind for kind in reversed(self.settings.gguf) if kind in self.finished)

    # --- report --------------------------------------------------------------------------------

    @property
    def summary(self) -> str:
        files = ", ".join(f"{file['file']} {file['bytes'] / 1e6:.0f} MB" for file in self.finished.values())
        if not self.original:
            return f"{files}; nothing was verified"
        right = ", ".join(f"{name} {share:.1%}" for name, share in self.results.accuracy.items())
        checks = f"{sum(check.passed for check in self.results.checks)} checks passed"
        if self.failed:
            checks += f"; not to be used: {self.shortfall}"
        advice = f"recommended: {self.recommended or 'none, every file is less accurate than what was trained'}"
        return f"{files}; {checks}; accuracy on {len(self.heldout.asked)} rows: {right}; {advice}"

    @property
    def shortfall(self) -> str:
        """The types that failed a check, with its figures."""
        return "; ".join(f"{kind}: {check.told}" for kind, check in self.failed.items())

    def report(self) -> dict[str, Any]:
        """`export.json`."""
        return {
            "model": str(self.merged),
            "made_of": self.made_of,
            "verified": self.original is not None
            and all(check.passed or check in self.failed.values() for check in self.results.checks),
            "rows": len(self.heldout.asked),
            "accuracy": self.results.accuracy,
            "recommended": self.recommended,
            "files": self.finished,
            "failed": {kind: check.name for kind, check in self.failed.items()},
            "checks": [asdict(check) for check in self.results.checks],
        }


def describe(file: Path) -> dict[str, Any]:
    """A finished file in `export.json`."""
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": hash_files([file])}


def made_of(merged: Path, adapter: Path, settings: Export, run: Session) -> dict[str, str]:
    """What the files and their checks depend on."""
    return {
        "model": hash_files(sorted(file for file in merged.iterdir() if file.is_file())),
        "adapter": hash_files(sorted(file for file in adapter.iterdir() if file.is_file())),
        "data": str(run.disk.manifest.get("data", {}).get("heldout")),
        "checks": f"{settings.rows} rows" if settings.verify else "none",
        "by": ", ".join(f"{name} {version(name)}" for name in ("qreason", *engine.PACKAGES)),
    }


def read_earlier(folder: Path, of: dict[str, str]) -> Exported | None:
    """What an export of the same model, cut off or finished, has left in a folder."""
    for file in (folder / PART, folder / REPORT):
        try:
            earlier: Exported = read_json(file, Exported)
        except RunFolderError:
            continue
        measured = earlier["accuracy"].keys() >= {"adapter", "merged"} or not earlier["checks"]
        if earlier["made_of"] == of and measured:
            return earlier
    return None


def base_folder(base: str) -> Path:
    """The folder with the files of a base: its own, or its snapshot in the Hub's cache."""
    folder = Path(locate(base))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:
        raise ModelError(f"{base}: cannot be fetched for the adapter's file ({first_line(error)[:200]})") from error
