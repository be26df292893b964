"""Client of the Redis that holds the shared limits. Every call ends within a bounded time, and none is repeated."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from proxy.admission.limit_scripts import SCRIPTS
from proxy.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from redis.asyncio import Redis

CONNECT_S: Final = 0.5
"""Seconds for connecting to Redis, for each of its replies, and for a free connection."""
CALL_S: Final = 1.0
"""Seconds for a whole call."""
CONNECTIONS: Final = 16
"""Maximum connections of this process to Redis. A call uses one for less than a millisecond."""
PREFIX: Final = "autotts:limits:"
"""Beginning of every key in Redis."""


class RedisAway(Exception):
    """Redis did not serve a call. The message says why, without the password."""


class RedisScripts:
    """Runs the scripts of the shared limits."""

    def __init__(self, url: SecretStr, metrics: Metrics) -> None:
        parts = urlsplit(url.get_secret_value())
        self.display_url = f"{parts.scheme}://{parts.hostname}:{parts.port or 6379}{parts.path}"
        self._secrets = [text for text in {parts.password, unquote(parts.password or "")} if text]
        self._seconds = metrics.limits_seconds
        self._running: set[asyncio.Task[Any]] = set()
        self._redis = _client(url)
        self._scripts = {name: self._redis.register_script(text) for name, text in SCRIPTS.items()}

    async def ping(self) -> None:
        """Check that Redis answers. Raises RedisAway."""
        await self._timed("ping", self._ping())

    async def _ping(self) -> None:
        await self._redis.ping()

    async def call(self, name: str, keys: Iterable[str], arguments: Sequence[str | int]) -> Any:
        """Run a script and return its result. Raises RedisAway; the script may have run then, or run later."""
        return await self._timed(name, self._scripts[name](keys=list(keys), args=arguments))

    async def _timed(self, name: str, call: Coroutine[Any, Any, Any]) -> Any:
        """Await a call in a task of its own, which is never cancelled.

        The client sends with `asyncio.wait_for`, which drops a cancellation that comes as it ends.
        """
        started, task = time.perf_counter(), asyncio.create_task(call)
        self._running.add(task)
        task.add_done_callback(self._end)
        try:
            async with asyncio.timeout(CALL_S):
                return await asyncio.shield(task)
        except Exception as error:  # whatever the client raises, the limits cannot be reached
            raise RedisAway(self._reason(error)) from None
        finally:
            self._seconds.labels(name).observe(time.perf_counter() - started)

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may await the task any more

    def _reason(self, error: Exception) -> str:
        text = " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())[:200]
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return text

    async def close(self) -> None:
        """Close all connections, after the calls that still run. The client ends each within seconds."""
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._redis.aclose()


def _client(url: SecretStr) -> Redis:
    """Return a client that neither retries nor waits for long. The settings have checked the URL."""
    from redis.asyncio import BlockingConnectionPool, Redis  # an optional package, which is slow to import
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    pool = BlockingConnectionPool.from_url(
        url.get_secret_value(),
        max_connections=CONNECTIONS,
        timeout=CONNECT_S,
        socket_timeout=CONNECT_S,
        socket_connect_timeout=CONNECT_S,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )
    return Redis.from_pool(pool)
