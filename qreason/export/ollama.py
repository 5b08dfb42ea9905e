"""Ollama: a Modelfile that renders like the chat template, and `ollama create` where Ollama is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qreason.errors import ExportError
from qreason.export import modelfile
from qreason.export.reference import Heldout
from qreason.export.verify import Check
from qreason.recipe.schema import Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

LONGEST_CONTEXT = 4096
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


def write_modelfile(folder: Path, model: Path, recipe: Recipe, heldout: Heldout, context: int, source: Path) -> Check:
    """`Modelfile` for a GGUF file beside it, with the recipe's system prompt and sampling."""
    draw = recipe.sampling
    text = modelfile.render(
        model=f"./{model.name}",
        system=heldout.system,
        stops=[heldout.tokenizer.eos_token],
        parameters={
            "temperature": draw.temperature,
            "top_p": draw.top_p,
            "top_k": draw.top_k,
            "min_p": draw.min_p,
            "repeat_penalty": 1.0,
            "num_ctx": min(context, LONGEST_CONTEXT),
            "num_predict": draw.max_completion_length,
        },
        license=next((f.read_text(encoding="utf-8") for f in (source / n for n in LICENCES) if f.is_file()), None),
    )
    problems = modelfile.check(text, heldout.tokenizer, heldout.conversations)
    (folder / ("Modelfile.unverified" if problems else "Modelfile")).write_text(text, encoding="utf-8")
    figures: dict[str, Any] = {"conversations": len(heldout.conversations), "different": len(problems)}
    if problems:
        figures["first"] = problems[0]
    return Check("Modelfile", "renders like the chat template", not problems, figures)


def commands(folder: Path, name: str) -> tuple[list[str], list[str]]:
    return ["ollama", "create", name, "-f", str(folder / "Modelfile")], ["ollama", "run", name]


def create(folder: Path, name: str, question: str) -> str | None:
    """Create the model where Ollama is installed and ask it a question; its reply, None without Ollama."""
    if shutil.which("ollama") is None:
        return None
    build, ask = commands(folder, name)
    call(build)
    return call([*ask, question]).strip()


def call(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ExportError(f"`{' '.join(command[:3])}` ended with {done.returncode} ({''.join(said)[:200]})")
    return done.stdout
