"""Fleet of replicas: which of them a request goes to.

    key of the request ──► order by rendezvous hashing ──► first replica that is up and not too loaded
                           of the replicas with its model   (spill-over; else the least loaded)

Replicas that are down are left out. If all are down, they are tried nevertheless: the checks may be wrong or late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Final

from proxy.errors import (
    UpstreamCircuitOpen,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from proxy.telemetry.metrics import Metrics
from proxy.upstream.fleet.rendezvous import ranked
from proxy.upstream.fleet.replica import Replica
from proxy.upstream.health_check import is_failure
from proxy.upstream.transport import CHECK_S

MAX_ATTEMPTS: Final = 3
"""Maximum number of replicas that one call is sent to. It bounds the harm of a request that makes replicas fail."""
MOVE_REASONS: Final = ("spilled", "failed")
"""Reasons for which requests leave a replica, in metrics."""


def is_replica_failure(error: UpstreamError) -> bool:
    """Return whether an error is a replica's failure, so that another one may do better. An invalid reply is none."""
    if isinstance(error, UpstreamRefused):
        return is_failure(error.upstream_status)
    return isinstance(error, UpstreamUnreachable | UpstreamTimeout | UpstreamCircuitOpen | UpstreamDisconnected)


class Fleet:
    """Replicas, and the choice among them."""

    def __init__(self, replicas: Sequence[Replica], spill_load: float, metrics: Metrics) -> None:
        self.replicas = list(replicas)
        self._spill_load = spill_load  # load from which new requests go to the next replica
        self._metrics = metrics
        self._closing: set[asyncio.Task[None]] = set()  # of replicas that left
        for replica in self.replicas:
            self._bind_gauges(replica)

    @property
    def available(self) -> list[Replica]:
        """The replicas that new requests may go to; all of them if there is none."""
        return [replica for replica in self.replicas if replica.is_available] or self.replicas

    def choose(self, model: str, key: bytes, tried: Collection[Replica] = ()) -> Replica | None:
        """Return the replica for a request that was sent to those `tried` before; None if no other is left."""
        left = self._left(model, tried)
        order = ranked(key, [replica for replica in left if replica.is_available] or left, lambda each: each.name)
        if not order:
            return None
        if order[0].load < self._spill_load:
            return order[0]
        chosen = next((replica for replica in order if replica.load < self._spill_load), None)
        chosen = chosen or min(order, key=lambda replica: replica.load)
        if chosen is not order[0]:
            self.count_move(order[0], "spilled")
        return chosen

    def has_other(self, model: str, tried: Collection[Replica]) -> bool:
        """Return whether there is a replica for a request besides those `tried`."""
        return bool(self._left(model, tried))

    def _left(self, model: str, tried: Collection[Replica]) -> list[Replica]:
        candidates = [replica for replica in self.replicas if replica.serves(model)] or self.replicas
        return [replica for replica in candidates if replica not in tried]

    def count_move(self, replica: Replica, reason: str) -> None:
        """Count a request that left a replica, or did not go there, by one of MOVE_REASONS."""
        if not replica.has_left:
            self._metrics.replica_moves.labels(replica.name, reason).inc()

    def replace(self, replicas: Sequence[Replica]) -> None:
        """Replace the replicas. Those that leave get no more requests, and those that they have go on."""
        gone = [replica for replica in self.replicas if replica not in replicas]
        new = [replica for replica in replicas if replica not in self.replicas]
        self.replicas = list(replicas)
        for replica in gone:
            replica.has_left = True
            self._remove_gauges(replica)
            closing = asyncio.create_task(replica.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        for replica in new:
            self._bind_gauges(replica)

    async def check(self) -> bool:
        """Check the health of all replicas. Return as soon as one is up; the other checks go on."""
        return await _wait_for_one({replica.begin_check() for replica in self.replicas})

    async def revive(self, model: str, tried: Collection[Replica]) -> None:
        """If no replica but those `tried` is available for a request, see whether one has come back.

        Replicas are checked once in RECHECK_S seconds for that, and requests wait so long.
        """
        left = self._left(model, tried)
        if any(replica.is_available for replica in left):
            return
        await asyncio.sleep(max((replica.check_due_s for replica in left), default=0))
        with suppress(TimeoutError):
            async with asyncio.timeout(CHECK_S):
                await _wait_for_one({replica.begin_check() for replica in left if not replica.check_due_s})

    async def close(self) -> None:
        """Cancel health checks that are under way."""
        await asyncio.gather(*self._closing, *(replica.close() for replica in self.replicas))

    def _bind_gauges(self, replica: Replica) -> None:
        """Bind a replica's gauges, which are computed when Prometheus reads them."""
        metrics, name, breaker = self._metrics, replica.name, replica.client.breaker
        metrics.replica_up.labels(name).set_function(lambda: replica.is_up is True)
        metrics.replica_circuit_open.labels(name).set_function(lambda: not breaker.is_closed)
        metrics.replica_branches.labels(name).set_function(lambda: replica.branches)
        for reason in MOVE_REASONS:
            metrics.replica_moves.labels(name, reason)

    def _remove_gauges(self, replica: Replica) -> None:
        """Remove a replica's series, so that there are never more than there are replicas."""
        metrics = self._metrics
        for gauge in (metrics.replica_up, metrics.replica_circuit_open, metrics.replica_branches):
            gauge.remove(replica.name)
        for reason in MOVE_REASONS:
            metrics.replica_moves.remove(replica.name, reason)


async def _wait_for_one(checks: set[asyncio.Task[bool]]) -> bool:
    """Wait until a check has passed, or all have failed. Return whether one has passed."""
    while checks:
        done, checks = await asyncio.wait(checks, return_when=asyncio.FIRST_COMPLETED)
        if any(not check.cancelled() and check.result() for check in done):
            return True
    return False
