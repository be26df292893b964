"""Sandboxed controllers: decisions per second in replay, latency of live decisions, start and kill of a process."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from controllers import Action, Fact, Limits, State, run_episode
from controllers.errors import BoundaryViolation
from controllers.loading import Spec
from controllers.sandbox.controller import SandboxedController
from controllers.sandbox.deadline import HARD_S
from controllers.sandbox.handle import SandboxHandle
from controllers.sandbox.spawner import SandboxSpawner
from discovery.data.importers import read_release, release_cell
from discovery.data.recordings import Recording, intern_answers
from discovery.evaluation.replay import ReplayEnvironment, shuffled_order
from discovery.evaluation.replay_jobs import Job, ReplayRules, Sealing, run_job
from tests.bench.replay import BLOCK, FILE
from tests.bench.rows import Row, Size, spread
from tests.discovery.evaluation.test_evaluate import question

EPISODES: Final = 8
"""Concurrent live episodes."""
ROUND_S: Final = 0.005
"""Simulated duration of a live round."""
TIMES: Final = 100


def rows(size: Size) -> Iterator[Row]:
    """Yield the benchmarks of the sandbox. They start event loops, so the caller must not run one."""
    if FILE.exists():
        recordings = [intern_answers(recorded) for recorded in read_release(FILE)]
        for beta in (0.0, 0.5, 1.0):
            yield _replay(recordings, beta, size.pick(5, 1), size.pick(BLOCK, 2))
    spawner = SandboxSpawner()
    spawner.check()
    try:
        yield asyncio.run(_live(spawner, size.pick(20, 1)))
        yield _start(spawner, size.pick(TIMES, 5))
        yield _kill(spawner, size.pick(20, 2))
    finally:
        spawner.close()


def _replay(recordings: Sequence[Recording], beta: float, times: int, block: int) -> Row:
    """Measure whole jobs, audit included, in turn with the same controller in this process."""
    speeds: dict[Sealing, list[float]] = {Sealing.ALL: [], Sealing.NONE: []}
    for start in range(0, times * block, block):
        job = Job(Spec("cmc"), beta, release_cell(FILE), range(start, start + block))
        for sealing, rates in speeds.items():
            played = run_job(job, recordings, ReplayRules(sealing=sealing))
            rates.append(int(played.outcomes[3].sum()) / played.seconds)
    sealed, here = (statistics.median(rates) for rates in speeds.values())
    return Row(
        f"sandboxed decisions per second: CMC β={beta:g}, Qwen3-1.7B aime25",
        f"{sealed:,.0f} (median of {times})",
        f"{here:,.0f} in this process",
        f"{sealed / here:.2f}",
        spread([s / h for s, h in zip(*speeds.values(), strict=True)]),
    )


class _Slow:
    """Environment whose rounds take as long as live ones."""

    def __init__(self, environment: ReplayEnvironment) -> None:
        self._environment = environment

    async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
        await asyncio.sleep(ROUND_S)
        return await self._environment.execute(actions)


class _Timed:
    def __init__(self, controller: SandboxedController, taken: list[float]) -> None:
        self._controller = controller
        self._taken = taken

    async def decide_later(self, state: State) -> Sequence[Action]:
        began = time.perf_counter()
        decided = await self._controller.decide_later(state)
        self._taken.append(time.perf_counter() - began)
        return decided


async def _live(spawner: SandboxSpawner, times: int) -> Row:
    """Measure decisions of CMC at β = 1, with each episode in its own process."""
    recording = intern_answers(question(0, branches=64))
    taken: list[float] = []

    async def episode(worker: SandboxHandle) -> None:
        environment = _Slow(ReplayEnvironment(recording, shuffled_order(64, 0)))
        timed = _Timed(SandboxedController(worker, 1.0), taken)
        await run_episode(timed, environment, State(Limits(recording.interval)))

    for _ in range(times):  # like the proxy, start and end processes outside the measured time
        workers = [_loaded(spawner) for _ in range(EPISODES)]
        await asyncio.gather(*map(episode, workers))
        for worker in workers:
            worker.close()
    cuts = statistics.quantiles(taken, n=100)
    return Row(
        f"live sandboxed decision, {EPISODES} concurrent episodes: CMC β=1",
        f"{1e3 * cuts[49]:.2f} ms p50, {1e3 * cuts[98]:.2f} ms p99",
        f"{len(taken)} decisions, slowest {1e3 * max(taken):.1f} ms",
        "",
    )


def _loaded(spawner: SandboxSpawner, source: str | None = None) -> SandboxHandle:
    worker = spawner.spawn()
    worker.load(Spec("cmc", source))
    return worker


def _start(spawner: SandboxSpawner, times: int) -> Row:
    """Measure starting a process, loading its controller and ending it."""
    taken = _measure(lambda: _loaded(spawner).close(), times)
    return Row(
        "sandbox process: start, load and end",
        f"{1e3 * statistics.median(taken):.2f} ms (median)",
        f"slowest of {times}: {1e3 * max(taken):.1f} ms",
        "",
    )


def _kill(spawner: SandboxSpawner, times: int) -> Row:
    """Measure how long after its deadline a process in an endless loop is killed and reaped."""
    source = "class L:\n    def __init__(self, beta): ...\n    def decide(self, state):\n        while True: pass\n"

    def loop() -> None:
        controller = SandboxedController(_loaded(spawner, source), 0.5)
        try:
            controller.decide(State(Limits(10)))
        except BoundaryViolation:
            return
        raise RuntimeError("the endless loop returned")

    over = [1e3 * (taken - HARD_S) for taken in _measure(loop, times)]
    return Row(
        f"kill of a looping process, after its deadline of {1e3 * HARD_S:.0f} ms",
        f"{statistics.median(over):.1f} ms (median, including its start)",
        f"slowest of {len(over)}: {max(over):.1f} ms",
        "",
    )


def _measure(work: Callable[[], object], times: int) -> list[float]:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return taken
