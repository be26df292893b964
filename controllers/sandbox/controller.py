"""Controllers whose decisions are made in a sealed child: one episode in one child, or many in one.

The state stays with the owner; the child has a copy that is brought up to date by what each round brought.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final, Generic, NamedTuple, TypeVar

from controllers.actions import Action
from controllers.episode import RemoteController
from controllers.errors import BoundaryViolation, ControllerError
from controllers.sandbox import frames
from controllers.sandbox.handle import Decision, SandboxHandle
from controllers.state import Limits, State

T = TypeVar("T")

EPISODES_PER_PROCESS: Final = 64
"""Episodes that share a child, and a message, at most."""


class _Seat:
    """An episode's place in a child."""

    def __init__(self, number: int, beta: float, codes: frames.FactCodes) -> None:
        self._number = number
        self._beta = beta
        self._codes = codes
        self._rounds = 0  # of which the child knows
        self._asked: Sequence[Action] = ()

    def turn(self, state: State) -> list[int]:
        """What the child has to be told before it decides on `state`."""
        if state.last is None:
            return frames.begin(self._number, self._beta, state.limits)
        self._rounds += 1
        if state.rounds != self._rounds:
            raise ControllerError(
                "a sealed controller sees its episode from the first round to the last, or not at all"
            )
        return frames.follow(self._number, self._asked, state.last, self._codes)

    def take(self, decision: Decision) -> Sequence[Action]:
        """The actions of a decision. Raises ControllerError if the child complains instead."""
        if isinstance(decision, str):
            raise ControllerError(frames.printable(decision))
        self._asked = decision
        return decision


class SandboxedController:
    """A controller with a child of its own, which has loaded it. `close` ends the child."""

    def __init__(self, worker: SandboxHandle, beta: float) -> None:
        self.worker = worker
        self._seat = _Seat(0, beta, worker.codes)

    def decide(self, state: State) -> Sequence[Action]:
        """Decide like `Controller.decide`, blocking. Raises ControllerError, BoundaryViolation or MachineDisturbed."""
        (decision,) = self.worker.decide([self._seat.turn(state)], frames.most_actions(state.limits))
        return self._seat.take(decision)

    async def decide_later(self, state: State) -> Sequence[Action]:
        """As `decide`, for an event loop."""
        turns = [self._seat.turn(state)]
        (decision,) = await self.worker.decide_later(turns, frames.most_actions(state.limits))
        return self._seat.take(decision)

    def close(self) -> None:
        """Kill the child."""
        self.worker.close()


class _Place:
    """A controller of one of many episodes in a child: deciding suspends it until all of them have asked."""

    def __init__(self, number: int, beta: float, codes: frames.FactCodes) -> None:
        self._seat = _Seat(number, beta, codes)

    async def decide_later(self, state: State) -> Sequence[Action]:
        return self._seat.take(await _ask(self._seat.turn(state)))


@types.coroutine
def _ask(turn: list[int]) -> Generator[list[int], Decision, Decision]:
    return (yield turn)


Episode = Callable[[RemoteController], Coroutine[Any, Any, T]]
"""Runs an episode under the controller it is given; suspends only where that decides."""


def seats(limits: Limits) -> int:
    """How many episodes may share a message whose largest legal reply still is a frame."""
    return max(1, min(EPISODES_PER_PROCESS, frames.LARGEST // 8 // (frames.most_actions(limits) + 2)))


def run_together(
    workers: Sequence[SandboxHandle],
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
    tables = [_Table(worker, beta, limits, min(share, seats(limits)), queue, results) for worker in workers]
    try:
        for table in tables:
            table.deal()
        while any(table.asking for table in tables):
            for table in tables:
                table.play()
                table.deal()
    finally:
        for table in tables:
            table.close()
    return [results[number] for number in range(len(results))]


class _Table(Generic[T]):
    """The episodes of one child."""

    def __init__(
        self,
        worker: SandboxHandle,
        beta: float,
        limits: Limits,
        share: int,
        queue: Iterator[tuple[int, Episode[T]]],
        results: dict[int, T],
    ) -> None:
        self.asking: list[_Asking[T]] = []
        self._worker = worker
        self._beta = beta
        self._most = frames.most_actions(limits)
        self._free = list(range(share))
        self._queue = queue
        self._results = results
        self._crossed: BoundaryViolation | None = None

    def deal(self) -> None:
        """Fill the free seats, and have the child begin to decide."""
        while self._free and (new := next(self._queue, None)) is not None:
            number, episode = new
            seat = self._free.pop()
            running = episode(_Place(seat, self._beta, self._worker.codes))
            self._go_on(number, seat, running, partial(running.send, None))
        if self.asking:
            try:
                self._worker.begin([asking.turn for asking in self.asking], self._most)
            except BoundaryViolation as error:
                self._crossed = error

    def play(self) -> None:
        """Go on with every episode, as its controller decided."""
        asked, self.asking = self.asking, []
        decisions: Sequence[Decision] = ()
        if asked and self._crossed is None:
            try:
                decisions = self._worker.finish()
            except BoundaryViolation as error:
                self._crossed = error
        for at, (number, seat, episode, _) in enumerate(asked):
            if self._crossed is None:
                self._go_on(number, seat, episode, partial(episode.send, decisions[at]))
            else:
                self._go_on(number, seat, episode, partial(episode.throw, self._crossed))

    def _go_on(self, number: int, seat: int, episode: Coroutine[Any, Any, T], step: Callable[[], list[int]]) -> None:
        try:
            self.asking.append(_Asking(number, seat, episode, step()))
        except StopIteration as done:
            self._results[number] = done.value
            self._free.append(seat)

    def close(self) -> None:
        """Leave what still runs."""
        for asking in self.asking:
            asking.episode.close()


class _Asking(NamedTuple, Generic[T]):
    """An episode that waits for a decision."""

    number: int  # of the episode
    seat: int
    episode: Coroutine[Any, Any, T]
    turn: list[int]
