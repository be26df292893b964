"""Start sandbox processes: a zygote process forks them, and a proof shows that their seal holds.

SandboxSpawner ──orders──▶ zygote ──forks──▶ child ◀──frames──▶ SandboxHandle
"""

from __future__ import annotations

import atexit
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Final, NamedTuple

from controllers.core.compiled import CORE, PURE
from controllers.errors import MachineDisturbed, SandboxUnavailable
from controllers.sandbox import frames
from controllers.sandbox.attempts import ATTEMPTS
from controllers.sandbox.deadline import HARD_S, Clock
from controllers.sandbox.frames import BadFrame
from controllers.sandbox.handle import SandboxHandle
from controllers.sandbox.proof import AttemptResult, Proof, prove
from controllers.sandbox.seal import ALL_LAYERS, Layer
from controllers.sandbox.zygote import ORDER, REAP, REPLY, SPAWN, TRY

PROVE_EVERY: Final = 1000
"""Processes after which the seal is proven again. A proof starts about fifteen; a search starts hundreds a minute."""
PATIENCE_S: Final = 10.0
"""Seconds the zygote may take for an order, and a process for an attempt to break out."""
ADVICE: Final = (
    "run `autotts doctor` for details, or --allow-unsandboxed to run controllers from files with all your permissions"
)
PASSING: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
"""Errors of a machine that lacks descriptors, memory or processes. They say nothing of its sandbox."""
ROOT: Final = Path(__file__).parents[2]
_START: Final = "import sys; sys.path.append({root!r}); from controllers.sandbox.zygote import main; main({descriptor})"


class _ForkedProcess(NamedTuple):
    """A process that the zygote has forked."""

    process: int
    channel: socket.socket
    zygote: int  # process id


class SandboxSpawner:
    """One zygote and its sandbox processes. It is thread-safe. Tests use fewer `layers` to show that each is needed."""

    def __init__(self, layers: Layer = ALL_LAYERS, python: str = sys.executable) -> None:
        self.layers = layers
        self.proof: Proof | None = None  # the latest
        self._python = python
        self._lock = threading.RLock()
        self._zygote: subprocess.Popen[bytes] | None = None
        self._orders: socket.socket | None = None
        self._spawned = 0  # since the latest proof

    def check(self) -> Proof:
        """Prove the seal now. If anything goes wrong, the proof says that the seal does not hold."""
        try:
            return self._prove()
        except OSError as error:
            self.proof = Proof(reason=f"cannot start a sandbox process: {error}")
            return self.proof

    def _prove(self) -> Proof:
        """Prove the seal. Raises OSError if the machine has no descriptors or memory left, and keeps the last proof."""
        self._spawned = 0
        if sys.platform != "linux":
            self.proof = Proof(reason=f"processes can be sealed on Linux only, not on {sys.platform}")
        else:
            try:
                self.proof = prove(self._attempt)
            except SandboxUnavailable as error:
                self.proof = Proof(reason=str(error))
        return self.proof

    def spawn(self, hard_s: float = HARD_S, clock: Clock = Clock.WALL) -> SandboxHandle:
        """Start a sandbox process. Raises SandboxUnavailable, and always does once a proof has failed.

        Raises MachineDisturbed if the machine has no descriptors or memory left.
        """
        try:
            if self.layers == ALL_LAYERS:
                self._require_proof()
            self._spawned += 1
            return self._handle_of(self._fork(SPAWN, self.layers), hard_s, clock)
        except OSError as error:
            raise MachineDisturbed(f"cannot start a sandbox process: {error.strerror or error}") from error

    def _handle_of(self, forked: _ForkedProcess, hard_s: float, clock: Clock) -> SandboxHandle:
        """Return the handle of a process. If there can be none, end the process and raise OSError."""
        reap = partial(self._reap, zygote=forked.zygote)
        try:
            return SandboxHandle(forked.process, forked.channel, reap, hard_s, clock)
        except OSError:
            forked.channel.close()
            with suppress(ProcessLookupError):
                os.kill(forked.process, signal.SIGKILL)  # nobody has reaped it, so the number is still its own
            reap(forked.process)
            raise

    def close(self) -> None:
        """End the zygote and every process it has forked."""
        with self._lock:
            if self._zygote is not None and self._orders is not None:
                self._orders.close()
                self._zygote.kill()
                self._zygote.wait()
                self._zygote = self._orders = None

    def _require_proof(self) -> None:
        proof = self.proof
        if proof is None or (proof.sealed and self._spawned >= PROVE_EVERY):
            proof = self._prove()
        if not proof.sealed:
            raise SandboxUnavailable(f"this machine cannot seal controllers: {proof.lacking}; {ADVICE}")

    def _attempt(self, number: int) -> AttemptResult:
        """Let a process try to break out, and return how it ended."""
        process, channel, zygote = self._fork(TRY, ATTEMPTS[number].layers, number)
        with channel:
            channel.settimeout(PATIENCE_S)
            try:
                received = b""
                while more := channel.recv(frames.MAX_FRAME_BYTES):
                    received += more
                message = ""
                if received:
                    body = frames.unpack(received[frames.HEADER.size :])
                    message = frames.decode_text(body, 0, frames.MAX_FRAME_BYTES)[0]
            except (TimeoutError, ValueError, BadFrame) as error:
                message = f"{type(error).__name__}: {error}"
        status = self._reap(process, zygote)
        if status is None:
            raise SandboxUnavailable("the zygote process ended while a sandbox process tried to break out")
        return AttemptResult(status, frames.printable(message))

    # Orders to the zygote

    def _fork(self, order: int, layers: Layer, attempt: int = 0) -> _ForkedProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process, zygote = self._order((order, int(layers), attempt), theirs)
            except BaseException:
                ours.close()
                raise
        if process < 0:
            ours.close()
            raise SandboxUnavailable(f"cannot fork a sandbox process: {os.strerror(-process)}")
        return _ForkedProcess(process, ours, zygote)

    def _reap(self, process: int, zygote: int) -> int | None:
        """Return the wait status of a process; None if the zygote that forked it has ended."""
        with self._lock:
            if self._zygote is None or self._zygote.pid != zygote:  # a later zygote does not know it
                return None
            try:
                status = self._order((REAP, process, 0))[0]
            except SandboxUnavailable:
                return None
        return status if status >= 0 else None

    def _order(self, message: tuple[int, int, int], channel: socket.socket | None = None) -> tuple[int, int]:
        """Send an order to the zygote; return its answer and its process id. Raises SandboxUnavailable."""
        with self._lock:
            if message[0] != REAP and (self._zygote is None or self._zygote.poll() is not None):
                self._start()
            zygote, orders = self._zygote, self._orders
            if orders is None or zygote is None:
                raise SandboxUnavailable("the zygote process is not running")
            try:
                socket.send_fds(orders, [ORDER.pack(*message)], [] if channel is None else [channel.fileno()])
                reply = orders.recv(REPLY.size)
            except OSError as error:
                reply, reason = b"", str(error)
            else:
                reason = "it ended"
            if len(reply) != REPLY.size:
                self.close()
                raise SandboxUnavailable(f"the zygote process failed: {reason}")
            return int(REPLY.unpack(reply)[0]), zygote.pid

    def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            code = _START.format(root=str(ROOT), descriptor=theirs.fileno())
            try:
                self._zygote = subprocess.Popen(
                    [self._python, "-s", "-P", "-c", code],
                    env={"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", PURE: "" if CORE.compiled else "1"},
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    process_group=0,  # signals that a terminal sends to the owner's group do not reach it
                    pass_fds=[theirs.fileno()],
                )
            except BaseException as error:
                ours.close()
                if isinstance(error, OSError) and error.errno not in PASSING:
                    raise SandboxUnavailable(f"{self._python} does not start: {error}") from None
                raise
        ours.settimeout(PATIENCE_S)
        self._orders = ours


@cache
def spawner() -> SandboxSpawner:
    """Return the spawner of this process."""
    made = SandboxSpawner()
    atexit.register(made.close)
    return made
