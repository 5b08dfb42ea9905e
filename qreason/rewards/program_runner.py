"""The program in which the code reward runs a reply; standard library only, Linux only.

A supervisor reads a job (marshal) from stdin, forks a child that confines itself and runs the code and then the tests,
kills all remaining processes, and exits with PASSED or FAILED; any other status means that the reply could not be
judged. It starts once per reply, so it imports little: program_job.py has what needs ast or is shared by all replies.
"""

from __future__ import annotations

import _thread
import builtins
import ctypes
import importlib
import marshal
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain
from types import CodeType, ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PASSED, FAILED = 10, 11
START_S = 30.0
"""Time limit for the child to confine itself and import what the tests import."""
FILE_BYTES = 16 * 2**20
OPEN_FILES = 64
PROCESSES = 64
"""Processes and threads, in addition to those that the user already has."""
READY = b"ready:"


def supervise(job: dict[str, Any]) -> int:
    """Run the job in a child and return the exit status; the child and its descendants are dead afterwards."""
    layers, tasks = set(job["layers"]), count_tasks(os.getuid())
    system = ctypes.CDLL(None, use_errno=True)
    prctl(system, PR_SET_CHILD_SUBREAPER, 1)
    # Children get separate pid, network and IPC namespaces, and no capabilities outside them.
    if "namespaces" in layers and system.unshare(NEW_USER | NEW_PID | NEW_NETWORK | NEW_IPC) != 0:
        system.unshare(NEW_PID | NEW_NETWORK | NEW_IPC)
    token = os.urandom(16).hex().encode()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            limit(job["memory"] * 2**20, tasks + PROCESSES)
            confine(system, layers, job["filter"])
            watched = import_modules(job["imports"])
            if "audit" in layers:
                fence()
            execute(job["code"], job["tests"], watched, job["timeout"], writing, token)
        finally:
            os._exit(1)
    os.close(writing)
    try:
        started = receive(reading, len(READY), START_S) == READY
        passed = started and receive(reading, len(token) + 1, job["timeout"]) == token
    finally:
        end_descendants()
    return (PASSED if passed else FAILED) if started else 1


def receive(pipe: int, most: int, seconds: float) -> bytes:
    """What the child wrote; empty if it ended without writing or was too slow."""
    return os.read(pipe, most) if select.select([pipe], [], [], seconds)[0] else b""


def end_descendants() -> None:
    """Kill and reap children until none are left: orphans become children of this process, the subreaper."""
    with suppress(ChildProcessError):
        while True:
            for pid in children():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.001)


def children() -> list[int]:
    """The process ids of this process's children, zombies included."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
            if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found


def renamed(builtin: str) -> str:
    """A name for a builtin that no statement of a program can bind."""
    return f"builtin {builtin}"


def import_modules(names: Iterable[str]) -> dict[str, ModuleType]:
    """The modules that can be imported, and the builtins."""
    for name in names:
        with suppress(Exception):
            importlib.import_module(name)
    return {name: sys.modules[name] for name in (*names, "builtins") if name in sys.modules}


def execute(
    code: str, tests: CodeType, watched: dict[str, ModuleType], timeout: float, pipe: int, token: bytes
) -> None:
    """Run the code, then the tests, in a module `answer`; write the token if all passed. Never returns.

    Everything used after the reply's code has started is a local variable, since it may have replaced any builtin.
    """
    module = ModuleType("answer")
    namespace, modules, own_builtins = vars(module), sys.modules, builtins
    modules["answer"] = modules["__main__"] = module
    namespace["__builtins__"] = own_builtins
    names = {renamed(name): value for name, value in vars(own_builtins).items()}
    originals: list[tuple[dict[str, Any], str, Any]] = [(modules, *named) for named in watched.items()]
    for each in watched.values():
        originals += [(vars(each), name, value) for name, value in vars(each).items() if callable(value)]
    run, translate, write, leave, length, sleep = exec, compile, os.write, os._exit, len, time.sleep
    start, count_threads, both, apply = _thread.start_new_thread, _thread._count, chain, map

    def run_alone(program: CodeType) -> None:
        """Run a program in a thread that starts in C, so that no frame of this file is among its callers."""
        steps: list[None] = []  # one item when it has started, two when it has finished
        start(steps.extend, (both((None,), apply(run, (program,), (namespace,))),))
        while length(steps) < 2:
            is_running = length(steps) == 0 or count_threads() > 0
            if not is_running and length(steps) < 2:
                leave(1)
            sleep(0.002)

    def refuse_replacements() -> None:
        for mapping, name, value in originals:
            if mapping.get(name) is not value:
                leave(1)

    cpu_s = int(time.process_time() + timeout) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    try:
        write(pipe, READY)
        run_alone(translate(code, "<answer>", "exec", dont_inherit=True))
        refuse_replacements()
        namespace.update(names)
        namespace["__builtins__"], namespace["__name__"] = own_builtins, "__main__"
        run_alone(tests)
        refuse_replacements()
        write(pipe, token)
    finally:
        leave(1)


PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
CAPABILITY_VERSION = 0x20080522
NEW_USER, NEW_PID, NEW_NETWORK, NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000


def confine(system: ctypes.CDLL, layers: set[str], steps: bytes) -> None:
    """Drop the rights of this process, as far as the kernel supports the layers."""
    system.capset(struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24))  # root loses all capabilities
    prctl(system, PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(system, PR_SET_NO_NEW_PRIVS, 1)
    if "landlock" in layers:
        restrict_files(system, os.getcwdb())
    if "seccomp" in layers and steps:
        program = ctypes.create_string_buffer(steps)
        header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps) // 8, ctypes.addressof(program)))
        prctl(system, PR_SET_SECCOMP, 2, ctypes.addressof(header))
    with open(os.__file__, "rb"):
        pass  # raises if Python itself is no longer readable: then nothing is judged
    folders = tuple(folder.rstrip(b"/") + b"/" for folder in installation())
    sys.path[:] = [path for path in sys.path if (os.fsencode(path) + b"/").startswith(folders)]


def limit(memory_bytes: int, processes: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, wanted in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (most, most))


def count_tasks(user: int) -> int:
    """The user's visible threads, which the kernel counts against the limit too."""
    tasks = 0
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == user:
                tasks += len(os.listdir(f"/proc/{name}/task"))
    return tasks


def prctl(system: ctypes.CDLL, option: int, *values: int) -> None:
    system.prctl(option, *(ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]))


def installation() -> tuple[bytes, ...]:
    """The folders of Python and of system libraries."""
    paths = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
    paths += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo"]
    return tuple({os.fsencode(path) for each in paths for path in (each, os.path.realpath(each))})


def restrict_files(system: ctypes.CDLL, folder: bytes) -> None:
    """Landlock: read access below the installation, all rights below the folder, no TCP, no signals to the outside."""
    create, add, enforce, of_path = 444, 445, 446, 1
    version = system.syscall(create, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    rights = (1 << (13 if version == 1 else 14 if version == 2 else 15 if version < 5 else 16)) - 1
    network, scopes = (0b11 if version >= 4 else 0), (0b11 if version >= 6 else 0)
    fields = 1 if version < 4 else 2 if version < 6 else 3
    handled = struct.pack("QQQ", rights, network, scopes)[: 8 * fields]
    if (ruleset := system.syscall(create, handled, ctypes.c_size_t(len(handled)), 0)) < 0:
        return
    read_file, read_folder, device = 0b100, 0b1100, 0b110
    make_special = 1 << 6 | 1 << 9 | 1 << 11  # devices and sockets
    allowed = {
        folder: rights & ~make_special,
        b"/dev/null": device,
        b"/dev/urandom": read_file,
        b"/etc/ld.so.cache": read_file,
    }
    allowed |= dict.fromkeys(installation(), read_folder)
    for path, right in allowed.items():
        with suppress(FileNotFoundError):
            file = os.open(path, os.O_PATH)
            system.syscall(add, ruleset, of_path, struct.pack("=Qi", right & rights, file), 0)
            os.close(file)
    system.syscall(enforce, ruleset, 0)
    os.close(ruleset)


REFUSED_EVENTS = (
    *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn", "subprocess.Popen"),
    *("os.kill", "os.killpg", "signal.pthread_kill", "resource.prlimit", "os.link", "os.symlink"),
    *("sys.settrace", "sys.setprofile", "sys.monitoring.register_callback", "sys.addaudithook"),
    *("gc.get_objects", "gc.get_referrers", "gc.get_referents", "sys._current_frames", "sys._current_exceptions"),
)
REFUSED_FAMILIES = ("ctypes.", "socket.", "syslog.")
REFUSED_MODULES = (
    *("ctypes", "_ctypes", "_ctypes_test", "_dbm", "_gdbm", "_multiprocessing", "_posixshmem"),
    *("_interpreters", "_xxsubinterpreters", "_testcapi", "_testinternalcapi", "_testlimitedcapi", "_testmultiphase"),
)
"""Modules that bypass the audit hook: native calls, files opened in C, further interpreters."""
LISTINGS = ("os.listdir", "os.scandir")
CHANGES = {
    **dict.fromkeys(["os.chdir", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.utime"], 1),
    **dict.fromkeys(["os.chmod", "os.chown", "os.setxattr", "os.removexattr", "sqlite3.connect"], 1),
    "os.rename": 2,
}
"""Audit events that change files -> the number of paths at the start of their arguments."""


def fence() -> None:
    """The last layer: remove ctypes, and add the audit hook, which nothing can remove."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]
    sys.addaudithook(make_hook(os.getcwdb(), installation()))


def make_hook(own: bytes, readable: Iterable[bytes]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that raises PermissionError, or ImportError for imports.

    It uses nothing that the reply could replace: no module, no builtin by name, no method of an argument.
    """
    current, fspath, encode, is_a = os.getcwdb, os.fspath, str.encode, isinstance
    number, text, raw, view, starts = int, str, bytes, memoryview, str.startswith
    events, families, modules, listings, changes = REFUSED_EVENTS, REFUSED_FAMILIES, REFUSED_MODULES, LISTINGS, CHANGES
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    refusal, import_refusal = PermissionError, ImportError
    unix, stream, devices = 1, 1, (b"/dev/null", b"/dev/urandom")
    ours, visible = (own,), (own, *readable)

    def is_inside(path: Any, folders: tuple[bytes, ...]) -> bool:
        if is_a(path, number):
            return True  # an open file
        given: Any = fspath("." if path is None else path)
        name = encode(given, "utf-8", "surrogateescape") if is_a(given, text) else raw(view(given))
        whole = name if name[:1] == b"/" else current() + b"/" + name
        if whole in devices:
            return True
        if b".." in whole.split(b"/"):
            return False
        for folder in folders:  # noqa: SIM110 (any could have been replaced)
            if (whole + b"/").startswith(folder + b"/"):
                return True
        return False

    def is_permitted(event: str, args: tuple[Any, ...]) -> bool:
        if event in events or starts(event, families):
            # Pairs of connected sockets, which asyncio needs; the kernel refuses all others.
            return event == "socket.__new__" and args[1] == unix and args[2] == stream
        if event == "open":
            # os.open has no mode; it could open a folder to which paths are relative.
            reads = args[1] is not None and args[2] & writing == 0
            return is_inside(args[0], visible if reads else ours)
        if event in listings:
            return is_inside(args[0], visible)
        if event in changes:
            for path in args[: changes[event]]:
                if not is_inside(path, ours):
                    return False
        return True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "import":
            name, file = args[:2]
            if name.rpartition(".")[2] in modules or not (file is None or is_inside(file, visible[1:])):
                raise import_refusal(f"{name} is not permitted")
        elif not is_permitted(event, args):
            raise refusal(f"{event} is not permitted")

    return hook


if __name__ == "__main__":
    sys.exit(supervise(marshal.load(sys.stdin.buffer)))
