"""Attempts of a sandbox process to break out. The kernel must refuse each one; otherwise the process has escaped."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from controllers.sandbox.frames import encode_text, pack
from controllers.sandbox.seal import ALL_LAYERS, MEMORY_BYTES, X32, Layer

ESCAPED, REFUSED, UNSURE, NOT_SEALED = 0, 2, 3, 4
"""Exit statuses. UNSURE: the attempt failed for another reason than the seal, which proves nothing. NOT_SEALED: a layer
could not be applied. The process sends details on the channel, except for ESCAPED."""
REFUSALS: Final = frozenset({errno.EACCES, errno.EPERM, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENOSYS})

_GETPID: Final = 39  # x86-64's number, which x32 has too


def read_file() -> None:
    os.close(os.open("/", os.O_RDONLY))


def open_socket() -> None:
    socket.socket().close()


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def execute() -> None:
    os.execv("/proc/self/exe", ["python", "-c", ""])


def call_x32() -> None:
    if ctypes.CDLL(None, use_errno=True).syscall(X32 | _GETPID) == -1:
        raise OSError(ctypes.get_errno(), "x32")


def raise_limit() -> None:
    import resource  # missing on other systems, where this module is only imported

    try:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except ValueError as error:  # Python's error for EPERM here
        raise PermissionError(errno.EPERM, str(error)) from None


def take_memory() -> None:
    mmap.mmap(-1, 2 * MEMORY_BYTES).close()


def make_code() -> None:
    mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


def become_root() -> None:
    os.setuid(0)


def signal_owner() -> None:
    os.kill(os.getppid(), 0)


class Attempt(NamedTuple):
    """An attempt, and the layers that must refuse it."""

    what: str  # description for people
    layers: Layer
    run: Callable[[], None]


ATTEMPTS: Final[Sequence[Attempt]] = (
    # Each layer alone. Attempts that only an unprivileged process can be refused also drop privileges.
    Attempt("become root", Layer.PRIVILEGES, become_root),
    Attempt("raise a limit", Layer.PRIVILEGES | Layer.LIMITS, raise_limit),
    Attempt("take memory", Layer.PRIVILEGES | Layer.LIMITS, take_memory),
    Attempt("fork", Layer.PRIVILEGES | Layer.LIMITS, fork),
    Attempt("read a file", Layer.PRIVILEGES | Layer.LANDLOCK, read_file),
    Attempt("open a socket", Layer.PRIVILEGES | Layer.SECCOMP, open_socket),
    Attempt("make memory executable", Layer.PRIVILEGES | Layer.SECCOMP, make_code),
    Attempt("call as x32", Layer.PRIVILEGES | Layer.SECCOMP, call_x32),
    # All layers, as for a controller.
    Attempt("read a file", ALL_LAYERS, read_file),
    Attempt("open a socket", ALL_LAYERS, open_socket),
    Attempt("fork", ALL_LAYERS, fork),
    Attempt("execute", ALL_LAYERS, execute),
    Attempt("call as x32", ALL_LAYERS, call_x32),
    Attempt("raise a limit", ALL_LAYERS, raise_limit),
    Attempt("signal its parent", ALL_LAYERS, signal_owner),
)


def run(number: int, channel: int) -> int:
    """Run attempt `number`, write to `channel` how it was refused, and return the exit status."""
    status, message = ESCAPED, ""
    try:
        ATTEMPTS[number].run()
    except MemoryError:
        status, message = REFUSED, "MemoryError"
    except OSError as error:
        status, message = REFUSED if error.errno in REFUSALS else UNSURE, str(error)
    os.write(channel, pack(encode_text(message)))
    return status
