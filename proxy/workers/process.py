"""One worker process, which only the supervisor starts.

Its order comes over standard input, because settings hold secrets. It writes a line to standard output when it accepts
connections. It ends in order when standard input ends, as when the supervisor is killed.
"""

from __future__ import annotations

import asyncio
import pickle
import shutil
import signal
import sys
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import Console

from discovery.exit_signals import exit_signals
from proxy.runtime import event_loop, freeze_objects
from proxy.server import Server, listen
from proxy.settings import Settings
from proxy.telemetry.logs import configure_logging
from proxy.telemetry.worker_metrics import WorkerPlace

UP: Final = b"up\n"
RESTARTED: Final = b"restarted\n"
"""Line for a worker when the embedded model was restarted."""


class WorkerOrder(NamedTuple):
    """Settings of a worker, whose port is shared by all, and its place among the workers."""

    settings: Settings
    place: WorkerPlace


async def serve(order: WorkerOrder) -> None:
    """Serve requests until a signal, or until standard input ends."""

    def report_up() -> None:
        freeze_objects()
        sys.stdout.buffer.write(UP)
        sys.stdout.buffer.flush()

    server = Server(order.settings, report_up, order.place)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    heeding = asyncio.create_task(_heed(reader, server, order.place.folder))
    try:
        with listen(order.settings.host, order.settings.port, is_shared=True) as listening:
            await server.serve(sockets=[listening])
    finally:
        heeding.cancel()
        await asyncio.gather(heeding, return_exceptions=True)


async def _heed(reader: asyncio.StreamReader, server: Server, folder: Path) -> None:
    """Do what the supervisor says. If it was killed, remove the workers' folder in its place, and end."""
    while line := await reader.readline():
        if line == RESTARTED:
            server.take_restart()
    shutil.rmtree(folder, ignore_errors=True)
    server.handle_exit(signal.SIGTERM, None)


def main() -> None:
    """Run a worker."""
    for each in exit_signals():  # until the server handles signals
        signal.signal(each, lambda *_: sys.exit(0))
    size = int.from_bytes(sys.stdin.buffer.read(8))
    order: WorkerOrder = pickle.loads(sys.stdin.buffer.read(size))  # from the supervisor only
    configure_logging(order.settings, Console(stderr=True))
    with asyncio.Runner(loop_factory=event_loop()) as runner:
        runner.run(serve(order))
