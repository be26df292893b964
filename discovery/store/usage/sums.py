"""Sums of episode facts by hour and by day, for hours that have ended.

Adding an episode adds its facts only, because sums would make every write slower. `sum_usage` sums the hours that have
ended since; readers add the facts that are not summed yet. Where facts of summed hours are added or removed, these
hours are summed again in the same transaction, so that no error can accumulate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any, Final

from discovery.store.databases.connection import DatabaseConnection
from discovery.store.usage.facts import BETA_STEPS, COLUMNS, KINDS, STORED_COLUMNS, Facts, stored_facts

BATCH: Final = 2_000
"""Episodes that are read at a time when everything is made anew."""
HOUR: Final = len("2026-01-01T00")
"""Characters of a stored time that give its hour."""
DAY: Final = len("2026-01-01")
"""Characters of a stored time that give its day."""
LAST: Final = "~"
"""Text that sorts after every continuation of a prefix of a stored time."""


class Measure(StrEnum):
    """Property that sums are kept by, besides time, tenant and model."""

    KIND = "kind"  # what tokens were spent on; counts the episodes that spent any
    STOP = "stop"
    CONTROLLER = "controller"
    BETA = "beta"  # step of the β histogram
    LATENCY = "latency"  # step of the latency histogram


def name_expressions(connection: DatabaseConnection) -> dict[Measure, str]:
    """Return expressions over table `episode_facts` that give the name under which an episode is counted."""
    beta_step = connection.integer_part(f"beta * {BETA_STEPS} + 0.5")
    return {
        Measure.STOP: "stop",
        Measure.CONTROLLER: "controller",
        Measure.BETA: f"CAST({beta_step} AS TEXT)",
        Measure.LATENCY: "CAST(latency AS TEXT)",
    }


def _parts(connection: DatabaseConnection) -> list[tuple[str, str, str, str]]:
    """Return measure, name, tokens and condition of each statement that sums facts."""
    return [
        *((measure.value, name, "tokens", "") for measure, name in name_expressions(connection).items()),
        *((Measure.KIND.value, f"'{kind}'", kind, f"AND {kind} <> 0") for kind in KINDS),
    ]


async def summed_until(connection: DatabaseConnection) -> str:
    """Return the hour before which everything is summed, or an empty text."""
    ((until,),) = await connection.fetch_all("SELECT until FROM usage_summed")
    return str(until)


async def add_usage(connection: DatabaseConnection, facts: Sequence[Facts], added: int) -> None:
    """Add the facts of episodes that were inserted. `added` is how many of them were not there before."""
    if added == len(facts):
        await connection.insert("episode_facts", COLUMNS, facts)
    else:
        for _, identity, *_ in facts:  # rare: some were there already, perhaps with another time
            stored = await connection.fetch_all(f"SELECT {STORED_COLUMNS} FROM episodes WHERE id = ?", (identity,))
            await connection.insert("episode_facts", COLUMNS, _readable(stored))
    await _sum_again(connection, {(created[:HOUR], tenant) for created, _, tenant, *_ in facts})


async def drop_usage(connection: DatabaseConnection, episodes: Sequence[tuple[str, str, str]]) -> None:
    """Remove the usage of episodes that were removed, given by id, time and tenant."""
    keys = [(created, identity) for identity, created, _ in episodes]
    await connection.execute_many("DELETE FROM episode_facts WHERE created = ? AND id = ?", keys)
    hours = {(created[:HOUR], tenant) for _, created, tenant in episodes if isinstance(created, str)}  # or corrupt
    await _sum_again(connection, hours)


async def rebuild(connection: DatabaseConnection) -> None:
    """Make all usage anew from the episodes. Corrupt episodes are left out."""
    until, last = await summed_until(connection), ""
    for table in ("episode_facts", "usage_hours", "usage_days"):
        await connection.delete_rows(table)
    statement = f"SELECT {STORED_COLUMNS} FROM episodes WHERE id > ? ORDER BY id LIMIT ?"
    while batch := await connection.fetch_all(statement, (last, BATCH)):
        await connection.insert("episode_facts", COLUMNS, _readable(batch))
        last = batch[-1][1]
    await connection.execute("UPDATE usage_summed SET until = ''")
    await sum_usage(connection, until)


async def sum_usage(connection: DatabaseConnection, until: str) -> None:
    """Sum the facts before the hour `until` that are not summed yet."""
    since = await summed_until(connection)
    if until <= since:
        return
    for measure, name, tokens, condition in _parts(connection):
        await connection.execute(_sum_statement(measure, name, tokens, condition), (since, until))
    await connection.execute(
        f"INSERT INTO usage_days {_DAYS} WHERE start >= ? AND start < ? GROUP BY 1, 2, 3, 4, 5",
        (since[:DAY], until[:DAY]),
    )
    await connection.execute("UPDATE usage_summed SET until = ?", (until,))


_DAYS: Final = (
    f"SELECT measure, substr(start, 1, {DAY}), tenant, model, name, SUM(episodes), SUM(tokens), SUM(seconds) "
    "FROM usage_hours"
)


def _sum_statement(measure: str, name: str, tokens: str, condition: str) -> str:
    """Return the statement that sums the facts between two times by hour."""
    return (
        f"INSERT INTO usage_hours SELECT '{measure}', substr(created, 1, {HOUR}), tenant, model, {name}, COUNT(*), "
        f"SUM({tokens}), SUM(seconds) FROM episode_facts WHERE created >= ? AND created < ? {condition} "
        "GROUP BY 1, 2, 3, 4, 5"
    )


async def _sum_again(connection: DatabaseConnection, hours: set[tuple[str, str]]) -> None:
    """Sum some hours of some tenants again, and their days, as far as they were summed."""
    until = await summed_until(connection)
    hours = {(hour, tenant) for hour, tenant in hours if hour < until}
    if not hours:
        return
    days = {(hour[:DAY], tenant) for hour, tenant in hours if hour[:DAY] < until[:DAY]}
    for table, starts in (("usage_hours", hours), ("usage_days", days)):
        doomed = [(measure, *start) for start in sorted(starts) for measure in Measure]
        statement = f"DELETE FROM {table} WHERE measure = ? AND start = ? AND tenant = ?"
        await connection.execute_many(statement, doomed)
    between = (
        f"SELECT DISTINCT substr(created, 1, {HOUR}), tenant FROM episode_facts WHERE created >= ? AND created < ?"
    )
    left = await connection.fetch_all(between, (min(hours)[0], max(hours)[0] + LAST))
    periods = [(hour, hour + LAST, tenant) for hour, tenant in sorted(hours.intersection(left))]
    for measure, name, tokens, condition in _parts(connection):
        statement = _sum_statement(measure, name, tokens, f"AND tenant = ? {condition}")
        await connection.execute_many(statement, periods)
    sum_days = (
        f"INSERT INTO usage_days {_DAYS} WHERE measure = ? AND start >= ? AND start < ? AND tenant = ? "
        "GROUP BY 1, 2, 3, 4, 5"
    )
    wanted = [(measure, day, day + LAST, tenant) for day, tenant in sorted(days) for measure in Measure]
    await connection.execute_many(sum_days, wanted)


def _readable(rows: Iterable[Sequence[Any]]) -> list[Facts]:
    return [facts for facts in map(stored_facts, rows) if facts is not None]
