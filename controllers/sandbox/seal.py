"""Seal a process: the kernel removes its permissions before it reads foreign code. Linux on x86-64 and arm64 only.

There are four layers, and most hold if the others fail: no privileges, no files, limited resources, and only the system
calls that a computation needs. `ctypes` calls the kernel, because Python has no functions for most of this.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from contextlib import suppress
from enum import IntFlag
from functools import cache
from typing import Final, NamedTuple

NOBODY: Final = 65534
MEMORY_BYTES: Final = 128 << 20
CPU_S: Final = 600
"""Seconds of processor time of a whole process. It applies if no owner is left to enforce deadlines."""


class Layer(IntFlag):
    """Layers of isolation."""

    PRIVILEGES = 1  # no_new_privs, another user instead of root, no capabilities, memory unreadable to others
    LIMITS = 2  # memory, processor time, files, processes
    LANDLOCK = 4  # no file, no TCP, no signal, no abstract socket
    SECCOMP = 8  # no system call but `CALLS`, no executable memory


ALL_LAYERS: Final = Layer.PRIVILEGES | Layer.LIMITS | Layer.LANDLOCK | Layer.SECCOMP
"""Foreign code runs only with all of them."""


class SealLayerMissing(Exception):
    """The kernel refused a layer."""

    def __init__(self, layer: Layer, reason: str) -> None:
        super().__init__(f"{str(layer.name).lower()}: {reason}")


class _Machine(NamedTuple):
    """Constants of a processor: its number in <linux/audit.h> and its system call numbers."""

    audit: int
    calls: dict[str, int]
    x32: bool  # the same calls have a second set of numbers


_MACHINES: Final = {
    "x86_64": _Machine(
        0xC000003E,
        {
            **{"read": 0, "write": 1, "munmap": 11, "brk": 12, "rt_sigprocmask": 14, "rt_sigreturn": 15},
            **{"mremap": 25, "madvise": 28, "exit": 60, "futex": 202, "restart_syscall": 219, "exit_group": 231},
            **{"mmap": 9, "mprotect": 10, "prctl": 157, "seccomp": 317},
        },
        x32=True,
    ),
    "aarch64": _Machine(
        0xC00000B7,
        {
            **{"read": 63, "write": 64, "munmap": 215, "brk": 214, "rt_sigprocmask": 135, "rt_sigreturn": 139},
            **{"mremap": 216, "madvise": 233, "exit": 93, "futex": 98, "restart_syscall": 128, "exit_group": 94},
            **{"mmap": 222, "mprotect": 226, "prctl": 167, "seccomp": 277},
        },
        x32=False,
    ),
}
CALLS: Final = (
    *("read", "write", "munmap", "brk", "rt_sigprocmask", "rt_sigreturn", "mremap", "madvise"),
    *("exit", "futex", "restart_syscall", "exit_group"),
)
"""System calls allowed with any arguments. mmap and mprotect are allowed too if nothing becomes executable."""

X32: Final = 0x40000000
_PROT_EXEC, _MAP_ANONYMOUS = 0x4, 0x20
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446  # the same on every processor
_SETS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
"""File access rights that Landlock knows, by version of its interface. Later versions add none."""
_PDEATHSIG, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVS = 1, 4, 22, 38  # of prctl


def prepare() -> None:
    """Do what is the same for all processes that this one will fork, so that sealing them takes less time."""
    with suppress(KeyError, OSError):  # `seal` raises them again, with the name of the layer
        _libc()
        _filter_program()


def seal(layers: Layer, parent: int) -> None:
    """Apply `layers` to this process for good. Raises SealLayerMissing if the kernel refuses one.

    PRIVILEGES also makes the process end with `parent`, which must still be its parent.
    """
    for layer, put_on in _STEPS:
        if layer in layers:
            try:
                put_on()
                if layer is Layer.PRIVILEGES and os.getppid() != parent:
                    raise ProcessLookupError("its parent process has ended")
            except (OSError, ValueError, KeyError) as error:
                raise SealLayerMissing(layer, str(error)) from None


def _drop_privileges() -> None:
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError:  # root may be unable to change its user; its capabilities are dropped below all the same
            pass
    _call(_libc().capset, struct.pack("=Ii", 0x20080522, 0), bytes(24))
    _prctl(_NO_NEW_PRIVS, 1)
    _prctl(_DUMPABLE, 0)
    _prctl(_PDEATHSIG, 9)


def _limit() -> None:
    import resource  # not available on other systems, where this module is imported only

    for name, most in {
        "RLIMIT_AS": MEMORY_BYTES,
        "RLIMIT_CPU": CPU_S,
        "RLIMIT_NOFILE": 0,  # open descriptors stay open
        "RLIMIT_NPROC": 0,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_SIGPENDING": 0,
    }.items():
        resource.setrlimit(getattr(resource, name), (most, most))


def _landlock() -> None:
    version = _call(_libc().syscall, _LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    net = 3 if version >= 4 else 0  # bind and connect over TCP
    scoped = 3 if version >= 6 else 0  # abstract sockets and signals
    rights = struct.pack("=QQQ", _SETS.get(version, _SETS[5]), net, scoped)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _call(_libc().syscall, _LANDLOCK_CREATE, rights, ctypes.c_size_t(size), 0)
    try:
        _call(_libc().syscall, _LANDLOCK_RESTRICT, rules, 0)
    finally:
        os.close(rules)


def _filter_calls() -> None:
    program = _filter_program()
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _prctl(_SECCOMP, 2, header)


@cache
def _filter_program() -> bytes:
    return _program(_MACHINES[platform.machine()])


def _program(machine: _Machine) -> bytes:
    """Return the BPF filter. It allows listed calls of this processor that do not make memory executable."""
    load, equal, at_least, masked, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow = (give, 0, 0, 0x80000000), (give, 0, 0, 0x7FFF0000)
    third, fourth = (
        16 + 2 * 8,
        16 + 3 * 8,
    )  # offsets of the low halves of two arguments; a jump counts steps
    steps = [(load, 0, 0, 4), (equal, 1, 0, machine.audit), kill, (load, 0, 0, 0)]
    if machine.x32:
        steps += [(at_least, 0, 1, X32), kill]
    for name in CALLS:
        steps += [(equal, 0, 1, machine.calls[name]), allow]
    inspect_mprotect = [(load, 0, 0, third), (masked, 1, 0, _PROT_EXEC), allow, kill]
    inspect_mmap = [(load, 0, 0, third), (masked, 3, 0, _PROT_EXEC), (load, 0, 0, fourth)]
    inspect_mmap += [(masked, 0, 1, _MAP_ANONYMOUS), allow, kill]
    steps += [(equal, 0, len(inspect_mprotect), machine.calls["mprotect"]), *inspect_mprotect]
    steps += [(equal, 0, len(inspect_mmap), machine.calls["mmap"]), *inspect_mmap, kill]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, first: int, second: bytes | None = None) -> None:
    zero = ctypes.c_ulong(0)
    _call(_libc().prctl, option, ctypes.c_ulong(first), second or zero, zero, zero)


def _call(function: ctypes._NamedFuncPointer, *arguments: object) -> int:
    """Call the kernel and return the result. Raises OSError if the call fails."""
    result: int = function(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


_STEPS: Final = (
    (Layer.PRIVILEGES, _drop_privileges),
    (Layer.LANDLOCK, _landlock),  # needs a descriptor, which limits forbid
    (Layer.LIMITS, _limit),
    (Layer.SECCOMP, _filter_calls),  # last: it forbids the calls that apply the others
)
