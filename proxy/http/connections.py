"""Limit open connections, per address and in total. A full table evicts the connection that has waited longest."""

from __future__ import annotations

import ipaddress
import logging
import resource
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

logger = logging.getLogger(__name__)

SPARE_DESCRIPTORS: Final = 512
"""File descriptors reserved for the store, logs, sandbox processes and everything else but HTTP connections."""
_IPV6_SITE: Final = 64
"""Prefix length of the IPv6 network that counts as one client, because a client can use any address in it."""


class Evictable(Protocol):
    """A connection that can be closed to make room for another."""

    def evict(self) -> None:
        """Close the connection at once."""


class Connections:
    """Table of open connections.

    A connection that waits for its client, between requests or during one, may be evicted. A full table evicts the
    connection that has waited longest, so that clients with unused connections cannot lock others out.
    """

    def __init__(self, most: int, most_per_address: int, on_event: Callable[[str], object] = lambda _: None) -> None:
        self.most = most
        self.most_per_address = most_per_address
        self._on_event = on_event  # called with "evicted" or "refused"
        self._open: dict[Evictable, str] = {}  # address of each connection
        self._by_address: Counter[str] = Counter()  # open connections
        self._waiting: OrderedDict[Evictable, None] = OrderedDict()  # longest wait first
        self._waiting_at: dict[str, OrderedDict[Evictable, None]] = {}  # by address, longest wait first

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: Evictable, address: str) -> bool:
        """Add a new connection, as one that waits. Return False if the table is full and nothing can be evicted."""
        address = client_key(address)
        if self._by_address[address] >= self.most_per_address:
            is_room = self._evict(self._waiting_at.get(address))
        else:
            is_room = len(self._open) < self.most or self._evict(self._waiting)
        if not is_room:
            self._forget_idle_address(address)
            self._on_event("refused")
            return False
        self._open[connection] = address
        self._by_address[address] += 1
        self.wait(connection)
        return True

    def leave(self, connection: Evictable) -> None:
        """Remove a closed connection. Does nothing if it has been removed already."""
        self.serve(connection)
        address = self._open.pop(connection, None)
        if address is not None:
            self._by_address[address] -= 1
            self._forget_idle_address(address)

    def wait(self, connection: Evictable) -> None:
        """Mark a connection as waiting for its client. It may be evicted from now on."""
        address = self._open.get(connection)
        if address is not None and connection not in self._waiting:
            self._waiting[connection] = None
            self._waiting_at.setdefault(address, OrderedDict())[connection] = None

    def serve(self, connection: Evictable) -> None:
        """Mark a connection as serving a request. It may not be evicted."""
        if connection in self._waiting:
            del self._waiting[connection]
            del self._waiting_at[self._open[connection]][connection]

    def _evict(self, waiting: OrderedDict[Evictable, None] | None) -> bool:
        if not waiting:
            return False
        oldest = next(iter(waiting))
        self.leave(oldest)
        oldest.evict()
        self._on_event("evicted")
        return True

    def _forget_idle_address(self, address: str) -> None:
        if self._by_address[address] <= 0:
            del self._by_address[address]
            self._waiting_at.pop(address, None)


def client_key(address: str) -> str:
    """Return the key by which a client's connections are counted: its IPv4 address or its IPv6 /64 network."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, _IPV6_SITE), strict=False))


def connection_capacity(connections: int, upstream: int) -> int:
    """Raise the limit of open files as far as needed and allowed. Return how many client connections fit.

    `upstream` is the maximum number of open connections to the upstream.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + upstream + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        except (OSError, ValueError) as error:
            logger.warning("the limit of open files stays at %d: %s", soft, error)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    room = max(1, min(connections, max(soft - upstream - SPARE_DESCRIPTORS, soft // 2)))
    logger.warning(
        "at most %d connections are accepted, not max_connections=%d: the system allows %d open files; raise the limit "
        "with `ulimit -n %d`",
        room,
        connections,
        soft,
        wanted,
    )
    return room
