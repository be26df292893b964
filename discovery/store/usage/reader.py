"""Read the usage of a store over a connection of its own, which cannot write.

The connection is opened when it is first needed, and again when the file was replaced or a statement failed. So a
proxy can start before its store exists.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from types import TracebackType
from typing import Any, Final

from discovery.errors import StoreError
from discovery.store.databases.connection import DatabaseConnection
from discovery.store.databases.opening import open_connection
from discovery.store.databases.places import StorePlace
from discovery.store.records import stored_time
from discovery.store.schema import MIGRATIONS
from discovery.store.usage.facts import FAILED_STOPS, KINDS, prompt_tokens_of
from discovery.store.usage.periods import ALL, Bucket, CostOfBeta, Period, Scope, UsagePoint, UsageTotal
from discovery.store.usage.requests import (
    MAX_COUNTED,
    MAX_PAGE,
    FilterChoices,
    ListedRequest,
    PageEnd,
    RequestFilter,
    RequestPage,
)
from discovery.store.usage.sums import BATCH, DAY, HOUR, LAST, Measure, name_expressions

WAIT_MS: Final = 1_000
"""Milliseconds to wait for another process's transaction when the store is opened."""
RECENT: Final = 5_000
"""Latest requests that costs are averaged over."""
MOST_CHOICES: Final = 500
"""Values of each menu of a filter; without keys, clients can make as many tenants as they like."""


class UsageReader:
    """Reads the usage of the store at `place`. As a context manager, it closes its connection at the end."""

    def __init__(self, place: StorePlace) -> None:
        self.place = place
        self._opening = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._connection: DatabaseConnection | None = None

    async def __aenter__(self) -> UsageReader:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; it is opened again if it is needed."""
        async with self._opening:
            self._connection = None
            await self._stack.aclose()

    # Sums

    async def series(self, measure: Measure, period: Period, scope: Scope = ALL) -> list[UsagePoint]:
        """Return the sums of a period by bucket and name, in order of time. Empty buckets have no points.

        Buckets below an hour are summed from the requests themselves, so such a period should be short.
        """
        bucket = period.bucket
        sums = await self._sums(measure, period, scope, "name")
        starts = {at: bucket.start(at) for at in {at for at, _ in sums}}  # once for all names in a bucket
        return [UsagePoint(starts[at], name, *figures) for (at, name), figures in sorted(sums.items())]

    async def _sums(
        self, measure: Measure, period: Period, scope: Scope, column: str
    ) -> dict[tuple[str, str], tuple[int, int, float]]:
        """Return requests, tokens and seconds by bucket, and by name or another column.

        Days that are summed come from `usage_days`, further hours from `usage_hours`, and the rest from the facts.
        """
        width, (first, last_bucket) = period.bucket.prefix, period.bounds
        last = last_bucket + LAST
        until = await self._summed_until() if period.bucket in (Bucket.HOUR, Bucket.DAY) else ""
        from_days = until[:DAY] if period.bucket is Bucket.DAY else ""
        rows: list[Any] = []
        for table, stored, begin, end in (
            ("usage_days", DAY, first, from_days),
            ("usage_hours", HOUR, max(first, from_days), until),
        ):
            if begin < min(end, last):
                at = "start" if stored == width else f"substr(start, 1, {width})"  # a function takes a fifth longer
                where, values = _conditions(
                    {"measure = ?": measure, "start >= ?": begin, "start < ?": min(end, last), **_scoped(scope)}
                )
                rows += await self.read(
                    f"SELECT {at}, {column}, SUM(episodes), SUM(tokens), SUM(seconds) "
                    f"FROM {table} WHERE {where} GROUP BY 1, 2",
                    values,
                )
        begin = max(first, until)
        if begin < last:
            where, values = _conditions({"created >= ?": begin, "created < ?": last, **_scoped(scope)})
            rows += await self._sums_of_facts(measure, width, where, values, column)
        sums: dict[tuple[str, str], tuple[int, int, float]] = {}
        for at, name, requests, tokens, seconds in rows:
            known = sums.get((at, name), (0, 0, 0.0))
            sums[at, name] = (known[0] + requests, known[1] + tokens, known[2] + seconds)
        return sums

    async def _sums_of_facts(
        self, measure: Measure, width: int, where: str, values: Sequence[Any], column: str
    ) -> list[Any]:
        start = f"substr(created, 1, {width})"
        if measure is not Measure.KIND:
            name = name_expressions(await self._connected())[measure] if column == "name" else column
            return await self.read(
                f"SELECT {start}, {name}, COUNT(*), SUM(tokens), SUM(seconds) FROM episode_facts WHERE {where} "
                "GROUP BY 1, 2",
                values,
            )
        sums = ", ".join(
            f"COUNT(NULLIF({kind}, 0)), SUM({kind}), SUM(CASE WHEN {kind} <> 0 THEN seconds ELSE 0.0 END)"
            for kind in KINDS
        )
        rows = await self.read(f"SELECT {start}, {sums} FROM episode_facts WHERE {where} GROUP BY 1", values)
        return [
            (at, kind, *figures[3 * place : 3 * place + 3])
            for at, *figures in rows
            for place, kind in enumerate(KINDS)
            if figures[3 * place]
        ]

    async def _summed_until(self) -> str:
        ((until,),) = await self.read("SELECT until FROM usage_summed")
        return str(until)

    async def totals(self, measure: Measure, period: Period, scope: Scope = ALL) -> list[UsageTotal]:
        """Return the sums of a period by name, in order of their names."""
        return sorted(_totals(await self._sums(measure, period, scope, "name")))

    async def by_tenant(self, period: Period, scope: Scope = ALL) -> list[UsageTotal]:
        """Return the sums of a period by tenant, most tokens first. The empty name is callers without a key."""
        sums = await self._sums(Measure.STOP, period, scope, "tenant")
        return sorted(_totals(sums), key=lambda total: (-total.tokens, total.name))

    async def prompt_tokens(self, period: Period) -> Counter[str]:
        """Return the prompt tokens of a period by tenant, of requests with a reply. Each prompt counts once.

        They are read from the episodes themselves, so this takes seconds for a million requests.
        """
        sums: Counter[str] = Counter()
        first, last_bucket = period.bounds
        after = (first, "")
        while True:
            rows = await self.read(
                "SELECT created, id, tenant, about, ledger FROM episodes WHERE (created, id) > (?, ?) AND created < ? "
                "ORDER BY created, id LIMIT ?",
                [*after, last_bucket + LAST, BATCH],
            )
            for _, _, tenant, about, ledger in rows:
                sums[tenant] += prompt_tokens_of(about, ledger)
            if len(rows) < BATCH:
                return sums
            after = rows[-1][:2]

    async def costs(self, model: str, since: datetime, tenant: str | None = None) -> list[CostOfBeta]:
        """Return mean tokens and seconds by controller and β, of the latest full answers of a model since a time.

        Requests whose deadline passed count if they have tokens: without any they had no reply.
        """
        where, values = _conditions({"model = ?": model, "created >= ?": stored_time(since), "tenant = ?": tenant})
        failed = ", ".join("?" * len(FAILED_STOPS))
        rows = await self.read(
            "SELECT controller, ROUND(CAST(beta AS NUMERIC), 2), COUNT(*), AVG(tokens), AVG(seconds) FROM "
            f"(SELECT controller, beta, tokens, seconds FROM episode_facts WHERE {where} "
            f"AND stop NOT IN ({failed}) AND (stop <> 'deadline' OR tokens > 0) ORDER BY created DESC LIMIT ?) "
            "AS latest GROUP BY 1, 2 ORDER BY 1, 2",
            [*values, *FAILED_STOPS, RECENT],
        )
        return [CostOfBeta(*row) for row in rows]

    # Requests

    async def requests(self, which: RequestFilter, after: PageEnd | None = None, limit: int = 50) -> RequestPage:
        """Return a page of at most `limit` requests, latest first, that begins after the end of another page."""
        if not 1 <= limit <= MAX_PAGE:
            raise ValueError(f"limit is {limit}; it must be from 1 to {MAX_PAGE}")
        where, values = _conditions(which.clauses())
        if after is not None:
            where += " AND (created, id) < (?, ?)"
            values += after
        rows = await self.read(
            "SELECT facts.created, facts.id, request_id, facts.tenant, facts.model, facts.controller, facts.beta, "
            "facts.stop, tokens, seconds, rounds, branches, is_fallback FROM "
            f"(SELECT * FROM episode_facts WHERE {where} ORDER BY created DESC, id DESC LIMIT ?) AS facts "
            "JOIN episodes ON episodes.id = facts.id ORDER BY facts.created DESC, facts.id DESC",
            [*values, limit + 1],
        )
        listed = [
            ListedRequest._make((request, created, *rest, bool(fallback)))
            for created, _, request, *rest, fallback in rows[:limit]
        ]
        end = PageEnd(*rows[limit - 1][:2]) if len(rows) > limit else None
        return RequestPage(listed, end)

    async def count(self, which: RequestFilter) -> int:
        """Return how many requests a filter selects, or MAX_COUNTED + 1 if they are more than that."""
        where, values = _conditions(which.clauses())
        counted = f"SELECT COUNT(*) FROM (SELECT 1 FROM episode_facts WHERE {where} LIMIT ?) AS counted"
        ((number,),) = await self.read(counted, [*values, MAX_COUNTED + 1])
        return int(number)

    async def choices(self, tenant: str | None = None) -> FilterChoices:
        """Return the values that occur in the requests of a tenant, or of all; at most MOST_CHOICES of each."""
        day = (await self._summed_until())[:DAY]  # the first that is not summed

        async def distinct(column: str, measure: Measure, fact: str) -> list[str]:
            of_days, day_values = _conditions({"measure = ?": measure, "start < ?": day, "tenant = ?": tenant})
            of_facts, fact_values = _conditions({"created >= ?": day, "tenant = ?": tenant})
            values = await self.read(
                f"SELECT {column} FROM usage_days WHERE {of_days} "
                f"UNION SELECT {fact} FROM episode_facts WHERE {of_facts} ORDER BY 1 LIMIT ?",
                [*day_values, *fact_values, MOST_CHOICES],
            )
            return [value for (value,) in values]

        return FilterChoices(
            models=await distinct("model", Measure.STOP, "model"),
            controllers=await distinct("name", Measure.CONTROLLER, "controller"),
            stops=await distinct("name", Measure.STOP, "stop"),
            tenants=await distinct("tenant", Measure.STOP, "tenant"),
        )

    # Connection

    async def read(self, statement: str, values: Iterable[Any] = ()) -> list[Any]:
        """Return all rows of a statement. Raises StoreError."""
        connection = await self._connected()
        try:
            return await connection.fetch_all(statement, values)
        except (StoreError, ValueError) as error:  # ValueError: the connection was closed meanwhile
            await self.close()
            raise error if isinstance(error, StoreError) else StoreError(f"{self.place}: {error}") from None

    async def _connected(self) -> DatabaseConnection:
        """Return the open connection; open it if there is none or the file was replaced. Raises StoreError."""
        async with self._opening:
            if self._connection is not None and self._connection.is_current:
                return self._connection
            self._connection = None
            await self._stack.aclose()
            async with AsyncExitStack() as stack:
                connection = await stack.enter_async_context(open_connection(self.place, WAIT_MS, is_reader=True))
                await self._check_version(connection)
                self._stack = stack.pop_all()
            self._connection = connection
            return connection

    async def _check_version(self, connection: DatabaseConnection) -> None:
        versions: Sequence[Any] = await connection.fetch_all("SELECT version FROM autotts_store")
        if versions != [(len(MIGRATIONS),)]:
            raise StoreError(
                f"{self.place}: the store is of another version than this program; "
                "bring it up to date with `autotts store info`"
            )


def _totals(sums: Mapping[tuple[str, str], tuple[int, int, float]]) -> list[UsageTotal]:
    """Return sums by bucket and name, by name alone."""
    totals: dict[str, UsageTotal] = {}
    for (_, name), (requests, tokens, seconds) in sums.items():
        known = totals.get(name, UsageTotal(name, 0, 0, 0.0))
        totals[name] = UsageTotal(name, known.requests + requests, known.tokens + tokens, known.seconds + seconds)
    return list(totals.values())


def _scoped(scope: Scope) -> dict[str, Any]:
    return {"tenant = ?": scope.tenant, "model = ?": scope.model}


def _conditions(clauses: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Return the clauses that have a value, joined, and their values. Without any, everything is selected."""
    used = {clause: value for clause, value in clauses.items() if value is not None}
    return " AND ".join(used) or "TRUE", list(used.values())
