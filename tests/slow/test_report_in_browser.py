"""The page of a run in a browser: it draws, filters, fits a phone, asks for nothing, and runs no script of a reply."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import RunWriter, evaluated_row, jsonl

from qreason.cli import main

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --enable-logging=stderr --v=0"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSER, reason="no Chromium here")]
SCRIPT = "<script>document.title = 'taken'</script><img src=https://example.org/x onerror=\"document.title = 'taken'\">"
PROBE = """
const visible = () => [...document.querySelectorAll("article")].filter((one) => !one.hidden).length;
const set = (name, value) => {
  document.querySelector("form").elements[name].value = value;
  document.querySelector("form").dispatchEvent(new Event("input"));
  return document.querySelector("#count").textContent;
};
const found = { all: visible() };
document.querySelector("#more").click();
found.more = visible();
found.worse = set("change", "10");
found.better = set("change", "01");
found.stages = set("from", "base");
set("change", "");
found.searched = set("search", "issue 13");
found.title = document.title;
found.charts = [...document.querySelectorAll("svg")].map((one) => Math.round(one.getBoundingClientRect().height));
found.colour = getComputedStyle(document.querySelector("svg path[stroke='var(--line)']")).stroke;
found.paper = getComputedStyle(document.documentElement).backgroundColor;
found.requests = performance.getEntriesByType("resource").map((one) => one.name);
found.wide = document.documentElement.scrollWidth;
found.room = document.documentElement.clientWidth;
found.seconds = performance.now() / 1000;
document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
parent.postMessage(JSON.stringify(found), "*");
"""


def browse(file: Path, *flags: str) -> tuple[str, str]:
    """What the page is in the end, and the browser's messages from it."""
    command = [str(BROWSER), *FLAGS.split(), f"--user-data-dir={file.parent / 'profile'}", *flags]
    shutil.rmtree(file.parent / "profile", ignore_errors=True)
    done = subprocess.run(
        [*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def probed(page: str) -> str:
    """The page with one more script at its end, which its policy allows."""
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    allowed = page.replace("script-src 'sha256-", f"script-src 'sha256-{digest}' 'sha256-", 1)
    assert allowed != page
    return allowed.replace("</body>", f"<script>{PROBE}</script></body>")


def read(dom: str) -> dict[str, object]:
    found = re.search(r"<pre>(\{.*?\})</pre>", dom, re.S)
    assert found, dom[-2000:]
    values: dict[str, object] = json.loads(found[1])
    return values


@pytest.fixture
def page(write_run: RunWriter) -> Path:
    """The page of a run with 2,000 steps and 60,000 replies; the first one of each kind holds a script."""
    right = [lambda i: False, lambda i: i % 2 == 0, lambda i: i % 4 != 0]
    passes = [
        [evaluated_row(i, f"{SCRIPT if i == 0 else ''} reply", is_right(i)) for i in range(40)] for is_right in right
    ]
    folder = write_run("out", passes, steps=2000)
    with (folder / "02-grpo" / "replies.jsonl").open("w") as stream:
        for step in range(1, 2001):
            row = {
                "step": step,
                "id": f"p{step}",
                "prompt": SCRIPT,
                "reply": SCRIPT + "word " * 50,
                "parts": {SCRIPT: 1.0},
            }
            stream.writelines(json.dumps(row | {"total": number / 30}) + "\n" for number in range(30))
    alarm = {"step": 900, "text": SCRIPT, "sign": "s", "reward": "format", "replies": [SCRIPT]}
    (folder / "02-grpo" / "alarms.jsonl").write_text(jsonl([alarm]))
    result = CliRunner().invoke(main, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    return folder.resolve() / "report.html"


def test_page_draws_filters_and_asks_for_nothing(page: Path) -> None:
    dom, messages = browse(page)
    assert messages == ""
    assert "<title>small, seed 1</title>" in dom
    assert page.stat().st_size < 3_000_000
    (page.parent / "probed.html").write_text(probed(page.read_text()))
    dom, messages = browse(page.parent / "probed.html")
    found = read(dom)
    assert messages == ""
    assert found["requests"] == []
    assert (found["all"], found["more"]) == (10, 20)
    assert [found[name] for name in ("worse", "better", "stages", "searched")] == [
        f"{n} of 40" for n in (10, 20, 30, 1)
    ]
    assert found["title"] == "small, seed 1"
    assert isinstance(found["charts"], list)
    assert len(found["charts"]) == 4
    assert min(found["charts"]) > 60
    assert isinstance(found["seconds"], float)
    assert found["seconds"] < 2


def test_page_has_a_dark_side(page: Path) -> None:
    (page.parent / "probed.html").write_text(probed(page.read_text()))
    sides = [
        read(browse(page.parent / "probed.html", f"--blink-settings=preferredColorScheme={scheme}")[0])
        for scheme in (1, 0)
    ]
    light, dark = ([side["paper"], side["colour"]] for side in sides)
    assert light == ["rgb(253, 253, 251)", "rgb(31, 95, 139)"]
    assert dark == ["rgb(22, 22, 21)", "rgb(130, 187, 227)"]


def test_page_fits_a_phone_without_scrolling_sideways(page: Path) -> None:
    (page.parent / "probed.html").write_text(probed(page.read_text()))
    frame = '<iframe src="probed.html" style="width: 375px; height: 800px; border: 0"></iframe><pre></pre>'
    script = "<script>onmessage = (event) => { document.querySelector('pre').textContent = event.data; };</script>"
    (page.parent / "phone.html").write_text(f"<!doctype html>{script}{frame}")
    dom, _ = browse(page.parent / "phone.html", "--virtual-time-budget=20000")
    found = read(dom)
    assert found["room"] in range(350, 376)
    assert found["wide"] == found["room"]
