"""Whether two expressions are equal, asked of math-verify in a process that can be killed.

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
from typing import Final, Self

WORKER: Final = Path(__file__).with_name("equality.py")
START_S: Final = 60.0
"""Seconds the worker may take to load what it needs."""
MOST_KNOWN: Final = 65_536


class Judge:
    """One worker, started when first asked and anew after it was killed. Threads may share it; they wait in turn.

    What it said of a pair is kept. A text it could not finish with is not asked about again. Use it as a context, or
    `close` it.
    """

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = seconds  # the wall clock of one question
        self.killed = 0  # workers killed over a question
        self._known: OrderedDict[tuple[str, str], bool] = OrderedDict()
        self._endless: set[str] = set()
        self._worker: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def same(self, one: str, other: str) -> bool:
        """Whether two answers are equal; False also where it cannot be found out in time. Blocks meanwhile."""
        pair = (one, other) if one <= other else (other, one)
        with self._lock:
            known = self._known.get(pair)
            if known is not None:
                self._known.move_to_end(pair)
                return known
            if self._endless.intersection(pair):
                return False
            equal = self._ask(pair)
            self._known[pair] = equal
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
            return equal

    def close(self) -> None:
        """Stop the worker."""
        with self._lock:
            self._stop()

    def _ask(self, pair: tuple[str, str]) -> bool:
        worker = self._running()
        if worker is None:
            return False
        reply = self._converse(worker, json.dumps(pair).encode() + b"\n", self.seconds)
        if reply is None:
            self._stop()
            self.killed += 1
            if len(self._endless) > MOST_KNOWN:
                self._endless.clear()
            self._endless.add(max(pair, key=len))
        return reply == b"true"

    def _running(self) -> subprocess.Popen[bytes] | None:
        if self._worker is not None and self._worker.poll() is None:
            return self._worker
        self._stop()
        self._worker = subprocess.Popen(
            [sys.executable, "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            bufsize=0,
        )
        if self._converse(self._worker, b"", START_S) != b"ready":
            self._stop()
        return self._worker

    def _converse(self, worker: subprocess.Popen[bytes], question: bytes, seconds: float) -> bytes | None:
        """The line that answers `question`; None if none came in time."""
        if worker.stdin is None or worker.stdout is None:
            return None
        deadline = time.monotonic() + seconds
        line = b""
        try:
            worker.stdin.write(question)
            while not line.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([worker.stdout], [], [], left)[0]:
                    return None
                data = worker.stdout.read(4096)
                if not data:
                    return None
                line += data
        except OSError:
            return None
        return line.strip()

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.communicate()
