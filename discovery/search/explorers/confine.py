"""Starts a command that the kernel keeps to its workspace. Linux with Landlock; without, it starts nothing.

    python -m discovery.search.explorers.confine WORKSPACE [--read PATH]... -- COMMAND...

The command reads and runs what is on `READABLE`, Python's own folders and what `--read` adds, writes in the workspace
alone, gains no privileges and keeps none, and signals nobody outside. Other files it cannot open, be it root's. It has
the network, for its model is there, and may still see that a file exists.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from controllers.sandbox import seal

READABLE: Final = (
    *("/usr", "/bin", "/lib", "/lib64", "/etc/ssl", "/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime"),
    *("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/resolv.conf", "/etc/hosts", "/etc/host.conf"),
    *("/dev/urandom", "/dev/random", "/dev/zero", "/proc/self", "/proc/cpuinfo", "/proc/meminfo"),
)
WRITABLE: Final = ("/dev/null",)
OLDEST: Final = 3
"""The version of Landlock from which on files outside cannot be cut short either."""
REFUSED: Final = 97
"""Exit status of a launcher that could not confine, and therefore started nothing."""
FILE_BYTES: Final = 1 << 30
"""Bytes one file may grow to."""

_ADD_RULE: Final = 445  # the same on every processor
_EXECUTE, _WRITE, _READ, _READ_DIR, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_MAKE_CHAR, _MAKE_BLOCK, _IOCTL_DEV = 1 << 6, 1 << 11, 1 << 15
_OF_FILES: Final = _EXECUTE | _WRITE | _READ | _TRUNCATE
_READING: Final = _EXECUTE | _READ | _READ_DIR
_SCOPED: Final = 3  # abstract sockets, signals


def version() -> int:
    """The kernel's version of Landlock. Raises OSError if it has none, or none that is enough."""
    if sys.platform != "linux":
        raise OSError(f"only Linux has Landlock, this is {sys.platform}")
    found = seal._call(seal._libc().syscall, seal._LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if found < OLDEST:
        raise OSError(f"Landlock {found} does not hold enough; {OLDEST} does (Linux 6.2)")
    return found


def confine(workspace: Path, readable: Sequence[Path] = ()) -> None:
    """Keep this process, and all it starts, to `workspace`, for good. Raises OSError."""
    import resource  # there is none on other systems, where this module only has to load

    rights = seal._SETS.get(found := version(), seal._SETS[5])
    scoped = struct.pack("=QQQ", rights, 0, _SCOPED if found >= 6 else 0)
    size = ctypes.c_size_t(24 if found >= 6 else 16 if found >= 4 else 8)
    seal._call(seal._libc().capset, struct.pack("=Ii", 0x20080522, 0), bytes(24))
    seal._prctl(seal._NO_NEW_PRIVS, 1)
    seal._prctl(seal._PDEATHSIG, 9)
    for limit, most in ((resource.RLIMIT_FSIZE, FILE_BYTES), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
    rules = seal._call(seal._libc().syscall, seal._LANDLOCK_CREATE, scoped, size, 0)
    try:
        _allow(rules, workspace, rights & ~(_MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV))
        for name in WRITABLE:
            _allow(rules, Path(name), _READ | _WRITE)
        for path in (*map(Path, READABLE), Path(sys.prefix), Path(sys.base_prefix), *readable):
            if path.exists():
                _allow(rules, path, _READING)
        seal._call(seal._libc().syscall, seal._LANDLOCK_RESTRICT, rules, 0)
    finally:
        os.close(rules)


def _allow(rules: int, path: Path, rights: int) -> None:
    """Allow `rights` on a file, or on a folder and all below it."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights, descriptor)
        seal._call(seal._libc().syscall, _ADD_RULE, rules, 1, rule, 0)
    finally:
        os.close(descriptor)


def main(arguments: Sequence[str]) -> NoReturn:
    """Become the command, confined; exit with REFUSED if that cannot be."""
    try:
        before, command = _parted(arguments)
        workspace, *options = before
        confine(Path(workspace), [Path(path) for path in options])
        os.chdir(workspace)
        os.execvp(command[0], command)
    except (OSError, ValueError) as error:
        os.write(2, f"cannot run confined: {error}\n".encode())
        os._exit(REFUSED)


def _parted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Workspace and readable paths, and the command. Raises ValueError."""
    given = list(arguments)
    middle = given.index("--")
    before, command = given[:middle], given[middle + 1 :]
    if not before or not command or any(flag != "--read" for flag in before[1::2]) or len(before) % 2 == 0:
        raise ValueError("WORKSPACE [--read PATH]... -- COMMAND...")
    return [before[0], *before[2::2]], command


if __name__ == "__main__":
    main(sys.argv[1:])
