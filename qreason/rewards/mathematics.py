"""The reward that checks mathematical equality with math-verify.

Equal plain numbers are recognized here. The rest is judged by a few worker processes, because parsing or simplifying
what a model wrote can hang or eat memory: they speak JSON, a line each way, and are killed when they take too long.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from queue import LifoQueue
from threading import Timer
from typing import Any

from qreason.errors import InputError
from qreason.rewards.tags import read_answer
from qreason.types import Example, Reply

WORKERS = min(4, os.cpu_count() or 1)
START_S = 120.0
"""What a worker may take to import sympy."""
ORPHAN_S = 1.0
"""How long after its time limit a worker ends by itself, should nobody have killed it."""
MEMORY_BYTES = 2 * 2**30
"""Address space of a worker: an answer that needs more is wrong."""
CURE = "pip install 'math-verify[antlr4_13_2]>=0.9,<0.10'"
READY = "null\n"
PROGRAM = "import gc; gc.disable(); from qreason.rewards.math import serve; serve()"

NUMBER = r"(?:(?:[1-9][0-9]{0,2}(?:(?:,| |\\,|\{,\})[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
CURRENCY = r"(?:\\?\$|[€£¥])?"
PLAIN = re.compile(rf"([-+]?){CURRENCY}({NUMBER})\s*{CURRENCY}")
QUANTITY = re.compile(
    rf"(?<![\w.,:/^)-])(?P<sign>[-+]?){CURRENCY}(?P<number>{NUMBER})(?P<divisor>/[0-9]+)?"
    r"(?![\w,:/^*(]|\.\w)\s*(?P<percent>%|percent\b)?"
)
DELIMITED = re.compile(r"\$[^$]+\$|\\\(.+\\\)|\\\[.+\\\]|\\boxed")
SYMBOLIC = re.compile(r"[\\^_{}\[\]<>|≤≥]")
FUNCTION = re.compile(r"(?<![A-Za-z\\])(pi|theta|sin|cos|tan|ln|log)(?![A-Za-z])")
MIXED = re.compile(r"(?<![\w.])([0-9]+) ([0-9]+)/([0-9]+)(?![\w.])")
WORD = re.compile(r"(?<![A-Za-z])(?!(?:and|or|pi|theta|sin|cos|tan|ln|log|sqrt|inf|infinity)\b)[A-Za-z]{2,}", re.I)
MULTIPLIER = re.compile(
    r"\b(?:no|not|minus|negative|plus|times|over|squared|cubed|root|half|third|quarter|dozen|hundred|thousand|million"
    r"|billion|trillion)s?\b",
    re.I,
)
"""Words that make the number beside them another one."""


def math(replies: Sequence[Reply], examples: Sequence[Example], *, timeout: float = 5.0) -> list[float | None]:
    """1.0 for an answer that equals a reference mathematically, by math-verify 0.9, else 0.0.

    None where no reference can be read as mathematics. `timeout` is in seconds, for reading one reference and for
    judging one answer: an answer that takes longer earns 0.0. Raises InputError where math-verify is missing.
    """
    if find_spec("math_verify") is None:
        raise InputError(f"reward 'math' needs math-verify; {CURE}")
    questions = [
        (read_answer(reply.text), example.references) for reply, example in zip(replies, examples, strict=True)
    ]
    different = list(dict.fromkeys(questions))
    with ThreadPoolExecutor(WORKERS) as threads:
        marks = dict(zip(different, threads.map(lambda question: mark(*question, timeout), different), strict=True))
    return [marks[question] for question in questions]


@lru_cache(maxsize=100_000)
def mark(answer: str, references: tuple[str, ...], timeout: float) -> float | None:
    if not answer:
        return 0.0
    number = plain_number(answer)
    if number is not None and number in map(plain_number, references):
        return 1.0
    readable = [text for text in references if plain_number(text) is not None or is_readable(text, timeout)]
    if not readable:
        return None
    return float(answer in readable or POOL.ask(answer, readable, timeout))


@lru_cache(maxsize=100_000)
def is_readable(reference: str, timeout: float) -> bool:
    return POOL.ask(None, [reference], timeout)


# --- reading -------------------------------------------------------------------------------------


def plain_number(text: str) -> Decimal | None:
    """The number a text consists of, with at most a currency sign; else None."""
    match = PLAIN.fullmatch(text.replace("−", "-").strip(" \n\t*`'\"").removesuffix("."))
    return Decimal(match[1] + digits(match[2])) if match else None


def digits(number: str) -> str:
    """A number without its thousands separators."""
    return re.sub("[^0-9.]", "", number)


def is_prose(text: str) -> bool:
    return " " in text and WORD.search(text) is not None and not SYMBOLIC.search(text)


def quantity(phrase: str, is_reference: bool) -> str | None:
    """The only number of a phrase, after its last `=`, as in `It costs 18 dollars`; else None.

    A reference has to begin with it: a port number inside a sentence is not what the sentence says.
    """
    end = phrase.rpartition("=")[2].strip()
    match = QUANTITY.search(end)
    if match is None or MULTIPLIER.search(phrase):
        return None
    if re.search("[0-9]", end[: match.start()] + end[match.end() :]) or (is_reference and match.start() > 0):
        return None
    percent = "%" if match["percent"] else ""
    return match["sign"] + digits(match["number"]) + (match["divisor"] or "") + percent


def as_math(text: str, is_reference: bool) -> tuple[str, bool]:
    """A text as math-verify wants it, mathematics in dollar signs; and whether a number outside of them counts."""
    text = " ".join(text.replace("−", "-").split()).strip("*`'\" ")
    number = plain_number(text)
    if number is not None:
        return f"{number:f}", True
    if DELIMITED.search(text):
        return text, not is_reference
    if is_prose(text):
        if is_reference or re.search("[0-9]", text):
            return quantity(text, is_reference) or "", True
        return rf"$\text{{{text.removesuffix('.')}}}$", False
    bare = text.replace("\\$", "").replace("$", "").removesuffix(".")
    if "\\" not in bare:
        bare = FUNCTION.sub(r"\\\1 ", MIXED.sub(r"\1\\frac{\2}{\3}", bare.replace("**", "^").replace("°", r"^\circ")))
    return f"${bare}$", False


# --- workers -------------------------------------------------------------------------------------


class Worker:
    """A process that judges; it is killed when it takes too long, and started when there is something to judge."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, answer: str | None, references: Sequence[str], timeout: float) -> bool:
        """What `judge` says; False when it takes longer than `timeout` seconds, or dies of the question twice."""
        question = json.dumps([answer, references, timeout])
        try:
            for _ in range(2):
                process = self.process or self.start()
                deadline = time.monotonic() + timeout
                verdict = exchange(process, question, timeout)
                if verdict:
                    return bool(json.loads(verdict))
                self.stop()
                if time.monotonic() >= deadline:
                    break
        except BaseException:
            self.stop()  # the verdict of a question that nobody waits for must not answer the next one
            raise
        return False

    def start(self) -> subprocess.Popen[str]:
        """Raises InputError when math-verify cannot be imported."""
        path = [*sys.path, str(Path(__file__).parents[2])]
        program = f"import sys; sys.path[:] = {path!r}; {PROGRAM}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        hello = exchange(self.process, "", START_S)
        if hello != READY:
            raise InputError(f"reward 'math' cannot start math-verify ({hello.strip() or 'no answer'}); {CURE}")
        return self.process

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate()  # closes the pipes and reaps


def exchange(process: subprocess.Popen[str], line: str, timeout: float) -> str:
    """Sends a line, if there is one, and returns the next one of the process: empty when it died or was too slow."""
    assert process.stdin is not None
    assert process.stdout is not None
    timer = Timer(timeout, process.kill)
    timer.daemon = True
    timer.start()
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(line + "\n" if line else "")
            process.stdin.flush()
        return process.stdout.readline()
    finally:
        timer.cancel()


class Pool:
    """The workers of this process, each for one question at a time; a fork has its own."""

    def __init__(self) -> None:
        self.reset()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        self.workers = [Worker() for _ in range(WORKERS)]
        self.idle: LifoQueue[Worker] = LifoQueue()  # last in, first out: no more workers start than are needed
        for worker in self.workers:
            self.idle.put(worker)

    def ask(self, answer: str | None, references: Sequence[str], timeout: float) -> bool:
        worker = self.idle.get()
        try:
            return worker.ask(answer, references, timeout)
        finally:
            self.idle.put(worker)

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()


POOL = Pool()


# --- in the worker -------------------------------------------------------------------------------


def serve() -> None:
    """The worker: answers each line `[answer or null, references, seconds]` with true or false.

    Without an answer: whether math-verify reads the references.
    """
    verdicts, sys.stdout = sys.stdout, sys.stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(ImportError, OSError, ValueError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        judge("1", [r"\frac{2}{2}"])
    except Exception as error:
        print(json.dumps(repr(error)), file=verdicts, flush=True)
        return
    gc.freeze()  # garbage is not looked for while the libraries are imported, nor among them later
    gc.enable()
    verdicts.write(READY)
    verdicts.flush()
    for line in sys.stdin:
        answer, references, seconds = json.loads(line)
        limit_own_time(seconds + ORPHAN_S)
        try:
            verdict = judge(answer, references)
        except Exception:
            verdict = False
        limit_own_time(0)
        print(json.dumps(verdict), file=verdicts, flush=True)


def limit_own_time(seconds: float) -> None:
    """The system ends this process after `seconds`, 0 = never, where it has such an alarm."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def judge(answer: str | None, references: Sequence[str]) -> bool:
    """In the worker: whether the answer equals a reference; without an answer, whether one of them can be read."""
    from math_verify import verify

    golds = [parse_math(text, is_reference=True) for text in references]
    if answer is None:
        return any(not isinstance(found, str) for gold in golds for found in gold)
    found = parse_math(answer, is_reference=False)
    return any(verify(gold, found, timeout_seconds=None) for gold in golds)


def parse_math(text: str, is_reference: bool) -> list[Any]:
    """What math-verify reads: an expression and its text, only the text where it cannot be parsed, or nothing."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    prepared, any_number = as_math(text, is_reference)
    kinds: list[Any] = [LatexExtractionConfig()]
    if any_number:
        kinds.append(ExprExtractionConfig())
    return list(parse(prepared, kinds, parsing_timeout=None))
