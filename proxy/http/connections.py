"""Limit open connections, by address and in all, and make room by closing those that wait the longest."""

from __future__ import annotations

import ipaddress
import logging
import resource
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

logger = logging.getLogger(__name__)

SPARE_DESCRIPTORS: Final = 512
"""File descriptors for the store, logs, sealed processes and everything else that is no HTTP connection."""
_IPV6_SITE: Final = 64
"""Leading bits of an IPv6 address that belong to one client, who may use any address below them."""


class Evictable(Protocol):
    """A connection that can be closed to make room for another."""

    def evict(self) -> None:
        """Close the connection at once."""


class Connections:
    """Open connections. Those that wait for their client, idle or in the midst of a request, may be evicted.

    A full table makes room by evicting the connection that has waited longest, so that clients who hold connections
    without using them cannot keep others out.
    """

    def __init__(self, most: int, most_per_address: int, on_event: Callable[[str], object] = lambda _: None) -> None:
        self.most = most
        self.most_per_address = most_per_address
        self.on_event = on_event  # called with "evicted" or "refused"
        self._open: dict[Evictable, str] = {}  # with their addresses
        self._by_address: Counter[str] = Counter()
        self._waiting: OrderedDict[Evictable, None] = OrderedDict()  # the longest first
        self._waiting_at: dict[str, OrderedDict[Evictable, None]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: Evictable, address: str) -> bool:
        """Take in a new connection, which waits. Returns False if there is no room and nothing to evict."""
        address = client_of(address)
        if self._by_address[address] >= self.most_per_address:
            is_room = self._evict(self._waiting_at.get(address))
        else:
            is_room = len(self._open) < self.most or self._evict(self._waiting)
        if not is_room:
            self._tidy(address)
            self.on_event("refused")
            return False
        self._open[connection] = address
        self._by_address[address] += 1
        self.wait(connection)
        return True

    def leave(self, connection: Evictable) -> None:
        """Forget a connection that is closed. Does nothing if it is forgotten already."""
        self.serve(connection)
        address = self._open.pop(connection, None)
        if address is not None:
            self._by_address[address] -= 1
            self._tidy(address)

    def wait(self, connection: Evictable) -> None:
        """Note that a connection waits for its client from now on."""
        address = self._open.get(connection)
        if address is not None and connection not in self._waiting:
            self._waiting[connection] = None
            self._waiting_at.setdefault(address, OrderedDict())[connection] = None

    def serve(self, connection: Evictable) -> None:
        """Note that a connection's client waits for its answer: it may not be evicted."""
        if connection in self._waiting:
            del self._waiting[connection]
            del self._waiting_at[self._open[connection]][connection]

    def _evict(self, waiting: OrderedDict[Evictable, None] | None) -> bool:
        if not waiting:
            return False
        oldest = next(iter(waiting))
        self.leave(oldest)
        oldest.evict()
        self.on_event("evicted")
        return True

    def _tidy(self, address: str) -> None:
        if self._by_address[address] <= 0:
            del self._by_address[address]
            self._waiting_at.pop(address, None)


def client_of(address: str) -> str:
    """Return what stands for a client in counts: an IPv4 address, or the /64 network of an IPv6 address."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, _IPV6_SITE), strict=False))


def room_for(connections: int, upstream: int) -> int:
    """Raise this process's limit of open files as far as needed and allowed, and return how many connections fit.

    `upstream` is how many connections to the upstream may be open at the same time.
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
        "at most %d connections are accepted, not max_connections=%d: the system allows %d open files; raise it with "
        "`ulimit -n %d`",
        room,
        connections,
        soft,
        wanted,
    )
    return room
