"""docs/reference.md is what the settings classes say, and every key has a meaning."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_reference_is_current_and_explains_every_key() -> None:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "scripts" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / "docs" / "reference.md").read_text("utf-8") == script.reference(), "run scripts/make_reference.py"
    kinds = [*script.SECTIONS.values(), *script.STAGES.values()]
    assert [
        f"{kind.__name__}.{name}" for kind in kinds for name, _, _, told, _ in named(script, kind) if not told
    ] == []


def named(script: object, kind: type) -> list[tuple[str, ...]]:
    stage = next((name for name, one in script.STAGES.items() if one is kind), "")  # type: ignore[attr-defined]
    return list(script.fields(kind, stage))  # type: ignore[attr-defined]
