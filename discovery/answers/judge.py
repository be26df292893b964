"""Whether two expressions are equal, asked of math-verify in processes that can be killed.

Symbolic mathematics on what a model wrote may never end. Its own timeouts are signals, which work in a main thread
only, so the clock is here, outside, and what is too slow is killed with its process.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from controllers.sandbox.deadline import Clock
from controllers.sandbox.process_usage import ProcessUsage, ProcessUsageReader

WORKER: Final = Path(__file__).with_name("equality_worker.py")
START_S: Final = 60.0
"""Seconds a worker may take to load what it needs."""
BACKSTOP_S: Final = 120.0
"""Seconds of wall clock a question takes at most where processor time is what counts."""
MOST_KNOWN: Final = 16_384
"""Pairs, and texts that could not be finished with, that are remembered."""


class EqualityResult(NamedTuple):
    """The outcome of one question."""

    equal: bool  # False also where it could not be found out
    seconds: float = 0.0  # a worker spent on it; 0 if the answer was known
    killed: bool = False  # the worker was killed over it
    waited: bool = False  # no worker was free in time, so nothing was found out


class Judge:
    """A pool of workers, started when first asked and replaced at once when they are killed. Threads may share it.

    What was found of a pair is kept. A text that could not be finished with is not asked about again. Use it as a
    context, or `close` it. Where nobody waits for it, the clock is the worker's processor time: what is found is then
    the same however busy the machine is.
    """

    def __init__(self, seconds: float = 1.0, workers: int = 1, clock: Clock = Clock.WALL) -> None:
        self.seconds = seconds  # of one question
        self.killed = 0  # workers killed over a question
        self._known: OrderedDict[tuple[str, str], bool] = OrderedDict()
        self._endless: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()  # never held while a worker is asked
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

    def same(self, one: str, other: str) -> bool:
        """Whether two answers are equal; False also where it cannot be found out in time. Blocks meanwhile."""
        return self.compare(one, other).equal

    def compare(self, one: str, other: str, *, wait_s: float | None = None) -> EqualityResult:
        """Find out whether two answers are equal. Blocks for as long as a question takes, after at most `wait_s`
        seconds until a worker is free; None waits as long as that takes."""
        pair = (one, other) if one <= other else (other, one)
        deadline = None if wait_s is None else time.monotonic() + wait_s
        with self._lock:
            if (finding := self._remembered(pair)) is not None:
                return finding
            while not self._idle:
                left = None if deadline is None else deadline - time.monotonic()
                if (left is not None and left <= 0) or self._is_closed:
                    return EqualityResult(False, waited=True)
                self._freed.wait(left)
            if (finding := self._remembered(pair)) is not None:  # somebody else has asked meanwhile
                return finding
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
                    self._idle.insert(0, worker)  # one that is ready is asked first
                if self._is_closed:
                    worker.stop()
                self._freed.notify()

    def close(self) -> None:
        """Stop the workers. A question that is being asked ends unanswered, and so does every later one."""
        with self._lock:
            self._is_closed = True
            self._freed.notify_all()
            for worker in self._workers:
                if worker in self._idle:
                    worker.stop()
                else:
                    worker.kill()  # whoever asks it stops it

    def _remembered(self, pair: tuple[str, str]) -> EqualityResult | None:
        known = self._known.get(pair)
        if known is not None:
            self._known.move_to_end(pair)
            return EqualityResult(known)
        return EqualityResult(False) if pair[0] in self._endless or pair[1] in self._endless else None

    def _ask(self, worker: _Worker, pair: tuple[str, str], start_s: float) -> EqualityResult:
        if not worker.start(start_s):
            return EqualityResult(False, waited=True)
        begun = time.monotonic()
        reply = worker.converse(json.dumps(pair).encode() + b"\n", self.seconds)
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
            for idle in (worker, *self._idle):
                idle.launch()  # what was killed loads again while nobody waits for it
        return EqualityResult(reply == b"true", seconds, reply is None)


class _Worker:
    """One process that compares answers, asked by one thread at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self.is_ready = False  # it has loaded what it needs

    def launch(self) -> None:
        """Begin to load, unless that has been done."""
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
        )

    def start(self, seconds: float) -> bool:
        """Be ready within so many seconds, or say that it is not; it goes on loading then."""
        self.launch()
        if not self.is_ready:
            self.is_ready = self.converse(b"", seconds) == b"ready"
        return self.is_ready

    def converse(self, question: bytes, seconds: float) -> bytes | None:
        """The line that answers `question`; None if none came in time."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return None
        line = b""
        try:
            with ProcessUsageReader(process.pid) as meter:
                start = meter.read()
                process.stdin.write(question)
                while not line.endswith(b"\n"):
                    left = self._left(seconds, start, meter.read())
                    if not select.select([process.stdout], [], [], max(0.0, left))[0]:  # past the end: once more
                        if left <= 0:
                            return None
                        continue
                    data = process.stdout.read(4096)
                    if not data:
                        return None
                    line += data
        except (OSError, ValueError):  # it has ended, or was stopped meanwhile
            return None
        return line.strip()

    def _left(self, seconds: float, start: ProcessUsage, now: ProcessUsage) -> float:
        """Seconds until one has to look again; none if the time is up."""
        used = now.since(start)
        if self._clock is Clock.WALL or not now.cpu:  # which is not known everywhere
            return seconds - used.wall
        return 0.0 if used.wall >= BACKSTOP_S else seconds - used.cpu

    def kill(self) -> None:
        """End the process; a question that is being asked then ends unanswered."""
        if (process := self._process) is not None:
            process.kill()

    def stop(self) -> None:
        """Kill the process and clear up after it."""
        process, self._process, self.is_ready = self._process, None, False
        if process is not None:
            process.kill()
            process.communicate()


def _shorten(memory: OrderedDict[tuple[str, str], bool] | OrderedDict[str, None]) -> None:
    while len(memory) > MOST_KNOWN:
        memory.popitem(last=False)
