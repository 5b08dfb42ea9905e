"""The reward that runs code: what it earns, what it cannot reach, and that nothing is left of it."""

from __future__ import annotations

import builtins
import ctypes
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Thread

import pytest

from qreason.types import Example, Reply

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the reward works on Linux")

reward = import_module("qreason.rewards.programs")  # the package has a function of this name
RIGHT = "def root(x):\n    return x**0.5"
WRONG = "def root(x):\n    return 7"
TESTS = "import math\n\nassert math.isclose(root(2), 1.41421356, rel_tol=1e-6)\nassert abs(root(9) - 3) < 1e-9"


def earned(program: str, tests: str | None = TESTS, timeout: float = 5.0, memory: int = 512) -> float | None:
    (value,) = reward.code([Reply(f"<answer>{program}</answer>")], [example(tests)], timeout=timeout, memory=memory)
    return value  # type: ignore[no-any-return]


def example(tests: str | None = TESTS) -> Example:
    return Example("x", "Write root(x).", "x**0.5", tests=tests)


def processes_below(folder: Path) -> list[int]:
    """The processes that work in a folder or below, zombies among the children of this one included."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            is_zombie = not os.path.lexists(entry / "cwd")
            if (is_zombie and parent == os.getpid()) or os.readlink(entry / "cwd").startswith(str(folder)):
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return found


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the temporary folders are made; after every test no process and no folder may be left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert processes_below(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


# --- what is earned ------------------------------------------------------------------------------


def test_only_the_program_that_passes_all_tests_earns_one() -> None:
    texts = [f"<answer>{RIGHT}</answer>", f"<answer>{WRONG}</answer>", RIGHT, f"<answer>{RIGHT}</answer>"]
    assert reward.code([Reply(text) for text in texts], [example()] * 4) == [1.0, 0.0, 0.0, 1.0]


def test_one_failing_test_of_several_earns_nothing() -> None:
    assert earned("def root(x):\n    return 3") == 0.0
    assert earned(RIGHT, TESTS + "\nassert root(4) == 3") == 0.0


@pytest.mark.parametrize("tests", [None, "", "assert root(2"])
def test_without_tests_that_can_run_nothing_is_judged(tests: str | None) -> None:
    assert earned(RIGHT, tests) is None


def test_other_systems_do_not_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert earned(RIGHT) is None


@pytest.mark.parametrize(
    "answer",
    [
        f"```python\n{RIGHT}\n```",
        f"Take this:\n```\n{RIGHT}\n```\nIt is used so:\n```\nroot('no number')\n```",
        f"```py\n{RIGHT}\nfence = '```'\n```",
        f"```python\n{RIGHT}",
    ],
)
def test_code_is_read_from_the_first_fence(answer: str) -> None:
    assert earned(answer) == 1.0


@pytest.mark.parametrize(
    "program", ["def root(x) return x", "root = 1 +", "\0", "raise ValueError", "input()", "\ud800"]
)
def test_program_that_does_not_run_through_earns_nothing(program: str) -> None:
    assert earned(program + "\n" + RIGHT) == 0.0


def test_program_is_imported_and_tests_are_run() -> None:
    assert earned(f"{RIGHT}\nif __name__ == '__main__':\n    input()") == 1.0
    assert earned(WRONG, f"if __name__ == '__main__':\n    {TESTS.splitlines()[-1]}") == 0.0


def test_usual_means_of_a_program_are_there() -> None:
    assert earned(
        "import asyncio, collections, dataclasses, json, sqlite3, subprocess, tempfile, threading, typing\n"
        "async def later(x):\n    await asyncio.sleep(0)\n    return x**0.5\n"
        "@dataclasses.dataclass\nclass Box:\n    value: float\n"
        "def root(x):\n"
        "    boxes = []\n"
        "    thread = threading.Thread(target=lambda: boxes.append(Box(asyncio.run(later(x)))))\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "    with tempfile.NamedTemporaryFile('w+') as file:\n"
        "        json.dump(boxes[0].value, file)\n"
        "        file.seek(0)\n"
        "        return sqlite3.connect(':memory:').execute('select ?', [json.load(file)]).fetchone()[0]\n"
    ) == 1.0  # fmt: skip


# --- time and memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_program_that_does_not_end_earns_nothing_after_the_timeout(program: str) -> None:
    start = time.monotonic()
    assert earned(program, timeout=0.3) == 0.0
    assert 0.3 <= time.monotonic() - start < 5


def test_endless_test_ends_too() -> None:
    assert earned("def root(x):\n    while True: pass", timeout=0.3) == 0.0


def test_program_cannot_have_more_memory_than_it_may() -> None:
    assert earned(f"block = bytearray(10 * 2**30)\n{RIGHT}") == 0.0
    assert earned(f"block = bytearray(100 * 2**20)\n{RIGHT}", memory=300) == 1.0
    assert earned(f"block = bytearray(300 * 2**20)\n{RIGHT}", memory=300) == 0.0


def test_file_cannot_grow_without_end() -> None:
    assert earned(f"open('small', 'wb').write(bytes(2**20))\n{RIGHT}") == 1.0
    assert earned(f"open('large', 'wb').write(bytes(2**25))\n{RIGHT}") == 0.0


# --- reports that are not earned -----------------------------------------------------------------


@pytest.mark.parametrize(
    "trick",
    [
        "print('passed')",
        "import os\nfor file in range(1, 64):\n    try: os.write(file, b'passed')\n    except OSError: pass",
        "import os\nos.closerange(3, 64)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "import os\nos._exit(0)",
        "import os\ndef root(x): os._exit(0)",
        "import sys\ndef root(x): sys.exit()",
        "import atexit, os\natexit.register(os._exit, 0)",
        "import builtins\nbuiltins.AssertionError = builtins.Exception = builtins.BaseException = int",
        "import builtins\nbuiltins.abs = lambda x: 0\ndef root(x): return 2**0.5",
        "def abs(x): return 0\ndef root(x): return 2**0.5",
        "__builtins__ = dict(vars(__builtins__), abs=lambda x: 0)\ndef root(x): return 2**0.5",
        "import builtins\ndef root(x):\n    builtins.abs = lambda x: 0\n    return 2**0.5",
        "import builtins\nbuiltins.exec = builtins.compile = lambda *_, **__: None",
        "import os\nos._exit = os.kill = lambda *_: None",
        "import math\nmath.isclose = lambda *_, **__: True\ndef root(x): return 3",
        "import sys, types\nsys.modules['math'] = types.SimpleNamespace(isclose=lambda *_, **__: True)\n"
        "def root(x): return 3",
        "import sys\ndef root(x): return 3\ndef jump(frame, *_):\n"
        "    if frame.f_lineno == 3: frame.f_lineno = 4\n    return jump\nsys.settrace(jump)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(0.1,)).start()\nroot = None",
        "import os, sys\n"
        "def report(frame):\n"
        "    while frame is not None:\n"
        "        for value in list(frame.f_locals.values()):\n"
        "            if isinstance(value, bytes):\n"
        "                for file in range(3, 64):\n"
        "                    try: os.write(file, value)\n"
        "                    except OSError: pass\n"
        "                os._exit(0)\n"
        "        frame = frame.f_back\n"
        "report(sys._getframe())\n"
        "def root(x): report(sys._getframe())",
    ],
)  # fmt: skip
def test_trick_earns_nothing(trick: str) -> None:
    assert earned(f"{WRONG}\n{trick}") == 0.0


def test_builtins_that_are_replaced_earn_nothing_even_when_right() -> None:
    assert earned(f"import builtins\nbuiltins.sorted = list\n{RIGHT}") == 0.0


def test_names_of_builtins_mean_the_builtins_unless_tests_ask_for_nothing_else() -> None:
    assert earned(f"{RIGHT}\nfrom cmath import *\ndef abs(x): return -1\ndef sorted(x): return abs(x)") == 1.0
    # MBPP has such tasks: define a function that is named like a builtin.
    assert earned("def sum(a, b):\n    return 6", "assert sum(10, 15) == 6") == 1.0
    assert earned("def sum(a, b):\n    return 6", "total = sum(10, 15)\nassert total == 6") == 1.0
    assert earned("def check(x):\n    return x", "input = [1]\nassert check(input) is input") == 1.0


def test_tests_keep_their_asserts_under_optimization_and_mean_only_builtins_of_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = (
        "from qreason.rewards.programs import code\nfrom qreason.types import Example, Reply\n"
        f"print(code([Reply({f'<answer>{WRONG}</answer>'!r})], [Example('x', 'p', 'r', tests={TESTS!r})]))"
    )
    done = subprocess.run([sys.executable, "-OO", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0.0]"
    monkeypatch.setattr(builtins, "display", lambda x: x, raising=False)  # as in a notebook
    assert earned("def display(x):\n    return 1\nlimit = 1", "assert display(5) == limit") == 1.0


# --- what cannot be reached ----------------------------------------------------------------------

ATTEMPTS = {
    "fork": "import os\ndef attempt():\n    if os.fork() == 0: os._exit(0)",
    "run": (
        "import subprocess, sys\n"
        "class Quiet:\n"
        "    def __getattr__(self, name): return getattr(sys, name)\n"
        "    def audit(self, *_): pass\n"
        "def attempt():\n"
        "    subprocess.sys = Quiet()\n"
        "    subprocess.run(['/bin/true'], check=True)"
    ),
    "system": "import os\ndef attempt():\n    assert os.system('true') == 0",
    "read": "def attempt():\n    assert open({secret!r}).read() == 'secret'",
    "write": "def attempt():\n    open({secret!r}, 'a').write('!')",
    "connect": "import socket\ndef attempt():\n    socket.create_connection({address!r}, 1).send(b'!')",
    "signal": "import os\ndef attempt():\n    os.kill({trainer}, 0)",
    "limit": "import resource\ndef attempt():\n    resource.prlimit({trainer}, resource.RLIMIT_NOFILE)",
    "ctypes": "def attempt():\n    import ctypes\n    ctypes.CDLL(None)",
    "link": "import os\ndef attempt():\n    os.symlink({secret!r}, 'link')\n    os.remove('link')",
    "mode": "import os\ndef attempt():\n    os.chmod({secret!r}, 0o777)",
    "list": "import os\ndef attempt():\n    os.listdir(os.path.dirname({secret!r}))",
    "objects": "import gc\ndef attempt():\n    gc.get_objects()",
}
HOLDS = {
    "namespaces": ["connect", "signal", "limit"],
    "landlock": ["read", "write", "list"],
    "seccomp": ["fork", "run", "system", "connect", "signal", "limit"],
    "audit": [name for name in ATTEMPTS if name != "run"],
}
"""Which attempts each layer stops by itself."""


def is_there(layer: str) -> bool:
    """Whether this kernel and this user have a layer."""
    if layer == "namespaces":
        return subprocess.run(["unshare", "--user", "--net", "--pid", "--fork", "true"], check=False).returncode == 0
    if layer == "landlock":
        return bool(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) > 0)
    return layer == "audit" or platform.machine() in ("x86_64", "aarch64")


class Outside:
    """A file and a listener that no reply should reach."""

    def __init__(self, folder: Path) -> None:
        self.secret = folder / "secret.txt"
        self.secret.write_text("secret")
        self.secret.chmod(0o600)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)

    def attempt(self, name: str, succeeds: bool = False) -> str:
        """A program whose root() is right only if the attempt is refused, or only if it succeeds."""
        values = {"secret": str(self.secret), "address": self.listener.getsockname(), "trainer": os.getpid()}
        return (
            ATTEMPTS[name].format(**values)
            + "\ndef root(x):\n    refused = False\n    try: attempt()\n"
            + "    except (AssertionError, ImportError, OSError): refused = True\n"
            + f"    if refused != {succeeds}: return x**0.5"
        )

    def connections(self) -> int:
        """How many there have been since the last call."""
        count = 0
        with suppress(BlockingIOError):
            while True:
                self.listener.accept()[0].close()
                count += 1
        return count

    def was_reached(self) -> bool:
        is_changed = self.secret.read_text() != "secret" or self.secret.stat().st_mode & 0o777 != 0o600
        return is_changed or self.connections() > 0


@pytest.fixture
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    there = Outside(tmp_path_factory.mktemp("outside"))
    yield there
    there.listener.close()


def refused(names: Sequence[str], outside: Outside) -> list[str]:
    """Those of the attempts that are refused."""
    replies = [Reply(f"<answer>{outside.attempt(name)}</answer>") for name in names]
    marks = reward.code(replies, [example()] * len(names))
    return [name for name, value in zip(names, marks, strict=True) if value == 1.0]


def test_reply_cannot_reach_out(outside: Outside) -> None:
    assert refused(list(ATTEMPTS), outside) == list(ATTEMPTS)
    assert not outside.was_reached()


@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempt_would_succeed_without_layers(name: str, outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward, "LAYERS", ())
    assert earned(outside.attempt(name, succeeds=True)) == 1.0
    assert outside.was_reached() == (name in ("write", "connect", "mode"))


@pytest.mark.parametrize("layer", HOLDS)
def test_each_layer_holds_by_itself(layer: str, outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_there(layer):
        pytest.skip(f"no {layer} here")
    monkeypatch.setattr(reward, "LAYERS", (layer,))
    assert refused(HOLDS[layer], outside) == HOLDS[layer]
    assert not outside.was_reached()


def test_equal_programs_with_equal_tests_run_once(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward, "LAYERS", ())
    tests = "root(4)"
    programs = [outside.attempt("connect"), outside.attempt("connect") + "\n# another"]
    replies = [Reply(f"<answer>{programs[number]}</answer>") for number in (0, 1, 0, 0)]
    reward.code(replies, [example(tests)] * 3 + [example(tests + "\n")])
    assert outside.connections() == 3


def test_environment_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    assert earned(f"import os\nassert 'API_KEY' not in os.environ and 'HOME' not in os.environ\n{RIGHT}") == 1.0


# --- nothing is left -----------------------------------------------------------------------------


def test_running_programs_and_their_folders_are_seen(folder: Path) -> None:
    thread = Thread(target=earned, args=("import time; time.sleep(60)",), kwargs={"timeout": 2.0})
    thread.start()
    seen = False
    while thread.is_alive() and not seen:  # a slow machine takes its time to start them
        time.sleep(0.02)
        seen = len(processes_below(folder)) >= 2 and len(list(folder.iterdir())) == 1
    thread.join()
    assert seen


def test_runaway_creation_of_processes_is_stopped() -> None:
    assert earned("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", timeout=0.5) == 0.0


@pytest.mark.skipif(os.getuid() == 0, reason="the kernel does not count the processes of root")
def test_number_of_processes_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward, "LAYERS", ())
    program = (
        "import os, time\n"
        "def fork(times):\n"
        "    for _ in range(times):\n"
        "        if os.fork() == 0:\n"
        "            time.sleep(60)\n"
        "            os._exit(0)\n"
    )
    assert earned(f"{program}fork(20)\n{RIGHT}") == 1.0
    assert earned(f"{program}try: fork(500)\nexcept BlockingIOError: pass\nelse: raise\n{RIGHT}") == 1.0


@pytest.mark.parametrize("layers", [(), ("namespaces",)])
@pytest.mark.parametrize("ending", ["", "time.sleep(60)", "os._exit(0)"])
def test_processes_that_left_their_group_are_killed(
    layers: tuple[str, ...], ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward, "LAYERS", layers)
    leaving = (
        "import os, signal, time\n"
        "for _ in range(10):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        os.fork()\n"
        "        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
        "        time.sleep(60)\n"
        "        os._exit(0)\n"
    )
    assert earned(f"{leaving}{RIGHT}\n{ending}", timeout=0.5) == (0.0 if ending else 1.0)


def test_folder_is_removed_however_deep_it_is() -> None:
    nesting = "import os\nfor _ in range(1000):\n    os.mkdir('a')\n    os.chdir('a')\n"
    assert earned(nesting + RIGHT) == 1.0


def test_folder_is_removed_whatever_its_modes() -> None:
    program = f"import os\nos.mkdir('a')\nopen('a/b', 'w').close()\nos.chmod('a/b', 0)\nos.chmod('a', 0)\n{RIGHT}"
    assert earned(program) == 1.0
