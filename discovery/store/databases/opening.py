"""Open a connection to a store, in whichever database its place names."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

from discovery.store.databases.connection import DatabaseConnection
from discovery.store.databases.places import StorePlace
from discovery.store.databases.postgres import open_postgres
from discovery.store.databases.sqlite import open_sqlite
from discovery.store.schema import MIGRATIONS


def open_connection(
    place: StorePlace, wait_ms: int, *, create: bool = False, is_reader: bool = False, newest: int = len(MIGRATIONS)
) -> AbstractAsyncContextManager[DatabaseConnection]:
    """Connect to the store at `place`. With `create`, there need not be one yet. A reader cannot write.

    Another process's transaction is waited for `wait_ms`. The context raises StoreError; a file of a version above
    `newest` is left unchanged.
    """
    if isinstance(place, Path):
        return open_sqlite(place, wait_ms, create=create, is_reader=is_reader, newest=newest)
    return open_postgres(place, wait_ms, create=create, is_reader=is_reader)
