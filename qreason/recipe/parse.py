"""YAML as plain values with their lines; what YAML cannot build is an error with its line."""

from __future__ import annotations

from typing import Any

import yaml

BASE = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's loader, ten times faster, where PyYAML was built with it."""
DEEPEST = 100
"""Levels of nesting: libyaml and PyYAML call themselves for each."""


class Loader(BASE):  # type: ignore[misc, valid-type]
    """Names the line of a value that cannot be built: a month 13, a number of 5000 digits, `!!float x`."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:
            value, kind = str(node.value)[:40], node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(problem=f"'{value}' is no {kind}", problem_mark=node.start_mark) from None


def parse_yaml(text: str) -> tuple[Any, dict[tuple[Any, ...], int]]:
    """(the plain values of a YAML text, path of keys -> line of that key); YAMLError for anything else."""
    depth = 0
    for event in yaml.parse(text, BASE):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)  # type: ignore[arg-type]
    try:
        return yaml.load(text, Loader), read_lines(text)
    except RecursionError:
        raise yaml.YAMLError("a value that contains itself") from None


def read_lines(text: str) -> dict[tuple[Any, ...], int]:
    """Path of keys -> line of that key in the YAML text."""
    lines: dict[tuple[Any, ...], int] = {}

    def walk(node: yaml.Node, path: tuple[Any, ...]) -> None:
        lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if (*path, key.value) in lines:
                    raise yaml.MarkedYAMLError(problem=f"duplicate key '{key.value}'", problem_mark=key.start_mark)
                lines[(*path, key.value)] = key.start_mark.line + 1
                walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for position, value in enumerate(node.value):
                walk(value, (*path, position))

    if (root := yaml.compose(text, BASE)) is not None:
        walk(root, ())
    return lines
