"""Supervisor of several worker processes that share one port. A worker that ends is started again.

Each worker has a listening socket of its own (SO_REUSEPORT), among which the system divides the connections. A worker
that ends takes its socket along, so that new connections go to the others.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from discovery.exit_signals import exit_signals, ignore_hangups
from proxy.errors import StartError
from proxy.server import listen
from proxy.settings import Settings
from proxy.telemetry.worker_metrics import WorkerPlace
from proxy.workers.process import RESTARTED, UP, WorkerOrder
from proxy.workers.shares import of_worker

logger = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.5
MOST_PAUSE_S: Final = 10.0
"""Seconds before a worker is started again; twice as many each time if it ends soon after its start."""
SOON_S: Final = 10.0
_ROOT: Final = str(Path(__file__).parents[2])
_START: Final = "import sys; sys.path.insert(0, sys.argv[1]); from proxy.workers.process import main; main()"
"""Program of a worker. It imports the same files as this process, whatever is in the working directory."""


class Supervisor:
    """Runs `settings.workers` workers. `on_up` is called once all accept connections."""

    def __init__(self, settings: Settings, on_up: Callable[[], None]) -> None:
        self._settings = of_worker(settings)
        self._on_up = on_up
        self._workers: dict[int, asyncio.subprocess.Process] = {}  # by number
        self._up: set[int] = set()  # numbers of workers that have accepted connections
        self._is_announced = False
        self._is_stopping = False
        self._stopping = asyncio.Event()

    async def run(self, listening: socket.socket) -> None:
        """Run until a signal, then wait for the workers. Raises StartError if a worker cannot start at first.

        `listening` has shown that the port is free. It is replaced by a socket that keeps the port for the workers.
        """
        host, port = listening.getsockname()[:2]
        listening.close()
        self._settings = self._settings.model_copy(update={"port": port})
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, *exit_signals())
        for each in signals:
            loop.add_signal_handler(each, self._heed, each)
        with (
            listen(host, port, is_shared=True),
            TemporaryDirectory(prefix="autotts-workers-") as folder,  # only this user may enter it
        ):
            try:
                async with asyncio.TaskGroup() as tasks:
                    for number in range(self._settings.workers):
                        tasks.create_task(self._keep(WorkerPlace(number, Path(folder))))
            except* StartError as errors:
                raise errors.exceptions[0] from None
            finally:
                for each in signals:
                    loop.remove_signal_handler(each)

    def take_restart(self) -> None:
        """Tell the workers that the upstream was restarted."""
        for worker in self._workers.values():
            if worker.stdin is not None and not worker.stdin.is_closing():
                worker.stdin.write(RESTARTED)

    def _heed(self, sign: signal.Signals) -> None:
        """Pass a signal on. The first lets running requests end. A second one does not, but for SIGHUP."""
        if not self._is_stopping or sign != signal.SIGHUP:
            ignore_hangups()
            self._stop()

    def _stop(self) -> None:
        self._is_stopping = True
        self._stopping.set()
        for worker in self._workers.values():
            with suppress(ProcessLookupError):
                worker.send_signal(signal.SIGTERM)

    async def _keep(self, place: WorkerPlace) -> None:
        """Keep one worker running. Raises StartError if it fails before it has ever accepted connections."""
        pause_s = FIRST_PAUSE_S
        while not self._is_stopping:
            started = time.monotonic()
            try:
                problem, hint = f"ended with status {await self._run(place)}", "; the log above has the reason"
            except OSError as error:  # the system lacks memory, processes or descriptors: the other workers go on
                problem, hint = f"cannot be started: {error.strerror or error}", ""
            if self._is_stopping:
                return
            if place.number not in self._up:
                self._stop()
                raise StartError(f"worker {place.number} {problem}{hint}")
            pause_s = min(2 * pause_s, MOST_PAUSE_S) if time.monotonic() - started < SOON_S else FIRST_PAUSE_S
            logger.error("worker %d %s; it starts again in %g s", place.number, problem, pause_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()

    async def _run(self, place: WorkerPlace) -> int:
        """Run a worker and return its exit status. It ends with this process."""
        order = pickle.dumps(WorkerOrder(self._settings, place))
        pipe = asyncio.subprocess.PIPE
        process = self._workers[place.number] = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", _START, _ROOT),
            stdin=pipe,
            stdout=pipe,
            start_new_session=True,  # signals of a terminal come only through the supervisor
        )
        orders, reports = process.stdin, process.stdout
        try:
            if orders is None or reports is None:
                raise StartError(f"worker {place.number} has no pipes")
            orders.write(len(order).to_bytes(8) + order)
            if self._is_stopping:
                process.send_signal(signal.SIGTERM)
            if await reports.readline() == UP:
                self._note_up(place.number)
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            if orders is not None:
                orders.close()

    def _note_up(self, number: int) -> None:
        self._up.add(number)
        if len(self._up) == self._settings.workers and not self._is_announced:
            self._is_announced = True
            self._on_up()
