"""Run SQL on a store's database directly, as another program would."""

from __future__ import annotations

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg

from discovery.store import DatabaseUrl, StorePlace


def run_sql(place: StorePlace, statement: str) -> list[Any]:
    """Run a statement and return its rows."""
    if isinstance(place, Path):
        with closing(sqlite3.connect(place)) as connection, connection:
            return connection.execute(statement).fetchall()
    with ThreadPoolExecutor(1) as thread:  # because a test may have an event loop that runs
        return thread.submit(lambda: asyncio.run(_run_in_postgres(place, statement))).result()


async def _run_in_postgres(url: DatabaseUrl, statement: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(url.text, password=url.password)
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()
