"""Who may import whom: downwards only, and the heavy libraries inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qreason"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "bitsandbytes",
    "unsloth",
    "accelerate",
    "openai",
    "gguf",
    "cyllama",
    "xllamacpp",
}

ORDER = (
    *("errors", "types", "machine", "rewards", "recipe", "data", "model", "inference", "sampling", "judge", "run"),
    *("report", "training", "export", "hub", "serve", "planning", "stages", "cli", "__main__"),
)
"""Folders (and the modules beside them) from the ground up: each imports only from itself and from those before it."""
MOST_LINES = 350
"""Lines of a file."""

DERIVED = {"training.trainer", "model.compat.cache"}
"""Modules whose classes have classes of heavy libraries as bases; they are themselves imported inside functions."""


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in FILES}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text("utf-8"))


def imports(nodes: Iterator[ast.AST]) -> Iterator[tuple[str, str]]:
    """(module, name imported from it or nothing) of every import statement."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def own_imports(module: str) -> Iterator[tuple[str, str]]:
    """(module of the package, name imported from it or nothing), wherever the import stands."""
    for target, name in imports(ast.walk(tree(module))):
        if target.partition(".")[0] == "qreason":
            inner = target.removeprefix("qreason").lstrip(".")
            submodule = f"{inner}.{name}".lstrip(".")
            yield (submodule, "") if submodule in MODULES else (inner or "__init__", name)


def at_import_time(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Statements that run when a module is imported: not those in functions or under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        for part in ("body", "orelse", "finalbody"):
            yield from at_import_time(getattr(node, part, []))


def folder(module: str) -> str:
    return module.partition(".")[0]


def test_every_folder_has_its_place() -> None:
    assert {folder(module) for module in MODULES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"__init__"}))
def test_folders_import_only_from_those_before_them(module: str) -> None:
    targets = {folder(target) for target, _ in own_imports(module)} - {"__init__"}
    later = set(ORDER[ORDER.index(folder(module)) + 1 :])
    assert not targets & later


def test_no_module_imports_itself_through_others() -> None:
    remaining = {module: {target for target, _ in own_imports(module)} & MODULES.keys() for module in MODULES}
    while free := [module for module, targets in remaining.items() if not targets & remaining.keys()]:
        for module in free:
            del remaining[module]
    assert sorted(remaining) == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_can_be_read_in_a_sitting(module: str) -> None:
    assert len(MODULES[module].read_text("utf-8").splitlines()) <= MOST_LINES


def test_package_itself_imports_nothing() -> None:
    assert list(imports(ast.walk(ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))))) == []


def test_recipe_takes_only_the_names_and_settings_of_the_rewards() -> None:
    taken = [one for module in MODULES if module.startswith("recipe.") for one in own_imports(module)]
    assert {name for target, name in taken if target.startswith("rewards")} == {"NAMES", "settings_model"}


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("stages.")))
def test_stages_meet_through_the_run_folder(module: str) -> None:
    others = {target for target, _ in own_imports(module) if target.partition(".")[0] == "stages"}
    assert others == set()


@pytest.mark.parametrize("module", sorted(MODULES.keys() - DERIVED))
def test_heavy_libraries_are_imported_inside_functions(module: str) -> None:
    early = {target.partition(".")[0] for target, _ in imports(at_import_time(tree(module).body))}
    assert not early & HEAVY


def test_classes_on_heavy_bases_are_imported_inside_functions() -> None:
    for module in MODULES:
        statements = at_import_time(tree(module).body)
        assert not {f"qreason.{name}" for name in DERIVED} & {target for target, _ in imports(statements)}, module
