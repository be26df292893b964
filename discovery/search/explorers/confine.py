"""Start a command that the kernel confines to its workspace. Requires Linux with Landlock, else nothing starts.

    python -m discovery.search.explorers.confine WORKSPACE [--read PATH]... -- COMMAND...

The command can read and execute the paths in `READABLE`, Python's own folders and the paths given with `--read`. It can
write only in the workspace. It has no privileges, cannot gain any, and cannot signal outside processes. It can open no
other files, even as root. It has network access, because its model is remote, and can still see whether a file exists.
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
    *("/usr", "/bin", "/lib", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime"),
    *("/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/ca-certificates"),  # not /etc/ssl/private, which holds keys
    *("/etc/pki/tls/certs", "/etc/pki/ca-trust/extracted"),
    *("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/resolv.conf", "/etc/hosts", "/etc/host.conf"),
    *("/dev/urandom", "/dev/random", "/dev/zero", "/proc/self", "/proc/cpuinfo", "/proc/meminfo"),
)
WRITABLE: Final = ("/dev/null",)
OLDEST: Final = 3
"""Lowest accepted version of Landlock: the first that prevents truncating files outside."""
REFUSED: Final = 97
"""Exit status of a launcher that could not confine the command and did not start it."""
FILE_BYTES: Final = 1 << 30
"""Maximum bytes of a file that the command writes."""

_ADD_RULE: Final = 445  # the same system call number on every processor
_EXECUTE, _WRITE, _READ, _READ_DIR, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_MAKE_CHAR, _MAKE_BLOCK, _IOCTL_DEV = 1 << 6, 1 << 11, 1 << 15
_OF_FILES: Final = _EXECUTE | _WRITE | _READ | _TRUNCATE
_READING: Final = _EXECUTE | _READ | _READ_DIR
_SCOPED: Final = 3  # abstract sockets, signals


def version() -> int:
    """Return the kernel's version of Landlock. Raises OSError if it is missing or too old."""
    if sys.platform != "linux":
        raise OSError(f"Landlock needs Linux; this is {sys.platform}")
    abi = seal._call(seal._libc().syscall, seal._LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if abi < OLDEST:
        raise OSError(f"Landlock version {abi} is too old; version {OLDEST} is needed (Linux 6.2)")
    return abi


def confine(workspace: Path, readable: Sequence[Path] = ()) -> None:
    """Confine this process and all its children to `workspace`, irrevocably. Raises OSError."""
    import resource  # does not exist on other systems, where this module must still be importable

    rights = seal._SETS.get(abi := version(), seal._SETS[5])
    scoped = struct.pack("=QQQ", rights, 0, _SCOPED if abi >= 6 else 0)
    size = ctypes.c_size_t(24 if abi >= 6 else 16 if abi >= 4 else 8)
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
    """Allow `rights` on a file, or on a folder and everything below it."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights, descriptor)
        seal._call(seal._libc().syscall, _ADD_RULE, rules, 1, rule, 0)
    finally:
        os.close(descriptor)


def main(arguments: Sequence[str]) -> NoReturn:
    """Replace this process by the confined command; exit with REFUSED if that fails."""
    try:
        before, command = _parse_arguments(arguments)
        workspace, *options = before
        confine(Path(workspace), [Path(path) for path in options])
        os.chdir(workspace)
        os.execvp(command[0], command)
    except (OSError, ValueError) as error:
        os.write(2, f"cannot run confined: {error}\n".encode())
        os._exit(REFUSED)


def _parse_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parse the arguments into workspace and readable paths, and the command. Raises ValueError."""
    given = list(arguments)
    middle = given.index("--")
    before, command = given[:middle], given[middle + 1 :]
    if not before or not command or any(flag != "--read" for flag in before[1::2]) or len(before) % 2 == 0:
        raise ValueError("expected arguments: WORKSPACE [--read PATH]... -- COMMAND...")
    return [before[0], *before[2::2]], command


if __name__ == "__main__":
    main(sys.argv[1:])
