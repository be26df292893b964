"""Connection to a store in a PostgreSQL database, through asyncpg.

Writers take turns by an advisory lock that is held for a transaction, so that a store behaves as in SQLite: what a
transaction has read stays true until it is committed. A connection that was lost is opened again by the next statement
outside a transaction. A transaction that was under way is rolled back, and its caller gets an error.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from itertools import count
from typing import Any, ClassVar, Final, TypeVar

from discovery.errors import StoreError, StoreNotCreated, UncertainCommit
from discovery.store.databases.connection import PAGE, DatabaseConnection
from discovery.store.databases.places import DatabaseUrl
from discovery.store.databases.postgres_errors import import_driver, is_lost, to_store_error
from discovery.store.databases.postgres_values import escaped, to_python
from discovery.store.schema import COLUMNS

T = TypeVar("T")
logger = logging.getLogger(__name__)

LOCK: Final = 0x6175746F747473
"""Number of the advisory lock that writers of a store take turns by."""
CONNECT_S: Final = 5.0
"""Seconds to connect to a server."""
READ_S: Final = 60.0
"""Seconds after which a statement of a reader is given up, because the server may hang."""
IDLE_MS: Final = 60_000
"""Milliseconds after which the server ends a transaction whose client does nothing, because others wait for it."""
UNANSWERED_S: Final = 30
"""Seconds without an answer of the server's machine after which a connection is lost."""
CLOSE_S: Final = 2.0
"""Seconds to close a connection."""
_SETTINGS: Final = {"application_name": "autotts", "timezone": "UTC", "client_min_messages": "error"}


class PostgresConnection(DatabaseConnection):
    """Connection to a PostgreSQL database. One statement runs at a time; others wait for it."""

    row_number: ClassVar[str] = "ctid"

    def __init__(
        self,
        url: DatabaseUrl,
        wait_ms: int,
        is_reader: bool,
        *,
        limit_s: float | None = None,
        lock: int = LOCK,
        idle_ms: int = IDLE_MS,
    ) -> None:
        """Connect later, with the first statement. A statement that takes `limit_s` is given up.

        Transactions wait for those of other connections with the same number `lock`.
        """
        super().__init__(url)
        self._url = url
        self._settings = _SETTINGS | {
            "lock_timeout": str(wait_ms or 1),  # 0 would be without a limit
            "idle_in_transaction_session_timeout": str(idle_ms),
            "default_transaction_read_only": "on" if is_reader else "off",
        }
        self._limit_s = limit_s or (READ_S if is_reader else None)  # a writer's caller has a limit of its own
        self._lock = lock
        self._channels: dict[str, Callable[[], None]] = {}
        self._turn = asyncio.Lock()
        self._opened: Any = None
        self._inserts: dict[tuple[str, Sequence[str]], str] = {}
        self._in_transaction = False
        self._cursors = count()

    async def execute(self, statement: str, values: Sequence[Any] = ()) -> int:
        status = await self._run(
            lambda opened: opened.execute(numbered(statement), *map(escaped, values)) if values
            else opened.execute(statement)
        )  # fmt: skip
        return _changed_rows(status)

    async def execute_many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        values = [tuple(map(escaped, row)) for row in rows]
        if values:
            await self._run(lambda opened: opened.executemany(numbered(statement), values))

    async def insert(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
        """Insert rows by one statement, to which each column is an array."""
        values = [list(map(escaped, column)) for column in zip(*rows, strict=True)]
        if not values:
            return 0

        async def insert(opened: Any) -> Any:
            key = table, columns
            if key not in self._inserts:
                self._inserts[key] = await _array_insert(opened, table, columns)
            return await opened.execute(self._inserts[key], *values)

        return _changed_rows(await self._run(insert))

    async def fetch_all(self, statement: str, values: Iterable[Any] = ()) -> list[Any]:
        bound = list(map(escaped, values))
        return to_python(await self._run(lambda opened: opened.fetch(numbered(statement), *bound)))

    async def pages(self, statement: str) -> AsyncIterator[list[Any]]:
        is_alone = not self._in_transaction
        if is_alone:
            await self.execute("BEGIN READ ONLY")
            self._in_transaction = True
        name = f"pages_{next(self._cursors)}"  # the driver keeps the columns of a statement by its text
        try:
            await self.execute(f"DECLARE {name} NO SCROLL CURSOR FOR {statement}")
            while part := await self.fetch_all(f"FETCH {PAGE} FROM {name}"):
                yield part
            await self.execute(f"CLOSE {name}")
        finally:
            if is_alone:
                await self.roll_back()

    async def begin(self) -> None:
        try:
            await self._run(lambda opened: opened.execute(f"BEGIN; SELECT pg_advisory_xact_lock({self._lock})"))
        except BaseException:
            await self.roll_back()
            raise
        self._in_transaction = True

    async def commit(self) -> None:
        try:
            status = await self._run(lambda opened: opened.execute("COMMIT"))
        except StoreError as error:
            raise UncertainCommit(f"{error}; whether the last transaction was written is unknown") from None
        self._in_transaction = False
        if status != "COMMIT":  # the server rolls a failed transaction back without an error
            raise StoreError(f"{self._url}: the transaction had failed")

    async def roll_back(self) -> None:
        self._in_transaction = False
        async with self._turn:
            if self._opened is not None and self._opened.is_in_transaction():
                with suppress(Exception):  # a lost connection; the server has rolled back
                    await self._opened.execute("ROLLBACK")

    async def has_store(self) -> bool:
        return await self.has_table("autotts_store")

    async def has_table(self, name: str) -> bool:
        """Return whether there is a table of this name."""
        named = "SELECT 1 FROM pg_catalog.pg_class WHERE relname = ? AND pg_table_is_visible(oid)"
        return bool(await self.fetch_all(named, (name,)))  # `to_regclass` may miss a table that was made meanwhile

    def listen(self, channel: str, heard: Callable[[], None]) -> None:
        """Call `heard` whenever `channel` is notified, and when the connection is lost.

        It holds for connections that are opened from now on. A server that cannot notify, as a standby, is accepted.
        """
        self._channels[channel] = heard

    def integer_part(self, expression: str) -> str:
        return f"CAST(FLOOR({expression}) AS BIGINT)"

    def adapt_schema(self, statement: str) -> str:
        """Return a statement with SQLite's range of integers, its order of texts, and without its storage."""
        adapted = re.sub(r"\bINTEGER\b", "BIGINT", statement.replace(" WITHOUT ROWID", ""))
        return re.sub(r"\bTEXT\b", 'TEXT COLLATE "C"', adapted)

    async def erase(self) -> bool:
        connection = PostgresConnection(self._url, int(self._settings["lock_timeout"]), is_reader=False)
        try:
            await connection.execute(f"VACUUM {', '.join(COLUMNS)}, episode_facts")  # not possible in a transaction
        finally:
            await connection.close()
        return False

    async def flush_log(self) -> bool:
        return False

    @property
    def is_current(self) -> bool:
        return True

    def is_same(self, other: DatabaseConnection) -> bool:
        return isinstance(other, PostgresConnection) and self._url == other._url

    async def close(self) -> None:
        """Close the connection, if it is open."""
        opened, self._opened = self._opened, None
        if opened is None:
            return
        try:
            await opened.close(timeout=CLOSE_S)
        except Exception:  # the server is gone
            opened.terminate()

    async def _run(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """Return the result of `work` on the connection. Outside a transaction, a lost one is opened again once."""
        async with self._turn:
            is_new = self._opened is None or self._opened.is_closed()
            if is_new and self._in_transaction:
                raise StoreError(f"{self._url}: the connection to the server was lost")
            try:
                return await self._limited(work)
            except Exception as error:
                if is_new or self._in_transaction or not (is_lost(error) or self._opened.is_closed()):
                    raise to_store_error(self._url, error) from None
            try:
                await self.close()
                return await self._limited(work)
            except Exception as error:
                raise to_store_error(self._url, error) from None

    async def _limited(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """Return the result of `work`. A connection on which it takes too long is given up."""
        opened = await self._connected()
        try:
            async with asyncio.timeout(self._limit_s):
                return await work(opened)
        except TimeoutError:
            opened.terminate()
            raise

    async def _connected(self) -> Any:
        if self._opened is None or self._opened.is_closed():
            self._opened = await connect(self._url, self._settings)
            self._inserts.clear()
            for channel, heard in self._channels.items():
                await _listen(self._opened, channel, heard)
        return self._opened


@asynccontextmanager
async def open_postgres(
    url: DatabaseUrl, wait_ms: int, *, create: bool = False, is_reader: bool = False
) -> AsyncIterator[PostgresConnection]:
    """Connect to the store in the database at `url`; with `create`, there need not be one. Raises StoreError."""
    connection = PostgresConnection(url, wait_ms, is_reader)
    try:
        if not await connection.has_store() and not create:
            raise StoreNotCreated(
                f"{url}: there is no store in this database; a proxy makes it when it records, and so does "
                "`autotts import`"
            )
        yield connection
    finally:
        await connection.close()


async def connect(url: DatabaseUrl, settings: dict[str, str]) -> Any:
    """Return a connection of the driver. Raises its errors, or StoreError if the database cannot hold a store."""
    driver = import_driver(url)
    opened = await driver.connect(url.text, password=url.password, timeout=CONNECT_S, server_settings=settings)
    try:
        _detect_loss(opened)
        if (encoding := opened.get_settings().server_encoding) != "UTF8":
            raise StoreError(f"{url}: the database has the encoding {encoding}; create it with ENCODING 'UTF8'")
        await opened.execute(  # committed must mean that it is on disk
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
        await opened.set_type_codec(  # of sums and means
            "numeric", schema="pg_catalog", encoder=str, decoder=_number, format="text"
        )
    except BaseException:
        opened.terminate()
        raise
    return opened


async def _listen(opened: Any, channel: str, heard: Callable[[], None]) -> None:
    opened.add_termination_listener(lambda _: heard())
    try:
        await opened.add_listener(channel, lambda *_: heard())
    except Exception as error:
        if is_lost(error) or opened.is_closed():
            raise
        logger.info("%s: no notifications: %s", channel, error)


def _detect_loss(opened: Any) -> None:
    """Let the connection fail if the server's machine is gone, which the system would notice after hours."""
    connected: socket.socket = opened._transport.get_extra_info("socket")  # the driver has no option for it
    if connected.family == socket.AF_UNIX:
        return
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPIDLE", None), UNANSWERED_S // 3),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPINTVL", None), UNANSWERED_S // 3),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPCNT", None), 2),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_USER_TIMEOUT", None), 1000 * UNANSWERED_S),
    ):
        if option is not None:  # some systems lack it
            connected.setsockopt(level, option, value)


async def _array_insert(opened: Any, table: str, columns: Sequence[str]) -> str:
    """Return the statement that inserts rows given as an array for each column."""
    names = ", ".join(columns)
    places = ", ".join(f"${number}" for number in range(1, len(columns) + 1))
    prepared = await opened.prepare(f"INSERT INTO {table} ({names}) VALUES ({places})")
    arrays = ", ".join(
        f"${number}::{parameter.name}[]" for number, parameter in enumerate(prepared.get_parameters(), start=1)
    )
    return f"INSERT INTO {table} ({names}) SELECT * FROM unnest({arrays}) ON CONFLICT DO NOTHING"


@lru_cache(maxsize=1000)
def numbered(statement: str) -> str:
    """Return a statement with `$1`, `$2`, … for its `?`."""
    first, *rest = statement.split("?")
    return first + "".join(f"${number}{text}" for number, text in enumerate(rest, start=1))


def _changed_rows(status: str) -> int:
    """Return the number of rows in the status of a statement, such as `INSERT 0 3`."""
    last = status.rpartition(" ")[2]
    return int(last) if last.isdigit() else 0


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)
