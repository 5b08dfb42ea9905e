"""docs/scale.md: what its plan prints is what it says."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path


def test_the_worked_plan_prints_what_stands_below_it() -> None:
    text = (Path(__file__).parents[1] / "docs" / "scale.md").read_text("utf-8")
    program, _, printed = re.findall(r"```python\n(.*?)```(\s*)```\n(.*?)```", text, re.DOTALL)[0]
    with redirect_stdout(StringIO()) as output:
        exec(program, {})
    assert output.getvalue() == printed
