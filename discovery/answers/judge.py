"""Equality of mathematical expressions, decided by math-verify in worker processes that can be killed.

Symbolic mathematics on model output may never terminate. math-verify's own timeouts are signals, which work only in a
main thread. The timeout is therefore enforced here, by killing the worker.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from controllers.sandbox.deadline import Clock
from controllers.sandbox.polling import is_ready
from controllers.sandbox.process_usage import ProcessUsage, ProcessUsageReader

WORKER: Final = Path(__file__).with_name("equality_worker.py")
START_S: Final = 60.0
"""Maximum seconds until a worker has loaded its libraries."""
BACKSTOP_S: Final = 120.0
"""Maximum wall-clock seconds of a comparison whose timeout is in processor time."""
MOST_KNOWN: Final = 16_384
"""Maximum entries of each cache: compared pairs, and texts that timed out."""


class EqualityResult(NamedTuple):
    """Result of one comparison."""

    equal: bool  # also False if it could not be determined
    seconds: float = 0.0  # time spent by a worker; 0 if cached
    killed: bool = False  # the worker was killed after a timeout
    waited: bool = False  # no worker was free in time; the pair was not compared


class Judge:
    """Pool of worker processes that compare expressions. Threads may share it.

    Workers start on first use and are replaced when they are killed. Results are cached, and a text that timed out is
    not compared again. Use it as a context manager, or `close` it. With `Clock.CPU` the timeout is in processor time,
    so that results do not depend on the load of the machine; use it where latency does not matter.
    """

    def __init__(self, seconds: float = 1.0, workers: int = 1, clock: Clock = Clock.WALL) -> None:
        self.seconds = seconds  # timeout of one comparison
        self.killed = 0  # number of workers killed after timeouts
        self._known: OrderedDict[tuple[str, str], bool] = OrderedDict()
        self._endless: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()  # never held while a worker compares
        self._freed = threading.Condition(self._lock)
        self._idle: list[_Worker] = [_Worker(clock) for _ in range(workers)]
        self._workers = tuple(self._idle)
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def same(self, first: str, second: str) -> bool:
        """Return whether two answers are equal; also False if that cannot be determined in time. Blocks."""
        return self.compare(first, second).equal

    def compare(self, first: str, second: str, *, wait_s: float | None = None) -> EqualityResult:
        """Compare two answers, blocking. Waits at most `wait_s` seconds until a worker is free.

        If `wait_s` is None, it waits for a worker without limit.
        """
        pair = (first, second) if first <= second else (second, first)
        deadline = None if wait_s is None else time.monotonic() + wait_s
        with self._lock:
            if (result := self._cached(pair)) is not None:
                return result
            while not self._idle:
                left = None if deadline is None else deadline - time.monotonic()
                if (left is not None and left <= 0) or self._is_closed:
                    return EqualityResult(False, waited=True)
                self._freed.wait(left)
            if (result := self._cached(pair)) is not None:  # another thread has compared the pair meanwhile
                return result
            if self._is_closed:
                return EqualityResult(False, waited=True)
            worker = self._idle.pop()
        try:
            return self._ask(worker, pair, START_S if deadline is None else deadline - time.monotonic())
        finally:
            with self._lock:
                if worker.is_ready:
                    self._idle.append(worker)
                else:
                    self._idle.insert(0, worker)  # started workers are used first
                if self._is_closed:
                    worker.stop()
                self._freed.notify()

    def close(self) -> None:
        """Stop the workers. Running and later comparisons end without a result."""
        with self._lock:
            self._is_closed = True
            self._freed.notify_all()
            for worker in self._workers:
                if worker in self._idle:
                    worker.stop()
                else:
                    worker.kill()  # the thread that uses it stops it

    def _cached(self, pair: tuple[str, str]) -> EqualityResult | None:
        known = self._known.get(pair)
        if known is not None:
            self._known.move_to_end(pair)
            return EqualityResult(known)
        return EqualityResult(False) if pair[0] in self._endless or pair[1] in self._endless else None

    def _ask(self, worker: _Worker, pair: tuple[str, str], start_s: float) -> EqualityResult:
        if not worker.start(start_s):
            return EqualityResult(False, waited=True)
        begun = time.monotonic()
        try:
            reply = worker.converse(json.dumps(pair).encode() + b"\n", self.seconds)
        except (OSError, ValueError):  # not the fault of the pair, which may be compared again
            worker.stop()
            return EqualityResult(False, waited=True)
        seconds = time.monotonic() - begun
        if reply is None:
            worker.stop()
        with self._lock:
            if self._is_closed:
                return EqualityResult(False, waited=True)
            if reply is None:
                self.killed += 1
                self._endless[max(pair, key=len)] = None
                _shorten(self._endless)
            else:
                self._known[pair] = reply == b"true"
                _shorten(self._known)
            with suppress(OSError):  # no process can be started now; the next comparison tries again
                for idle in (worker, *self._idle):
                    idle.launch()  # killed workers are restarted now, while no comparison waits for them
        return EqualityResult(reply == b"true", seconds, reply is None)


class _Worker:
    """One process that compares answers; only one thread at a time uses it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self.is_ready = False  # it has loaded its libraries

    def launch(self) -> None:
        """Start the process unless it runs; it loads its libraries in the background."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            self.stop()
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            bufsize=0,
            process_group=0,  # signals that a terminal sends to the owner's group do not reach it
        )

    def start(self, seconds: float) -> bool:
        """Wait up to `seconds` until the process is ready; return whether it is. Otherwise it continues to load.

        After an error the process is stopped, so that the next call starts another.
        """
        try:
            self.launch()
            if not self.is_ready:
                self.is_ready = self.converse(b"", seconds) == b"ready"
        except (OSError, ValueError):
            self.stop()
        return self.is_ready

    def converse(self, question: bytes, seconds: float) -> bytes | None:
        """Send `question` and return the line it is answered with; None if there is none within `seconds`.

        None if the process ends meanwhile, too. Raises OSError or ValueError if it cannot be asked.
        """
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return None
        line = b""
        with ProcessUsageReader(process.pid) as meter:
            start = meter.read()
            process.stdin.write(question)
            while not line.endswith(b"\n"):
                left = self._left(seconds, start, meter.read())
                if not is_ready(process.stdout.fileno(), select.POLLIN, left):  # at the deadline, check once more
                    if left <= 0:
                        return None
                    continue
                data = process.stdout.read(4096)
                if not data:
                    return None
                line += data
        return line.strip()

    def _left(self, seconds: float, start: ProcessUsage, now: ProcessUsage) -> float:
        """Return the seconds until the next check; 0 or less if the time is up."""
        used = now.since(start)
        if self._clock is Clock.WALL or not now.cpu:  # some systems do not report processor time
            return seconds - used.wall
        return 0.0 if used.wall >= BACKSTOP_S else seconds - used.cpu

    def kill(self) -> None:
        """Kill the process; a running comparison then ends without a result."""
        if (process := self._process) is not None:
            process.kill()

    def stop(self) -> None:
        """Kill the process and release its resources."""
        process, self._process, self.is_ready = self._process, None, False
        if process is not None:
            process.kill()
            process.communicate()


def _shorten(memory: OrderedDict[tuple[str, str], bool] | OrderedDict[str, None]) -> None:
    while len(memory) > MOST_KNOWN:
        memory.popitem(last=False)
