"""Replicas behind one name: resolve it every few seconds, and let replicas come and go with its addresses.

If the name cannot be resolved, the replicas stay as they are: a name server that is down is no reason to stop serving.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Collection
from typing import Final
from urllib.parse import urlsplit

from proxy.errors import UpstreamUnreachable
from proxy.settings import MAX_REPLICAS
from proxy.upstream.fleet.fleet import Fleet
from proxy.upstream.fleet.replica import Replica

logger = logging.getLogger(__name__)

RESOLVE_S: Final = 5.0
"""Seconds after which the name server counts as down."""
RETRY_S: Final = 1.0
"""Maximum seconds between attempts as long as no address is known."""

Resolve = Callable[[str, int], Awaitable[Collection[str]]]
"""Returns the addresses of a host. Raises OSError or UnicodeError."""


async def resolve(host: str, port: int) -> Collection[str]:
    """Return the addresses of a host, as the system resolves it. Raises OSError or UnicodeError."""
    found_addresses = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return {str(address[0]) for *_, address in found_addresses}


def _reason(error: OSError | UnicodeError) -> str:
    """Return why a name could not be resolved."""
    if isinstance(error, UnicodeError):
        return f"it is not a host name ({error})"
    return "no answer in time" if isinstance(error, TimeoutError) else error.strerror or type(error).__name__


class DnsPoller:
    """Keeps the replicas of a fleet in step with the addresses of a name. `create` makes the replica of a URL."""

    def __init__(
        self, url: str, poll_s: float, fleet: Fleet, create: Callable[[str], Replica], resolve: Resolve = resolve
    ) -> None:
        self._parts = urlsplit(url)
        self.name = f"dns+http://{self._parts.netloc.rpartition('@')[2]}"  # without credentials
        self._poll_s = poll_s
        self._fleet = fleet
        self._create = create
        self._resolve = resolve
        self._members: dict[str, Replica] = {}  # by address
        self._problem = ""  # why the name could not be resolved the last time
        self._first: asyncio.Task[None] | None = None
        self._polling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Resolve the name for the first time, and begin to poll. Raises UpstreamUnreachable if no address is known."""
        if self._first is None:
            self._first = asyncio.create_task(self.refresh())
            self._polling = asyncio.create_task(self._poll(self._first))
        if not self._first.done():
            await asyncio.wait([self._first])
        if not self._members:
            raise UpstreamUnreachable(f"{self._problem}; retry later")

    async def close(self) -> None:
        """Stop polling."""
        tasks = [task for task in (self._first, self._polling) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def refresh(self) -> None:
        """Resolve the name, and let replicas come and go."""
        host, port = self._parts.hostname or "", self._parts.port or 80
        try:
            async with asyncio.timeout(RESOLVE_S):
                addresses = sorted(await self._resolve(host, port))
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
            self._report(f"cannot resolve upstream {host}: {_reason(error)}")
            return
        self._report("")
        if len(addresses) > MAX_REPLICAS:
            logger.warning("upstream %s has %s addresses; %s are used", host, len(addresses), MAX_REPLICAS)
        self._set_members(addresses[:MAX_REPLICAS])

    def _set_members(self, addresses: Collection[str]) -> None:
        kept = {address: member for address, member in self._members.items() if address in addresses}
        added = {address: self._create(self._url(address)) for address in addresses if address not in kept}
        left = [member for address, member in self._members.items() if address not in kept]
        if added or left:
            names = [", ".join(each.name for each in members) or "none" for members in (added.values(), left)]
            logger.info("upstream %s: new replicas: %s; gone: %s", self._parts.hostname, *names)
            self._members = kept | added
            self._fleet.replace(list(self._members.values()))

    def _url(self, address: str) -> str:
        user = self._parts.netloc.rpartition("@")[0]
        host = f"[{address}]" if ":" in address else address
        return self._parts._replace(netloc=f"{user}@" * bool(user) + f"{host}:{self._parts.port or 80}").geturl()

    def _report(self, problem: str) -> None:
        """Log a problem once."""
        if problem not in ("", self._problem):
            logger.warning("%s%s", problem, "; its replicas stay as they are" if self._members else "")
        self._problem = problem

    async def _poll(self, first: asyncio.Task[None]) -> None:
        await asyncio.wait([first])
        while True:
            await asyncio.sleep(self._poll_s if self._members else min(self._poll_s, RETRY_S))
            await self.refresh()
