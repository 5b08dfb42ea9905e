"""Writes docs/reference.md from the settings classes: every key of a recipe, its type, default, meaning and TRL's name.

python scripts/make_reference.py           # writes the file
python scripts/make_reference.py --check   # ends with 1 where the file is not what the classes say
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from qreason.recipe.schema import STAGES, Recipe
from qreason.recipe.sections import Data, Draw, Lora, Model, Strict, Weighted
from qreason.recipe.settings import Beam
from qreason.recipe.stage import Stage
from qreason.recipe.training import Teacher, Training
from qreason.rewards.judged import JudgeSettings
from qreason.training.arguments import CONFIGS

FILE = Path(__file__).parents[1] / "docs" / "reference.md"
HEAD = """\
# Every key of a recipe

Made by `python scripts/make_reference.py` from the settings classes; change those, then run it again. The last column
is the name in TRL's config of the step, or in PEFT's of the adapter, of keys that are handed on to them.
"""
SECTIONS: dict[str, type[BaseModel]] = {
    "Recipe": Recipe, "model": Model, "model.lora": Lora, "data": Data, "sampling": Draw, "rewards.NAME": Weighted,
    "rewards.judge": JudgeSettings,
    "sample.teacher, distill.teacher": Teacher, "evaluate.beam": Beam,
}  # fmt: skip
PEFT = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "target_modules"}
OURS = {"max_num_seqs"}
"""Keys of sampling that no config of TRL has."""


def main() -> int:
    text = reference()
    if "--check" not in sys.argv[1:]:
        FILE.write_text(text, encoding="utf-8")
        return 0
    if FILE.is_file() and FILE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{FILE} is not what the settings say: run scripts/make_reference.py")
    return 1


def reference() -> str:
    """The whole document."""
    tables = [table(f"`{key}`" if key != "Recipe" else key, kind) for key, kind in SECTIONS.items()]
    tables += [table(f"`{stage}` step", kind, stage) for stage, kind in STAGES.items()]
    return "\n".join([HEAD, *tables])


def table(title: str, kind: type[BaseModel], stage: str = "") -> str:
    """A section with its fields."""
    own = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].replace("\n", " ") if kind.__doc__ else ""
    rows = [f"| {' | '.join(row)} |" for row in fields(kind, stage)]
    return "\n".join([f"## {title}\n", *([f"{own}\n"] if own else []), HEADER, *rows, ""])


HEADER = "| key | type | default | meaning | elsewhere |\n|---|---|---|---|---|"


def fields(kind: type[BaseModel], stage: str) -> Iterator[tuple[str, str, str, str, str]]:
    """(key, type, default, meaning, TRL's or PEFT's name) of every field."""
    written = declarations(kind)
    for name, field in kind.model_fields.items():
        annotation, meaning = written[name]
        default = "required" if field.is_required() else f"`{shown(field.get_default(call_default_factory=True))}`"
        yield f"`{field.alias or name}`", annotation, default, meaning, elsewhere(kind, name, stage)


def declarations(kind: type[Any]) -> dict[str, tuple[str, str]]:
    """Name -> (type as written, docstring) of the fields of a class and of those it inherits from."""
    found: dict[str, tuple[str, str]] = {}
    for one in reversed(kind.__mro__):
        if not (isinstance(one, type) and issubclass(one, BaseModel) and one is not BaseModel):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(node, ast.ClassDef)
        for at, line in enumerate(node.body):
            if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
                continue
            after = node.body[at + 1] if at + 1 < len(node.body) else None
            text = ast.get_docstring(ast.Module([after], [])) if isinstance(after, ast.Expr) else None
            earlier = found.get(line.target.id, ("", ""))[1]
            meaning = cell(text or earlier)
            found[line.target.id] = (f"`{cell(ast.unparse(line.annotation))}`", meaning)
    return found


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def shown(value: Any) -> str:
    """A default as YAML would have it."""
    if isinstance(value, Strict):
        return "{}"
    if isinstance(value, frozenset | tuple):
        value = list(value)
    return cell(json.dumps(value, ensure_ascii=False))


def elsewhere(kind: type[BaseModel], name: str, stage: str) -> str:
    """The name of a field in TRL's or PEFT's config; empty for qreason's own."""
    if kind is Lora:
        return f"`{PEFT[name]}`" if name in PEFT else ""
    if kind is Draw:
        return "" if name in OURS else f"`GRPOConfig.{name}`"
    if issubclass(kind, Stage) and issubclass(kind, Training) and name not in kind.not_trls:
        return f"`{CONFIGS[stage]}.{name}`"
    return ""


if __name__ == "__main__":
    sys.exit(main())
