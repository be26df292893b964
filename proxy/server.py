"""HTTP server that runs the app: socket, connection limits, and graceful shutdown on signals."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Final

import uvicorn

from discovery.exit_signals import exit_signals, ignore_hangups
from proxy.app import create_app
from proxy.errors import StartError
from proxy.http.connections import Connections, connection_capacity
from proxy.http.graceful_shutdown import ShutdownMiddleware
from proxy.http.protocol import ConnectionLimits, ProtocolContext, protocol_class
from proxy.settings import Settings
from proxy.telemetry.worker_metrics import WorkerPlace

logger = logging.getLogger(__name__)

UNPRIVILEGED: Final = 1024
"""First port that Linux gives to programs without root's rights."""
CLOSE_S: Final = 5
"""Seconds that connections have to close after the last request."""


class Server(uvicorn.Server):
    """Uvicorn server that handles signals itself.

    Uvicorn would raise them again before the embedded model is stopped.
    """

    def __init__(
        self,
        settings: Settings,
        on_up: Callable[[], None] = lambda: None,
        place: WorkerPlace | None = None,
        *,
        heeds_signals: bool = True,
    ) -> None:
        self.up = asyncio.Event()  # set once the server accepts connections
        app = self._app = create_app(settings, place)
        self.gate = ShutdownMiddleware(app)

        def count(event: str) -> None:
            app.state.service.metrics.connections_cut.labels(event).inc()

        room = connection_capacity(settings.max_connections, settings.branches_in_flight + settings.max_passed)
        self.connections = Connections(room, settings.max_connections_per_address, count)
        limits = ConnectionLimits(settings.head_s, settings.body_s, settings.body_rate, settings.write_s)
        self._on_up = on_up
        self._heeds_signals = heeds_signals
        self._drain_s = settings.drain_s
        self._draining: asyncio.Task[None] | None = None
        super().__init__(
            uvicorn.Config(
                self.gate,
                http=protocol_class(ProtocolContext(limits, self.connections, count)),  # type: ignore[arg-type]
                timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type]  # a timer's seconds
                ws="none",
                lifespan="on",
                log_config=None,
                proxy_headers=False,  # forwarded headers are not trusted
                access_log=False,
                timeout_graceful_shutdown=CLOSE_S,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()
        self._on_up()

    def take_restart(self) -> None:
        """Reset the circuit breaker after a restart of the upstream."""
        if self.up.is_set():
            self._app.state.service.engine.reset()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse new requests, wait for running ones and exit. A second signal exits at once, but for SIGHUP."""
        if self._draining is None:
            logger.info("%s: running requests have %g s to end", signal.Signals(sig).name, self._drain_s)
            self.gate.shut()
            self._draining = asyncio.get_running_loop().create_task(self._drain())
            ignore_hangups()
        elif sig != signal.SIGHUP:  # one may have been under way
            self._draining.cancel()
            self.should_exit = True

    async def _drain(self) -> None:
        if cut := await self.gate.drain(self._drain_s):
            logger.warning("%s requests were cancelled: they had not ended %g s after the signal", cut, self._drain_s)
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, *exit_signals()) if self._heeds_signals else ()
        for each in signals:
            loop.add_signal_handler(each, self.handle_exit, each, None)
        yield
        for each in signals:
            loop.remove_signal_handler(each)


def listen(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """Return a socket bound to a port, which other sockets of this user may share. Raises StartError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The event loop disables Nagle's algorithm only if the protocol is given. Otherwise each response takes 40 ms more.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"port {port} of {host} is in use; stop the process that listens there or use --port"
            ) from None
        is_privileged = isinstance(error, PermissionError) and port < UNPRIVILEGED
        advice = f"; ports below {UNPRIVILEGED} need root; use --port" if is_privileged else ""
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror}{advice}") from None
    return listening


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[str]:
    """Run a proxy on a free port of 127.0.0.1 and yield its URL. Signals are left to the caller. Raises StartError."""
    with listen("127.0.0.1", 0) as listening:
        server = Server(settings, heeds_signals=False)
        task = asyncio.create_task(server.serve(sockets=[listening]))
        up = asyncio.create_task(server.up.wait())
        try:
            await asyncio.wait({task, up}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                raise StartError("the proxy ended before it accepted connections; its log has the details")
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            up.cancel()
            server.should_exit = True
            await task
