"""Read and compare answers off the event loop, so that no tenant's answers delay another's requests.

Most readings take microseconds and are done at once. Long texts are read in a thread. Client patterns and questions to
math-verify can take seconds, so each tenant runs one of them at a time, within a budget of seconds for the episode and
for the tenant. Beyond the budget answers are compared by their canonical form only, and a metric counts it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, ParamSpec, Protocol, TypeVar

from discovery.answers import PATTERN_S, Answer, AnswerKind, ExtractionMethod, Judge, read_answer
from proxy.telemetry.metrics import Metrics

P = ParamSpec("P")
R = TypeVar("R")

SHORT: Final = 500
"""Characters of a text that is read at once."""
SLOW_THREADS: Final = 4
WORKERS: Final = 2
"""Processes of math-verify."""
EPISODE_S: Final = 4.0
"""Seconds an episode may have its answers compared by math-verify, and as many of CPU its client's pattern may take."""
TENANT_S: Final = 20.0
"""Seconds a tenant may have answers compared at once."""
TENANT_SHARE: Final = 0.5
"""Seconds a tenant gains of them each second."""
KILL_S: Final = 3.0
"""Seconds a question costs beside its own when a process is killed over it: another has to be started."""
WAIT_S: Final = 5.0
"""Seconds an answer may wait until a process is free and has started."""


class Grader(Protocol):
    """Reads and compares the answers of one episode."""

    async def read(self, text: str, kind: AnswerKind) -> Answer | None:
        """Return what `text` answers, if it can be read."""
        ...

    async def compare(self, written: str, others: Sequence[tuple[int, str]]) -> int | None:
        """Return the label of the first of `others` that equals `written`, if any is found to."""
        ...


class PlainGrader:
    """Grader without threads and without math-verify."""

    async def read(self, text: str, kind: AnswerKind) -> Answer | None:
        return read_answer(text, kind)

    async def compare(self, written: str, others: Sequence[tuple[int, str]]) -> int | None:
        return None


class TimeBudget:
    """Seconds that may be spent: `most` at once, `share` of each second that passes comes back."""

    def __init__(self, most: float, share: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._share, self._clock = most, share, clock
        self._left, self._seen = most, clock()

    @property
    def left(self) -> float:
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._seen) * self._share)
        self._seen = now
        return self._left

    def spend(self, seconds: float) -> None:
        self._left = self.left - seconds


class TenantLane:
    """A tenant's lane, in which one slow call runs at a time, and its budget."""

    def __init__(self) -> None:
        self._lane = asyncio.Lock()
        self.budget = TimeBudget(TENANT_S, TENANT_SHARE)

    async def run(self, threads: ThreadPoolExecutor, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `call` in a thread. The lane stays taken until it has ended, even if the caller is cancelled."""
        loop = asyncio.get_running_loop()
        await self._lane.acquire()
        try:
            future = threads.submit(call, *args, **kwargs)
        except BaseException:
            self._lane.release()
            raise

        def free(_: Future[R]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._lane.release)

        future.add_done_callback(free)
        return await asyncio.wrap_future(future)


class GraderPool:
    """Resources that the graders of all episodes share: threads, math-verify, and each tenant's lane."""

    def __init__(self, metrics: Metrics, judge: Judge | None = None) -> None:
        self.metrics = metrics
        self.judge = judge or Judge(workers=WORKERS)
        self.quick = ThreadPoolExecutor(1, "reading")
        self.slow = ThreadPoolExecutor(SLOW_THREADS, "grading")
        self._tenants: dict[str, TenantLane] = {}

    def grader(self, tenant: str) -> EpisodeGrader:
        """The grader of one of a tenant's episodes."""
        return EpisodeGrader(self, self._tenants.setdefault(tenant, TenantLane()))

    async def close(self) -> None:
        """End what is being compared, and the threads."""
        self.judge.close()
        for threads in (self.quick, self.slow):
            await asyncio.to_thread(threads.shutdown, cancel_futures=True)


class EpisodeGrader:
    """Grader of one episode, within its budget and its tenant's."""

    def __init__(self, grading: GraderPool, tenant: TenantLane) -> None:
        self._grading, self._tenant = grading, tenant
        self._judging, self._matching = TimeBudget(EPISODE_S), TimeBudget(EPISODE_S)

    async def read(self, text: str, kind: AnswerKind) -> Answer | None:
        if kind.method is ExtractionMethod.REGEX:
            return await self._tenant.run(self._grading.slow, self._match, text, kind)
        if len(text) <= SHORT:
            return read_answer(text, kind)
        return await asyncio.get_running_loop().run_in_executor(self._grading.quick, read_answer, text, kind)

    async def compare(self, written: str, others: Sequence[tuple[int, str]]) -> int | None:
        if not others or self._spent():
            return None
        return await self._tenant.run(self._grading.slow, self._ask, written, others)

    def _match(self, text: str, kind: AnswerKind) -> Answer | None:
        left = self._matching.left
        if left <= 0:
            self._count("pattern_episode")
            return None
        begun = time.thread_time()
        answer = read_answer(text, kind, seconds=min(PATTERN_S, left))
        self._matching.spend(time.thread_time() - begun)
        return answer

    def _ask(self, written: str, others: Sequence[tuple[int, str]]) -> int | None:
        for label, other in others:
            if self._spent():
                return None
            finding = self._grading.judge.compare(written, other, wait_s=WAIT_S)
            if finding.waited:
                self._count("judge_busy")
                return None
            seconds = finding.seconds + (KILL_S if finding.killed else 0)
            self._judging.spend(seconds)
            self._tenant.budget.spend(seconds)
            if finding.equal:
                return label
        return None

    def _spent(self) -> bool:
        """Whether no more questions may be asked; counted if so."""
        if self._judging.left <= 0:
            self._count("judge_episode")
        elif self._tenant.budget.left <= 0:
            self._count("judge_tenant")
        else:
            return False
        return True

    def _count(self, limit: str) -> None:
        self._grading.metrics.answer_limits.labels(limit).inc()
