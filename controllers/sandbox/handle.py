"""The owner's handle on a sealed process: ask it for decisions, bound its time, and find out why it ended."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

from controllers.actions import Action
from controllers.errors import BadController, Boundary, BoundaryViolation, MachineDisturbed
from controllers.loading import Spec
from controllers.sandbox import frames
from controllers.sandbox.deadline import HARD_S, SOFT_S, Clock, Deadline
from controllers.sandbox.exit_reasons import explain_exit, explain_late
from controllers.sandbox.frames import BadFrame
from controllers.sandbox.polling import is_ready, wait_ready
from controllers.sandbox.process_usage import ProcessUsage, ProcessUsageReader

T = TypeVar("T")

LOAD_S: Final = 2.0
"""Seconds of processor time a controller's file may take to run."""
UNASKED_S: Final = 0.1
"""Seconds of processor time a child may use between an answer and the next question."""
NICE: Final = 5
"""By how much children that decide live are nicer than their owner, which goes first when both want to run."""
IDLE_S: Final = 0.005
"""Seconds of processor time below which a child that was killed had not begun to decide."""
EXIT_S: Final = 1.0
"""Seconds a killed process may take to end before its status is asked for all the same."""

Decision = list[Action] | str
"""A decision for an episode, or the controller's complaint."""
Exchange = Generator[int, None, T]
"""Waits for the events it yields, of `select.poll`, and returns a reply."""


class _Late(Exception):
    """The deadline has passed and there is nothing to read."""


class _NotSealed(Exception):
    """The child has ended, or could not be sealed, before anything foreign ran in it."""


class _Unasked(Exception):
    """The child has computed while it was not asked anything."""


_ENDS: Final = (OSError, BadFrame, _Late, _NotSealed, _Unasked)
"""Errors that end a child."""


class SandboxHandle:
    """One sealed process.

    `reap` waits for the end of a killed process and returns its wait status, or None if nobody knows it. A child that
    is timed by the wall clock has a low priority and is stopped between its answer and the next question.
    """

    def __init__(
        self,
        process: int,
        channel: socket.socket,
        reap: Callable[[int], int | None],
        hard_s: float = HARD_S,
        clock: Clock = Clock.WALL,
    ) -> None:
        self.process = process
        self.hard_s = hard_s
        self.clock = clock
        self.codes = frames.FactCodes()  # of the facts it knows
        self.slow = 0  # live decisions that took longer than SOFT_S
        self._reap = reap
        self._lock = threading.Lock()  # whoever kills it may be another thread than the one that closes it
        self._handle = os.pidfd_open(process)
        self._meter = ProcessUsageReader(process)
        self._channel = channel
        self._sealed = False  # as far as is known
        self._number = 0  # of the latest frame
        self._ended: BoundaryViolation | MachineDisturbed | None = None  # why it may not be asked any more
        self._idle: ProcessUsage | None = None  # its usage when it had answered; None while it is asked
        self._pending: _Pending[list[Decision]]  # what `begin` began
        channel.setblocking(False)
        if clock is Clock.WALL:
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process, os.getpriority(os.PRIO_PROCESS, 0) + NICE)

    @property
    def alive(self) -> bool:
        """Whether its process runs and it may be asked."""
        return self._ended is None and self._handle >= 0 and not is_ready(self._handle, select.POLLIN)

    def load(self, spec: Spec) -> None:
        """Load a controller. BadController, BoundaryViolation and MachineDisturbed leave the process dead."""
        about = [*frames.encode_text(spec.name), *frames.encode_text(spec.source or "")]
        deadline = Deadline(self._meter, Clock.CPU, LOAD_S)
        complaint = self._wait(self._question(frames.LOAD, about, deadline, _complaint))
        if complaint:
            self.close()
            raise BadController(frames.printable(complaint))

    def decide(self, turns: Sequence[Sequence[int]], most: int) -> list[Decision]:
        """Return a decision of at most `most` actions for each turn, blocking.

        Raises BoundaryViolation or MachineDisturbed.
        """
        self.begin(turns, most)
        return self.finish()

    def begin(self, turns: Sequence[Sequence[int]], most: int) -> None:
        """Start decisions on `turns`; `finish` returns them. Raises BoundaryViolation or MachineDisturbed."""
        self._pending = self._step(turns, most)
        self._go_on(self._pending, until=select.POLLIN)

    def finish(self) -> list[Decision]:
        """Return the decisions that the latest `begin` started. Raises BoundaryViolation or MachineDisturbed."""
        return self._wait(self._pending)

    async def decide_later(self, turns: Sequence[Sequence[int]], most: int) -> list[Decision]:
        """As `decide`, in an event loop. Cancelling kills the child."""
        pending = self._step(turns, most)
        decisions = await self._wait_later(pending)
        self.slow += self._meter.read().since(pending.deadline.start).wall > SOFT_S * len(turns)
        return decisions

    def kill(self, why: str) -> None:
        """Kill the process without waiting for its end. Later questions to it raise MachineDisturbed with `why`."""
        if self._ended is None:
            self._ended = MachineDisturbed(why)
        self._signal(signal.SIGKILL)

    def close(self) -> int | None:
        """Kill it if it lives, free what it holds and return its wait status; None if that is not known (any more)."""
        with self._lock:
            if self._handle < 0:
                return None
            if self._ended is None:
                self._ended = BoundaryViolation(Boundary.DEAD, "it has been closed")
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            self._channel.close()
            self._meter.close()
            os.close(self._handle)
            self._handle = -1
        return self._reap(self.process)

    def _signal(self, number: signal.Signals) -> None:
        with self._lock, suppress(ProcessLookupError):
            if self._handle >= 0:
                signal.pidfd_send_signal(self._handle, number)

    # The exchange itself, without waiting

    def _step(self, turns: Sequence[Sequence[int]], most: int) -> _Pending[list[Decision]]:
        seconds = self.hard_s + (len(turns) - 1) * SOFT_S
        about = [*self.codes.new_facts(), *(number for turn in turns for number in turn)]
        deadline = Deadline(self._meter, self.clock, seconds)
        return self._question(frames.STEP, about, deadline, lambda reply: _decisions(reply, len(turns), most))

    def _question(
        self, kind: int, numbers: Sequence[int], deadline: Deadline, parse: Callable[[list[int]], T]
    ) -> _Pending[T]:
        """A question that has not been sent yet. Raises BoundaryViolation or MachineDisturbed if it cannot be."""
        if self._ended is not None:
            raise _again(self._ended)
        return _Pending(self._ask(kind, numbers, parse), deadline, is_ready(self._handle, select.POLLIN))

    def _ask(self, kind: int, numbers: Sequence[int], parse: Callable[[list[int]], T]) -> Exchange[T]:
        """Raises OSError if the child has gone, BadFrame if its answer is none, _NotSealed or _Unasked."""
        if not self._sealed:
            yield from self._await_seal()
        idle, self._idle = self._idle, None
        if idle is not None and (unasked_s := self._meter.read().since(idle).cpu) > UNASKED_S:
            raise _Unasked(f"it computed for {unasked_s:.2f} s without being asked")
        self._number += 1
        if self.clock is Clock.WALL:
            self._signal(signal.SIGCONT)
        left = memoryview(frames.pack([kind, self._number, *numbers]))
        while left:
            try:
                left = left[self._channel.send(left) :]
            except BlockingIOError:
                yield select.POLLOUT
        yield select.POLLIN  # always, so that what was begun is never finished at once
        reply = yield from self._frame()
        if self.clock is Clock.WALL:
            self._signal(signal.SIGSTOP)
        self._idle = self._meter.read()
        if not reply or reply[0] != self._number:
            raise BadFrame("it answers what it was not asked")
        return parse(reply)

    def _await_seal(self) -> Generator[int, None, None]:
        yield select.POLLIN
        try:
            first = yield from self._frame()
        except OSError:
            raise _NotSealed("it ended before it was ready") from None
        if first != [frames.READY]:
            raise _NotSealed(frames.printable(frames.decode_text(first, 0, frames.MAX_FRAME_BYTES)[0]))
        self._sealed = True

    def _frame(self) -> Exchange[list[int]]:
        header = yield from self._receive(frames.HEADER.size)
        return frames.unpack((yield from self._receive(frames.body_size(bytes(header)))))

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

    def _wait(self, pending: _Pending[T]) -> T:
        """Go on with an exchange to its end, the caller waiting."""
        self._go_on(pending, until=None)
        return pending.reply

    def _go_on(self, pending: _Pending[Any], until: int | None) -> None:
        """Go on with an exchange to its end, or `until` it first waits for that event."""
        deadline = pending.deadline
        try:
            while True:
                left = deadline.left()
                # A deadline may pass while the owner does something else: what can be read by now counts.
                if not pending.event or is_ready(self._channel.fileno(), pending.event, left):
                    pending.event = next(pending.exchange)
                    if pending.event == until:
                        return
                elif left <= 0 and not deadline.extend():
                    raise _Late
        except StopIteration as done:
            pending.reply = done.value
        except _ENDS as error:
            left = max(SOFT_S, deadline.left())
            gone = isinstance(error, OSError) and is_ready(self._handle, select.POLLIN, left)
            if not gone:
                self._end(deadline)
                is_ready(self._handle, select.POLLIN, EXIT_S)
            raise self._failed(error, pending, gone) from None
        except BaseException:
            self.close()
            raise

    async def _wait_later(self, pending: _Pending[T]) -> T:
        """Go on with an exchange to its end, in an event loop."""
        deadline = pending.deadline
        try:
            while True:
                left, channel = deadline.left(), self._channel.fileno()
                # The loop may be late itself: what can be read by now counts, whatever its timer says.
                if (
                    not pending.event
                    or is_ready(channel, pending.event)
                    or (left > 0 and await wait_ready(channel, pending.event, left))
                ):
                    pending.event = next(pending.exchange)
                elif left <= 0 and not deadline.extend():
                    raise _Late
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        except _ENDS as error:
            left = max(SOFT_S, deadline.left())
            gone = isinstance(error, OSError) and await wait_ready(self._handle, select.POLLIN, left)
            if not gone:
                self._end(deadline)
                await wait_ready(self._handle, select.POLLIN, EXIT_S)
            raise self._failed(error, pending, gone) from None
        except BaseException:  # a cancelled request's too: nobody waits for the answer
            self.kill("its decision was cancelled")
            raise

    # How it ends

    def _end(self, deadline: Deadline) -> None:
        deadline.stop()
        self._signal(signal.SIGKILL)

    def _failed(self, error: Exception, pending: _Pending[Any], gone: bool) -> BoundaryViolation | MachineDisturbed:
        """Why a child that has ended may not be asked any more: by its own fault, or the machine's.

        `gone` says that it ended without being killed here.
        """
        deadline = pending.deadline
        usage, life = deadline.usage(), self._meter.read()
        before, status = self._ended, self.close()
        if before is not None:  # it was killed for another reason
            self._ended = before
        elif isinstance(error, OSError):
            idle = pending.died_idle or usage.cpu < IDLE_S
            self._ended = explain_exit(status, gone, idle, life.cpu, deadline.start.wall)
        elif isinstance(error, _Late):
            self._ended = explain_late(deadline, usage)
        elif isinstance(error, _NotSealed):
            self._ended = MachineDisturbed(f"a sealed process could not be made: {error}")
        else:
            boundary = Boundary.UNASKED if isinstance(error, _Unasked) else Boundary.FRAME
            self._ended = BoundaryViolation(boundary, str(error), deadline.start.wall)
        return _again(self._ended)


class _Pending(Generic[T]):
    """An exchange under way."""

    def __init__(self, exchange: Exchange[T], deadline: Deadline, died_idle: bool) -> None:
        self.exchange = exchange
        self.deadline = deadline
        self.died_idle = died_idle  # the process had ended before it was asked
        self.event = 0  # it waits for; none before it has begun
        self.reply: T  # once it has come to its end


def _again(error: BoundaryViolation | MachineDisturbed) -> BoundaryViolation | MachineDisturbed:
    """A new error like `error`, for a second caller."""
    return type(error)(*error.args)


def _complaint(reply: Sequence[int]) -> str:
    """Return the child's complaint about a file it was to load, empty if there is none. Raises BadFrame."""
    return frames.decode_text(reply, 1, frames.MAX_COMPLAINT_CHARS)[0]


def _decisions(reply: Sequence[int], count: int, most: int) -> list[Decision]:
    """So many decisions, of at most so many actions. Raises BadFrame."""
    decisions: list[Decision] = []
    at = 1
    for _ in range(count):
        decided, at = frames.decode_decision(reply, at, most)
        decisions.append(decided)
    if at != len(reply):
        raise BadFrame(f"{len(reply) - at} numbers too many")
    return decisions
