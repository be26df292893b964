"""Registry in a PostgreSQL database. A change is a transaction; its commit announces the change to the proxies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from discovery.data.hash_chained_log import hash_line
from discovery.errors import PromotionError, RegistryAway, StoreError, UncertainCommit
from discovery.promotion.storage.registry_storage import RegistryChange, RegistryStorage
from discovery.promotion.storage.tables import (
    AUDIT,
    CHANNEL,
    CONTROLLERS,
    REGISTRY_TABLES,
    STATE,
    changing_registry,
    reading,
)
from discovery.store.databases.blocking import BlockingConnection
from discovery.store.databases.places import DatabaseUrl


class RegistryDatabase(RegistryStorage):
    """A registry in a database, whose tables are made by the first change. Threads may share it."""

    mend_state: ClassVar[str] = (
        f"restore the database from a backup, or delete the rows of {STATE} and promote again; "
        f"{AUDIT} lists what was installed"
    )
    mend_audit: ClassVar[str] = "restore the database from a backup, or delete all rows of the table to begin a new log"

    def __init__(self, url: DatabaseUrl, connection: BlockingConnection | None = None) -> None:
        self._url = url
        self._connection = connection  # None: each read opens one

    @property
    def state_name(self) -> str:
        return f"{self._url}, table {STATE}"

    @property
    def audit_name(self) -> str:
        return f"{self._url}, table {AUDIT}"

    def card_name(self, digest: str) -> str:
        return f"{self._url}, card of controller {digest[:12]}"

    def source_name(self, digest: str) -> str:
        return f"{self._url}, source of controller {digest[:12]}"

    def stamp(self) -> str | None:
        """Return the hash of the latest line of the audit log."""
        rows = self._select(f"SELECT chain FROM {STATE}")
        return str(rows[0][0]) if rows else None

    def state(self) -> bytes | None:
        rows = self._select(f"SELECT content FROM {STATE}")
        return bytes(rows[0][0]) if rows else None

    def digests(self) -> list[str]:
        return sorted(digest for (digest,) in self._select(f"SELECT digest FROM {CONTROLLERS}"))

    def card(self, digest: str) -> bytes:
        rows = self._select(f"SELECT card FROM {CONTROLLERS} WHERE digest = ?", digest)
        if not rows:
            raise PromotionError(f"{self.card_name(digest)}: there is none")
        return bytes(rows[0][0])

    def source(self, digest: str) -> str:
        rows = self._select(f"SELECT source FROM {CONTROLLERS} WHERE digest = ?", digest)
        if not rows or rows[0][0] is None:
            raise PromotionError(f"{self.source_name(digest)}: there is none")
        try:
            return bytes(rows[0][0]).decode()
        except ValueError as error:
            raise PromotionError(f"{self.source_name(digest)}: {error}") from None

    def audit_lines(self) -> list[bytes]:
        return [bytes(line) for (line,) in self._select(f"SELECT line FROM {AUDIT} ORDER BY number")]

    @contextmanager
    def session(self) -> Iterator[RegistryDatabase]:
        if self._connection is not None:
            yield self
            return
        with _store_errors(), reading(self._url) as connection:
            yield RegistryDatabase(self._url, connection)

    @contextmanager
    def changing(self) -> Iterator[RegistryDatabase]:
        """Begin a transaction, and commit it at the end."""
        with _store_errors(), changing_registry(self._url) as connection, connection.transaction():
            yield RegistryDatabase(self._url, connection)

    def commit(self, change: RegistryChange) -> None:
        connection = self._connection
        if connection is None:
            raise PromotionError(f"{self._url}: a change needs the context of `changing`")
        for statement in REGISTRY_TABLES:
            connection.execute(statement)
        connection.execute_many(
            f"INSERT INTO {CONTROLLERS} (digest, card, source) VALUES (?, ?, ?) "
            "ON CONFLICT (digest) DO UPDATE SET card = excluded.card, source = excluded.source",
            change.controllers,
        )
        ((last,),) = connection.fetch_all(f"SELECT COALESCE(MAX(number), 0) FROM {AUDIT}")
        lines = enumerate((*change.missing, change.line), last + 1)
        connection.execute_many(f"INSERT INTO {AUDIT} (number, line) VALUES (?, ?)", list(lines))
        chain = hash_line(change.line)
        connection.execute(f"DELETE FROM {STATE}")
        connection.execute(f"INSERT INTO {STATE} (chain, content) VALUES (?, ?)", (chain, change.state))
        connection.execute("SELECT pg_notify(?, ?)", (CHANNEL, chain))

    def _select(self, query: str, *values: Any) -> list[Any]:
        """Return the rows of a query; none if the tables are not there yet."""
        with self.session() as storage, _store_errors():
            connection = storage._connection
            if connection is None or not connection.has_table(STATE):
                return []
            return connection.fetch_all(query, values)


@contextmanager
def _store_errors() -> Iterator[None]:
    """Raise the errors of the database as errors of the registry."""
    try:
        yield
    except UncertainCommit as error:
        raise RegistryAway(f"{error}; see `autotts controllers`; the same promotion may be repeated") from None
    except StoreError as error:
        raise RegistryAway(str(error)) from None
