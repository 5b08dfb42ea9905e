"""The reward that checks mathematical equality: its verdicts, its limits, and the processes it leaves behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import pytest

pytest.importorskip("math_verify")

from qreason.data.examples import read_examples
from qreason.errors import InputError
from qreason.rewards import mathematics
from qreason.rewards.mathematics import as_math, math, plain_number
from qreason.types import Example, Reply

GSM8K = Path(__file__).parents[2] / "shared" / "benchmarks" / "gsm8k"
HANGS = "9^{9^{9^{9}}}"


def marked(answer: str, *references: str, timeout: float = 5.0) -> float | None:
    """What one answer earns."""
    example = Example("x", "How many?", references[0], references[1:])
    (earned,) = math([Reply(f"<answer>{answer}</answer>")], [example], timeout=timeout)
    return earned


def is_gone(process_id: int, seconds: float = 5.0) -> bool:
    """Whether the process ends within `seconds`; one that only waits for its parent to read its status has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(process_id, 0)
            if Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def running() -> list[int]:
    """The process ids of the workers."""
    return [worker.pid for worker in multiprocessing.active_children() if worker.pid is not None]


def sleep(*question: object) -> None:
    """In a worker."""
    time.sleep(60)


def die(*question: object) -> None:
    """In a worker."""
    os.abort()


def lack_antlr(*question: object) -> None:
    """In a worker."""
    raise ImportError("antlr")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No verdicts remembered and no workers running, before and after."""

    def forget() -> None:
        mathematics.PROCESSES.stop()
        mathematics.evaluate.cache_clear()
        mathematics.is_readable.cache_clear()

    forget()
    yield monkeypatch
    forget()


# --- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "answer", "earned"),
    [
        (r"${1,3} \cup {2,4}$", "${1,2,3,4}$", 1.0),
        (r"{1,3} \cup {2,4}", "{1,2,3,4}", 1.0),
        (r"\frac{1}{3}", r"\frac13", 1.0),
        (r"\beta", "β", 1.0),
        ("1", "x = 1", 1.0),
        ("x = 1", "1", 1.0),
        ("0.1", "10%", 1.0),
        ("10", "10 cm", 1.0),
        (r"10 \text{ cm}", "10", 1.0),
        ("1/3", "0.333333", 1.0),
        ("1/3", "0.333", 0.0),
        ("a + b", "b + a", 1.0),
        ("a < 2", "2 > a", 1.0),
        ("a < 2", "2 < a", 0.0),
        ("1 < x < 2", "(1,2)", 1.0),
        ("(1,2)", "1 < x < 2", 0.0),  # who repeats the inequality has not solved it
        ("101", "a+2z = 2z + a = 101", 1.0),
        ("a+2z = 2z + a = 101", "101", 0.0),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}", 1.0),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", 0.0),
        ("3 + 4i", "4i + 3", 1.0),
    ],
)
def test_verdict_is_the_one_math_verify_documents(reference: str, answer: str, earned: float) -> None:
    assert marked(answer, reference) == earned


@pytest.mark.parametrize(
    "answer", [r"\[\sqrt{2}\]", r"$$\sqrt{2}$$", r"$\sqrt{2}$", r"\(\sqrt{2}\)", r"\boxed{\sqrt{2}}", r"\sqrt{2}"]
)
def test_latex_is_understood_in_every_environment_and_in_none(answer: str) -> None:
    assert marked(answer, r"\sqrt2") == 1.0
    assert marked(answer, r"\sqrt3") == 0.0
    assert marked(r"\sqrt2", answer) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("1234", "1,234"),
        ("$1,234.00", "1,234"),
        (r"1\,234", "1,234"),
        ("1 234", "1,234"),
        (r"\$18", "18"),
        ("**18**", "18"),
        ("18.", "18"),
        ("18 €", "18"),
        ("−3", "-3"),
        ("-$3", "-3"),
        ("It is 18", "18"),
        ("It costs $18.", "18"),
        ("12 + 6 = 18 dollars", "18"),
        ("16", "16 GB"),
        ("3/4 cup", "0.75"),
        ("50 percent", "50%"),
        (r"50\%", "1/2"),
        ("90°", r"90^\circ"),
        ("2 pi", r"2\pi"),
        ("1 1/2", r"\frac{3}{2}"),
        ("x**2", "x^2"),
        ("(x+1)^2", "x^2+2x+1"),
        ("2, 1", r"\{1, 2\}"),
        ("1 and 2", "1, 2"),
        (r"(3,4] \cup (-\infty,2)", r"(-\infty,2)\cup(3,4]"),
        ("[1, infinity)", r"[1,\infty)"),
        (r"3\times 10^8", "300,000,000"),
        ("Evelyn", r"\text{Evelyn}"),
        ("no solution", r"\text{no solution}"),
    ],
)
def test_same_value_in_another_form_earns_one(answer: str, reference: str) -> None:
    assert marked(answer, reference) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("0.05", "0.5"),
        ("0.5", "0.05"),
        ("2", "1/2"),
        ("1/2", "2"),
        ("3", "-3"),
        ("-3", "3"),
        ("-$3", "3"),
        ("5%", "0.5"),
        ("12,34", "1234"),
        ("1.2", "1,2"),
        (r"\{1,2\}", r"\{1,2,3\}"),
        (r"\{1,2,3\}", r"\{1,2\}"),
        ("{1,2}", "{1,2,3}"),
        ("(2,1)", "(1,2)"),
        ("(1,2)", "[1,2]"),
        (r"2\pi", "2"),
        ("5x", "5"),
        ("5", "5x"),
        ("y=3", "x=3"),
        ("17 GB", "16 GB"),
        (r"\text{Bob}", r"\text{Evelyn}"),
        ("18 or nineteen", r"\frac{38}{2}"),
    ],
)
def test_near_miss_earns_nothing(answer: str, reference: str) -> None:
    assert marked(answer, reference) == 0.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("12 or 13", "13"),
        ("12, 13", "13"),
        ("5 apples and 6 pears", "6"),
        ("10:30 am", "10"),
        ("3 million", "3"),
        ("minus 3 degrees", "3"),
        ("not 3", "3"),
        ("1 1/2", "1/2"),  # math-verify multiplies what stands side by side
        ("1 000", "0"),
    ],
)
def test_number_inside_another_answer_earns_nothing(answer: str, reference: str) -> None:
    assert marked(answer, reference) == 0.0


def test_every_accepted_wording_counts() -> None:
    assert marked("0.5", "x", r"\frac{1}{2}") == 1.0
    assert marked("0.6", "x", r"\frac{1}{2}") == 0.0


@pytest.mark.parametrize(
    "reference", ["Restart the spooler.", "Allow port 443 now.", "3 of 4", r"\frac{", r"$\frac{ = 443$", "..."]
)
def test_reference_that_is_no_mathematics_cannot_be_judged(reference: str) -> None:
    assert marked("443", reference) is None
    assert marked("", reference) is None
    assert marked("443", reference, "443") == 1.0
    assert marked("444", reference, "443") == 0.0


@pytest.mark.parametrize("text", ["18", "<answer></answer>", "<answer>18</answer><answer>18</answer>"])
def test_reply_without_answer_earns_nothing(text: str) -> None:
    assert math([Reply(text)], [Example("x", "How many?", "18")]) == [0.0]


@pytest.mark.parametrize("answer", ["", "$", "\\", "{", "$$$", "\ud800", "🙂", "\x00", "%", "=", "()", "{}" * 500])
def test_odd_answer_earns_nothing(answer: str) -> None:
    assert marked(answer, r"\frac{1}{2}") == 0.0


def test_marks_stay_in_the_order_of_the_replies() -> None:
    answers = ["1/2", "3", "0.5", "x", "", r"\frac12", "1/2"]
    examples = [Example(str(row), "How many?", r"\frac{1}{2}") for row in range(len(answers))]
    replies = [Reply(f"<answer>{answer}</answer>") for answer in answers]
    assert math(replies, examples) == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert math([], []) == []


@pytest.mark.parametrize("text", ["1,23", "0,123", "1 2", "10:30", "50%", "5x", "two", "", "$", "-", "1.2.3"])
def test_only_a_bare_number_is_compared_without_math_verify(text: str) -> None:
    assert plain_number(text) is None


def test_phrase_of_a_reference_has_to_begin_with_its_number() -> None:
    assert as_math("It costs 18 dollars", is_reference=False) == ("18", True)
    assert as_math("It costs 18 dollars", is_reference=True) == ("", True)
    assert as_math("18 dollars", is_reference=True) == ("18", True)


# --- GSM8K ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not GSM8K.exists(), reason="shared/benchmarks/gsm8k lies beside the checkout of the authors only")
@pytest.mark.parametrize(
    "written",
    [pytest.param("{}", id="plain"), pytest.param(r"\boxed{{{}}}", id="by math-verify", marks=pytest.mark.slow)],
)
def test_every_gold_solution_of_gsm8k_earns_one(written: str) -> None:
    examples = [row for name in ("train", "test") for row in read_examples(GSM8K / f"{name}.jsonl", use="sft")]
    assert len(examples) == 8792
    replies = [
        Reply(f"<reasoning>{row.reasoning}</reasoning>\n<answer>{written.format(row.reference)}</answer>")
        for row in examples
    ]
    started = time.monotonic()
    marks = math(replies, examples)
    seconds = time.monotonic() - started
    print(f"{len(marks)} gold solutions as {written}: {seconds:.2f} s")
    assert [row.id for row, earned in zip(examples, marks, strict=True) if earned != 1.0] == []
    assert seconds < 60


# --- limits --------------------------------------------------------------------------------------


def test_hanging_answer_earns_nothing_in_time_and_the_next_is_judged(fresh: pytest.MonkeyPatch) -> None:
    assert marked("2/4", r"\frac{1}{2}") == 1.0
    before = set(running())
    started = time.monotonic()
    assert marked(HANGS, "5", timeout=1.0) == 0.0
    assert time.monotonic() - started < 1.8
    (hanging,) = before - set(running())
    with pytest.raises(ProcessLookupError):
        os.kill(hanging, 0)  # reaped: a zombie would still be there
    assert marked("3/6", r"\frac{1}{2}") == 1.0
    assert marked("3/5", r"\frac{1}{2}") == 0.0


def test_hanging_answer_leaves_the_others_of_its_batch_alone(fresh: pytest.MonkeyPatch) -> None:
    replies = [Reply(f"<answer>{answer}</answer>") for answer in ("2/4", HANGS, "3/6", HANGS, "3/5")]
    examples = [Example("x", "How many?", r"\frac{1}{2}")] * len(replies)
    assert math(replies, examples, timeout=0.5) == [1.0, 0.0, 1.0, 0.0, 0.0]


def test_worker_that_sleeps_is_given_up(fresh: pytest.MonkeyPatch) -> None:
    with fresh.context() as patched:
        patched.setattr(mathematics, "answer_question", sleep)
        started = time.monotonic()
        assert marked("1/2", "3", timeout=0.2) == 0.0
        assert marked("1/2", "x", timeout=0.2) is None  # nobody read the reference
        assert time.monotonic() - started < 10
    assert marked("3/4", "0.75") == 1.0


def test_answer_that_kills_its_worker_earns_nothing(fresh: pytest.MonkeyPatch) -> None:
    with fresh.context() as patched:
        patched.setattr(mathematics, "answer_question", die)
        assert marked("1/2", "3") == 0.0
    assert marked("3/4", "0.75") == 1.0


def test_worker_killed_from_outside_costs_no_verdict(fresh: pytest.MonkeyPatch) -> None:
    assert marked("2/4", r"\frac{1}{2}") == 1.0
    for worker in running():
        os.kill(worker, signal.SIGKILL)
    assert marked("3/6", r"\frac{1}{2}") == 1.0


def test_reference_that_hangs_cannot_be_judged(fresh: pytest.MonkeyPatch) -> None:
    nested = "(" * 300 + "5" + ")" * 300
    assert marked("5", nested, timeout=0.5) is None


def test_worker_has_a_limit_of_memory(fresh: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/limits").exists():
        pytest.skip("reads /proc")
    assert marked("2/4", r"\frac{1}{2}") == 1.0
    worker, *_ = running()
    limits = Path(f"/proc/{worker}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max address space")]
    assert [mathematics.MEMORY_BYTES < int(limit) < 2 * mathematics.MEMORY_BYTES for limit in line.split()[3:5]] == [
        True
    ] * 2


def test_same_question_is_judged_once(fresh: pytest.MonkeyPatch) -> None:
    assert marked("2/4", r"\frac{1}{2}") == 1.0

    def refuse(*question: object) -> bool:
        raise AssertionError(question)

    fresh.setattr(mathematics.PROCESSES, "ask", refuse)
    assert marked("2/4", r"\frac{1}{2}") == 1.0
    assert marked("1,234.0", "1234") == 1.0
    with pytest.raises(AssertionError):
        marked("2/5", r"\frac{1}{2}")


def test_interrupted_question_does_not_answer_the_next_one(fresh: pytest.MonkeyPatch) -> None:
    mathematics.PROCESSES.ask("1/2", ["0.5"], 30.0)  # the workers run: the signal meets a waiting question
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs this in the background ignores it
    Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        mathematics.PROCESSES.ask(HANGS, ["5"], 60.0)
    started = time.monotonic()
    assert mathematics.PROCESSES.ask("1/2", ["0.6"], 5.0) is False
    assert mathematics.PROCESSES.ask("1/2", ["0.5"], 5.0) is True
    assert time.monotonic() - started < 30


def test_missing_math_verify_is_named_with_its_cure(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(mathematics, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install 'math-verify"):
        marked("18", "18")


def test_math_verify_that_cannot_be_imported_is_no_wrong_answer(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(mathematics, "answer_question", lack_antlr)
    with pytest.raises(InputError, match="ImportError: antlr"):
        marked("1/2", "3")


# --- processes -----------------------------------------------------------------------------------


START = r"""
import multiprocessing, os, signal, sys, time
from qreason.rewards import mathematics
from qreason.types import Example, Reply
mathematics.WORKERS = 1
def marked(answer, timeout=5.0):
    example = Example("x", "p", r"\frac{1}{2}")
    return mathematics.math([Reply(f"<answer>{answer}</answer>")], [example], timeout=timeout)
def worker():
    (found,) = multiprocessing.active_children()
    return found.pid
assert marked("2/4") == [1.0]
print(worker(), flush=True)
"""


def workers_of(program: str) -> list[int]:
    """Runs a program that has had a worker judge something; the process ids it printed."""
    result = subprocess.run([sys.executable, "-c", START + program], capture_output=True, text=True, timeout=60)
    assert result.stdout, result.stderr
    return [int(word) for word in result.stdout.split()]


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "raise RuntimeError",
        "os._exit(0)",
        "os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_no_worker_outlives_its_process(ending: str) -> None:
    (worker,) = workers_of(ending)
    assert is_gone(worker)


def test_hanging_worker_of_a_killed_process_ends_by_itself() -> None:
    program = f"""
import threading
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
marked({HANGS!r}, timeout=0.5)
"""
    (worker,) = workers_of(program)
    assert is_gone(worker, seconds=0.5 + mathematics.ORPHAN_S + 3)


def test_fork_has_workers_of_its_own() -> None:
    program = """
if os.fork() == 0:
    assert marked("3/6") == [1.0]
    print(worker(), flush=True)
    sys.exit()
os.wait()
assert marked("4/8") == [1.0]
print(worker(), flush=True)
"""
    first, forked, last = workers_of(program)
    assert first == last != forked
    assert is_gone(first)
    assert is_gone(forked)


def test_worker_does_not_load_torch() -> None:
    program = "import sys, qreason.rewards.mathematics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_script_whose_workers_cannot_start_is_no_wrong_answer(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(START)  # a worker reads it again, and has no workers of its own
    result = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=60)
    assert "cannot start its workers" in result.stderr.splitlines()[-1]
    assert "if __name__ == '__main__':" in result.stderr.splitlines()[-1]
