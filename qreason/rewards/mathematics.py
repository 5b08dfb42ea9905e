"""The reward that checks mathematical equality with math-verify.

Equal plain numbers are recognized here. Everything else goes to worker processes, because parsing or simplifying a
reply can hang or use up the memory: pebble kills workers that take too long.
"""

from __future__ import annotations

import atexit
import gc
import logging
import multiprocessing
import os
import re
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from qreason.errors import InputError, kind_and_line
from qreason.rewards.tags import answer_of
from qreason.types import Example, Reply

if TYPE_CHECKING:
    from pebble import ProcessPool

WORKERS = min(4, os.cpu_count() or 1)
START_S = 120.0
"""Time limit for the workers to start and import sympy."""
ORPHAN_S = 1.0
"""How long after its time limit a worker that nobody killed ends itself."""
MEMORY_BYTES = 2 * 2**30
"""Address space of a worker beyond what it starts with: an answer that needs more is wrong."""
GUARD = "a script that uses it begins its work under `if __name__ == '__main__':`"
CURE = "pip install 'math-verify[antlr4_13_2]>=0.9,<0.10'"

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
"""Words that change the value of the number next to them."""


def math(replies: Sequence[Reply], examples: Sequence[Example], *, timeout: float = 5.0) -> list[float | None]:
    """1.0 for an answer that equals a reference mathematically, by math-verify 0.9, else 0.0.

    None where no reference can be read as mathematics. `timeout` is in seconds, for reading one reference and for
    judging one answer: an answer that takes longer earns 0.0. Raises InputError where math-verify is missing.
    """
    if find_spec("math_verify") is None:
        raise InputError(f"reward 'math' needs math-verify; {CURE}")
    pairs = [(answer_of(reply, example), example.references) for reply, example in zip(replies, examples, strict=True)]
    distinct = list(dict.fromkeys(pairs))
    with ThreadPoolExecutor(WORKERS) as threads:
        values = dict(zip(distinct, threads.map(lambda pair: evaluate(*pair, timeout), distinct), strict=True))
    return [values[pair] for pair in pairs]


@lru_cache(maxsize=100_000)
def evaluate(answer: str, references: tuple[str, ...], timeout: float) -> float | None:
    number = plain_number(answer)
    if number is not None and number in map(plain_number, references):
        return 1.0
    readable = [text for text in references if plain_number(text) is not None or is_readable(text, timeout)]
    if not readable:
        return None
    return float(bool(answer) and (answer in readable or PROCESSES.ask(answer, readable, timeout)))


@lru_cache(maxsize=100_000)
def is_readable(reference: str, timeout: float) -> bool:
    return PROCESSES.ask(None, [reference], timeout)


def plain_number(text: str) -> Decimal | None:
    """The number a text consists of, with at most a currency sign; else None."""
    match = PLAIN.fullmatch(text.replace("−", "-").strip(" \n\t*`'\"").removesuffix("."))
    return Decimal(match[1] + digits(match[2])) if match else None


def digits(number: str) -> str:
    """A number without its thousands separators."""
    return re.sub("[^0-9.]", "", number)


def quantity(phrase: str, is_reference: bool) -> str | None:
    """The only number of a phrase, after its last `=`, as in `It costs 18 dollars`; else None.

    A reference must start with it: a port number inside a sentence is not what the sentence says.
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
    """A text as math-verify expects it, mathematics in dollar signs; and whether a number outside of them counts."""
    text = " ".join(text.replace("−", "-").split()).strip("*`'\" ")
    number = plain_number(text)
    if number is not None:
        return f"{number:f}", True
    if DELIMITED.search(text):
        return text, not is_reference
    if " " in text and WORD.search(text) and not SYMBOLIC.search(text):  # prose
        if is_reference or re.search("[0-9]", text):
            return quantity(text, is_reference) or "", True
        return rf"$\text{{{text.removesuffix('.')}}}$", False
    bare = text.replace("\\$", "").replace("$", "").removesuffix(".")
    if "\\" not in bare:
        bare = FUNCTION.sub(r"\\\1 ", MIXED.sub(r"\1\\frac{\2}{\3}", bare.replace("**", "^").replace("°", r"^\circ")))
    return f"${bare}$", False


class Workers:
    """The pool of worker processes, started by the first question; a fork starts its own."""

    pool: ProcessPool | None

    def __init__(self) -> None:
        self.lock, self.pool = Lock(), None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """In a fork: the workers belong to the parent and must survive the fork."""
        self.lock, self.pool = Lock(), None
        multiprocessing.process._children.clear()  # type: ignore[attr-defined]  # as it does itself

    def started(self) -> ProcessPool:
        from pebble import ProcessPool

        with self.lock:
            if self.pool is None or not self.pool.active:
                self.stop()
                # Not by fork: it would copy locks that threads of torch hold.
                self.pool = ProcessPool(WORKERS, initializer=prepare, context=multiprocessing.get_context("spawn"))
                atexit.register(self.stop)
            return self.pool

    def stop(self) -> None:
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.stop()  # type: ignore[no-untyped-call]
            pool.join()

    def ask(self, answer: str | None, references: Sequence[str], timeout: float) -> bool:
        """The result of `judge` in a worker; False when it exceeds `timeout` seconds or kills its worker twice.

        Raises InputError when workers cannot start or cannot import math-verify.
        """
        from pebble import ProcessExpired

        for last in (False, True):
            question = None
            try:
                question = self.started().schedule(answer_question, (answer, references, timeout), timeout=timeout)
                return question.result(START_S + timeout)
            except ProcessExpired:  # killed by the question, or from outside
                continue
            except TimeoutError:
                if question and question.done():
                    return False
                raise InputError(f"reward 'math': no worker has started in {START_S:.0f} s") from None
            except ImportError as error:
                raise InputError(f"reward 'math' needs math-verify ({kind_and_line(error)}); {CURE}") from error
            except RuntimeError as error:  # an idle worker that dies ends the whole pool
                if last:
                    raise InputError(
                        f"reward 'math' cannot start its workers ({kind_and_line(error)}); {GUARD}"
                    ) from error
            finally:
                if question:
                    question.cancel()  # type: ignore[no-untyped-call]
        return False


PROCESSES = Workers()


def prepare() -> None:
    """Initialize a worker: limit its memory, and load sympy and the LaTeX grammar, which takes seconds."""
    logging.disable()  # math-verify warns at every question that it sets no time limit
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's own handler would wait until a hanging C call ends
    with suppress(ImportError, OSError, ValueError):  # not on every system
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    gc.disable()  # faster imports; the imported objects are never collected
    with suppress(Exception):  # the first question reports the error
        judge("1", [r"\frac{2}{2}"])
    gc.freeze()
    gc.enable()


def answer_question(answer: str | None, references: Sequence[str], timeout: float) -> bool:
    import math_verify  # noqa: F401  outside of try: an ImportError must reach the caller

    limit_own_time(timeout + ORPHAN_S)
    try:
        return judge(answer, references)
    except Exception:
        return False
    finally:
        limit_own_time(0)


def limit_own_time(seconds: float) -> None:
    """Let the system kill this process after `seconds` (0: never), where it supports alarms."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def judge(answer: str | None, references: Sequence[str]) -> bool:
    """Whether the answer equals a reference; without an answer, whether any reference can be parsed."""
    from math_verify import verify

    golds = [parse_math(text, is_reference=True) for text in references]
    if answer is None:
        return any(not isinstance(found, str) for gold in golds for found in gold)
    found = parse_math(answer, is_reference=False)
    return any(verify(gold, found, timeout_seconds=None) for gold in golds)


def parse_math(text: str, is_reference: bool) -> list[Any]:
    """What math-verify extracts: expression and text, only the text if it cannot be parsed, or nothing."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    prepared, any_number = as_math(text, is_reference)
    targets = [LatexExtractionConfig(), *([ExprExtractionConfig()] if any_number else [])]
    return list(parse(prepared, targets, parsing_timeout=None))
