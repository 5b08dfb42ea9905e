"""Inputs of the program runner: the compiled tests of an example, and the filter of system calls."""

from __future__ import annotations

import ast
import builtins
import os
import struct
import sys
from functools import cache, lru_cache
from types import BuiltinFunctionType, CodeType
from typing import Any

from qreason.rewards.program_runner import renamed


@lru_cache(maxsize=10_000)
def prepare(tests: str) -> tuple[CodeType, list[str]]:
    """The compiled tests and the modules they import. Raises SyntaxError or ValueError.

    Builtins are renamed in them, so that no statement of a program can bind them, unless the tests use nothing but
    builtins: then the reply is supposed to define one of these.
    """
    tree = ast.parse(tests)
    nodes = list(ast.walk(tree))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound: set[Any] = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    imported: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.alias):
            bound.add(node.asname or node.name.partition(".")[0])
        elif not isinstance(node, ast.keyword):
            bound |= {getattr(node, field, None) for field in ("name", "arg", "rest")}
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported.add(node.module)
    free = read - bound
    # Only Python's builtins, which the runner has too: not those that a notebook adds.
    own = {name for name, value in vars(builtins).items() if isinstance(value, type | BuiltinFunctionType)}
    used_builtins = {name for name in free & own if not name.startswith("_")}
    if free != used_builtins and "*" not in bound:
        for node in nodes:
            if isinstance(node, ast.Name) and node.id in used_builtins:
                node.id = renamed(node.id)
    return compile(tree, "<tests>", "exec", optimize=0), sorted(imported)  # with asserts, even under -O


REFUSED_CALLS = """
fork 57 -, vfork 58 -, execve 59 221, execveat 322 281,
kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
pidfd_send_signal 424 424,
pidfd_open 434 434, pidfd_getfd 438 438, ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271,
setpriority 141 140, ioprio_set 251 30, sched_setparam 142 118, sched_setscheduler 144 119, sched_setattr 314 274,
sched_setaffinity 203 122,
socket 41 198, bind 49 200, connect 42 203, sendmsg 46 211, sendmmsg 307 269,
unshare 272 97, setns 308 268, mount 165 40, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282,
io_uring_setup 425 425,
add_key 248 217, request_key 249 218, keyctl 250 219, shmget 29 194, semget 64 190, msgget 68 186, mq_open 240 180
"""
"""System calls and their numbers on x86_64 and aarch64. io_uring is listed because no filter sees what it does."""

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
CLONE, CLONE3, PRLIMIT = (56, 220), 435, (302, 261)


@cache
def call_filter() -> bytes:
    """A seccomp program against new processes (not threads), programs, signals, sockets, and access to other processes.

    8 bytes per instruction; empty on an architecture whose system calls are unknown.
    """
    if os.uname().machine not in MACHINES or sys.maxsize < 2**32:
        return b""
    column, machine = MACHINES[os.uname().machine]
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, unknown = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
    call_at, machine_at, argument_at = 0, 4, 16
    new_thread, other_numbers = 0x10000, 0x40000000
    # (operation, instructions to skip if true, if false, value)
    steps = [(load, 0, 0, machine_at), (equal, 1, 0, machine), (end, 0, 0, refuse)]
    steps += [(load, 0, 0, call_at), (at_least, 0, 1, other_numbers), (end, 0, 0, refuse)]
    for call in REFUSED_CALLS.split(","):
        if (number := call.split()[1 + column]) != "-":
            steps += [(equal, 0, 1, int(number)), (end, 0, 0, refuse)]
    steps += [(equal, 0, 1, CLONE3), (end, 0, 0, unknown)]  # its flags are in memory; the C library falls back to clone
    for call_number, is_allowed in (CLONE[column], (any_bit, 0, 1, new_thread)), (PRLIMIT[column], (equal, 0, 1, 0)):
        steps += [(equal, 0, 4, call_number), (load, 0, 0, argument_at), is_allowed]
        steps += [(end, 0, 0, allow), (end, 0, 0, refuse)]
    steps.append((end, 0, 0, allow))
    return b"".join(struct.pack("HBBI", *step) for step in steps)
