"""The replay store, in a SQLite file or in a PostgreSQL database.

Acknowledged writes are committed and survive a power cut: SQLite's write-ahead log has `synchronous=FULL`, and
PostgreSQL has `synchronous_commit`. A single task writes. It puts all waiting work into one transaction, so that many
writers share one sync and no caller's cancellation can leave a transaction open.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, TypeVar

from discovery.data.recordings import Cell, Origin, RecordedQuestion, Split, Version
from discovery.errors import CorruptRow, StoreError
from discovery.store import removal, rows, transactions
from discovery.store.checksums import Row, with_checksum
from discovery.store.databases.connection import DatabaseConnection
from discovery.store.databases.opening import open_connection
from discovery.store.databases.places import StorePlace
from discovery.store.loading import load_recordings
from discovery.store.migration import migrate
from discovery.store.records import (
    AddedCounts,
    CellSummary,
    Feedback,
    ForgottenCounts,
    Label,
    SearchRun,
    ServedEpisode,
    ServedSummary,
    StoreItem,
    VerificationReport,
    names_of,
    utc_now,
)
from discovery.store.row_checks import REPAIR_HINT, describe_row, read_rows
from discovery.store.schema import COLUMNS, MIGRATIONS, Migration, select_statement
from discovery.store.usage.facts import Facts, facts_of
from discovery.store.usage.sums import HOUR, add_usage, sum_usage
from discovery.store.write_queue import WriteQueue

logger = logging.getLogger(__name__)

T = TypeVar("T")

EXPIRED_AT_ONCE: Final = 2_000
"""Episodes and feedback that one transaction removes at most when they expire."""
WAIT_MS: Final = 10_000
"""Default time to wait for another process's transaction."""


class Store:
    """An open store. Use `Store.open` to get one."""

    def __init__(self, place: StorePlace, writes: WriteQueue, reading: DatabaseConnection) -> None:
        self.place = place
        self._writes = writes
        self.reading = reading  # cannot write

    @property
    def transactions(self) -> int:
        """Transactions committed by this object."""
        return self._writes.transactions

    @property
    def is_moved(self) -> bool:
        """Whether the file has been renamed, removed, replaced or overwritten since it was opened.

        When the context of such a store ends, its log is written into the file, wherever that is now. SQLite would
        leave the log behind for the next file of that name.
        """
        return not self.reading.is_current

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        place: StorePlace,
        *,
        create: bool = False,
        migrations: Sequence[Migration] = MIGRATIONS,
        wait_ms: int = WAIT_MS,
    ) -> AsyncIterator[Store]:
        """Open the store at `place` and bring it up to date; with `create`, make a new one if there is none.

        Another process's transaction is waited for `wait_ms`. Leaving the context completes queued writes. Raises
        StoreError.
        """
        newest = len(migrations)
        async with (
            open_connection(place, wait_ms, create=create, newest=newest) as writing,
            open_connection(place, wait_ms, create=create, is_reader=True, newest=newest) as reading,
        ):
            if not reading.is_same(writing):
                raise StoreError(f"{place}: the store was replaced while it was being opened; try again")
            await migrate(writing, migrations)
            writes = WriteQueue(writing)
            store = cls(place, writes, reading)
            task = asyncio.create_task(writes.run())
            try:
                yield store
            finally:
                writes.close()
                await asyncio.shield(task)
                if writing.is_overwritten:
                    logger.error(
                        "%s: the store was overwritten while it was in use, and what was written since is not in it; "
                        "stop every program that uses it and restore the copy again",
                        place,
                    )
                elif store.is_moved:
                    with suppress(StoreError):  # then the log stays, which prevents a new store of the same name
                        await writing.flush_log()

    # Writing

    async def add(self, recordings: Sequence[RecordedQuestion]) -> AddedCounts:
        """Add all recordings or none; those that exist already are left unchanged.

        A question keeps the split and the reference it was first added with. A recording that was not made for a
        request replaces one that holds a part of its branches, as when a collection was continued.
        """
        return await self.write(lambda connection: transactions.add_recordings(connection, recordings))

    async def add_all(self, items: Sequence[StoreItem]) -> list[StoreItem]:
        """Add all items from the proxy or none; those that exist already are left unchanged.

        Forgotten data is not added again: recordings and feedback are added only if their request's episode is there.
        Returns the recordings and the feedback that were left out for that reason.
        """
        episodes = [item for item in items if isinstance(item, ServedEpisode)]
        feedback = [item for item in items if isinstance(item, Feedback)]
        recordings = [item for item in items if isinstance(item, RecordedQuestion)]

        async def work(connection: DatabaseConnection) -> list[StoreItem]:
            kept = await transactions.without_forgotten(connection, episodes)
            if kept:
                episode_rows, facts = await asyncio.to_thread(_episode_rows, kept)
                await add_usage(connection, facts, await connection.insert_rows("episodes", episode_rows))
            asked = {item.request_id for item in feedback} | {recorded.request for recorded in recordings}
            served_requests = await transactions.served_among(connection, asked)
            rated = [item for item in feedback if item.request_id in served_requests]
            if rated:
                await connection.insert_rows("feedback", map(rows.feedback_row, rated))
            served = [recorded for recorded in recordings if recorded.request in served_requests]
            if served:
                await transactions.add_recordings(connection, served)
            return [
                *(item for item in feedback if item.request_id not in served_requests),
                *(recorded for recorded in recordings if recorded.request not in served_requests),
            ]

        return await self.write(work)

    async def set_labels(self, labels: Sequence[Label], removed: Sequence[Label] = ()) -> None:
        """Replace the labels that questions have from the same source, and remove the labels `removed`.

        Questions that have been forgotten meanwhile get no label.
        """

        async def work(connection: DatabaseConnection) -> None:
            known = await transactions.questions_among(connection, (label.question for label in labels))
            for row in map(rows.label_row, (*removed, *labels)):
                await connection.delete_rows("labels WHERE id = ?", row[0])
            kept = [label for label in labels if label.question in known]
            await connection.insert_rows("labels", map(rows.label_row, kept))

        await self.write(work)

    async def forget(self, *, request: str | None = None, tenant: str | None = None) -> ForgottenCounts:
        """Remove all data derived from a request, or from a tenant's requests so far. It cannot be added again.

        A request stands for all of its prompts. Its bytes are erased too. Labels counted from it are removed, and so
        are questions that nothing else refers to. Raises StoreError, also if bytes remain because another process still
        reads them.
        """
        names = [] if request is None else names_of(request)
        where = f"request_id IN ({', '.join('?' * len(names))})" if names else "tenant = ?"

        async def work(connection: DatabaseConnection) -> ForgottenCounts:
            tombstone = _tombstone(request, tenant)
            await connection.delete_rows("forgotten WHERE id = ?", tombstone)
            await connection.insert_rows("forgotten", [with_checksum((tombstone, utc_now()))])
            return await removal.drop_served(connection, where, names or (tenant or "",), names)

        return await self._write_and_erase(work)

    async def was_forgotten(self, *, request: str | None = None, tenant: str | None = None) -> bool:
        """Return whether `forget` was called before with this request or tenant."""
        return bool(await self._read("SELECT 1 FROM forgotten WHERE id = ?", (_tombstone(request, tenant),)))

    async def expire(self, before: str) -> ForgottenCounts:
        """Remove episodes and feedback older than `before`, a stored time, and other data derived from those requests.

        They are removed in several transactions, so that other writers need not wait for long. Their bytes are erased
        too. Bytes that another process still reads are erased by the next call.
        """

        async def work(connection: DatabaseConnection) -> ForgottenCounts:
            return await removal.drop_served(connection, "created < ?", (before,), limit=EXPIRED_AT_ONCE)

        total = ForgottenCounts(0, 0, 0, 0, 0)
        while any(removed := await self.write(work)):
            total = ForgottenCounts._make(map(sum, zip(total, removed, strict=True)))
        await self.reading.flush_log()  # the writing connection may be in a transaction
        return total

    async def _write_and_erase(self, work: Callable[[DatabaseConnection], Awaitable[T]]) -> T:
        """Do `work`, which removes rows, and erase their bytes from the file and its log. Raises StoreError."""
        result = await self.write(work)
        if await self._writes.connection.erase():
            raise StoreError(
                f"{self.place}: rows were removed, but their bytes remain in the log because another process reads "
                "them; run the command again when that process has ended"
            )
        return result

    async def sum_usage(self, now: str | None = None) -> None:
        """Sum the usage of the hours that have ended, so that charts of long periods are read fast."""
        hour = (now or utc_now())[:HOUR]
        await self.write(lambda connection: sum_usage(connection, hour))

    async def add_search(self, search: SearchRun) -> None:
        """Add a search with its candidates; a search with the same id is left unchanged."""

        async def work(connection: DatabaseConnection) -> None:
            if await connection.insert_rows("runs", [rows.run_row(search)]):
                await connection.insert_rows("candidates", rows.candidate_rows(search))

        await self.write(work)

    async def prune(
        self, cells: Callable[[str, str, Origin], bool] = lambda model, benchmark, origin: False, corrupt: bool = False
    ) -> AddedCounts:
        """Remove the recordings that `cells` selects by model, benchmark and origin.

        With `corrupt`, also remove every corrupt row, whole recordings at a time. Questions without recordings are
        removed too. Returns how many rows were removed.
        """

        return await self._write_and_erase(lambda connection: removal.prune(connection, cells, corrupt))

    async def write(self, work: Callable[[DatabaseConnection], Awaitable[T]]) -> T:
        """Do `work` inside a transaction, shared with other queued work, and return when it is on disk.

        If it raises, only its own changes are undone. Cancelling the caller does not undo it.
        """
        return await self._writes.write(work)

    # Reading

    async def summaries(self) -> list[CellSummary]:
        """Return the totals of each cell, in the order in which cells were first added."""
        totals = await self._read(
            "SELECT model, benchmark, split, COUNT(DISTINCT question_id), COUNT(*), SUM(complete), SUM(branches) "
            "FROM recordings JOIN questions ON questions.id = recordings.question_id "
            "GROUP BY model, benchmark, split ORDER BY MIN(number)"
        )
        try:
            return [
                CellSummary(Cell(str(model), str(benchmark), Split(split)), *rest)
                for model, benchmark, split, *rest in totals
            ]
        except ValueError as error:
            raise CorruptRow(f"{self.place}: a question's split: {error}; {REPAIR_HINT}") from None

    async def load(self, cell: Cell) -> list[RecordedQuestion]:
        """Return the recordings of a cell in the order in which they were added, after verifying every checksum."""
        return await self._load("recordings.model = ? AND recordings.benchmark = ? AND questions.split = ?", cell)

    async def recording_of(self, request: str) -> RecordedQuestion | None:
        """Return the recording that was made of a request, or None, after verifying its checksums."""
        own = "recordings.id IN (SELECT recording_id FROM provenance WHERE request_id = ?)"
        loaded = await self._load(own, (request,))
        return loaded[0] if loaded else None

    async def _load(self, condition: str, values: Sequence[Any]) -> list[RecordedQuestion]:
        """Return the recordings that satisfy a condition on tables `recordings` and `questions`."""
        return await load_recordings(self.reading, condition, values)

    async def episodes(self) -> list[ServedEpisode]:
        """Return all episodes, in the order in which they ended."""
        return await self._select("episodes", rows.episode_from_row, "ORDER BY created, id")

    async def episode(self, request: str) -> ServedEpisode | None:
        """Return the episode of a request, or None if there is none."""
        latest = "WHERE request_id = ? ORDER BY created DESC, id LIMIT 1"
        episodes = await self._select("episodes", rows.episode_from_row, latest, (request,))
        return episodes[0] if episodes else None

    async def latest(
        self,
        limit: int,
        model: str | None = None,
        client_id: str | None = None,
        without_controller: str | None = None,
        tenant: str | None = None,
        stop: str | None = None,
    ) -> list[ServedEpisode]:
        """Return the episodes that ended last, latest first, of a model or with a client's own request id.

        `stop` is why they ended. `tenant` is the beginning of a tenant's hash.
        Episodes of the controller `without_controller`, or of that name with `@N`, are left out.
        """
        conditions: list[tuple[str, str]] = []
        if without_controller is not None:
            prefix = f"{without_controller}@"
            conditions += [
                ("controller <> ?", without_controller),
                (f"substr(controller, 1, {len(prefix)}) <> ?", prefix),
            ]
        if model is not None:
            conditions.append(("model = ?", model))
        if stop is not None:
            conditions.append(("stop = ?", stop))
        if tenant is not None:
            conditions.append((f"substr(tenant, 1, {len(tenant)}) = ?", tenant))
        if client_id is not None:
            conditions.append(("about LIKE ? ESCAPE '\\'", rows.client_id_pattern(client_id)))
        where = f"WHERE {' AND '.join(clause for clause, _ in conditions)} " if conditions else ""
        values = (*(value for _, value in conditions), limit)
        latest = f"{where}ORDER BY created DESC, id DESC LIMIT ?"
        return await self._select("episodes", rows.episode_from_row, latest, values)

    async def served(self) -> ServedSummary:
        """Return the totals of episodes and feedback."""
        ((count, oldest, newest),) = await self._read("SELECT COUNT(*), MIN(created), MAX(created) FROM episodes")
        stops = await self._read("SELECT stop, COUNT(*) FROM episodes GROUP BY stop ORDER BY 2 DESC, 1")
        feedback = await self._read("SELECT kind, COUNT(*) FROM feedback GROUP BY kind ORDER BY kind")
        first, last = (None if time is None else str(time) for time in (oldest, newest))  # a bad row may hold bytes
        by_stop, by_kind = ({str(name): number for name, number in counts} for counts in (stops, feedback))
        return ServedSummary(count, first, last, by_stop, by_kind)

    async def feedback(self, request: str | None = None) -> list[Feedback]:
        """Return the feedback on a request, or all feedback, latest last."""
        where, values = ("", ()) if request is None else ("WHERE request_id = ?", (request,))
        return await self._select("feedback", rows.feedback_from_row, f"{where} ORDER BY created, id", values)

    async def questions(self) -> dict[str, Label | None]:
        """Return every recorded or served question, and the answer it was added with, if any."""
        served = await self._read("SELECT DISTINCT question_id FROM episodes WHERE question_id IS NOT NULL ORDER BY 1")
        recorded = dict(await self._select("questions", rows.question_label, "ORDER BY id"))
        return recorded | {question: None for (question,) in served if question not in recorded}

    async def labels(self) -> list[Label]:
        """Return all labels. The answers that questions were added with are not among them."""
        return await self._select("labels", rows.label_from_row, "ORDER BY question_id, source")

    async def versions(self, model: str) -> list[Version]:
        """Return the versions of the recordings of a model that were made by a proxy, latest first."""
        columns = await self._read(
            "SELECT recordings.model, chat_template, sampling, delta, probe_template FROM recordings "
            "JOIN provenance ON provenance.recording_id = recordings.id WHERE recordings.model = ? "
            "GROUP BY 1, 2, 3, 4, 5 ORDER BY MAX(number) DESC",
            (model,),
        )
        try:
            return [rows.version_from_columns(*row) for row in columns]
        except ValueError as error:
            raise CorruptRow(f"{self.place}: a recording of {model}: {error}; {REPAIR_HINT}") from None

    async def verify(self) -> VerificationReport:
        """Check every row. Bad rows are reported, not raised."""
        bad = await transactions.find_bad_rows(self.reading)
        counts = {table: await self.reading.fetch_number(f"SELECT COUNT(*) FROM {table}") for table in COLUMNS}
        messages = [
            f"{describe_row(table, row.key)}: {row.fault}" for table, bad_rows in bad.items() for row in bad_rows
        ]
        return VerificationReport(counts, messages)

    async def _select(
        self, table: str, read: Callable[[Sequence[Any]], T], rest: str, values: Iterable[Any] = ()
    ) -> list[T]:
        """Return what `read` makes of the selected rows of a table. Raises CorruptRow or StoreError."""
        return read_rows(self.place, table, await self._read(select_statement(table, rest), values), read)

    async def _read(self, statement: str, values: Iterable[Any] = ()) -> list[Any]:
        return await self.reading.fetch_all(statement, values)


def _episode_rows(episodes: Sequence[ServedEpisode]) -> tuple[list[Row], list[Facts]]:
    return list(map(rows.episode_row, episodes)), list(map(facts_of, episodes))


def _tombstone(request: str | None, tenant: str | None) -> str:
    return rows.tombstone("tenant", tenant or "") if request is None else rows.tombstone("request", request)
