"""Announcements of changes of a registry in a database, and its stamp, over one connection that stays open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from discovery.errors import RegistryAway, StoreError
from discovery.promotion.storage.tables import CHANNEL, STATE, reading_connection
from discovery.store.databases.places import DatabaseUrl
from discovery.store.databases.postgres import PostgresConnection


class Announcements:
    """Announcements on a connection. One that was lost is opened again, to listen on it, when the stamp is read."""

    def __init__(self, connection: PostgresConnection) -> None:
        self._connection = connection
        self._announced = asyncio.Event()
        self._has_table = False
        connection.listen(CHANNEL, self._announced.set)

    async def stamp(self) -> str | None:
        """Return the stamp of the registry; None if nothing is installed. Raises RegistryAway."""
        self._announced.clear()  # a change after this line is announced again
        try:
            self._has_table = self._has_table or await self._connection.has_table(STATE)
            if not self._has_table:
                return None
            rows = await self._connection.fetch_all(f"SELECT chain FROM {STATE}")
        except StoreError as error:
            raise RegistryAway(str(error)) from None
        return str(rows[0][0]) if rows else None

    async def wait(self, most_s: float) -> None:
        """Wait until a change is announced or the connection is lost, `most_s` seconds at most."""
        try:
            async with asyncio.timeout(most_s):
                await self._announced.wait()
        except TimeoutError:
            pass


@asynccontextmanager
async def open_announcements(url: DatabaseUrl) -> AsyncIterator[Announcements]:
    """Yield the announcements of the registry in a database, which need not be reachable yet."""
    connection = reading_connection(url)
    try:
        yield Announcements(connection)
    finally:
        await connection.close()
