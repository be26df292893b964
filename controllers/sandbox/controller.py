"""Controllers that decide in a sandbox process: one episode per process, or many.

The state stays with the owner. The process has a copy, which the facts of each round update.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Final, Generic, TypeVar

from controllers.actions import Action
from controllers.environment import SynchronousEnvironment
from controllers.episode import RemoteController
from controllers.errors import BoundaryViolation
from controllers.limits import Limits
from controllers.loading import Spec
from controllers.sandbox import frames
from controllers.sandbox.deadline import Clock
from controllers.sandbox.episode_rounds import EpisodeRounds, EpisodeTurns
from controllers.sandbox.frames import Decision
from controllers.sandbox.handle import SandboxHandle
from controllers.sandbox.spawner import spawner
from controllers.state import Round, State

T = TypeVar("T")

EPISODES_PER_PROCESS: Final = 128
"""Maximum number of episodes that share a process and its messages."""


class SandboxedController:
    """A controller with a process of its own, which has loaded it. `close` ends the process."""

    def __init__(self, handle: SandboxHandle, beta: float) -> None:
        self.handle = handle
        self._turns = EpisodeTurns(0, beta, handle.codes)

    def decide(self, state: State) -> Sequence[Action]:
        """Decide like `Controller.decide`, blocking. Raises ControllerError, BoundaryViolation or MachineDisturbed."""
        (decision,) = self.handle.decide([self._turns.turn(state)], frames.most_actions(state.limits))
        return self._turns.take(decision)

    async def decide_later(self, state: State) -> Sequence[Action]:
        """Decide like `decide`, without blocking the event loop."""
        turns = [self._turns.turn(state)]
        (decision,) = await self.handle.decide_later(turns, frames.most_actions(state.limits))
        return self._turns.take(decision)

    def close(self) -> None:
        """Kill the process."""
        self.handle.close()


class SuspendingController:
    """Controller of one of many episodes in a process. Deciding suspends its episode until all episodes wait."""

    def __init__(self, number: int, beta: float, codes: frames.FactCodes) -> None:
        self._turns = EpisodeTurns(number, beta, codes)

    @types.coroutine
    def decide_later(self, state: State) -> Generator[list[int], Decision, Sequence[Action]]:
        turns = self._turns
        return turns.take((yield turns.turn(state)))

    def rounds(
        self,
        environment: SynchronousEnvironment,
        state: State,
        on_round: Callable[[State, Round], None] | None = None,
    ) -> EpisodeRounds:
        """Return what runs an episode like `run_episode`, faster, when it is awaited."""
        return EpisodeRounds(self._turns, environment, state, on_round)


Episode = Callable[[RemoteController], Coroutine[Any, Any, T]]
"""Runs an episode under the given controller. It suspends only where the controller decides."""


def episodes_per_message(limits: Limits) -> int:
    """Return how many episodes may share a message.

    The largest legal reply fits in a frame. So do the rounds before it, even if all their facts are new.
    """
    largest = max(frames.most_actions(limits), 2 * limits.max_branches * frames.NUMBERS_PER_NEW_FACT) + 8
    return max(1, min(EPISODES_PER_PROCESS, frames.MAX_FRAME_BYTES // 8 // largest))


def run_sandboxed(
    spec: Spec,
    beta: float,
    limits: Limits,
    episodes: Sequence[Episode[T]],
    processes: int,
    share: int = EPISODES_PER_PROCESS,
) -> list[T]:
    """Run episodes in so many new sandbox processes of one controller, up to `share` at a time in each.

    A process that would get few episodes is not started. The others start at the same time.

    No episode may have wider limits than `limits`. Raises ControllerError if the controller does not load,
    SandboxUnavailable and MachineDisturbed.
    """
    with ExitStack() as stack:
        workers: list[SandboxHandle] = []
        most = min(share, episodes_per_message(limits))
        processes = min(processes, math.ceil(len(episodes) / max(1, most // 2)))
        in_each = min(most, math.ceil(len(episodes) / max(1, processes)))  # so that all have as much to do
        for _ in range(processes):
            worker = spawner().spawn(clock=Clock.CPU)
            stack.callback(worker.close)
            workers.append(worker)
        for worker in workers:
            worker.begin_load(spec)
        for worker in workers:
            worker.finish_load()
        return run_together(workers, beta, limits, episodes, in_each)


def run_together(
    handles: Sequence[SandboxHandle],
    beta: float,
    limits: Limits,
    episodes: Iterable[Episode[T]],
    share: int = EPISODES_PER_PROCESS,
) -> list[T]:
    """Run episodes in several sandbox processes and return their results in order.

    Each process runs as many episodes at a time as may share a message. While one process decides, its owner applies
    the decisions of another. No episode's state may have wider limits than `limits`. If a process has to be killed, its
    present and later episodes fail: BoundaryViolation is raised where they next decide. Raises MachineDisturbed, which
    ends all episodes.
    """
    results: dict[int, T] = {}
    queue = enumerate(episodes)
    batches = [
        _EpisodeBatch(handle, beta, limits, min(share, episodes_per_message(limits)), queue, results)
        for handle in handles
    ]
    try:
        for batch in batches:
            batch.start_decisions()
        while any(batch.waiting for batch in batches):
            for batch in batches:
                batch.apply_decisions()
                batch.start_decisions()
    finally:
        for batch in batches:
            batch.close()
    return [results[number] for number in range(len(results))]


class _EpisodeBatch(Generic[T]):
    """The episodes of one process."""

    def __init__(
        self,
        handle: SandboxHandle,
        beta: float,
        limits: Limits,
        share: int,
        queue: Iterator[tuple[int, Episode[T]]],
        results: dict[int, T],
    ) -> None:
        self.waiting: list[_SuspendedEpisode[T]] = []
        self._handle = handle
        self._beta = beta
        self._most = frames.most_actions(limits)
        self._free = list(range(share))
        self._queue = queue
        self._results = results
        self._violation: BoundaryViolation | None = None

    def start_decisions(self) -> None:
        """Start episodes in free places, and start the decisions."""
        while self._free and (new := next(self._queue, None)) is not None:
            number, episode = new
            place = self._free.pop()
            running = episode(SuspendingController(place, self._beta, self._handle.codes))
            suspended = _SuspendedEpisode(number, place, running)
            self._continue(suspended, suspended.step, None)
        if self.waiting:
            try:
                self._handle.begin([waiting.turn for waiting in self.waiting], self._most)
            except BoundaryViolation as error:
                self._violation = error

    def apply_decisions(self) -> None:
        """Continue every episode with its controller's decision."""
        suspended, self.waiting = self.waiting, []
        decisions: Sequence[Decision] = ()
        if suspended and self._violation is None:
            try:
                decisions = self._handle.finish()
            except BoundaryViolation as error:
                self._violation = error
        if self._violation is None:
            waiting = self.waiting
            for running, decision in zip(suspended, decisions, strict=True):
                try:
                    running.turn = running.step(decision)
                except StopIteration as done:
                    self._finish(running, done.value)
                else:
                    waiting.append(running)
        else:
            for running in suspended:
                self._continue(running, running.episode.throw, self._violation)

    def _continue(self, running: _SuspendedEpisode[T], step: Callable[[Any], list[int]], argument: object) -> None:
        """Continue an episode by `step`, until it waits for its next decision or has ended."""
        try:
            running.turn = step(argument)
        except StopIteration as done:
            self._finish(running, done.value)
        else:
            self.waiting.append(running)

    def _finish(self, running: _SuspendedEpisode[T], result: T) -> None:
        self._results[running.number] = result
        self._free.append(running.place)

    def close(self) -> None:
        """Close the episodes that still run."""
        for waiting in self.waiting:
            waiting.episode.close()


class _SuspendedEpisode(Generic[T]):
    """An episode that waits for a decision."""

    __slots__ = ("episode", "number", "place", "step", "turn")

    def __init__(self, number: int, place: int, episode: Coroutine[Any, Any, T]) -> None:
        self.number = number  # of the episode
        self.place = place
        self.episode = episode
        self.step: Callable[[Any], list[int]] = episode.send
        self.turn: list[int]  # waits for its decision
