"""Processor time and memory of other processes, read from /proc. Both are independent of what else the machine runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
LISTENING: Final = "0A"
"""State of a listening socket in /proc/net/tcp."""
TICKS: Final = os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that `pid` and its descendants started and that run, without `pid` itself."""
    try:
        tasks = list((PROC / str(pid) / "task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return  # it has just ended
    for child in children:
        yield child
        yield from descendants(child)


def processor_seconds(pid: int, *, is_alone: bool = False) -> float:
    """Return the processor time of a running process; 0 if it has ended.

    Its children that have ended count too, unless `is_alone`.
    """
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11 : 13 if is_alone else 15])) / TICKS


def tree_seconds(pid: int) -> float:
    """Return the processor time of a process and its descendants, also of those that have ended."""
    return sum(map(processor_seconds, (pid, *descendants(pid))))


def resident_bytes(pid: int) -> int:
    """Return the memory that a process holds now."""
    return _status(pid, "VmRSS")


def peak_bytes(pid: int) -> int:
    """Return the most memory that a process held since it began, or since `forget_peak`."""
    return _status(pid, "VmHWM")


def forget_peak(pid: int) -> None:
    """Let the peak of a process's memory begin at what it holds now."""
    (PROC / str(pid) / "clear_refs").write_text("5")


def _status(pid: int, field: str) -> int:
    lines = (PROC / str(pid) / "status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def listener(port: int) -> int:
    """Return the process that listens on a port of this machine. Raises LookupError."""
    lines = [line.split() for line in (PROC / "net/tcp").read_text().splitlines()[1:]]
    sockets = {f"socket:[{line[9]}]" for line in lines if line[3] == LISTENING and int(line[1][-4:], 16) == port}
    for pid in [int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal()]:
        with suppress(OSError):  # it has ended, or belongs to another user
            if any(os.readlink(link) in sockets for link in (PROC / str(pid) / "fd").iterdir()):
                return pid
    raise LookupError(f"no process of this user listens on port {port}")


def snapshot(root: int) -> dict[int, float]:
    """Return the processor time of every descendant of a process."""
    return {pid: processor_seconds(pid) for pid in descendants(root)}


def used_since(earlier: Mapping[int, float], root: int) -> dict[int, float]:
    """Return the processor time that each running descendant of a process has used since an earlier `snapshot`."""
    return {pid: seconds - earlier.get(pid, 0.0) for pid, seconds in snapshot(root).items()}
