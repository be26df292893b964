"""Read and compare answers off the event loop, so that no tenant's answers delay another's requests.

Most answers are read in microseconds, on the event loop. Long texts are read in a thread. Matching a client's pattern
and comparing with math-verify can take seconds. So each tenant runs one of these at a time, within time budgets per
episode and per tenant. Beyond a budget, answers are compared by their canonical form only, and a metric counts that.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, ParamSpec, Protocol, TypeVar
from weakref import WeakSet

from discovery.answers import PATTERN_S, Answer, AnswerKind, ExtractionMethod, Judge, read_answer
from proxy.telemetry.metrics import Metrics

P = ParamSpec("P")
R = TypeVar("R")

SHORT: Final = 500
"""Maximum number of characters of a text that is read on the event loop."""
SLOW_THREADS: Final = 4
"""Number of threads for client patterns and comparisons."""
WORKERS: Final = 2
"""Number of math-verify processes."""
EPISODE_S: Final = 4.0
"""Seconds per episode for comparisons by math-verify, and CPU seconds per episode for the client's pattern."""
TENANT_S: Final = 20.0
"""Capacity of a tenant's token bucket, in seconds of comparisons."""
TENANT_SHARE: Final = 0.5
"""Refill rate of a tenant's token bucket, in seconds of comparisons per second."""
KILL_S: Final = 3.0
"""Extra seconds charged for a comparison whose process is killed, because another must be started."""
WAIT_S: Final = 5.0
"""Maximum seconds that a comparison waits for a free process."""
LANES_LOOKED_AT: Final = 4
"""Lanes of which each new grader looks whether they can be forgotten."""


class Grader(Protocol):
    """Reads and compares the answers of one episode."""

    async def read(self, text: str, kind: AnswerKind) -> Answer | None:
        """Return the answer in `text`, if one can be read."""
        ...

    async def compare(self, written: str, others: Sequence[tuple[int, str]]) -> int | None:
        """Return the label of the first answer in `others` that equals `written`, or None.

        `others` are pairs of a label and an answer as it was written.
        """
        ...


class PlainGrader:
    """Grader that uses neither threads nor math-verify."""

    async def read(self, text: str, kind: AnswerKind) -> Answer | None:
        return read_answer(text, kind)

    async def compare(self, written: str, others: Sequence[tuple[int, str]]) -> int | None:
        return None


class TimeBudget:
    """Token bucket of seconds: it holds at most `most`, and gains `share` per second."""

    def __init__(self, most: float, share: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._share, self._clock = most, share, clock
        self._left, self._updated = most, clock()

    @property
    def left(self) -> float:
        """Seconds left; below zero if more was spent than there was."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._updated) * self._share)
        self._updated = now
        return self._left

    @property
    def is_full(self) -> bool:
        """Whether nothing that was spent is missing."""
        return self.left >= self._most

    def spend(self, seconds: float) -> None:
        """Take `seconds` off the budget."""
        self._left = self.left - seconds


class TenantLane:
    """Runs a tenant's slow calls one at a time, and holds the tenant's time budget."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self.budget = TimeBudget(TENANT_S, TENANT_SHARE)
        self.graders: WeakSet[EpisodeGrader] = WeakSet()  # of episodes that run

    @property
    def is_idle(self) -> bool:
        """Whether a new lane would do the same: no episode uses it, nothing runs in it, and its budget is full."""
        return not self.graders and not self._lock.locked() and self.budget.is_full

    async def run(self, threads: ThreadPoolExecutor, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `call` in a thread. The next call waits until it has ended, even if its caller is cancelled."""
        loop = asyncio.get_running_loop()
        await self._lock.acquire()
        try:
            future = threads.submit(call, *args, **kwargs)
        except BaseException:
            self._lock.release()
            raise

        def release(_: Future[R]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._lock.release)

        future.add_done_callback(release)
        return await asyncio.wrap_future(future)


class GraderPool:
    """Resources that the graders of all episodes share: threads, math-verify, and a lane per tenant."""

    def __init__(self, metrics: Metrics, judge: Judge | None = None) -> None:
        self.metrics = metrics
        self.judge = judge or Judge(workers=WORKERS)
        self.quick = ThreadPoolExecutor(1, "reading")
        self.slow = ThreadPoolExecutor(SLOW_THREADS, "grading")
        self._lanes: OrderedDict[str, TenantLane] = OrderedDict()  # by tenant; callers without keys may be any tenant

    def grader(self, tenant: str) -> EpisodeGrader:
        """Return a grader for one of a tenant's episodes."""
        self._forget_idle()
        return EpisodeGrader(self, self._lanes.setdefault(tenant, TenantLane()))

    def _forget_idle(self) -> None:
        """Drop those of the next few lanes that are idle, so that they do not pile up."""
        for _ in range(min(LANES_LOOKED_AT, len(self._lanes))):
            tenant, lane = next(iter(self._lanes.items()))
            if lane.is_idle:
                del self._lanes[tenant]
            else:
                self._lanes.move_to_end(tenant)

    async def close(self) -> None:
        """Stop running comparisons and the threads."""
        self.judge.close()
        for threads in (self.quick, self.slow):
            await asyncio.to_thread(threads.shutdown, cancel_futures=True)


class EpisodeGrader:
    """Grader of one episode. It keeps to the time budgets of the episode and of its tenant."""

    def __init__(self, pool: GraderPool, lane: TenantLane) -> None:
        self._pool, self._lane = pool, lane
        lane.graders.add(self)
        self._judge_budget, self._pattern_budget = TimeBudget(EPISODE_S), TimeBudget(EPISODE_S)

    async def read(self, text: str, kind: AnswerKind) -> Answer | None:
        if kind.method is ExtractionMethod.REGEX:
            return await self._lane.run(self._pool.slow, self._match_pattern, text, kind)
        if len(text) <= SHORT:
            return read_answer(text, kind)
        return await asyncio.get_running_loop().run_in_executor(self._pool.quick, read_answer, text, kind)

    async def compare(self, written: str, others: Sequence[tuple[int, str]]) -> int | None:
        if not others or self._is_spent():
            return None
        return await self._lane.run(self._pool.slow, self._compare, written, others)

    def _match_pattern(self, text: str, kind: AnswerKind) -> Answer | None:
        left = self._pattern_budget.left
        if left <= 0:
            self._count("pattern_episode")
            return None
        started = time.thread_time()
        answer = read_answer(text, kind, seconds=min(PATTERN_S, left))
        self._pattern_budget.spend(time.thread_time() - started)
        return answer

    def _compare(self, written: str, others: Sequence[tuple[int, str]]) -> int | None:
        for label, other in others:
            if self._is_spent():
                return None
            result = self._pool.judge.compare(written, other, wait_s=WAIT_S)
            if result.waited:
                self._count("judge_busy")
                return None
            seconds = result.seconds + (KILL_S if result.killed else 0)
            self._judge_budget.spend(seconds)
            self._lane.budget.spend(seconds)
            if result.equal:
                return label
        return None

    def _is_spent(self) -> bool:
        """Return whether a budget for comparisons is used up, and count that in the metrics."""
        if self._judge_budget.left <= 0:
            self._count("judge_episode")
        elif self._lane.budget.left <= 0:
            self._count("judge_tenant")
        else:
            return False
        return True

    def _count(self, limit: str) -> None:
        self._pool.metrics.answer_limits.labels(limit).inc()
