"""Run a command on a kernel that lacks something: `python -m tests.faults.without landlock|seccomp COMMAND…`.

A filter makes the calls fail as they do where the feature was not built in. Linux on x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Sequence

LOAD, EQUAL, GIVE = 0x20, 0x15, 0x06
ALLOW, FAIL = 0x7FFF0000, 0x00050000
PRCTL, SET_SECCOMP = 157, 22
LACKING = {"landlock": [(444, errno.ENOSYS)], "seccomp": [(317, errno.ENOSYS), (PRCTL, errno.EINVAL)]}
"""Numbers of system calls, and what each fails with; of prctl, only where it would set a filter."""


def steps(calls: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """The filter's instructions."""
    found = [(LOAD, 0, 0, 0)]
    for number, error in calls:
        if number == PRCTL:
            found += [(EQUAL, 0, 3, number), (LOAD, 0, 0, 16), (EQUAL, 0, 1, SET_SECCOMP), (GIVE, 0, 0, FAIL | error)]
        else:
            found += [(EQUAL, 0, 1, number), (GIVE, 0, 0, FAIL | error)]
    return [*found, (GIVE, 0, 0, ALLOW)]


def main(what: str, command: list[str]) -> None:
    program = b"".join(struct.pack("=HBBI", *step) for step in steps(LACKING[what]))
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for arguments in ((38, 1, 0, 0, 0), (SET_SECCOMP, 2, header, 0, 0)):  # no new privileges; the filter
        if prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
