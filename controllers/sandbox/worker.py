"""A sealed child as its owner sees it: it is asked, and answers in time and form, or is dead."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Final

from controllers.actions import Action
from controllers.errors import BadController, Boundary, Crossed
from controllers.loading import Spec
from controllers.sandbox import frames
from controllers.sandbox.frames import BadFrame

SOFT_S: Final = 0.05
"""Seconds from which on a decision is slow."""
HARD_S: Final = 0.25
"""Seconds after which a child that still decides is killed. Of a message for n episodes all but one have SOFT_S."""
LOAD_S: Final = 2.0
"""Seconds a controller's file may take to run."""

Decision = list[Action] | str
"""What a child decided for an episode, or what it complains of."""
Exchange = Generator[int, None, list[int]]
"""Waits for the events it yields, of `select.poll`, and returns a frame's numbers."""


class Worker:
    """One child. `reap` waits for the end of a process that has been killed and gives its wait status."""

    def __init__(
        self, process: int, channel: socket.socket, reap: Callable[[int], int], hard_s: float = HARD_S
    ) -> None:
        self.process = process
        self.hard_s = hard_s
        self.codes = frames.Codes()  # of the facts it knows
        self.slow = 0  # live decisions that took longer than SOFT_S
        self._reap = reap
        self._handle = os.pidfd_open(process)
        self._channel = channel
        self._number = 0  # of the latest frame
        self._end = ""  # how it ended
        self._pending: tuple[Exchange, int, int, float]  # what was begun: its exchange, event, turns, and when
        channel.setblocking(False)

    @property
    def alive(self) -> bool:
        """Whether it may be asked."""
        return self._handle >= 0

    def load(self, spec: Spec) -> None:
        """Have it run a controller's source. Raises BadController or Crossed; it is dead then."""
        about = [*frames.told(spec.name), *frames.told(spec.source or "")]
        exchange = self._ask(frames.LOAD, about)
        reply = self._wait(exchange, LOAD_S, time.monotonic(), next(exchange))
        try:
            words, _ = frames.text(reply, 1, frames.LONGEST)
        except BadFrame as error:
            raise self._crossed(Boundary.FRAME, str(error)) from None
        if words:
            self.close()
            raise BadController(frames.printable(words))

    def decide(self, turns: Sequence[Sequence[int]], most: int) -> list[Decision]:
        """A decision for each turn, of at most so many actions; the caller waits. Raises Crossed."""
        self.begin(turns)
        return self.finish(most)

    def begin(self, turns: Sequence[Sequence[int]]) -> None:
        """Have it decide on `turns` while the caller does something else. Raises Crossed."""
        exchange = self._ask(frames.STEP, self._told(turns))
        self._pending = exchange, next(exchange), len(turns), time.monotonic()

    def finish(self, most: int) -> list[Decision]:
        """What it decided on the turns of the latest `begin`. Raises Crossed."""
        exchange, event, turns, began = self._pending
        reply = self._wait(exchange, self._allowed(turns), began, event)
        return self._decisions(reply, turns, most)

    async def decide_later(self, turns: Sequence[Sequence[int]], most: int) -> list[Decision]:
        """As `decide`, in an event loop. Cancelling kills the child."""
        began = time.monotonic()
        exchange = self._ask(frames.STEP, self._told(turns))
        reply = await self._wait_later(exchange, self._allowed(len(turns)))
        self.slow += time.monotonic() - began > SOFT_S * len(turns)
        return self._decisions(reply, len(turns), most)

    def close(self) -> int | None:
        """Kill it, if it lives, and give its wait status; None if it had been closed."""
        if not self.alive:
            return None
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        self._channel.close()
        os.close(self._handle)
        self._handle = -1
        return self._reap(self.process)

    def _told(self, turns: Sequence[Sequence[int]]) -> list[int]:
        return [*self.codes.news(), *(number for turn in turns for number in turn)]

    def _allowed(self, turns: int) -> float:
        return self.hard_s + (turns - 1) * SOFT_S

    def _decisions(self, reply: Sequence[int], count: int, most: int) -> list[Decision]:
        decisions: list[Decision] = []
        at = 1
        try:
            for _ in range(count):
                decided, at = frames.decision(reply, at, most)
                decisions.append(decided)
            if at != len(reply):
                raise BadFrame(f"{len(reply) - at} numbers too many")
        except BadFrame as error:
            raise self._crossed(Boundary.FRAME, str(error)) from None
        return decisions

    # The exchange itself, without waiting

    def _ask(self, kind: int, numbers: Sequence[int]) -> Exchange:
        if not self.alive:
            raise Crossed(Boundary.DEAD, self._end or "it has been closed")
        self._number += 1
        left = memoryview(frames.pack([kind, self._number, *numbers]))
        try:
            while left:
                try:
                    left = left[self._channel.send(left) :]
                except BlockingIOError:
                    yield select.POLLOUT
            yield select.POLLIN  # always, so that what was begun is never finished at once
            header = yield from self._receive(frames.HEADER.size)
            reply = frames.unpack((yield from self._receive(frames.size(bytes(header)))))
        except OSError:
            raise self._died() from None
        except BadFrame as error:
            raise self._crossed(Boundary.FRAME, str(error)) from None
        if not reply or reply[0] != self._number:
            raise self._crossed(Boundary.FRAME, "it answers what it was not asked")
        return reply

    def _receive(self, count: int) -> Generator[int, None, bytearray]:
        data = bytearray()
        while len(data) < count:
            try:
                more = self._channel.recv(count - len(data))
            except BlockingIOError:
                yield select.POLLIN
                continue
            if not more:
                raise ConnectionResetError
            data += more
        return data

    # Waiting

    def _wait(self, exchange: Exchange, seconds: float, began: float, event: int) -> list[int]:
        """Go on with an exchange that waits for `event`, until so many seconds after it `began`."""
        try:
            while True:
                waiting = select.poll()
                waiting.register(self._channel, event)
                if not waiting.poll(max(0.0, began + seconds - time.monotonic()) * 1000):
                    raise self._crossed(Boundary.LATE, _late(seconds))
                event = next(exchange)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        except BaseException:
            self.close()
            raise

    async def _wait_later(self, exchange: Exchange, seconds: float) -> list[int]:
        try:
            async with asyncio.timeout(seconds):
                while True:
                    await _ready(self._channel.fileno(), next(exchange))
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        except TimeoutError:
            raise self._crossed(Boundary.LATE, _late(seconds)) from None
        except BaseException:  # a cancelled request's too: what it would answer is nobody's
            self.close()
            raise

    # How it ends

    def _crossed(self, boundary: Boundary, words: str) -> Crossed:
        """Kill it for what it did."""
        self.close()
        self._end = words
        return Crossed(boundary, words)

    def _died(self) -> Crossed:
        """It has closed its end: find out why."""
        status = self.close()
        if status is not None and os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGSYS:
                return self._crossed(Boundary.CALL, "the kernel killed it at a system call it may not make")
            return self._crossed(Boundary.DEAD, f"it was killed by {signal.Signals(number).name}")
        code = None if status is None else os.waitstatus_to_exitcode(status)
        return self._crossed(Boundary.DEAD, f"it left with status {code}")


def _late(seconds: float) -> str:
    return f"it took longer than {seconds * 1000:.0f} ms"


async def _ready(descriptor: int, event: int) -> None:
    """Wait until a descriptor can be read from, or written to."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    reading = event == select.POLLIN
    (loop.add_reader if reading else loop.add_writer)(descriptor, _settle, done)
    try:
        await done
    finally:
        (loop.remove_reader if reading else loop.remove_writer)(descriptor)


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
