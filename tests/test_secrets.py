"""No key, token or password is printed, stored or published; and any console can print what is not one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from qreason.cli import main
from qreason.errors import QReasonError, redact
from qreason.machine.files import write_json

RecipeWriter = Callable[..., Path]
PLANTED = "plantedSECRET"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://me:{PLANTED}@host/v1: 401", "http://***@host/v1: 401"),
        (f"http://me:{PLANTED}/p@ss@host/v1", "http://***@host/v1"),
        (f"https://{PLANTED}@host", "https://***@host"),
        (f"GET http://host/v1?model=m&api_key={PLANTED}&n=1", "GET http://host/v1?model=m&api_key=***&n=1"),
        (f"Illegal header value b'Bearer {PLANTED}\\n'", "Illegal header value b'Bearer ***'"),
        (f"{{'Authorization': 'Basic {PLANTED}=='}}", "{'Authorization': 'Basic ***'}"),
        (f"no access with hf_{PLANTED}", "no access with hf_***"),
        (f"Incorrect API key provided: sk-proj-{PLANTED}.", "Incorrect API key provided: sk-***."),
    ],
)
def test_a_secret_is_left_out_and_the_rest_stays(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert str(QReasonError(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "https://medium.com/@name", "http://host:8000/v1: no answer", "risk-assessment-of-tokens", "hf_hub_download",
        "git@github.com:me/name", "the key in OPENAI_API_KEY", "a bearer", "http://host/v1?model=m",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("end", ["\n", " ", "\r\n", " second-part\n"])
def test_the_value_of_a_variable_is_left_out_however_it_is_written(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setenv("MY_JUDGE_API_KEY", f"0{PLANTED}1{end}")
    assert PLANTED not in redact(f"header {('0' + PLANTED + '1' + end)!r}")
    assert PLANTED not in redact(f"header 0{PLANTED}1")


def test_a_stored_file_holds_no_secret(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"teacher": f"http://me:{PLANTED}@host/v1", "said": "é"})
    assert (tmp_path / "x.json").read_text("utf-8") == '{\n  "teacher": "http://***@host/v1",\n  "said": "é"\n}\n'


@pytest.mark.parametrize(
    "arguments",
    [
        ["validate", f"http://me:{PLANTED}@host/x.yaml"],
        ["run", "smoke", "--seed", f"sk-{PLANTED}"],
        ["pull", f"https://me:{PLANTED}@hub/x"],
        ["validate", "smoke", "--set", f"data.sft=https://me:{PLANTED}@host/x.jsonl"],
        ["chat", f"http://me:{PLANTED}@host"],
    ],
)
def test_no_command_shows_what_it_was_given(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code in (1, 2)
    assert PLANTED not in result.output
    assert "***" in result.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_console_of_any_encoding_prints_the_error(write_recipe: RecipeWriter, encoding: str) -> None:
    # A console without the character ended the command with a traceback.
    file = write_recipe(name="größe-→-日本.yaml")
    (file.parent / "sft.jsonl").write_text('{"issue": "日本"}\n', "utf-8")
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for arguments in (["validate", file], ["validate", "--help"], ["evaluate", "--help"], ["validate", "日本→"]):
        done = subprocess.run([sys.executable, "-m", "qreason", *arguments], capture_output=True, env=environment)
        assert done.returncode == (0 if arguments[-1] == "--help" else 2), done.stderr
        assert b"Traceback" not in done.stderr
