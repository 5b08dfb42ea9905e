"""The reward that runs the code of a reply against the tests of its example. Linux only.

Each reply runs in a separate process (`program_runner.py`). Always: `python -I`, a separate session and temporary
folder, an almost empty environment, no input, no output; limits on CPU time, memory, file size, open files and, except
for root, processes; at the end, everything that the process has started is killed. In layers, as far as the kernel and
the user's rights permit:

- namespaces: no other processes visible, no network, no shared memory of others;
- Landlock (Linux 5.13): reading only below the Python installation and the system's libraries, writing only in the
  temporary folder;
- seccomp (x86_64, aarch64): no new processes, no other programs, no sockets, no signals;
- a Python audit hook for the same, and against ctypes, debuggers and the listing of objects.

Not covered. The audit hook stops Python code, but not libraries that open files in C, nor a program that undoes it;
without Landlock and seccomp, such a program can do whatever the user can. With them it can still see which files exist,
change modes and times of the user's files, fill the disk until its time is up, and exploit the kernel. For code from
malicious authors, use a virtual machine.

A random token, written only after the tests ran, reports that they passed. Printing, exiting early, atexit, tracing,
searching the frames for the token, and replacing builtins or functions of modules that the tests import earn 0.0. But
code and tests share an interpreter: an object that claims to equal everything passes `assert f(x) == y`; a function can
read the expected values in the frame of the test that calls it; replacing what the tests use and restoring it goes
unnoticed; and a program that circumvents the audit hook finds the token in memory. Look at what is rewarded.
"""

from __future__ import annotations

import marshal
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer

from pydantic import PositiveFloat, PositiveInt

from qreason.rewards.tags import read_answer
from qreason.types import Example, Reply

LAYERS = ("namespaces", "landlock", "seccomp", "audit")
"""Applied in every run, beyond the limits; each is tested without the others."""
SPARE_S = 60.0
"""Time beyond the timeout after which the supervisor, which enforces the timeout itself, is killed as hanging."""
FENCED = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def code(
    replies: Sequence[Reply], examples: Sequence[Example], *, timeout: PositiveFloat = 5.0, memory: PositiveInt = 512
) -> list[float | None]:
    """1.0 for an answer whose Python passes all tests of the example, else 0.0.

    None where the example has no tests, or they cannot be compiled; where the program could not be started; and on
    systems other than Linux. `timeout` is in seconds of wall time for code and tests, `memory` in MiB of address space;
    a reply that exceeds them earns 0.0. One program per CPU runs in parallel. A package that needs ctypes (pandas,
    sympy) can be used if the tests import it.
    """
    if sys.platform != "linux":
        return [None] * len(replies)
    questions = [(read_code(reply.text), example.tests) for reply, example in zip(replies, examples, strict=True)]
    distinct = list(dict.fromkeys(questions))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        values = dict(zip(distinct, threads.map(partial(evaluate, timeout, memory), distinct), strict=True))
    return [values[question] for question in questions]


def read_code(text: str) -> str:
    """The answer of a reply, or the content of its first code fence."""
    answer = read_answer(text)
    fenced = FENCED.search(answer)
    return fenced[1] if fenced else answer


def evaluate(timeout: float, memory: int, question: tuple[str, str | None]) -> float | None:
    from qreason.rewards.program_job import call_filter, prepare
    from qreason.rewards.program_runner import FAILED, PASSED

    program, tests = question
    if tests is None or not tests.strip():
        return None
    if not program:
        return 0.0
    try:
        compiled, imports = prepare(tests)
        job = {"code": program, "tests": compiled, "imports": imports, "filter": call_filter(), "layers": LAYERS}
        status = run(marshal.dumps(job | {"timeout": timeout, "memory": memory}), timeout + SPARE_S)
    except (SyntaxError, ValueError, RecursionError, MemoryError, BlockingIOError):  # Blocking: no process left
        return None
    return {PASSED: 1.0, FAILED: 0.0}.get(status)


def run(job: bytes, seconds: float) -> int:
    """The exit status of a supervisor; it is killed after `seconds`."""
    from qreason.rewards import program_runner

    cached: str | None = getattr(program_runner, "__cached__", None)  # compiling takes a seventh of a run
    program = cached if cached and Path(cached).is_file() else program_runner.__file__
    try:
        with TemporaryDirectory(prefix="qreason-code-", ignore_cleanup_errors=True) as folder:
            supervisor = subprocess.Popen(
                [sys.executable, "-I", program],
                cwd=folder,
                env={"OMP_NUM_THREADS": "1"},  # one thread per CPU would not fit into the memory
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            # Not communicate's own timeout: with it Python polls the process every 50 ms.
            watchdog = Timer(seconds, kill, [supervisor])
            watchdog.daemon = True
            watchdog.start()
            try:
                supervisor.communicate(job)
            finally:
                watchdog.cancel()
                kill(supervisor)
    except RecursionError:  # nested deeper than Python can remove
        subprocess.run(["rm", "-rf", folder], check=False)
    return supervisor.returncode


def kill(supervisor: subprocess.Popen[bytes]) -> None:
    """Kill a supervisor that still runs, and its process group."""
    if supervisor.poll() is None:
        os.killpg(supervisor.pid, signal.SIGKILL)
        supervisor.wait()
