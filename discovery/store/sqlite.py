"""The replay store in one SQLite file, for one machine.

The file uses a write-ahead log with `synchronous=FULL`, so acknowledged writes survive a power cut. A single task
writes. It puts all waiting work into one transaction, so that many writers share one sync and no caller's cancellation
can leave a transaction open.

Longer than 400 lines: the store's methods share one connection, one queue and one lock, and each is a few lines.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any, Final, TypeVar

import aiosqlite

from discovery.data.recordings import Cell, Origin, RecordedQuestion, Split, Version
from discovery.errors import CorruptRow, StoreError
from discovery.store import rows, transactions
from discovery.store.checksums import Row, with_checksum
from discovery.store.connections import Identity, identity_of, open_connection, truncate_log
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
    utc_now,
)
from discovery.store.row_checks import REPAIR_HINT, checked_rows, describe_row, read_rows
from discovery.store.schema import COLUMNS, MIGRATIONS, Migration, select_statement
from discovery.store.transactions import delete_rows, drop_served, fetch_all, insert_rows
from discovery.store.write_queue import WriteQueue, to_store_error

T = TypeVar("T")

logging.getLogger("aiosqlite").setLevel(logging.WARNING)  # at lower levels it logs every value of every row

WAIT_MS: Final = 10_000
"""Default time to wait for another process's transaction."""


class Store:
    """An open store. Use `Store.open` to get one."""

    def __init__(self, path: Path, identity: Identity, writes: WriteQueue, reading: aiosqlite.Connection) -> None:
        self.path = path
        self._identity = identity
        self._writes = writes
        self._reading = reading

    @property
    def transactions(self) -> int:
        """Transactions committed by this object."""
        return self._writes.transactions

    @property
    def is_moved(self) -> bool:
        """Whether the file has been renamed, removed or replaced since it was opened.

        When the context of such a store ends, its log is written into the file, wherever that is now. SQLite would
        leave the log behind for the next file of that name.
        """
        return identity_of(self.path) != self._identity

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        path: Path,
        *,
        create: bool = False,
        migrations: Sequence[Migration] = MIGRATIONS,
        wait_ms: int = WAIT_MS,
    ) -> AsyncIterator[Store]:
        """Open the store at `path` and bring it up to date; with `create`, make a new one if there is none.

        Another process's transaction is waited for `wait_ms`. Leaving the context completes queued writes. Raises
        StoreError.
        """
        async with (
            open_connection(path, wait_ms, create=create) as (writing, identity),
            open_connection(path, wait_ms) as (reading, other),
        ):
            if identity != other:
                raise StoreError(f"{path}: the store was replaced while it was being opened; try again")
            await migrate(path, writing, migrations)
            await reading.execute("PRAGMA query_only = ON")
            writes = WriteQueue(path, writing)
            store = cls(path, identity, writes, reading)
            task = asyncio.create_task(writes.run())
            try:
                yield store
            finally:
                writes.close()
                await asyncio.shield(task)
                if store.is_moved:
                    with suppress(sqlite3.Error):  # then the log stays, which prevents a new store of the same name
                        await truncate_log(writing)

    # Writing

    async def add(self, recordings: Sequence[RecordedQuestion]) -> AddedCounts:
        """Add all recordings or none; those that exist already are left unchanged.

        A question keeps the split and the reference it was first added with. A recording that was not made for a
        request replaces one that holds a part of its branches, as when a collection was continued.
        """
        return await self.write(lambda connection: transactions.add_recordings(connection, recordings))

    async def add_all(self, items: Sequence[StoreItem]) -> list[RecordedQuestion]:
        """Add all items from the proxy or none; those that exist already are left unchanged.

        Forgotten data is not added again: recordings and feedback are added only if their request's episode is there.
        Returns the recordings that were left out for that reason.
        """
        episodes = [item for item in items if isinstance(item, ServedEpisode)]
        feedback = [item for item in items if isinstance(item, Feedback)]
        recordings = [item for item in items if isinstance(item, RecordedQuestion)]

        async def work(connection: aiosqlite.Connection) -> list[RecordedQuestion]:
            forgotten = dict(await fetch_all(connection, "SELECT id, created FROM forgotten"))

            def is_kept(episode: ServedEpisode) -> bool:
                by_tenant = forgotten.get(rows.tombstone("tenant", episode.tenant), "")
                by_request = rows.tombstone("request", episode.request_id) in forgotten
                return not by_request and not episode.created <= by_tenant

            kept = list(filter(is_kept, episodes)) if forgotten else episodes
            await insert_rows(connection, "episodes", await asyncio.to_thread(_episode_rows, kept))
            rated = [item for item in feedback if await transactions.is_served(connection, item.request_id)]
            if rated:
                await insert_rows(connection, "feedback", map(rows.feedback_row, rated))
            served, left_out = list[RecordedQuestion](), list[RecordedQuestion]()
            for recorded in recordings:
                (served if await transactions.is_served(connection, recorded.request) else left_out).append(recorded)
            if served:
                await transactions.add_recordings(connection, served)
            return left_out

        return await self.write(work)

    async def set_labels(self, labels: Sequence[Label], removed: Sequence[Label] = ()) -> None:
        """Replace the labels that questions have from the same source, and remove the labels `removed`.

        Questions that have been forgotten meanwhile get no label.
        """

        async def work(connection: aiosqlite.Connection) -> None:
            known = set(await fetch_all(connection, "SELECT id FROM questions UNION SELECT question_id FROM episodes"))
            for row in map(rows.label_row, (*removed, *labels)):
                await delete_rows(connection, "labels WHERE id = ?", row[0])
            kept = [label for label in labels if (label.question,) in known]
            await insert_rows(connection, "labels", map(rows.label_row, kept))

        await self.write(work)

    async def forget(self, *, request: str | None = None, tenant: str | None = None) -> ForgottenCounts:
        """Remove all data derived from a request, or from a tenant's requests so far. It cannot be added again.

        Its bytes are erased too. Labels counted from it are removed, and so are questions that nothing else refers to.
        Raises StoreError, also if bytes remain because another process still reads them.
        """
        kind, column, name = ("tenant", "tenant", tenant) if request is None else ("request", "request_id", request)

        async def work(connection: aiosqlite.Connection) -> ForgottenCounts:
            tombstone = rows.tombstone(kind, name or "")
            await delete_rows(connection, "forgotten WHERE id = ?", tombstone)
            await insert_rows(connection, "forgotten", [with_checksum((tombstone, utc_now()))])
            return await drop_served(connection, f"{column} = ?", name or "", () if request is None else (request,))

        return await self._write_and_erase(work)

    async def expire(self, before: str) -> ForgottenCounts:
        """Remove episodes and feedback older than `before`, a stored time, and other data derived from those requests.

        Their bytes are erased too. Bytes that another process still reads are erased by the next call.
        """
        removed: ForgottenCounts = await self.write(lambda connection: drop_served(connection, "created < ?", before))
        await truncate_log(self._reading)  # the writing connection may be in a transaction
        return removed

    async def _write_and_erase(self, work: Callable[[aiosqlite.Connection], Awaitable[T]]) -> T:
        """Do `work`, which removes rows, and erase their bytes from the file and its log. Raises StoreError."""
        result = await self.write(work)
        try:
            await self._writes.connection.execute_fetchall("VACUUM")
            is_busy = await truncate_log(self._writes.connection)
        except sqlite3.OperationalError as error:
            raise StoreError(
                f"{self.path}: rows were removed, but their bytes remain in the file: {error}; run the command again"
            ) from None
        if is_busy:
            raise StoreError(
                f"{self.path}: rows were removed, but their bytes remain in the log because another process reads "
                "them; run the command again when that process has ended"
            )
        return result

    async def add_search(self, search: SearchRun) -> None:
        """Add a search with its candidates; a search with the same id is left unchanged."""

        async def work(connection: aiosqlite.Connection) -> None:
            if await insert_rows(connection, "runs", [rows.run_row(search)]):
                await insert_rows(connection, "candidates", rows.candidate_rows(search))

        await self.write(work)

    async def prune(
        self, cells: Callable[[str, str, Origin], bool] = lambda model, benchmark, origin: False, corrupt: bool = False
    ) -> AddedCounts:
        """Remove the recordings that `cells` selects by model, benchmark and origin.

        With `corrupt`, also remove every corrupt row, whole recordings at a time. Questions without recordings are
        removed too. Returns how many rows were removed.
        """

        async def work(connection: aiosqlite.Connection) -> AddedCounts:
            bad = await transactions.find_bad_rows(connection) if corrupt else {}
            doomed = {row.key[0] for table in ("recordings", "branches", "provenance") for row in bad.get(table, ())}
            bad_questions = {row.key[0] for row in bad.get("questions", ())}
            for row in bad.get("episodes", ()):  # without the episode, a recording's owner and age are unknown
                doomed |= await transactions.recordings_of(connection, row.key[0])
            known = "SELECT id, question_id, model, benchmark, origin FROM recordings"
            for recording, question, model, benchmark, origin in await fetch_all(connection, known):
                is_selected = origin in list(Origin) and cells(model, benchmark, Origin(origin))
                if question in bad_questions or is_selected:
                    doomed.add(recording)
            branches = recordings = 0
            for recording in sorted(doomed, key=repr):
                dropped = await transactions.drop_recording(connection, recording)
                recordings, branches = recordings + dropped[0], branches + dropped[1]
            for row in bad.get("runs", ()):
                await delete_rows(connection, "candidates WHERE run_id = ?", row.key[0])
            for table in ("branches", "provenance", "candidates", *COLUMNS):  # referring tables first
                for row in bad.get(table, ()):
                    await delete_rows(connection, f"{table} WHERE rowid = ?", row.rowid)
            _, questions = await transactions.drop_unused(connection)
            return AddedCounts(questions, recordings, branches)

        return await self._write_and_erase(work)

    async def write(self, work: Callable[[aiosqlite.Connection], Awaitable[T]]) -> T:
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
            raise CorruptRow(f"{self.path}: a question's split: {error}; {REPAIR_HINT}") from None

    async def load(self, cell: Cell) -> list[RecordedQuestion]:
        """Return the recordings of a cell in the order in which they were added, after verifying every checksum."""
        where = "WHERE recordings.model = ? AND recordings.benchmark = ? AND questions.split = ?"
        joined = f"JOIN questions ON questions.id = recordings.question_id {where}"
        order = "ORDER BY recordings.number"
        recordings = await self._rows("recordings", f"{joined} {order}", cell)
        identities = "SELECT question_id FROM recordings WHERE recordings.model = ? AND recordings.benchmark = ?"
        questions = await self._rows("questions", f"WHERE id IN ({identities}) AND split = ?", cell)
        branches = await self._rows(
            "branches",
            f"JOIN recordings ON recordings.id = branches.recording_id {joined} {order}, branches.number",
            cell,
        )
        origins = await self._rows(
            "provenance", f"JOIN recordings ON recordings.id = provenance.recording_id {joined}", cell
        )
        by_id = {question[0]: question for question in questions}
        provenance = {row[0]: row for row in origins}
        labels: dict[str, list[Label]] = {}
        for label in await self.labels():
            labels.setdefault(label.question, []).append(label)
        by_recording = {key: list(group) for key, group in groupby(branches, key=lambda row: row[0])}
        loaded = []
        for recording in recordings:
            own = by_recording.get(recording[0], [])
            if len(own) != recording[10]:
                raise CorruptRow(
                    f"{self.path}: recording {recording[0][:16]} has {len(own)} of its {recording[10]} branches; "
                    f"{REPAIR_HINT}"
                )
            related = by_id[recording[2]], own, provenance.get(recording[0]), labels.get(recording[2], ())
            try:
                loaded.append(rows.recording_from_rows(recording, *related))
            except ValueError as error:
                raise CorruptRow(f"{self.path}: recording {recording[0][:16]}: {error}; {REPAIR_HINT}") from None
        return loaded

    async def episodes(self) -> list[ServedEpisode]:
        """Return all episodes, in the order in which they ended."""
        return await self._select("episodes", rows.episode_from_row, "ORDER BY created, id")

    async def episode(self, request: str) -> ServedEpisode | None:
        """Return the episode of a request, or None if there is none."""
        latest = "WHERE request_id = ? ORDER BY created DESC, id LIMIT 1"
        episodes = await self._select("episodes", rows.episode_from_row, latest, (request,))
        return episodes[0] if episodes else None

    async def latest(
        self, limit: int, model: str | None = None, client_id: str | None = None, without_controller: str | None = None
    ) -> list[ServedEpisode]:
        """Return the episodes that ended last, latest first, of a model or with a client's own request id.

        Episodes of the controller `without_controller`, or of that name with `@N`, are left out.
        """
        conditions: list[tuple[str, str]] = []
        if without_controller is not None:
            conditions += [
                ("controller <> ?", without_controller),
                ("controller NOT GLOB ?", f"{without_controller}@*"),
            ]
        if model is not None:
            conditions.append(("model = ?", model))
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
            raise CorruptRow(f"{self.path}: a recording of {model}: {error}; {REPAIR_HINT}") from None

    async def verify(self) -> VerificationReport:
        """Check every row. Bad rows are reported, not raised."""
        bad = await transactions.find_bad_rows(self._reading)
        counts = {
            table: await transactions.fetch_number(self._reading, f"SELECT COUNT(*) FROM {table}") for table in COLUMNS
        }
        messages = [
            f"{describe_row(table, row.key)}: {row.fault}" for table, bad_rows in bad.items() for row in bad_rows
        ]
        return VerificationReport(counts, messages)

    async def _select(
        self, table: str, read: Callable[[Sequence[Any]], T], rest: str, values: Iterable[Any] = ()
    ) -> list[T]:
        """Return what `read` makes of the selected rows of a table. Raises CorruptRow or StoreError."""
        return read_rows(self.path, table, await self._read(select_statement(table, rest), values), read)

    async def _rows(self, table: str, rest: str, values: Iterable[Any] = ()) -> list[Sequence[Any]]:
        """Return selected rows of a table without their checksums. Raises CorruptRow or StoreError."""
        return list(checked_rows(self.path, table, await self._read(select_statement(table, rest), values)))

    async def _read(self, statement: str, values: Iterable[Any] = ()) -> list[Any]:
        try:
            return await fetch_all(self._reading, statement, values)
        except sqlite3.Error as error:
            raise to_store_error(self.path, error) from None


def _episode_rows(episodes: Sequence[ServedEpisode]) -> list[Row]:
    return [rows.episode_row(episode) for episode in episodes]
