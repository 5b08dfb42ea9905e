"""README.md and docs/: every command line parses, its recipe and its --set keys exist, programs print what is shown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from functools import cache
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import ValidationError

from qreason.cli import main
from qreason.errors import QReasonError
from qreason.recipe.load import find_recipe, set_value, shipped_recipes
from qreason.recipe.parse import parse_yaml
from qreason.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
LANGUAGES = {"console", "json", "python", "sh", "text", "yaml"}
"""sh is what is typed, text what is printed, console both: what is typed begins with $."""
SPAN = re.compile(r"`((?:qreason|--set) [^`]+)`")
END = re.compile(r"&&|\|\|?|;|&|\d?>.*")
"""A word that ends a command."""
OPEN = re.compile(r"[][|…<>]|\b[A-Z]{2,}\b")
"""In a line that stands for many."""
MODULE = re.compile(r"`(\w+\.py)`[^`]*```python\n(.*?)```", re.DOTALL)
"""A program that a document names."""


def blocks(document: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of the fenced blocks."""
    for indent, language, text in BLOCK.findall(document.read_text("utf-8")):
        yield language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)


def typed(language: str, text: str) -> Iterator[list[str]]:
    """The words of each line that is typed; a line goes on after a backslash, and within quotes."""
    line = ""
    for further in text.replace("\\\n", " ").splitlines():
        if language == "console" and not line and not further.startswith("$ "):
            continue
        line += further.removeprefix("$ ").removeprefix("!")
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an open quote
            line += "\n"
        else:
            yield words
            line = ""


def commands(document: Path) -> Iterator[list[str]]:
    """What follows every `qreason` in the blocks that are typed."""
    for language, text in blocks(document):
        for words in typed(language, text) if language in ("sh", "console") else ():
            for start in (at + 1 for at, word in enumerate(words) if word == "qreason"):
                ends = (end for end in range(start, len(words)) if END.fullmatch(words[end]))
                yield words[start : next(ends, len(words))]


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that words name, and the rest of them; of several, as in `sft|grpo`, the last."""
    command: click.Command = main
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        for name in words[0].split("|"):
            assert name in command.commands, f"no command {name}"
        command, words = command.commands[name], words[1:]
    return command, words


def parse(words: list[str]) -> None:
    """Parse a command line with click; a recipe that comes with qreason exists, and so do the keys of --set."""
    command, rest = command_of(words)
    given = command.make_context(command.name, list(rest)).params
    name = given.get("recipe") or (given.get("name") if command.name == "init" else None) or "mine.yaml"
    ours = not name.startswith("runs/") and (name.startswith("recipes/") or not name.endswith(".yaml"))
    check_keys(given.get("overrides", ()), [find_recipe(name)] if ours else shipped_recipes())


def check_keys(overrides: Sequence[str], recipes: Sequence[Path]) -> None:
    """One of the recipes takes all overrides; the files that they name need not exist."""
    problems = (refusal(read(recipe), overrides) for recipe in recipes)
    assert (first := next(problems)) is None or None in problems, first


def read(recipe: Path) -> Any:
    """The values of a recipe, to be changed."""
    return deepcopy(plain(recipe))


@cache
def plain(recipe: Path) -> Any:
    return parse_yaml(recipe.read_text("utf-8"))[0]


def refusal(raw: dict[str, Any], overrides: Sequence[str] = ()) -> str | None:
    """Why a recipe, or an override of it, is refused."""
    try:
        for override in overrides:
            set_value(raw, override)
        Recipe.model_validate(raw)
    except (QReasonError, ValidationError) as error:
        return str(error)
    return None


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs that documents name, to be imported."""
    for document in DOCUMENTS:
        for name, text in MODULE.findall(document.read_text("utf-8")):
            (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_block_says_whether_it_is_typed_or_printed(document: Path) -> None:
    text, found = document.read_text("utf-8"), [*blocks(document)]
    assert 2 * len(found) == len(re.findall(r"^ *```", text, re.MULTILINE))
    assert {language for language, _ in found} <= LANGUAGES
    assert [text for language, text in found if language == "text" and re.search("^[$!]? ?qreason ", text, re.M)] == []


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_command_line_parses(document: Path) -> None:
    for words in commands(document):
        try:
            parse(words)
        except (click.UsageError, QReasonError, AssertionError) as error:
            pytest.fail(f"qreason {shlex.join(words)}: {error}")


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_command_within_a_sentence_exists(document: Path) -> None:
    for span in SPAN.findall(document.read_text("utf-8").replace("\\|", "|")):
        first, *words = span.split() if OPEN.search(span) else shlex.split(span)
        if first == "--set":
            if "KEY" not in span:
                check_keys([word for word in words if word != "--set"], shipped_recipes())
            continue
        command, rest = command_of(words)
        known = {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)} | {"--help"}
        assert {*re.findall(r"--[a-z-]+", " ".join(rest))} <= known, span
        if rest and not OPEN.search(span) and command is not main:
            parse(words)


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_part_of_a_recipe_is_valid(document: Path) -> None:
    for part in (parse_yaml(text)[0] for language, text in blocks(document) if language == "yaml"):
        problems = (refusal(put(part, read(recipe))) for recipe in shipped_recipes())
        assert (first := next(problems)) is None or None in problems, (part, first)


def put(part: Any, recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with a part of another one in place of its own; a step in place of the last one of its kind."""
    steps = recipe["steps"]
    for step in part if isinstance(part, list) else ():
        kind = next(iter(step))
        places = [place for place, old in enumerate(steps) if kind in old] or [len(steps)]
        for place in places if kind == "evaluate" else places[-1:]:  # evaluations are all alike
            steps[place : place + 1] = [step]
    for key, value in part.items() if isinstance(part, dict) else ():
        recipe[key] = {**recipe[key], **value} if key in ("data", "model", "sampling") else value
    return recipe


def test_programs_print_what_stands_below_them() -> None:
    shown = [
        (text, printed)
        for document in DOCUMENTS
        for (language, text), (below, printed) in pairwise(blocks(document))
        if (language, below) == ("python", "text")
    ]
    assert len(shown) == 2
    for text, printed in shown:
        with redirect_stdout(StringIO()) as output:
            exec(text, {})
        assert output.getvalue() == printed


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("qreason trian quickstart", "no command trian"),
        ("qreason run", "recipe"),
        ("qreason run quickstart --speed 3", "No such option"),
        ("qreason run quickstrat", "no such recipe"),
        ("qreason run quickstart --set grpo.max_stepz=3 && echo done", "max_stepz"),
        ("qreason run mine.yaml --set model.bsae=x", "bsae"),
        ("qreason run quickstart --set sample.n=3", "no sample step"),
    ],
)
def test_a_line_that_is_wrong_is_noticed(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "page.md").write_text(f"```sh\nOMP_NUM_THREADS=1 {line}\n```\n")
    (words,) = commands(tmp_path / "page.md")
    with pytest.raises((click.UsageError, QReasonError, AssertionError), match=problem):
        parse(words)
