"""The owner's handle on a sandbox process: ask it for decisions, limit its time, and find out why it ended."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, Generic, TypeVar

from controllers.errors import BadController, Boundary, BoundaryViolation, MachineDisturbed
from controllers.loading import Spec
from controllers.sandbox import frames
from controllers.sandbox.deadline import HARD_S, SOFT_S, Clock, Deadline
from controllers.sandbox.exit_reasons import explain_exit, explain_late
from controllers.sandbox.frames import BadFrame, Decision
from controllers.sandbox.functions import MAX_TEXT, decode_outcomes
from controllers.sandbox.polling import is_ready, wait_ready
from controllers.sandbox.process_usage import ProcessUsageReader

T = TypeVar("T")

LOAD_S: Final = 2.0
"""Seconds of processor time a controller's file may take to run."""
UNASKED_S: Final = 0.1
"""Seconds of processor time a process may use between a reply and the next request."""
NICE: Final = 5
"""Added to the niceness of processes that decide live, so that their owner runs first."""
IDLE_S: Final = 0.005
"""A killed process that used less processor time than this had not begun to decide."""
EXIT_S: Final = 1.0
"""Seconds to wait for the end of a killed process before its status is read."""
RECEIVED_BYTES: Final = 1 << 16
"""Most bytes that are received at once. Most replies are shorter."""
_ASKED: Final = 0
"""Yielded by an exchange once its request is sent, before it first tries to read the reply."""

Exchange = Generator[int, None, T]
"""Generator that yields the `select.poll` event it waits for, or `_ASKED`, and returns the reply."""


class _Late(Exception):
    """The deadline has passed without an answer."""


class _NotSealed(Exception):
    """The process ended, or could not be sealed, before foreign code ran in it."""


class _Unasked(Exception):
    """The process computed between a reply and the next request."""


_ENDS: Final = (OSError, BadFrame, _Late, _NotSealed, _Unasked)
"""Errors after which the process is killed."""


class SandboxHandle:
    """One sandbox process.

    `reap` waits for the end of a killed process and returns its wait status, or None if it is unknown. A process timed
    by the wall clock has a low priority and is stopped between a reply and the next request.
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
        self.codes = frames.FactCodes()  # of the facts that the process knows
        self.slow = 0  # live decisions that took longer than SOFT_S
        self._reap = reap
        self._lock = threading.Lock()  # one thread may kill the process while another closes it
        self._handle = os.pidfd_open(process)
        self._exit = select.poll()  # waits for the end of the process
        self._exit.register(self._handle, select.POLLIN)
        self._meter = ProcessUsageReader(process)
        self._channel = channel
        self._sealed = False  # the process has confirmed that it is sealed
        self._number = 0  # of the latest frame
        self._received = bytearray()  # of the next frame
        self._ended: BoundaryViolation | MachineDisturbed | None = None  # why it can no longer decide
        self._idle_s: float | None = None  # processor time at the latest answer; None while it decides
        self._loading: _Pending[str]  # started by `begin_load`
        self._pending: _Pending[list[Decision]]  # started by `begin`
        channel.setblocking(False)
        if clock is Clock.WALL:
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process, os.getpriority(os.PRIO_PROCESS, 0) + NICE)

    @property
    def alive(self) -> bool:
        """Whether the process runs and can decide."""
        return self._ended is None and self._handle >= 0 and not is_ready(self._handle, select.POLLIN)

    def load(self, spec: Spec) -> None:
        """Load a controller. BadController, BoundaryViolation and MachineDisturbed close the handle."""
        self.begin_load(spec)
        self.finish_load()

    def begin_load(self, spec: Spec) -> None:
        """Start loading a controller once the process is sealed; `finish_load` waits for it. Raises like `load`."""
        about = [*frames.encode_text(spec.name), *frames.encode_text(spec.source or "")]
        deadline = Deadline(self._meter, Clock.CPU, LOAD_S)
        try:
            self._loading = self._question(frames.LOAD, about, deadline, frames.decode_complaint)
            self._continue(self._loading, until_asked=True)
        except BaseException:  # also if it was killed before it was asked
            self.close()
            raise

    def finish_load(self) -> None:
        """Wait until the controller is loaded. Raises like `load`."""
        try:
            complaint = self._wait(self._loading)
            if complaint:
                raise BadController(frames.printable(complaint))
        except BaseException:
            self.close()
            raise

    def call(self, blocks: Sequence[str], name: str, inputs: Sequence[str]) -> list[str]:
        """Call a function of foreign code with each of `inputs`, blocking (see `functions.py`). Return the outcomes.

        Raises BadController with what is wrong with the code, BoundaryViolation or MachineDisturbed.
        """
        about = [*frames.encode_text(name), *frames.encode_texts(blocks), *frames.encode_texts(inputs)]
        deadline = Deadline(self._meter, self.clock, self.hard_s)
        parse = partial(decode_outcomes, count=len(inputs), longest=2 * MAX_TEXT)
        problem, outcomes = self._wait(self._question(frames.CALL, about, deadline, parse))
        if problem:
            raise BadController(frames.printable(problem))
        return outcomes

    def decide(self, turns: Sequence[Sequence[int]], most: int) -> list[Decision]:
        """Return a decision of at most `most` actions for each turn, blocking.

        Raises BoundaryViolation or MachineDisturbed.
        """
        self.begin(turns, most)
        return self.finish()

    def begin(self, turns: Sequence[Sequence[int]], most: int) -> None:
        """Start decisions on `turns`; `finish` returns them. Raises BoundaryViolation or MachineDisturbed."""
        self._pending = self._decision_question(turns, most)
        self._continue(self._pending, until_asked=True)

    def finish(self) -> list[Decision]:
        """Return the decisions that the latest `begin` started. Raises BoundaryViolation or MachineDisturbed."""
        return self._wait(self._pending)

    async def decide_later(self, turns: Sequence[Sequence[int]], most: int) -> list[Decision]:
        """Decide like `decide`, without blocking the event loop. Cancelling kills the process."""
        pending = self._decision_question(turns, most)
        decisions = await self._wait_later(pending)
        self.slow += self._meter.read().since(pending.deadline.start).wall > SOFT_S * len(turns)
        return decisions

    def kill(self, why: str) -> None:
        """Kill the process without waiting for its end. Later requests raise MachineDisturbed(`why`)."""
        if self._ended is None:
            self._ended = MachineDisturbed(why)
        self._signal(signal.SIGKILL)

    def close(self) -> int | None:
        """Kill the process, free the descriptors and return its wait status; None if it is unknown."""
        with self._lock:
            if self._handle < 0:
                return None
            if self._ended is None:
                self._ended = BoundaryViolation(Boundary.DEAD, "the process has been closed")
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

    # The exchange, without blocking

    def _decision_question(self, turns: Sequence[Sequence[int]], most: int) -> _Pending[list[Decision]]:
        seconds = self.hard_s + (len(turns) - 1) * SOFT_S
        about = self.codes.new_facts()
        for turn in turns:
            about += turn
        deadline = Deadline(self._meter, self.clock, seconds)
        return self._question(frames.STEP, about, deadline, lambda reply: _decisions(reply, len(turns), most))

    def _question(
        self, kind: int, numbers: Sequence[int], deadline: Deadline, parse: Callable[[list[int]], T]
    ) -> _Pending[T]:
        """Return a question that is not sent yet. Raises why the process has ended, if it has."""
        if self._ended is not None:
            raise _copy_of(self._ended)
        return _Pending(self._ask(kind, numbers, parse), deadline, bool(self._exit.poll(0)))

    def _ask(self, kind: int, numbers: Sequence[int], parse: Callable[[list[int]], T]) -> Exchange[T]:
        """Send a question and read the answer.

        Raises OSError if the process has ended, BadFrame for an invalid answer, _NotSealed and _Unasked.
        """
        if not self._sealed:
            yield from self._await_seal()
        idle_s, self._idle_s = self._idle_s, None
        if idle_s is not None and (unasked_s := self._meter.read_cpu() - idle_s) > UNASKED_S:
            raise _Unasked(f"it computed for {unasked_s:.2f} s while no decision was requested")
        if self._received:
            raise BadFrame("it replied more than once")
        self._number += 1
        if self.clock is Clock.WALL:
            self._signal(signal.SIGCONT)
        left = memoryview(frames.pack([kind, self._number, *numbers], frames.MAX_OWNER_BYTES))
        while left:
            try:
                left = left[self._channel.send(left) :]
            except BlockingIOError:
                yield select.POLLOUT
        yield _ASKED
        reply = yield from self._frame()
        if self.clock is Clock.WALL:
            self._signal(signal.SIGSTOP)
        self._idle_s = self._meter.read_cpu()
        if not reply or reply[0] != self._number:
            raise BadFrame("it replied to another request")
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
        header = frames.HEADER.size
        while len(self._received) < header:
            yield from self._receive(RECEIVED_BYTES)
        end = header + frames.body_size(bytes(self._received[:header]))
        while len(self._received) < end:
            yield from self._receive(end - len(self._received))
        body = self._received[header:end]
        del self._received[:end]
        return frames.unpack(body)

    def _receive(self, most: int) -> Generator[int, None, None]:
        while True:
            try:
                more = self._channel.recv(most)
            except BlockingIOError:
                yield select.POLLIN
                continue
            if not more:
                raise ConnectionResetError
            self._received += more
            return

    # Waiting for the answer

    def _wait(self, pending: _Pending[T]) -> T:
        """Complete an exchange, blocking."""
        self._continue(pending)
        return pending.reply

    def _continue(self, pending: _Pending[Any], until_asked: bool = False) -> None:
        """Continue an exchange to its end, or until its request is sent."""
        deadline = pending.deadline
        try:
            while True:
                event = next(pending.exchange)
                if event:
                    self._await(event, deadline)
                elif until_asked:
                    return
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

    def _await(self, event: int, deadline: Deadline) -> None:
        """Wait for an event on the channel. Raises _Late."""
        while True:
            left = deadline.left()
            # The deadline may pass while the owner is busy: an answer that can be read now counts.
            if is_ready(self._channel.fileno(), event, left):
                return
            if left <= 0 and not deadline.extend():
                raise _Late

    async def _wait_later(self, pending: _Pending[T]) -> T:
        """Complete an exchange without blocking the event loop."""
        deadline = pending.deadline
        try:
            while True:
                if event := next(pending.exchange):
                    await self._await_later(event, deadline)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        except _ENDS as error:
            left = max(SOFT_S, deadline.left())
            gone = isinstance(error, OSError) and await wait_ready(self._handle, select.POLLIN, left)
            if not gone:
                self._end(deadline)
                await wait_ready(self._handle, select.POLLIN, EXIT_S)
            raise self._failed(error, pending, gone) from None
        except BaseException:  # also a cancelled request: nothing awaits the answer
            self.kill("its decision was cancelled")
            raise

    async def _await_later(self, event: int, deadline: Deadline) -> None:
        """Wait like `_await`, without blocking the event loop."""
        while True:
            left, channel = deadline.left(), self._channel.fileno()
            # The event loop may be late itself: an answer that can be read now counts.
            if (left > 0 and await wait_ready(channel, event, left)) or is_ready(channel, event):
                return
            if left <= 0 and not deadline.extend():
                raise _Late

    # The end of the process

    def _end(self, deadline: Deadline) -> None:
        deadline.stop()
        self._signal(signal.SIGKILL)

    def _failed(self, error: Exception, pending: _Pending[Any], gone: bool) -> BoundaryViolation | MachineDisturbed:
        """Close the handle and return why: by the controller's fault or by the machine's.

        `gone` says that the process ended without being killed here.
        """
        deadline = pending.deadline
        usage, life = deadline.usage(), self._meter.read()
        before, status = self._ended, self.close()
        if before is not None:  # `kill` or `close` was called before
            self._ended = before
        elif isinstance(error, OSError):
            idle = pending.died_idle or usage.cpu < IDLE_S
            self._ended = explain_exit(status, gone, idle, life.cpu, deadline.start.wall)
        elif isinstance(error, _Late):
            self._ended = explain_late(deadline, usage)
        elif isinstance(error, _NotSealed):
            self._ended = MachineDisturbed(f"cannot start a sandbox process: {error}")
        else:
            boundary = Boundary.UNASKED if isinstance(error, _Unasked) else Boundary.FRAME
            self._ended = BoundaryViolation(boundary, str(error), deadline.start.wall)
        return _copy_of(self._ended)


class _Pending(Generic[T]):
    """An exchange in progress."""

    def __init__(self, exchange: Exchange[T], deadline: Deadline, died_idle: bool) -> None:
        self.exchange = exchange
        self.deadline = deadline
        self.died_idle = died_idle  # the process had ended before the request was sent
        self.reply: T  # set at the end


def _copy_of(error: BoundaryViolation | MachineDisturbed) -> BoundaryViolation | MachineDisturbed:
    """Return a copy of `error` to raise again."""
    return type(error)(*error.args)


def _decisions(reply: list[int], count: int, most: int) -> list[Decision]:
    """Return `count` decisions of at most `most` actions each. Raises BadFrame."""
    decisions, at = frames.decode_decisions(reply, 1, count, most)
    if at != len(reply):
        raise BadFrame(f"{len(reply) - at} numbers too many in the frame")
    return decisions
