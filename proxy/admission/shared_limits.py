"""Limits that hold over all proxies that use one Redis.

What a request reserves is a lease in Redis, which this process renews while the request runs. If the process is killed,
its leases end and free what they held. Settlements are sent in the background, and repeated until Redis confirms them.

This process also counts what its own requests use. While Redis is away, these counts are the limits
(`AUTOTTS_LIMITS_AWAY=local`), or requests that need a limit are refused (`refuse`). When Redis is back, this process
writes its running reservations to it, and what its requests spent while Redis was away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count, islice
from secrets import token_hex
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

from pydantic import SecretStr

from proxy.admission.limits import NO_PLACE, LimitUsage, LocalLimits, Place, RequestLimits
from proxy.admission.redis_scripts import PREFIX, RedisAway, RedisScripts
from proxy.admission.token_budget import GRAIN_S, MINUTE_S, BudgetExceeded, Caps, Reservation, WindowState
from proxy.errors import LimitsAway
from proxy.settings import AwayPolicy, Settings
from proxy.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

LEASE_S: Final = 30.0
"""Seconds after which the leases of a killed proxy end."""
RENEWALS: Final = 3
"""Renewals of each lease within its duration."""
RETRY_S: Final = 1.0
"""Seconds between attempts to reach Redis while it is away."""
POLL_S: Final = 0.1
"""Seconds between attempts to take a place that other proxies hold."""
PATIENCE_S: Final = 1.0
"""Seconds for which a waiting proxy keeps its turn without another attempt."""
BATCH: Final = 100
"""Maximum leases or settlements in one call."""
KINDS: Final = ("episode", "passed")
"""Kinds of requests whose number is limited, each by itself."""

Part = tuple[str, int]
"""Part of a lease: the name of a window, and the amount reserved in it."""


class _Settlement(NamedTuple):
    """A settlement that Redis has not confirmed."""

    lease: str
    window: str
    amount: int
    cost: int
    at: float


class SharedReservation(Reservation):
    """Tokens reserved in this process and in Redis."""

    def __init__(self, local: Reservation, limits: SharedLimits, lease: str) -> None:
        super().__init__((), local.tokens)
        self._local = local
        self._limits = limits
        self._lease = lease

    def settle(self, cost: int, now: float) -> None:
        """Charge `cost` tokens and free the rest."""
        self._local.settle(cost, now)
        self._limits.settle(self._lease, cost)


class SharedPlace(Place):
    """Place among the running requests of a key over all proxies."""

    def __init__(self, limits: SharedLimits, window: str, limit: int, lease: str) -> None:
        self.window = window
        self.limit = limit
        self.lease = lease
        self.is_held = False
        self._limits = limits

    async def wait(self) -> None:
        """Wait until the place is held. Raises LimitsAway."""
        if not self.is_held:
            await self._limits.wait_for(self)

    def release(self) -> None:
        """Give the place back. Further calls do nothing."""
        self._limits.settle(self.lease, 0)


class SharedLimits:
    """Limits in Redis. `url` holds its password and is never logged. Raises SettingsError."""

    def __init__(
        self,
        url: SecretStr,
        tokens_per_minute: int | None,
        metrics: Metrics,
        away_policy: AwayPolicy = AwayPolicy.LOCAL,
        lease_s: float = LEASE_S,
    ) -> None:
        self.is_away = False
        self._local = LocalLimits(tokens_per_minute)
        self._scripts = RedisScripts(url, metrics)
        self._metrics = metrics
        self._policy = away_policy
        self._lease_s = lease_s
        self._keep_s = 2 * (MINUTE_S + lease_s)  # after its latest use, until Redis forgets a window
        self._process = token_hex(8)
        self._numbers = count()
        self._held: dict[str, Sequence[Part]] = {}  # leases that are renewed, by id
        self._unsent: set[str] = set()  # held leases that Redis may not know
        self._settlements: dict[tuple[str, str], _Settlement] = {}  # by lease and window, in order
        self._writing = asyncio.Lock()  # renewals and settlements go to Redis in order
        self._wake = asyncio.Event()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by window
        self._freed: dict[str, asyncio.Event] = {}  # by window that a request of this process waits for
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to renew leases and to send settlements. Redis may be away."""
        try:
            await self._scripts.ping()
            logger.info("limits hold over all proxies that use %s", self._scripts.display_url)
        except RedisAway as error:
            self._mark_away(error)
        self._task = asyncio.create_task(self._maintain())

    async def close(self) -> None:
        """Free what is still held, if Redis is there."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for lease in list(self._held):
            self.settle(lease, 0)
        if not self.is_away:
            with suppress(RedisAway):
                await self._send_settlements()
        await self._scripts.close()

    async def reserve(self, holder: str, per_minute: int | None, tokens: int | None) -> Reservation:
        """Reserve tokens in Redis, and in this process. Raises BudgetExceeded or LimitsAway."""
        local = await self._local.reserve(holder, per_minute, tokens)
        common = self._local.budgets.common
        caps = {holder: per_minute, "": None if common is None else common.cap}
        limits = {name: cap for name, cap in caps.items() if cap is not None}
        if not limits:
            return local
        lease = self._new_lease()
        parts = [(_tokens_window(name), local.tokens) for name in limits]
        try:
            await self._take(lease, parts, self._reserve(lease, parts, limits))
        except BaseException:
            local.settle(0, time.monotonic())
            raise
        return SharedReservation(local, self, lease)

    async def _reserve(self, lease: str, parts: Sequence[Part], limits: Mapping[str, int]) -> bool:
        """Reserve the parts of a lease in Redis. Raises BudgetExceeded or RedisAway."""
        times = map(_ms, (self._lease_s, MINUTE_S, GRAIN_S, self._keep_s))
        amounts = [number for cap, (_, amount) in zip(limits.values(), parts, strict=True) for number in (cap, amount)]
        refusal = await self._scripts.call("reserve", _keys(window for window, _ in parts), [lease, *times, *amounts])
        if not refusal[0]:
            return True
        number, wait_ms, spent, reserved = refusal
        holder = list(limits)[number - 1]
        raise BudgetExceeded(holder, wait_ms / 1000, WindowState(limits[holder], spent, reserved))

    async def place(self, kind: str, holder: str, limit: int | None) -> Place:
        """Return a place, which is held at once if there is one and no earlier request waits. Raises LimitsAway."""
        if limit is None:
            return NO_PLACE
        place = SharedPlace(self, f"{kind}:{holder}", limit, self._new_lease())
        if place.window not in self._turns:
            await self._enter(place, waiter="")
        return place

    async def wait_for(self, place: SharedPlace) -> None:
        """Wait until `place` is held. One request of this process asks for each limit at a time. Raises LimitsAway."""
        turn = self._turns.setdefault(place.window, asyncio.Lock())
        async with turn:
            freed = self._freed[place.window] = asyncio.Event()
            try:
                while not await self._enter(place, waiter=self._process):
                    with suppress(TimeoutError):
                        async with asyncio.timeout(POLL_S):
                            await freed.wait()
                    freed.clear()
            finally:
                del self._freed[place.window]

    async def _enter(self, place: SharedPlace, waiter: str) -> bool:
        """Try to take a place. Return whether it is held. Raises LimitsAway."""
        keys = (*_keys([place.window]), *(f"{PREFIX}{place.window}:{end}" for end in ("arrivals", "patience")))
        times = _ms(self._lease_s), _ms(self._keep_s)
        call = self._scripts.call("enter", keys, [place.lease, *times, place.limit, waiter, _ms(PATIENCE_S)])
        place.is_held = await self._take(place.lease, [(place.window, 1)], call)
        return place.is_held

    async def _take(self, lease: str, parts: Sequence[Part], call: Coroutine[Any, Any, Any]) -> bool:
        """Take a lease by a `call` of a script, or without Redis if the policy says so. Return whether it is held.

        Raises LimitsAway, and what the call raises.
        """
        was_away = self.is_away
        try:
            if was_away:
                raise RedisAway
            await self._send_settlements()  # what this process has freed counts for its next request
            is_held = bool(await call)
        except RedisAway as error:
            self._mark_away(error)
            if self._policy is AwayPolicy.REFUSE:
                if not was_away:
                    self._settle(lease, parts, 0)  # the script may have run
                self._metrics.refusals.labels("limits_away").inc()
                raise LimitsAway(
                    "the Redis that holds the shared limits (AUTOTTS_LIMITS) cannot be reached; retry later",
                    code="limits_away",
                ) from None
            self._unsent.add(lease)
            is_held = True
        except asyncio.CancelledError:
            self._settle(lease, parts, 0)  # the script may have run
            raise
        finally:
            call.close()
        if is_held:
            self._held[lease] = parts
        return is_held

    def settle(self, lease: str, cost: int) -> None:
        """Charge `cost` to the windows of a lease and free it. Only the first call counts."""
        parts = self._held.pop(lease, None)
        if parts is not None:
            self._unsent.discard(lease)
            self._settle(lease, parts, cost)

    def _settle(self, lease: str, parts: Sequence[Part], cost: int) -> None:
        """Schedule a settlement. Those older than a minute are dropped: their tokens no longer count."""
        now = time.monotonic()
        for window, amount in parts:
            self._settlements[lease, window] = _Settlement(lease, window, amount, cost, now)
        while (oldest := next(iter(self._settlements.values()))).at < now - MINUTE_S:
            del self._settlements[oldest.lease, oldest.window]
        self._wake.set()

    async def _send_settlements(self) -> None:
        """Send all settlements. Raises RedisAway; those that are not confirmed are sent again later."""
        while self._settlements:
            async with self._writing:
                batch = list(islice(self._settlements.values(), BATCH))
                if not batch:
                    return
                numbers = [value for item in batch for value in (item.lease, item.amount, item.cost)]
                arguments = [_ms(GRAIN_S), _ms(self._keep_s), *numbers]
                await self._scripts.call("settle", _keys(item.window for item in batch), arguments)
                for item in batch:
                    self._settlements.pop((item.lease, item.window), None)
                    if item.window in self._freed:
                        self._freed[item.window].set()

    async def _renew(self, leases: Iterable[str]) -> None:
        """Renew leases. Those that Redis does not know are taken again. Raises RedisAway."""
        async with self._writing:
            parts = [(lease, *part) for lease in leases for part in self._held.get(lease, ())]
            for start in range(0, len(parts), BATCH):
                batch = parts[start : start + BATCH]
                numbers = [value for lease, _, amount in batch for value in (lease, amount)]
                arguments = [_ms(self._lease_s), _ms(self._keep_s), *numbers]
                await self._scripts.call("renew", _keys(window for _, window, _ in batch), arguments)
            self._unsent.difference_update(lease for lease, _, _ in parts)

    async def _maintain(self) -> None:
        """Send settlements as they come, renew leases, and find out when Redis is back."""
        renew_at = time.monotonic()
        while True:
            if self.is_away:
                await asyncio.sleep(RETRY_S)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(renew_at - time.monotonic()):
                        await self._wake.wait()
            self._wake.clear()
            try:
                if self.is_away:
                    await self._restore()
                await self._send_settlements()
                if time.monotonic() >= renew_at:
                    renew_at = time.monotonic() + self._lease_s / RENEWALS
                    await self._renew(list(self._held))
            except RedisAway as error:
                self._mark_away(error)

    async def _restore(self) -> None:
        """Send settlements and running leases to Redis, and use it again. Raises RedisAway."""
        await self._scripts.ping()
        await self._send_settlements()
        await self._renew(list(self._held))
        while self._unsent:
            await self._renew(list(self._unsent))
        self.is_away = False
        self._metrics.limits_away.set(0)
        logger.warning("limits: Redis at %s is back; limits hold over all proxies again", self._scripts.display_url)

    def _mark_away(self, error: RedisAway) -> None:
        if self.is_away:
            return
        self.is_away = True
        self._metrics.limits_away.set(1)
        self._wake.set()
        is_refusing = self._policy is AwayPolicy.REFUSE
        effect = "requests with limits are refused" if is_refusing else "limits hold in this process alone"
        logger.error("limits: Redis at %s cannot be reached (%s); %s", self._scripts.display_url, error, effect)

    async def usage(self, holders: Mapping[str, Caps]) -> Mapping[str, LimitUsage]:
        """Return the usage over all proxies; that of this process while Redis is away."""
        usage = dict(await self._local.usage(holders))
        windows = [(name, _tokens_window(name)) for name, own in usage.items() if own.tokens is not None]
        limited = [name for name, caps in holders.items() if caps.episodes is not None]
        windows += [(name, f"{kind}:{name}") for name in limited for kind in KINDS]
        if self.is_away or not windows:
            return usage
        try:
            numbers = await self._scripts.call("usage", _keys(window for _, window in windows), [_ms(MINUTE_S)])
        except RedisAway as error:
            self._mark_away(error)
            return usage
        for (name, window), spent, reserved in zip(windows, numbers[::2], numbers[1::2], strict=True):
            own = usage[name]
            if own.tokens is not None and window == _tokens_window(name):
                usage[name] = own._replace(tokens=WindowState(own.tokens.cap, spent, reserved))
            else:
                kind = window.partition(":")[0]
                usage[name] = own._replace(running={**(own.running or {}), kind: reserved})
        return usage

    def _new_lease(self) -> str:
        return f"{self._process}-{next(self._numbers)}"


def create_limits(settings: Settings, metrics: Metrics) -> RequestLimits:
    """Return limits that hold over all proxies if the settings name a Redis, else limits of this process."""
    if not settings.limits:
        return LocalLimits(settings.tokens_per_minute)
    return SharedLimits(settings.limits, settings.tokens_per_minute, metrics, settings.limits_away)


def _ms(seconds: float) -> int:
    return int(1000 * seconds)


def _tokens_window(holder: str) -> str:
    return f"tokens:{holder}"


def _keys(windows: Iterable[str]) -> list[str]:
    """Return the keys of windows in Redis, each followed by the key of its leases."""
    return [key for window in windows for key in (f"{PREFIX}{window}", f"{PREFIX}{window}:leases")]
