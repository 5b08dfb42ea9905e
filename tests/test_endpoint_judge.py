"""A judge behind an OpenAI-compatible server: real HTTP, bounded retries, and never a verdict that was not given."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qreason.errors import ModelError, QReasonError
from qreason.judge.verdict import Judge, open_judge
from qreason.rewards.judged import JudgeSettings
from qreason.sampling.endpoint import Completion, Endpoint

YES = {"choices": [{"message": {"content": "Yes."}}]}


class Server(ThreadingHTTPServer):
    """Answers with what `answers` says: (status, body) for each request in turn, the last one for ever."""

    request_queue_size = 64  # with the usual 5, the sixth connection at once waits for a second

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, object]] = [(200, YES)]
        self.requests: list[dict[str, object]] = []
        self.headers: list[str | None] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append({"path": self.path, **body})
            self.server.headers.append(self.headers.get("Authorization"))
            status, answer = self.server.answers[0]
            if len(self.server.answers) > 1:
                self.server.answers.pop(0)
        text = answer if isinstance(answer, str) else json.dumps(answer)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def judge_at(server: Server, **settings: object) -> Judge:
    def no_base() -> None:
        raise AssertionError("the policy's base is not needed")

    given = {"endpoint": server.url, "model": "m", "retries": 2, **settings}
    return open_judge(JudgeSettings.model_validate(given), no_base)  # type: ignore[arg-type]


def says(text: str) -> tuple[int, object]:
    return 200, {"choices": [{"message": {"content": text}}]}


def test_the_question_goes_out_and_the_answer_comes_back_as_a_number(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    server.answers = [says("No")]
    assert judge_at(server, api_key="MY_KEY")([("Restart it.", "Buy a new one.")]) == [0.0]
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["temperature"] == 0
    assert "Buy a new one." in request["messages"][1]["content"]  # type: ignore[index]
    assert server.headers == ["Bearer secret"]


@pytest.mark.parametrize(
    ("text", "verdict"), [("yes", 1.0), ("**No**, they differ", 0.0), ("<think>No?\n</think>\nyes", 1.0)]
)
def test_a_verdict_is_the_first_word_after_any_thoughts(server: Server, text: str, verdict: float) -> None:
    server.answers = [says(text)]
    assert judge_at(server)([("a", "b")]) == [verdict]


@pytest.mark.parametrize(
    "answer", [says("Perhaps."), says(""), (200, "no JSON"), (200, {"choices": []}), (200, []), says("1.0")]
)
def test_an_answer_that_is_no_verdict_is_none_and_counted(server: Server, answer: tuple[int, object]) -> None:
    server.answers = [answer]
    judge = judge_at(server)
    assert judge([("a", "b"), ("a", "c")]) == [None, None]
    assert (judge.asked, judge.unanswered) == (2, 2)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, status: int) -> None:
    server.answers = [(status, "busy"), (status, "busy"), (200, YES)]
    assert judge_at(server)([("a", "b")]) == [1.0]
    assert len(server.requests) == 3


def test_retries_are_bounded_and_end_without_a_verdict(server: Server) -> None:
    server.answers = [(500, "down")]
    assert judge_at(server)([("a", "b")]) == [None]
    assert len(server.requests) == 3


def test_a_server_that_is_not_there_gives_no_verdict(server: Server) -> None:
    gone = JudgeSettings(endpoint="http://127.0.0.1:9/v1", model="m", retries=1)
    assert open_judge(gone, lambda: None)([("a", "b")]) == [None]  # type: ignore[arg-type, return-value]


def test_a_refused_key_stops_with_the_cure(server: Server) -> None:
    server.answers = [(401, "bad key")]
    with pytest.raises(ModelError, match=r"401 bad key; check the address, .* the key in OPENAI_API_KEY"):
        judge_at(server)([("a", "b")])
    assert len(server.requests) == 1


@pytest.mark.parametrize("choice", [None, [], {"message": "x"}, {"message": {"content": 7}}, {"text": "yes"}])
@pytest.mark.parametrize("usage", [None, "many", [1], {"prompt_tokens": "many"}])
def test_a_malformed_body_is_an_empty_answer(server: Server, choice: object, usage: object) -> None:
    server.answers = [(200, {"choices": [choice], "usage": usage})]
    assert Endpoint(server.url, "m", "NO_KEY", timeout=5, retries=0).complete([]).text == ""


def test_tokens_are_those_that_the_server_counted(server: Server) -> None:
    choice = {"message": {"content": "yes"}, "finish_reason": "length"}
    server.answers = [(200, {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": None}})]
    found = Endpoint(server.url, "m", "NO_KEY", timeout=5, retries=0).complete([])
    assert found == Completion("yes", finished=False, prompt_tokens=7)


def test_a_key_is_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret\nkey")
    with pytest.raises(ModelError, match="MY_KEY: its key has characters") as caught:
        Endpoint(server.url, "m", "MY_KEY", timeout=5, retries=0)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("MY_KEY", "secret\n")  # as a file ends
    for url, answer in ((server.url, (401, "no")), (server.url, (500, "no")), ("http://127.0.0.1:9", (500, "no"))):
        server.answers = [answer]
        with pytest.raises(QReasonError) as refused:
            Endpoint(url, "m", "MY_KEY", timeout=5, retries=0).complete([])
        assert "secret" not in str(refused.value)
    assert server.headers == ["Bearer secret"] * 2


def test_verdicts_keep_their_order_with_many_requests_in_flight(server: Server) -> None:
    pairs = [(f"r{i}", f"c{i}") for i in range(40)]
    judge = judge_at(server)
    server.answers = [says("yes")]
    assert judge(pairs) == [1.0] * 40
    assert len(server.requests) == 40


def test_what_was_not_answered_is_asked_again_later_and_what_was_is_not(server: Server) -> None:
    server.answers = [says("hm"), says("yes")]
    judge = judge_at(server, concurrency=1)
    assert judge([("a", "b")]) == [None]
    assert judge([("a", "b")]) == [1.0]
    assert judge([("a", "b")]) == [1.0]
    assert len(server.requests) == 2


def test_groupwise_asks_in_both_orders_and_counts_wins(server: Server) -> None:
    server.answers = [says("1")]  # always the first: no one is better
    judge = judge_at(server, mode="groupwise")
    assert judge([("r", "a"), ("r", "b"), ("r", "a"), ("r", "c")]) == [0.5, 0.5, 0.5, 0.5]
    assert len(server.requests) == 6


def cut(text: str) -> tuple[int, object]:
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": "length"}]}


@pytest.mark.parametrize("beginning", ["<think>\nOkay, the reference says", "", "<think>a</think>\n"])
def test_a_judge_that_thinks_is_given_more_tokens(server: Server, beginning: str) -> None:
    # A reasoning model was cut off at 16 tokens inside its thoughts, and never gave a verdict.
    server.answers = [cut(beginning), says("<think>Okay.</think>yes")]
    judge = judge_at(server, max_tokens=500, concurrency=1)
    assert judge([("a", "b"), ("a", "c")]) == [1.0, 1.0]
    assert [request["max_tokens"] for request in server.requests] == [16, 500, 500]


def test_a_verdict_cut_off_inside_its_thoughts_says_so_once(server: Server) -> None:
    server.answers = [cut("<think>Okay, but")]
    said: list[str] = []
    settings = JudgeSettings(endpoint=server.url, model="m", max_tokens=40)
    judge = open_judge(settings, lambda: None, said.append)  # type: ignore[arg-type, return-value]
    assert judge([("a", "b"), ("a", "c")]) == [None, None]
    (line,) = said
    assert "cut off inside <think> at 40 tokens" in line
    assert "raise max_tokens" in line


@pytest.mark.parametrize("usage", [None, "many", [1], {"prompt_tokens": [3]}, {"prompt_tokens": 1e300}, 7])
def test_a_text_counts_whatever_the_server_says_of_its_tokens(server: Server, usage: object) -> None:
    server.answers = [(200, {"choices": [{"message": {"content": "yes"}}], "usage": usage})]
    assert Endpoint(server.url, "m", "NO_KEY", timeout=5, retries=0).complete([]) == Completion("yes")


@pytest.mark.parametrize("body", ["[" * 20_000, '{"choices": [{"message": {"content": ["yes"]}}]}', "no JSON", "{}"])
def test_a_body_that_is_no_completion_says_why(server: Server, body: str) -> None:
    server.answers = [(200, body)]
    found = Endpoint(server.url, "m", "NO_KEY", timeout=5, retries=0).complete([])
    assert found.text == ""
    assert found.problem


def test_half_a_surrogate_pair_in_an_answer_can_be_stored(server: Server) -> None:
    server.answers = [(200, '{"choices": [{"message": {"content": "a\\ud800"}}]}')]
    assert Endpoint(server.url, "m", "NO_KEY", timeout=5, retries=0).complete([]).text == "a?"


@pytest.mark.parametrize("address", ["http://me:planted@h:x/v1", "http://***@host/v1"])
def test_an_address_that_is_none_is_refused_without_its_password(address: str) -> None:
    with pytest.raises(ModelError) as caught:
        Endpoint(address, "m", "NO_KEY", timeout=5, retries=0)
    assert "me:planted" not in str(caught.value)
