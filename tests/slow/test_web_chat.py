"""The chat's page in a browser: it sends, streams, folds, remembers, stops, switches, and shows markup as text."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from browser import BROWSER, Browser
from conftest import RecipeWriter, give_weights

import qreason
from qreason.recipe.load import load_recipe
from qreason.run.session import Session

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSER, reason="no Chromium here")]
SHOWN = "[...document.querySelectorAll('.prose.turns')].map(one => one.innerText)"
ALL = SHOWN.replace("innerText", "textContent")
"""With what is folded."""
DONE = f"{SHOWN}.every(text => text.endsWith('tokens)')) && {SHOWN}"
MARKUP = "<reasoning><img src=//x.test/1></reasoning><answer>"
SLOWLY = f"""
import sys, time
from dataclasses import replace
from qreason.inference import decoding
from qreason.inference.generate import LocalGenerator
from qreason.serve.chat import Talk
draw, text, choose = decoding.draw, LocalGenerator.text, Talk.choose
decoding.draw = lambda *given: (time.sleep(0.1), draw(*given))[1]
LocalGenerator.text = lambda *given: {MARKUP!r} + text(*given)
Talk.choose = lambda *given: (replace(choose(*given)[0], text={MARKUP!r} + choose(*given)[0].text), "greedy")
from qreason.cli import main
main(["chat", sys.argv[1], "--web", "--port", "0"])
"""
"""Replies that take their time, and begin with markup."""


@pytest.fixture
def folder(write_recipe: RecipeWriter, tmp_path: Path) -> Path:
    """A run whose stages answer differently."""
    run = Session.open(
        load_recipe(str(write_recipe(("length: 12", "length: 30")))), tmp_path / "out", say=lambda line: None
    )
    for step in range(4):
        if folder := {1: "01-sft", 3: "02-grpo"}.get(step):
            torch.manual_seed(step)
            run.resident.new_adapter(run.recipe.model.lora)
            give_weights(run.resident, 0.3)
            run.resident.model.peft_config["default"].base_model_name_or_path = "qreason/tiny"
            run.resident.model.save_pretrained(str(run.folder / folder / "adapter"), save_embedding_layers=False)
            run.resident.remove_adapter()
        run.disk.finish_step(step, 0)
    return run.folder


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """Where the page is; Ctrl-C ends it in the end, although a reply is being made."""
    own = os.environ | {"PYTHONPATH": str(Path(qreason.__file__).parents[1])}
    command = [sys.executable, "-c", SLOWLY, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=own) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()


def send(browser: Browser, text: str) -> None:
    browser.run("document.querySelector('textarea, input[type=text]').focus()")
    browser.type(text)
    browser.enter()


def press(browser: Browser, name: str) -> None:
    browser.run(f"[...document.querySelectorAll('button')].find(one => one.innerText === '{name}').click()")


def test_the_page_sends_streams_folds_remembers_switches_and_stops(address: str, tmp_path: Path) -> None:
    assert address.startswith("http://127.0.0.1:")
    assert httpx.get(address, headers={"Host": "elsewhere.example"}, timeout=120).status_code == 400
    with Browser(tmp_path / "profile") as browser:
        browser.order("Page.navigate", url=address)
        browser.wait("document.querySelectorAll('.prose.turns').length == 2 && !!document.querySelector('textarea')")
        assert browser.run("[...document.querySelectorAll(':checked')].map(one => one.value)") == ["01-sft", "02-grpo"]

        send(browser, "disk <b>full</b>")
        lengths = set()
        while not (first := browser.run(DONE)):
            lengths.add(tuple(map(len, browser.run(SHOWN))))
        assert len({left for left, _ in lengths}) > 3  # it grew
        assert len({right for _, right in lengths}) > 3
        whole = browser.run(ALL)
        assert whole[0] != whole[1]
        assert all(text.startswith("disk <b>full</b>\n") for text in first)
        assert browser.run("document.querySelectorAll('.turns img, .turns b').length") == 0
        assert "reasoning: 2 words" in first[0]
        assert "img" not in first[0]
        browser.run("document.querySelector('.prose details').open = true")
        assert "<img src=//x.test/1>" in browser.run(SHOWN)[0]

        send(browser, "and the printer")
        second = browser.wait(f"{DONE} && {SHOWN}.every(text => text.includes('printer')) && {SHOWN}")
        assert second[1].startswith(first[1])
        assert browser.run(ALL)[1].startswith(whole[1])

        browser.run("document.querySelector('input[value=base]').click()")
        browser.wait(f"{SHOWN}.every(text => text.trim() === '')")
        send(browser, "disk <b>full</b>")
        browser.wait(DONE)
        again = browser.run(ALL)
        assert again[1] == whole[1]  # the same stage, and nothing remembered
        assert again[0] not in whole

        press(browser, "New conversation")
        browser.wait(f"{SHOWN}.every(text => text.trim() === '')")
        send(browser, "mail")
        browser.wait(f"{SHOWN}[0].includes('answer')")
        press(browser, "Stop")
        stopped = browser.wait(f"{SHOWN}[0].endsWith('tokens)') && {SHOWN}")
        assert "(stopped, " in stopped[0]
        assert stopped[1].strip() == ""
        send(browser, "VPN")
        browser.wait(f"{SHOWN}[0].includes('VPN')")  # and Ctrl-C while it answers
        assert {one for one in browser.requests if not one.startswith((f"{address}/", "data:"))} == set()
        assert browser.messages == []
