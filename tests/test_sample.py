"""Rejection sampling through `qreason run`: a teacher behind real HTTP, cuts and resuming, what is kept and why not."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from qreason.cli import main
from qreason.data.examples import read_examples
from qreason.errors import RecipeError
from qreason.inference.generate import LocalGenerator
from qreason.recipe.load import load_recipe
from qreason.recipe.settings import Sample
from qreason.sampling.draws import Sieve
from qreason.sampling.endpoint import Endpoint, NoAnswerError
from qreason.stages.sft import conversation
from qreason.types import Messages, Sampling

if TYPE_CHECKING:
    from qreason.model.resident import Resident

RecipeWriter = Callable[..., Path]
STEPS = "  - evaluate\n  - sft: {learning_rate: 1e-5}\n  - evaluate\n  - grpo: {num_generations: 4}\n  - merge\n"
PROMPTS, N = 12, 3


class Teacher(ThreadingHTTPServer):
    """Chat completions; `answer` gives (status, text). After `most` answers the server is gone, as if killed."""

    daemon_threads = True
    request_queue_size = 64  # with the usual 5, the sixth connection at once waits for a second

    def __init__(self, answer: Callable[[Messages], tuple[int, str]], port: int = 0, most: int | None = None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.answer, self.most = answer, most
        self.retry_after = ""
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.answered = self.in_flight = self.most_in_flight = 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Teacher

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        status, text = server.answer(body["messages"])
        with server.lock:
            server.in_flight -= 1
            gone = server.most is not None and server.answered >= server.most
            server.answered += not gone
        if gone:  # the connection drops without an answer
            self.close_connection = True
            return
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": len(text.split())}
        self.send_response(status)
        if server.retry_after:
            self.send_header("Retry-After", server.retry_after)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [choice], "usage": usage}).encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Teacher]]:
    """Starts teachers, and stops them after the test."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    started: list[Teacher] = []

    def start(*arguments: Any, **options: Any) -> Teacher:
        started.append(Teacher(*arguments, **options))
        return started[-1]

    yield start
    for teacher in started:
        teacher.stop()


TIMES = itertools.count(1)


def good(messages: Messages) -> tuple[int, str]:
    """A right reply, never the same twice."""
    return 200, f"<reasoning>Looked at it {next(TIMES)} times.</reasoning>\n<answer>Restart the spooler.</answer>"


@pytest.fixture
def prompts(workplace: Path) -> Path:
    """Prompts of different wording, all with the same resolution."""
    rows = [
        {"id": f"p{i}", "issue": f"printer {i} is offline", "resolution": "Restart the spooler."}
        for i in range(PROMPTS)
    ]
    (workplace / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workplace


def sampling(write: RecipeWriter, settings: str, more: str = "") -> Path:
    return write((STEPS, f"  - sample: {settings}\n{more}"))


def run(file: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["run", str(file), "--out", "out", *arguments])


def rows_of(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/01-sample", file).read_text().splitlines()]


def taught_by(teacher: Teacher, more: str = "") -> str:
    return f"{{n: {N}, teacher: {{endpoint: '{teacher.url}', model: m, retries: 1}}{more}}}"


# --- the teacher -----------------------------------------------------------------------------------


def test_a_run_whose_teacher_is_killed_goes_on_and_loses_and_doubles_no_row(
    prompts: Path, write_recipe: RecipeWriter, serve: Callable[..., Teacher], resident: Resident
) -> None:
    generator, lock = LocalGenerator(resident), threading.Lock()

    def embedded(messages: Messages) -> tuple[int, str]:
        """The embedded model speaks, in the tags that it has not learnt."""
        with lock:
            ((reply,),) = generator.generate([messages], n=1, sampling=Sampling(max_completion_length=4))
        return 200, f"<reasoning>{reply.text.replace('<', ' ')} So.</reasoning>\n<answer>{len(reply.text)} x</answer>"

    half = PROMPTS * N // 2
    teacher = serve(embedded, most=half)
    file = sampling(write_recipe, taught_by(teacher, ", keep: {}, language: null"))
    first = run(file)
    assert first.exit_code == 1
    assert "the teacher does not answer" in first.stderr
    assert "run the same command again" in first.stderr
    assert len(rows_of("draws.jsonl")) == half
    before = Path("out/01-sample/draws.jsonl").read_text()
    assert 0 < len(rows_of("sampled.jsonl")) <= half
    port = teacher.server_address[1]
    teacher.stop()
    assert "does not answer" in run(file).stderr  # nobody listens at all
    assert Path("out/01-sample/draws.jsonl").read_text() == before

    together = threading.Event()

    def all_at_once(messages: Messages) -> tuple[int, str]:
        """The first answers wait until eight requests are there, or too long."""
        if again.in_flight == 8:
            together.set()
        together.wait(5)
        return embedded(messages)

    again = serve(all_at_once, port=port)
    second = run(file)
    assert second.exit_code == 0, second.output
    assert again.most_in_flight == 8
    assert len(again.bodies) == PROMPTS * N - half
    draws = rows_of("draws.jsonl")
    assert [(row["id"], row["number"]) for row in draws] == [(f"p{i}", n) for i in range(PROMPTS) for n in range(N)]
    paid = [json.loads(line)["reply"] for line in before.splitlines()]
    assert not set(paid) - {row["reply"] for row in draws}
    kept = rows_of("sampled.jsonl")
    assert [row["id"] for row in kept] == [f"{row['id']}-{row['number']}" for row in draws if not row["rejected"]]
    assert {row["rejected"] for row in draws} <= {None, "duplicate"}
    assert len(read_examples("out/01-sample/sampled.jsonl", use="sft")) == len(kept)


def test_the_request_says_how_to_draw_and_names_the_model(
    prompts: Path, write_recipe: RecipeWriter, serve: Callable[..., Teacher]
) -> None:
    teacher = serve(good)
    file = sampling(write_recipe, taught_by(teacher, ", rows: 1"))
    assert run(file, "--set", "sampling.min_p=0.1", "--set", "sampling.max_completion_length=99").exit_code == 0
    body = teacher.bodies[0]
    assert {key: body[key] for key in ("model", "temperature", "min_p", "max_tokens")} == {
        "model": "m",
        "temperature": 0.9,
        "min_p": 0.1,
        "max_tokens": 99,
    }
    assert not {"top_p", "top_k"} & body.keys()
    assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_the_card_tells_cost_acceptance_and_every_reason(
    prompts: Path, write_recipe: RecipeWriter, serve: Callable[..., Teacher]
) -> None:
    texts = iter(["", "no tags", *[good([])[1]] * 4])  # one at a time: three for the first prompt, three for the other
    teacher = serve(lambda messages: (200, next(texts)))
    settings = taught_by(teacher, ", rows: 2").replace("retries: 1", "retries: 1, concurrency: 1")
    result = run(sampling(write_recipe, settings))
    assert result.exit_code == 0, result.output
    figures = json.loads(Path("out/01-sample/sample.json").read_text())
    unformed = "not in the form <reasoning>…</reasoning><answer>…</answer>"
    assert figures["rejected"] == {"duplicate": 2, "empty": 1, unformed: 1}
    assert (figures["kept"], figures["replies"], figures["acceptance"]) == (2, 6, 0.3333)
    assert figures["prompt_tokens"] == 60
    card = Path("out/01-sample/README.md").read_text()
    assert "m at http://127.0.0.1" in card
    assert "| empty | 1 |" in card


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (401, 2, "401"),
        (429, 1, "the teacher does not answer: .*no answer in 2 attempts \\(429"),
        (500, 1, "no answer in 2 attempts \\(500"),
    ],
)
def test_an_endpoint_that_refuses_or_throttles_is_one_clear_line(
    prompts: Path, write_recipe: RecipeWriter, serve: Callable[..., Teacher], status: int, code: int, told: str
) -> None:
    result = run(sampling(write_recipe, taught_by(serve(lambda messages: (status, "x")))))
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)
    assert re.search(f"^qreason: .*{told}", result.stderr.strip().splitlines()[-1])


def test_a_throttled_request_waits_as_long_as_the_server_asks(
    serve: Callable[..., Teacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    sleep, own = time.sleep, threading.current_thread()

    def wait(seconds: float) -> None:  # the module is everyone's: threads of other tests sleep too
        if threading.current_thread() is own:
            waits.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr("openai._base_client.time.sleep", wait)
    teacher = serve(lambda messages: (429, ""))
    teacher.retry_after = "7"
    server = Endpoint(teacher.url, "m", "NO_KEY", timeout=5, retries=2)
    with pytest.raises(NoAnswerError):
        server.complete([{"role": "user", "content": "x"}])
    assert waits == [7.0, 7.0]


def test_one_refused_request_ends_the_run_after_the_replies_that_came(
    prompts: Path, write_recipe: RecipeWriter, serve: Callable[..., Teacher]
) -> None:
    def picky(messages: Messages) -> tuple[int, str]:
        return (400, "x") if "printer 11 " in messages[1]["content"] else good(messages)

    result = run(sampling(write_recipe, taught_by(serve(picky))))
    assert result.exit_code == 2
    assert "400" in result.stderr.splitlines()[-1]
    assert len(rows_of("draws.jsonl")) == (PROMPTS - 1) * N


def test_what_a_teacher_thought_before_its_reply_is_left_out(
    prompts: Path, write_recipe: RecipeWriter, serve: Callable[..., Teacher]
) -> None:
    teacher = serve(lambda messages: (200, f"<think>Hm.\nSo.</think>\n\n{good(messages)[1]}"))
    assert run(sampling(write_recipe, taught_by(teacher))).exit_code == 0
    assert all("<think>" not in row["reasoning"] for row in rows_of("sampled.jsonl"))


# --- nothing kept, and other bounds ----------------------------------------------------------------


def test_nothing_kept_says_why_and_other_bounds_draw_nothing_anew(
    prompts: Path, write_recipe: RecipeWriter, serve: Callable[..., Teacher]
) -> None:
    teacher = serve(good)
    file = sampling(write_recipe, taught_by(teacher, ", keep: {correctness: 2.5}"))
    result = run(file)
    assert result.exit_code == 1
    assert f"none of {PROMPTS * N} replies was kept: {PROMPTS * N} correctness below 2.5" in result.stderr
    asked = len(teacher.bodies)
    assert run(file, "--set", "sample.keep={correctness: 2.0}", "--set", "sample.per_prompt=2").exit_code == 0
    assert len(teacher.bodies) == asked
    assert len(rows_of("sampled.jsonl")) == PROMPTS * 2


def test_a_teacher_that_answers_nothing_is_counted_reply_by_reply(
    prompts: Path, write_recipe: RecipeWriter, serve: Callable[..., Teacher]
) -> None:
    result = run(sampling(write_recipe, taught_by(serve(lambda messages: (200, "")), ", rows: 2")))
    assert result.exit_code == 1
    assert "none of 6 replies was kept: 6 empty" in result.stderr


def test_draws_of_other_settings_are_refused_by_name(
    prompts: Path, write_recipe: RecipeWriter, serve: Callable[..., Teacher]
) -> None:
    teacher = serve(good, most=4)
    file = sampling(write_recipe, taught_by(teacher))
    run(file)
    kept = rows_of("draws.jsonl")
    result = run(file, "--set", "sample.teacher.model=other")
    assert result.exit_code == 2
    assert "its draws were made with other settings (model)" in result.stderr
    assert rows_of("draws.jsonl") == kept


# --- the run's own model ---------------------------------------------------------------------------


def test_a_cut_stage_draws_the_rest_as_it_would_have(
    prompts: Path, write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No reply of the bare base has the form, so the stage ends without data; its draws are what is compared.
    monkeypatch.setattr("qreason.stages.sample.DRAWS", 6)
    file = sampling(write_recipe, f"{{n: {N}, rows: 4}}")
    tokens = ("--set", "sampling.max_completion_length=8")
    assert "none of 12 replies was kept" in run(file, *tokens).stderr
    journal = Path("out/01-sample/draws.jsonl")
    whole = [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of("draws.jsonl")]
    assert len(whole) == 4 * N
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:7]) + lines[7][:20])  # cut in the middle of a line of the second batch
    run(file, *tokens)
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of("draws.jsonl")] == whole


# --- shards ----------------------------------------------------------------------------------------


def shard(file: Path, number: int, of: int, *arguments: str) -> Result:
    given = ["sample", str(file), "--out", "out", "--shard", f"{number}/{of}", *arguments]
    return CliRunner().invoke(main, given)


def draws() -> list[dict[str, Any]]:
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of("draws.jsonl")]
    return sorted(rows, key=lambda row: (row["id"], row["number"]))


def test_three_shards_draw_what_one_process_draws_even_if_one_is_cut_off(
    prompts: Path, write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qreason.stages.sample.DRAWS", 6)
    file = sampling(write_recipe, f"{{n: {N}, rows: 7}}")  # four batches of two prompts, the last with one
    tokens = ("--set", "sampling.max_completion_length=8")
    assert "none of 21 replies was kept" in run(file, *tokens).stderr
    whole = draws()
    Path("out").rename("whole")
    for number, count in ((3, 6), (1, 9), (2, 6)):
        done = shard(file, number, 3, *tokens)
        assert f"shard {number}/3: {count} draws" in done.stderr, done.output
    assert "shard 2/3: 6 draws" in shard(file, 2, 3, *tokens).stderr  # again: nothing is doubled
    part = Path("out/01-sample/shards/1-of-3/draws.jsonl")
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:4]) + lines[4][:20])
    joined = run(file, *tokens)
    assert "01-sample: 16 draws are there, going on with 5" in joined.stderr
    assert draws() == whole


def test_shards_of_a_teacher_are_joined_without_asking_again(
    prompts: Path, write_recipe: RecipeWriter, serve: Callable[..., Teacher]
) -> None:
    teacher = serve(good)
    file = sampling(write_recipe, taught_by(teacher))
    for number in (1, 2):
        assert shard(file, number, 2).exit_code == 0
    assert "is still being drawn" not in (joined := run(file)).stderr
    assert joined.exit_code == 0, joined.output
    assert len(teacher.bodies) == len(rows_of("sampled.jsonl")) == PROMPTS * N
    assert not Path("out/01-sample/shards").exists()
    assert "no sample step is left" in shard(file, 1, 2).stderr


def test_a_shard_that_is_still_drawn_is_not_joined(
    prompts: Path, write_recipe: RecipeWriter, serve: Callable[..., Teacher]
) -> None:
    file = sampling(write_recipe, taught_by(serve(good)))
    assert shard(file, 1, 2).exit_code == 0
    code = "import filelock; a = filelock.FileLock('out/01-sample/shards/1-of-2/.lock'); a.acquire(); print(); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-u", "-c", code], **pipes) as other:  # type: ignore[call-overload]
        other.stdout.readline()
        assert "this shard is still being drawn" in run(file).stderr
        assert "in use by another qreason" in shard(file, 1, 2).stderr
        other.communicate(b"\n")
    assert run(file).exit_code == 0


def test_a_shard_of_other_settings_is_refused_by_name(
    prompts: Path, write_recipe: RecipeWriter, serve: Callable[..., Teacher]
) -> None:
    file = sampling(write_recipe, taught_by(serve(good)))
    shard(file, 1, 2, "--set", "sampling.temperature=0.5")
    shard(file, 2, 2)
    result = run(file)
    assert result.exit_code == 2
    assert "1-of-2: its draws were made with other settings (sampling)" in result.stderr


@pytest.mark.parametrize("wrong", ["0/3", "4/3", "3", "a/b"])
def test_a_shard_that_is_none_is_refused(prompts: Path, write_recipe: RecipeWriter, wrong: str) -> None:
    file = sampling(write_recipe, "{}")
    result = CliRunner().invoke(main, ["sample", str(file), "--shard", wrong])
    assert (result.exit_code, "give i/n" in result.stderr) == (2, True)


# --- what is kept ----------------------------------------------------------------------------------

GOOD = "<reasoning>The spooler had hung after the update.</reasoning>\n<answer>Restart the spooler now.</answer>"


def drawn(reply: str = GOOD, **changes: Any) -> dict[str, Any]:
    row = {"id": "a", "prompt": "p", "reply": reply, "finished": True, "parts": {"judge": 0.7, "format": 0.8}}
    return row | {"total": 0.5} | changes


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        (drawn(), {}, None),
        (drawn("  "), {}, "empty"),
        (drawn(finished=False), {}, "cut off at max_completion_length"),
        (drawn("<answer>x</answer>"), {}, "not in the form <reasoning>…</reasoning><answer>…</answer>"),
        (drawn(GOOD + " And more."), {}, "not in the form <reasoning>…</reasoning><answer>…</answer>"),
        (drawn(), {"least_words": 40}, "shorter than 40 words"),
        (drawn(), {"most_words": 5}, "longer than 5 words"),
        (drawn(), {"language": "de"}, "less than 0.9 in language de"),
        (drawn(), {"keep": {"judge": 0.7}}, None),
        (drawn(), {"keep": {"judge": 0.71}}, "judge below 0.71"),
        (drawn(parts={"judge": None}), {"keep": {"judge": 0.1}}, "judge gave no verdict"),
        (drawn(total=None), {"keep": {"total": 0.1}}, "total gave no verdict"),
        (drawn(), {"keep": {"total": 0.6}}, "total below 0.6"),
    ],
)
def test_each_flaw_has_its_reason(row: dict[str, Any], settings: dict[str, Any], reason: str | None) -> None:
    assert Sieve(Sample(**{"keep": {}, **settings})).reason(row) == reason


def test_a_text_is_kept_once_a_prompt_whatever_its_case_and_blanks() -> None:
    sieve = Sieve(Sample(keep={}))
    other = GOOD.replace("The spooler", "the  Spooler")
    reasons = [sieve.reason(drawn()), sieve.reason(drawn(other)), sieve.reason(drawn(prompt="q", id="b"))]
    assert reasons == [None, "duplicate", None]


def test_no_more_than_asked_are_kept_a_prompt() -> None:
    sieve = Sieve(Sample(keep={}, per_prompt=1))
    reasons = [sieve.reason(drawn(GOOD.replace("hung", word))) for word in ("hung", "stopped")]
    assert reasons == [None, "more than 1 a prompt"]


# --- training on it --------------------------------------------------------------------------------


def test_sft_trains_from_the_base_on_what_was_sampled_and_on_rows_without_reasoning(
    prompts: Path, write_recipe: RecipeWriter, serve: Callable[..., Teacher]
) -> None:
    rows = [{"id": f"r{i}", "prompt": f"Name town {i}.", "reference": "Berlin."} for i in range(30)]
    (prompts / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tail = "  - sft: {data: sampled, from: base, max_steps: 1, per_device_train_batch_size: 2}\n"
    file = sampling(write_recipe, taught_by(serve(good), ", plain_share: 0.25"), tail)
    result = run(file, "--set", "data.plain=plain.jsonl")
    assert result.exit_code == 0, result.output
    assert "36 of 36 replies kept (100%), to 12 of 12 prompts, 12 rows mixed in" in result.stderr
    assert "48 sampled rows, 1 steps" in result.stderr
    assert Path("out/02-sft/adapter/adapter_model.safetensors").is_file()
    nodes = json.loads(Path("out/lineage.json").read_text())["nodes"]
    assert [(node["name"], node["from"]) for node in nodes] == [
        ("base", None),
        ("01-sample", "base"),
        ("02-sft", "base"),
    ]
    assert nodes[2]["data"] == ["01-sample"]
    assert nodes[1]["data"][-1] == "m"
    drawn = CliRunner().invoke(main, ["lineage", "out"]).stdout
    assert "01-sample  prompts.jsonl, plain.jsonl, m  kept 36 of 36" in drawn
    examples = read_examples("out/01-sample/sampled.jsonl", use="sampled")
    assert sum(example.reasoning is None for example in examples) == 12
    talks = {example.reasoning is None: conversation(example, "SYSTEM") for example in examples}
    assert [message["role"] for message in talks[True]["prompt"]] == ["user"]
    assert talks[True]["completion"][0]["content"] == "Berlin."
    assert [message["role"] for message in talks[False]["prompt"]] == ["system", "user"]
    assert talks[False]["completion"][0]["content"].startswith("<reasoning>Looked at it")


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ("  - sft: {data: sampled}\n", "sft.data: sampled: there is no sample step before it"),
        ("  - sft: {from: 02-grpo}\n", "from: no earlier '02-grpo'; there are newest, base"),
        ("  - sample: {keep: {juge: 1}}\n", "sample.keep: 'juge' is none of total, correctness, format"),
        ("  - sample: {plain_share: 0.2}\n", "data.plain is missing: the sample step needs rows without reasoning"),
        ("  - sample: {language: klingon}\n", "unknown language 'klingon'"),
        ("  - sample: {least_words: 9, most_words: 3}\n", "most_words (3) is below least_words (9)"),
        ("  - sample: {fom: base}\n", "unknown key 'steps.0.sample.fom' (did you mean 'from'?)"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_when_it_is_read(
    write_recipe: RecipeWriter, steps: str, told: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe((STEPS, steps)))
    assert told in str(caught.value)


def test_a_step_may_start_from_an_earlier_stage(write_recipe: RecipeWriter) -> None:
    recipe = load_recipe(write_recipe((STEPS, "  - sft\n  - grpo\n  - sample: {from: 01-sft}\n")))
    assert recipe.steps[2].sample == Sample(start="01-sft")
    assert recipe.dump()["steps"][2]["sample"]["from"] == "01-sft"


def test_preview_shows_plain_rows_as_they_are_taught(write_recipe: RecipeWriter, workplace: Path) -> None:
    (workplace / "plain.jsonl").write_text('{"prompt": "Name a town.", "reference": "Berlin."}\n')
    file = write_recipe(("  sft: sft.jsonl", "  sft: sft.jsonl\n  plain: plain.jsonl"))
    shown = CliRunner().invoke(main, ["data", "preview", str(file), "--rows", "1"]).stdout.partition("plain: 1 rows")[2]
    assert "<|im_start|>user\nName a town.<|im_end|>\n<|im_start|>assistant\nBerlin.<|im_end|>" in shown
    assert "helpdesk" not in shown
