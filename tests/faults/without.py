"""Run a command on a kernel that lacks something: `python -m tests.faults.without landlock|seccomp COMMAND…`.

A seccomp filter makes the calls fail as on a kernel built without the feature. Linux on x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Sequence

LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, FAIL = 0x7FFF0000, 0x00050000
PRCTL, SET_SECCOMP = 157, 22
LACKING = {"landlock": [(444, errno.ENOSYS)], "seccomp": [(317, errno.ENOSYS), (PRCTL, errno.EINVAL)]}
"""System call numbers and the error each fails with. prctl fails only where it would set a filter."""


def steps(calls: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """Return the filter's instructions."""
    instructions = [(LOAD, 0, 0, 0)]
    for number, error in calls:
        if number == PRCTL:
            instructions += [
                (EQUAL, 0, 3, number),
                (LOAD, 0, 0, 16),
                (EQUAL, 0, 1, SET_SECCOMP),
                (RETURN, 0, 0, FAIL | error),
            ]
        else:
            instructions += [(EQUAL, 0, 1, number), (RETURN, 0, 0, FAIL | error)]
    return [*instructions, (RETURN, 0, 0, ALLOW)]


def main(feature: str, command: list[str]) -> None:
    program = b"".join(struct.pack("=HBBI", *step) for step in steps(LACKING[feature]))
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for arguments in ((38, 1, 0, 0, 0), (SET_SECCOMP, 2, header, 0, 0)):  # no new privileges; the filter
        if prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
