"""The reward that runs the code of a reply against the tests of its example. It works on Linux.

Each reply runs in a process of its own (`program_runner.py`). Always: `python -I`, a session and a temporary folder of
its own, an all but empty environment, no input, no output; limits on CPU time, memory, the size of a file, open files
and, unless one is root, processes; at the end, whatever the process has started is killed. In layers, each as far as
this kernel and this user permit:

- namespaces: no other processes in sight, no network, no shared memory of others;
- Landlock (Linux 5.13): files are read below the Python installation and the system's libraries, and written only in
  the own folder;
- seccomp (x86_64, aarch64): no new processes, no other programs, no sockets, no signals;
- an audit hook of Python for the same, and against ctypes, debuggers and the listing of objects.

Not covered. The audit hook stops Python code, not libraries that open files in C, nor a program that undoes it; where
the kernel has no Landlock and no seccomp, such a program can do what the user can. With them it still can see which
files there are, change modes and times of the user's files, fill the disk until its time is up, and use weaknesses of
the kernel. For code from people who mean harm, use a virtual machine.

That the tests passed is reported by a random token, written only after they ran. Printing, exiting early, atexit,
tracing, searching the frames for the token, and replacing builtins or functions of modules that the tests import earn
0.0. But code and tests share an interpreter. An object that claims to equal everything passes `assert f(x) == y`; a
function can read the expected values in the frame of the test that calls it; one that replaces what the tests use and
puts it back is not noticed; and a program that gets around the audit hook finds the token in memory. Look at what is
rewarded.
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
"""What every run tries, beyond the limits; each is tested with the others left out."""
SPARE_S = 60.0
"""How much longer than the timeout the supervisor may take: it has its own clock and is killed only if it hangs."""
FENCED = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def code(
    replies: Sequence[Reply], examples: Sequence[Example], *, timeout: PositiveFloat = 5.0, memory: PositiveInt = 512
) -> list[float | None]:
    """1.0 for an answer whose Python passes all tests of the example, else 0.0.

    None where the example has no tests, or none that can be compiled; where the program could not be started; and on
    any system but Linux. `timeout` is in seconds of wall clock for code and tests, `memory` in MiB of address space.
    A reply that needs longer or more earns 0.0. As many run at once as there are CPUs. A package that needs ctypes
    (pandas, sympy) can be used where the tests import it.
    """
    if sys.platform != "linux":
        return [None] * len(replies)
    questions = [(read_code(reply.text), example.tests) for reply, example in zip(replies, examples, strict=True)]
    different = list(dict.fromkeys(questions))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        marks = dict(zip(different, threads.map(partial(mark, timeout, memory), different), strict=True))
    return [marks[question] for question in questions]


def read_code(text: str) -> str:
    """The answer of a reply, or what stands in its first fence."""
    answer = read_answer(text)
    fenced = FENCED.search(answer)
    return fenced[1] if fenced else answer


def mark(timeout: float, memory: int, question: tuple[str, str | None]) -> float | None:
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
    except (SyntaxError, ValueError, RecursionError, MemoryError, BlockingIOError):  # or no process was left
        return None
    return {PASSED: 1.0, FAILED: 0.0}.get(status)


def supervisor_file() -> str:
    """The supervisor's program, as Python has compiled it where it could: compiling takes a seventh of a run."""
    from qreason.rewards import program_runner

    compiled: str | None = getattr(program_runner, "__cached__", None)
    return compiled if compiled and Path(compiled).is_file() else program_runner.__file__


def run(job: bytes, seconds: float) -> int:
    """The exit status of a supervisor; it is killed after `seconds`."""
    try:
        with TemporaryDirectory(prefix="qreason-code-", ignore_cleanup_errors=True) as folder:
            supervisor = subprocess.Popen(
                [sys.executable, "-I", supervisor_file()],
                cwd=folder,
                env={"OMP_NUM_THREADS": "1"},  # a pool of threads, one a CPU, would not fit into the memory
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            # Not communicate's own timeout: with it Python looks every 50 ms whether the process has ended.
            watchdog = Timer(seconds, kill, [supervisor])
            watchdog.daemon = True
            watchdog.start()
            try:
                supervisor.communicate(job)
            finally:
                watchdog.cancel()
                kill(supervisor)
    except RecursionError:  # folders in folders, deeper than Python can remove
        subprocess.run(["rm", "-rf", folder], check=False)
    return supervisor.returncode


def kill(supervisor: subprocess.Popen[bytes]) -> None:
    """End a supervisor that still runs, and what is in its process group."""
    if supervisor.poll() is None:
        os.killpg(supervisor.pid, signal.SIGKILL)
        supervisor.wait()
