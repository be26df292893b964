"""Tables of the registry and the ledger in PostgreSQL, and the locks by which their writers take turns.

They are made by the first change, beside the tables of a store or in a database of their own. Contents are bytes, the
same as in files.
"""

from __future__ import annotations

from typing import Final

from discovery.store.databases.blocking import BlockingConnection
from discovery.store.databases.places import DatabaseUrl
from discovery.store.databases.postgres import LOCK, PostgresConnection

STATE: Final = "autotts_registry"
CONTROLLERS: Final = "autotts_controllers"
AUDIT: Final = "autotts_audit"
LEDGER: Final = "autotts_ledger"

CHANNEL: Final = "autotts_registry"
"""Channel on which a change of the registry is announced."""

REGISTRY_TABLES: Final = (
    f"CREATE TABLE IF NOT EXISTS {STATE} (chain TEXT NOT NULL, content BYTEA NOT NULL)",  # one row
    f"CREATE TABLE IF NOT EXISTS {CONTROLLERS} (digest TEXT PRIMARY KEY, card BYTEA NOT NULL, source BYTEA)",
    f"CREATE TABLE IF NOT EXISTS {AUDIT} (number BIGINT PRIMARY KEY, line BYTEA NOT NULL)",
)
LEDGER_TABLE: Final = f"CREATE TABLE IF NOT EXISTS {LEDGER} (number BIGINT PRIMARY KEY, line BYTEA NOT NULL)"

_READ_S: Final = 10.0
"""Seconds after which a read is given up, because the server may hang."""
_CHANGE_MS: Final = 10_000
"""Milliseconds to wait for another process's change of the registry."""
_JUDGE_MS: Final = 3_600_000
"""Milliseconds to wait for another process's judgement, and that one may take while others wait for it."""


def reading(url: DatabaseUrl) -> BlockingConnection:
    """Return a connection for reading."""
    return BlockingConnection(reading_connection(url))


def reading_connection(url: DatabaseUrl) -> PostgresConnection:
    """Return a connection for reading in the caller's event loop."""
    return PostgresConnection(url, _CHANGE_MS, is_reader=True, limit_s=_READ_S)


def changing_registry(url: DatabaseUrl) -> BlockingConnection:
    """Return a connection whose transactions are the only ones that change the registry."""
    limit_s = _READ_S + _CHANGE_MS / 1000
    return BlockingConnection(PostgresConnection(url, _CHANGE_MS, is_reader=False, limit_s=limit_s, lock=LOCK + 1))


def changing_ledger(url: DatabaseUrl) -> BlockingConnection:
    """Return a connection whose transactions are the only ones that change the ledger."""
    return BlockingConnection(PostgresConnection(url, _JUDGE_MS, is_reader=False, lock=LOCK + 2, idle_ms=_JUDGE_MS))
