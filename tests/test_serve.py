"""The endpoint: real clients against a real llama.cpp, what it refuses, and that it is gone with its command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import RunWriter, evaluated_row, give_weights
from huggingface_hub import InferenceClient

import qreason
from qreason.cli import main
from qreason.errors import RunFolderError
from qreason.recipe.load import load_recipe
from qreason.run.checkpoint import open_checkpoint
from qreason.run.folder import RunFolder
from qreason.run.session import Session
from qreason.serve.chat import Talk
from qreason.serve.endpoint import find_export
from qreason.stages import run_stage

SYSTEM = 'Say "it\'s" with \\ or {{ x }} %} {% y %},\nnothing ünusual </s>'
STEPS = "steps=[{sft: {max_steps: 1}}, {merge: {rows: 2}}, {export: {gguf: [f32, q8_0], verify: false}}]"
ISSUES = ["printer is offline", "the disk is full", "mail does not arrive", "the VPN drops"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adapter that was never trained, merged and exported."""
    folder = tmp_path_factory.mktemp("run") / "smoke"
    settings = [STEPS, "data.prompt=null", f"data.system={json.dumps(SYSTEM)}"]
    run = Session.open(load_recipe("smoke", settings), folder, say=lambda line: None)
    torch.manual_seed(1)
    run.resident.new_adapter(run.recipe.model.lora)
    give_weights(run.resident, 0.05)
    run.resident.model.peft_config["default"].base_model_name_or_path = "qreason/tiny"
    run.resident.model.save_pretrained(str(folder / "01-sft" / "adapter"), save_embedding_layers=False)
    run.resident.remove_adapter()
    run.disk.finish_step(0, 0)
    for step in (1, 2):
        run.step = step
        run_stage(run.recipe.steps[step], run)
        run.disk.finish_step(step, 0)
    return folder


@dataclass(frozen=True)
class Endpoint:
    process: subprocess.Popen[str]
    url: str
    token: str
    model: str

    def post(self, content: str | bytes, token: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token or self.token}", "Content-Type": "application/json"}
        return httpx.post(f"{self.url}/chat/completions", headers=headers, content=content, timeout=120)


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Endpoint]:
    own = os.environ | {"PYTHONPATH": str(Path(qreason.__file__).parents[1])}
    command = [sys.executable, "-m", "qreason", "serve", str(folder), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=own) as process:
        try:
            assert process.stdout
            told = dict(process.stdout.readline().split() for _ in range(3))
            yield Endpoint(process, told["base_url"], told["api_key"], told["model"])
        finally:
            process.kill()


@pytest.fixture(scope="module")
def endpoint(exported: Path) -> Iterator[Endpoint]:
    with serving(exported) as one:
        yield one


@pytest.fixture(scope="module")
def expected(exported: Path) -> list[str]:
    """What the chat answers."""
    talk = Talk(open_checkpoint(str(exported)), single=True)
    return [talk.ask(issue).reply.text for issue in ISSUES]


def test_openai_clients_get_the_replies_of_the_chat_whole_and_streamed(endpoint: Endpoint, expected: list[str]) -> None:
    client = openai.OpenAI(base_url=endpoint.url, api_key=endpoint.token)
    assert [model.id for model in client.models.list()] == [endpoint.model] == ["01-sft"]
    for issue, text in zip(ISSUES, expected, strict=True):
        asked = {"model": endpoint.model, "temperature": 0, "messages": [{"role": "user", "content": issue}]}
        whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
        assert whole.choices[0].message.content == text
        chunks = [part.choices[0].delta.content for part in client.chat.completions.create(**asked, stream=True)]  # type: ignore[call-overload]
        assert "".join(filter(None, chunks)) == text
        assert len(chunks) > 2


def test_the_system_prompt_of_training_is_there_unless_a_request_has_one(
    endpoint: Endpoint, expected: list[str]
) -> None:
    client = InferenceClient(base_url=endpoint.url, api_key=endpoint.token)

    def tokens(*messages: dict[str, str]) -> int:
        found = client.chat_completion([*messages], temperature=0, max_tokens=1)
        return int(found.usage.prompt_tokens)

    user, own = {"role": "user", "content": ISSUES[0]}, {"role": "system", "content": SYSTEM}
    assert tokens(user) == tokens(own, user) > tokens({"role": "system", "content": "Hi"}, user)
    found = client.chat_completion([user], temperature=0)
    assert found.choices[0].message.content == expected[0]


def test_sixteen_clients_at_once_are_answered(endpoint: Endpoint) -> None:
    def ask(number: int) -> str | None:
        client = openai.OpenAI(base_url=endpoint.url, api_key=endpoint.token, max_retries=0)
        asked = [{"role": "user", "content": ISSUES[number % len(ISSUES)]}]
        found = client.chat.completions.create(model="any", temperature=0, messages=asked)  # type: ignore[arg-type]
        return found.choices[0].finish_reason

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(ask, range(16))) <= {"stop", "length"}


def test_what_is_no_request_is_refused_and_the_server_lives_on(endpoint: Endpoint) -> None:
    ask = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2})
    for wrong in ("no", endpoint.token[:-1], endpoint.token.swapcase()):
        assert endpoint.post(ask, token=wrong).status_code == 401
    assert httpx.get(f"{endpoint.url}/models").status_code == 401
    huge = json.dumps({"messages": [{"role": "user", "content": "a " * 500_000}]})
    for content in ('{"messages": [', "", "[]", "null", '{"messages": "x"}', b"\xff\xfe\x00", huge):
        assert 400 <= endpoint.post(content).status_code < 500
    assert endpoint.post(ask).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_server_is_gone_when_the_command_ends(exported: Path, number: int) -> None:
    with serving(exported, "--token", "given", "--gguf", "q8_0") as one:
        assert (one.token, one.url[:17]) == ("given", "http://127.0.0.1:")
        assert httpx.get(f"{one.url}/models", headers={"Authorization": "Bearer given"}).status_code == 200
        one.process.send_signal(number)
        code = one.process.wait(30)
        assert code == (0 if number == signal.SIGINT else -number)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{one.url}/models")


# --- what cannot be served -------------------------------------------------------------------------


def serve(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["serve", str(folder), *options])


def test_a_run_without_an_export_says_how_to_make_one(write_run: RunWriter) -> None:
    result = serve(write_run("runs/one", [[evaluated_row(0)]] * 3))
    assert (result.exit_code, "nothing is exported yet; `qreason export runs/one`" in result.stderr) == (2, True)
    assert serve(Path("runs/on")).exit_code == 2


def test_a_port_that_is_taken_is_named(exported: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = serve(exported, "--port", str(taken.getsockname()[1]))
        page = CliRunner().invoke(main, ["chat", str(exported), "--web", "--port", str(taken.getsockname()[1])])
    assert (result.exit_code, "take another one with --port" in result.stderr) == (2, True)
    assert (page.exit_code, "take another one with --port" in page.stderr) == (2, True)
    assert "--port" in serve(exported, "--host", "203.0.113.1").stderr


def test_a_type_that_is_not_there_names_the_others_and_a_changed_file_is_not_served(exported: Path) -> None:
    run = RunFolder.reopen(exported)
    with pytest.raises(RunFolderError, match=r"'q8_1' \(did you mean 'q8_0'\?\); there are f32, q8_0"):
        find_export(run, "q8_1")
    found = find_export(run)
    assert (found.file.name, found.stage, found.verified) == ("smoke-f32.gguf", "01-sft", False)
    report = exported / "03-export" / "export.json"
    written = report.read_text()
    for recommended, name in (("q8_0", "smoke-q8_0.gguf"), ("q4_k_m", "smoke-f32.gguf")):
        report.write_text(written.replace('"recommended": null', f'"recommended": "{recommended}"'))
        assert find_export(run).file.name == name
    report.write_text(written)
    file = find_export(run, "q8_0").file
    kept = file.read_bytes()
    file.write_bytes(kept[:-1])
    try:
        with pytest.raises(RunFolderError, match="not the file that was exported"):
            find_export(run, "q8_0")
    finally:
        file.write_bytes(kept)
