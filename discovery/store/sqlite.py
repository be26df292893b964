"""The store in one SQLite file, for one machine.

WAL with `synchronous=FULL`: what was acknowledged survives a power cut. One task writes: it gathers what waits into one
transaction, so that many writers share one sync, and no caller's cancellation can leave a transaction open.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import aiosqlite

from discovery.data.recordings import Cell, LabelSource, Origin, RecordedQuestion, Split, Version
from discovery.errors import CorruptRow, StoreError, UnstorableValue
from discovery.store import rows
from discovery.store.connections import Identity, identity_of, open_connection, truncate_log
from discovery.store.rows import (
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
)
from discovery.store.schema import COLUMNS, MIGRATIONS, Migration, insert_statement, select_statement

T = TypeVar("T")
Work = Callable[[aiosqlite.Connection], Awaitable[Any]]

logging.getLogger("aiosqlite").setLevel(logging.WARNING)  # below that it tells every value of every row

WAIT_MS: Final = 10_000
"""How long another process's transaction is waited for, unless said otherwise."""
GROUP: Final = 256
"""Writes that share one transaction at most."""
_OF_A_ROW: Final = (
    *(sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError),
    *(OverflowError, UnicodeEncodeError),
)
"""Errors that only a value which no column can hold raises."""


class _Write(NamedTuple):
    """Something to be done inside a transaction, and who waits for it."""

    work: Work
    done: asyncio.Future[Any]


class Store:
    """An open store. Made by `Store.open`."""

    def __init__(
        self, path: Path, identity: Identity, writing: aiosqlite.Connection, reading: aiosqlite.Connection
    ) -> None:
        self.path = path
        self.transactions = 0  # committed by this object
        self._writing = writing
        self._reading = reading
        self._queue: asyncio.Queue[_Write | None] = asyncio.Queue()
        self._identity = identity

    @property
    def is_moved(self) -> bool:
        """Whether the file has been renamed, removed or replaced since it was opened.

        On leaving the context the log of such a store is written into its file, wherever that is now: SQLite would
        leave it behind for whatever takes the name next.
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
        """The store at `path`, brought up to date; a new one if there is none and `create` says so.

        Another process's transaction is waited for `wait_ms`. Leaving the context writes what still waits.
        Raises StoreError.
        """
        async with (
            open_connection(path, wait_ms, create=create) as (writing, identity),
            open_connection(path, wait_ms) as (reading, other),
        ):
            if identity != other:
                raise StoreError(f"{path}: the store was replaced while it was being opened; try again")
            await _migrate(path, writing, migrations)
            await reading.execute("PRAGMA query_only = ON")
            store = cls(path, identity, writing, reading)
            task = asyncio.create_task(store._write_all())
            try:
                yield store
            finally:
                store._queue.put_nowait(None)
                await asyncio.shield(task)
                if store.is_moved:
                    with suppress(sqlite3.Error):  # then the log stays, and no new store is made beside it
                        await truncate_log(writing)

    # Writing

    async def add(self, recordings: Sequence[RecordedQuestion]) -> AddedCounts:
        """Add recordings, all or none; what is there already is left as it is.

        A question keeps the split and the reference it came with first. A recording without a request that has all
        branches of one made the same way, a collection that went on, takes its place.
        """

        return await self.write(lambda connection: _add(connection, recordings))

    async def add_all(self, items: Sequence[StoreItem]) -> list[RecordedQuestion]:
        """Add what the proxy has to write down, all or none. What is there already is left as it is, and nothing comes
        back that was forgotten: a recording made for a request, or feedback on one, is added only where its episode is.

        Returns the recordings that were left out so.
        """
        episodes = [one for one in items if isinstance(one, ServedEpisode)]
        feedback = [one for one in items if isinstance(one, Feedback)]
        recordings = [one for one in items if isinstance(one, RecordedQuestion)]

        async def work(connection: aiosqlite.Connection) -> list[RecordedQuestion]:
            gone = dict(await _all(connection, "SELECT id, created FROM forgotten"))

            def kept(one: ServedEpisode) -> bool:
                by_tenant = gone.get(rows.tombstone("tenant", one.tenant), "")
                return rows.tombstone("request", one.request_id) not in gone and not one.created <= by_tenant

            told = list(filter(kept, episodes)) if gone else episodes
            await _insert(connection, "episodes", await asyncio.to_thread(_made, rows.episode_row, told))
            heard = [one for one in feedback if await _is_served(connection, one.request_id)]
            if heard:
                await _insert(connection, "feedback", map(rows.feedback_row, heard))
            served, left_out = list[RecordedQuestion](), list[RecordedQuestion]()
            for one in recordings:
                (served if await _is_served(connection, one.request) else left_out).append(one)
            if served:
                await _add(connection, served)
            return left_out

        return await self.write(work)

    async def set_labels(self, labels: Sequence[Label], gone: Sequence[Label] = ()) -> None:
        """Put labels in the place of those their questions had from the same source, and remove those `gone`.

        What has been forgotten meanwhile gets none.
        """

        async def work(connection: aiosqlite.Connection) -> None:
            known = set(await _all(connection, "SELECT id FROM questions UNION SELECT question_id FROM episodes"))
            for row in map(rows.label_row, (*gone, *labels)):
                await _delete(connection, "labels WHERE id = ?", row[0])
            kept = [label for label in labels if (label.question,) in known]
            await _insert(connection, "labels", map(rows.label_row, kept))

        await self.write(work)

    async def forget(self, *, request: str | None = None, tenant: str | None = None) -> ForgottenCounts:
        """Remove all that came of a request, or of a tenant's requests so far, its bytes too; it cannot come back.

        Labels that were counted of it go, and questions where nothing else is known of them. Raises StoreError, also
        if bytes of it remain because another process still reads them.
        """
        what, column, name = ("tenant", "tenant", tenant) if request is None else ("request", "request_id", request)

        async def work(connection: aiosqlite.Connection) -> ForgottenCounts:
            stone = rows.tombstone(what, name or "")
            await _delete(connection, "forgotten WHERE id = ?", stone)
            await _insert(connection, "forgotten", [rows.with_checksum((stone, rows.utc_now()))])
            return await _drop_served(connection, f"{column} = ?", name or "", () if request is None else (request,))

        return await self._rewritten(work)

    async def expire(self, before: str) -> ForgottenCounts:
        """Remove episodes and feedback older than a time, as stored, with all else that came of those requests.

        Its bytes go too, but for those another process still reads: they go with the next call.
        """
        removed: ForgottenCounts = await self.write(lambda connection: _drop_served(connection, "created < ?", before))
        await truncate_log(self._reading)  # for the writing one may be in a transaction
        return removed

    async def _rewritten(self, work: Callable[[aiosqlite.Connection], Awaitable[T]]) -> T:
        """What `work` gives that removes rows; nothing of them is left in the file or its log. Raises StoreError."""
        result = await self.write(work)
        try:
            await self._writing.execute_fetchall("VACUUM")
            is_busy = await truncate_log(self._writing)
        except sqlite3.OperationalError as error:
            raise StoreError(f"{self.path}: rows are gone, but bytes of them remain: {error}; say it again") from None
        if is_busy:
            raise StoreError(
                f"{self.path}: rows are gone, but bytes of them remain in its log until the process that still reads "
                "them has ended; say it again then"
            )
        return result

    async def add_search(self, search: SearchRun) -> None:
        """Add a search with all it tried; one that ends in the same hash is left as it is."""

        async def work(connection: aiosqlite.Connection) -> None:
            if await _insert(connection, "runs", [rows.run_row(search)]):
                await _insert(connection, "candidates", rows.candidate_rows(search))

        await self.write(work)

    async def prune(
        self, cells: Callable[[str, str, Origin], bool] = lambda model, benchmark, origin: False, corrupt: bool = False
    ) -> AddedCounts:
        """Remove the recordings `cells` picks by model, benchmark and origin, and with `corrupt` every row that is not
        what was written, whole recordings at a time. Questions nothing is recorded of go too."""

        async def work(connection: aiosqlite.Connection) -> AddedCounts:
            bad = await _corrupt(connection) if corrupt else {}
            gone = {one.key[0] for table in ("recordings", "branches", "provenance") for one in bad.get(table, ())}
            lost = {one.key[0] for one in bad.get("questions", ())}
            for one in bad.get("episodes", ()):  # without it nobody could tell whose they are, or how old
                gone |= await _recordings_of(connection, one.key[0])
            known = "SELECT id, question_id, model, benchmark, origin FROM recordings"
            for recording, question, model, benchmark, origin in await _all(connection, known):
                if question in lost or (origin in list(Origin) and cells(model, benchmark, Origin(origin))):
                    gone.add(recording)
            branches = recordings = 0
            for recording in sorted(gone, key=repr):
                dropped = await _drop_recording(connection, recording)
                recordings, branches = recordings + dropped[0], branches + dropped[1]
            for one in bad.get("runs", ()):
                await _delete(connection, "candidates WHERE run_id = ?", one.key[0])
            for table in ("branches", "provenance", "candidates", *COLUMNS):  # what refers to others first
                for one in bad.get(table, ()):
                    await _delete(connection, f"{table} WHERE rowid = ?", one.number)
            _, questions = await _drop_unused(connection)
            return AddedCounts(questions, recordings, branches)

        return await self._rewritten(work)

    async def write(self, work: Callable[[aiosqlite.Connection], Awaitable[T]]) -> T:
        """Do `work` inside a transaction, shared with what else waits, and return when it is on disk.

        If it raises, only its own changes are undone. Cancelling the caller does not undo it.
        """
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(_Write(work, done))
        return await done

    async def _write_all(self) -> None:
        while (first := await self._queue.get()) is not None:
            group = [first]
            closing = False
            while len(group) < GROUP and not self._queue.empty():
                following = self._queue.get_nowait()
                if following is None:
                    closing = True
                    break
                group.append(following)
            await self._commit(group)
            if closing:
                return

    async def _commit(self, group: Sequence[_Write]) -> None:
        """One transaction; a write that fails is rolled back alone."""
        outcomes: list[tuple[_Write, Any, Exception | None]] = []
        try:
            await self._writing.execute("BEGIN IMMEDIATE")
            for write in group:
                await self._writing.execute("SAVEPOINT one")
                try:
                    outcomes.append((write, await write.work(self._writing), None))
                except Exception as error:  # whatever it is, it is for the one who asked, and the others go on
                    await self._writing.execute("ROLLBACK TO one")
                    outcomes.append((write, None, error))
                await self._writing.execute("RELEASE one")
            await self._writing.execute("COMMIT")
            self.transactions += 1
        except sqlite3.Error as error:
            if self._writing.in_transaction:
                await self._writing.execute("ROLLBACK")
            failure = StoreError(f"{self.path}: {error}; nothing of this was written")
            outcomes = [(write, None, failure) for write in group]
        for write, result, problem in outcomes:
            if write.done.done():  # its caller has gone
                continue
            if problem is None:
                write.done.set_result(result)
            else:
                write.done.set_exception(_told(self.path, problem))

    # Reading

    async def summaries(self) -> list[CellSummary]:
        """What there is, cell by cell, in the order in which they came."""
        found = await self._read(
            "SELECT model, benchmark, split, COUNT(DISTINCT question_id), COUNT(*), SUM(complete), SUM(branches) "
            "FROM recordings JOIN questions ON questions.id = recordings.question_id "
            "GROUP BY model, benchmark, split ORDER BY MIN(number)"
        )
        try:
            return [
                CellSummary(Cell(str(model), str(benchmark), Split(split)), *rest)
                for model, benchmark, split, *rest in found
            ]
        except ValueError as error:
            raise CorruptRow(f"{self.path}: a question's split: {error}; {rows.REPAIR_HINT}") from None

    async def load(self, cell: Cell) -> list[RecordedQuestion]:
        """The recordings of a cell in the order in which they were added, every checksum verified."""
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
        found = []
        for recording in recordings:
            mine = by_recording.get(recording[0], [])
            if len(mine) != recording[10]:
                raise CorruptRow(
                    f"{self.path}: recording {recording[0][:16]} has {len(mine)} of its {recording[10]} branches; "
                    f"{rows.REPAIR_HINT}"
                )
            known = by_id[recording[2]], mine, provenance.get(recording[0]), labels.get(recording[2], ())
            try:
                found.append(rows.recording_from_rows(recording, *known))
            except ValueError as error:
                raise CorruptRow(f"{self.path}: recording {recording[0][:16]}: {error}; {rows.REPAIR_HINT}") from None
        return found

    async def episodes(self) -> list[ServedEpisode]:
        """All episodes, in the order in which they ended."""
        return await self._made("episodes", rows.episode_from_row, "ORDER BY created, id")

    async def episode(self, request: str) -> ServedEpisode | None:
        """The episode of a request, if it is known."""
        latest = "WHERE request_id = ? ORDER BY created DESC, id LIMIT 1"
        found = await self._made("episodes", rows.episode_from_row, latest, (request,))
        return found[0] if found else None

    async def latest(self, limit: int, model: str | None = None, client_id: str | None = None) -> list[ServedEpisode]:
        """The episodes that ended last, the latest first: of a model, or of requests their clients call `client_id`."""
        wanted: list[tuple[str, str]] = []
        if model is not None:
            wanted.append(("model = ?", model))
        if client_id is not None:
            text = json.dumps({"client_request_id": client_id}, separators=(",", ":"), ensure_ascii=False)[1:-1]
            for special in "\\%_":
                text = text.replace(special, f"\\{special}")
            wanted.append(("about LIKE ? ESCAPE '\\'", f"%{text}%"))
        where = f"WHERE {' AND '.join(clause for clause, _ in wanted)} " if wanted else ""
        values = (*(value for _, value in wanted), limit)
        latest = f"{where}ORDER BY created DESC, id DESC LIMIT ?"
        return await self._made("episodes", rows.episode_from_row, latest, values)

    async def served(self) -> ServedSummary:
        """How many episodes and how much feedback there is."""
        ((count, oldest, newest),) = await self._read("SELECT COUNT(*), MIN(created), MAX(created) FROM episodes")
        stops = await self._read("SELECT stop, COUNT(*) FROM episodes GROUP BY stop ORDER BY 2 DESC, 1")
        feedback = await self._read("SELECT kind, COUNT(*) FROM feedback GROUP BY kind ORDER BY kind")
        first, last = (None if one is None else str(one) for one in (oldest, newest))  # a spoilt row may hold bytes
        by_stop, by_kind = ({str(name): number for name, number in one} for one in (stops, feedback))
        return ServedSummary(count, first, last, by_stop, by_kind)

    async def feedback(self, request: str | None = None) -> list[Feedback]:
        """What was said of a request, or of all, the latest last."""
        where, values = ("", ()) if request is None else ("WHERE request_id = ?", (request,))
        return await self._made("feedback", rows.feedback_from_row, f"{where} ORDER BY created, id", values)

    async def questions(self) -> dict[str, Label | None]:
        """Every question that was recorded or served, and the answer it came with, if it did."""
        served = await self._read("SELECT DISTINCT question_id FROM episodes WHERE question_id IS NOT NULL ORDER BY 1")
        found = dict(await self._made("questions", rows.question_label, "ORDER BY id"))
        return found | {question: None for (question,) in served if question not in found}

    async def labels(self) -> list[Label]:
        """All answers that are held for right, but those questions came with."""
        return await self._made("labels", rows.label_from_row, "ORDER BY question_id, source")

    async def versions(self, model: str) -> list[Version]:
        """Of the recordings made here of a model, the latest first."""
        found = await self._read(
            "SELECT recordings.model, chat_template, sampling, delta, probe_template FROM recordings "
            "JOIN provenance ON provenance.recording_id = recordings.id WHERE recordings.model = ? "
            "GROUP BY 1, 2, 3, 4, 5 ORDER BY MAX(number) DESC",
            (model,),
        )
        try:
            return [rows.version_from_columns(*row) for row in found]
        except ValueError as error:
            raise CorruptRow(f"{self.path}: a recording of {model}: {error}; {rows.REPAIR_HINT}") from None

    async def verify(self) -> VerificationReport:
        """Look at every row; raises nothing for bad ones."""
        bad = await _corrupt(self._reading)
        counts = {table: await _one(self._reading, f"SELECT COUNT(*) FROM {table}") for table in COLUMNS}
        told = [f"{rows.describe_row(table, one.key)}: {one.fault}" for table, found in bad.items() for one in found]
        return VerificationReport(counts, told)

    async def _made(
        self, table: str, make: Callable[[Sequence[Any]], T], rest: str, values: Iterable[Any] = ()
    ) -> list[T]:
        return rows.read_rows(self.path, table, await self._read(select_statement(table, rest), values), make)

    async def _rows(self, table: str, rest: str, values: Iterable[Any] = ()) -> list[Sequence[Any]]:
        found = await self._read(select_statement(table, rest), values)
        return list(rows.checked_rows(self.path, table, found))

    async def _read(self, statement: str, values: Iterable[Any] = ()) -> list[Any]:
        try:
            return await _all(self._reading, statement, values)
        except sqlite3.Error as error:
            raise _told(self.path, error) from None


async def _migrate(path: Path, connection: aiosqlite.Connection, migrations: Sequence[Migration]) -> None:
    """Bring a store up to date in one transaction. Raises StoreError if it is newer than this program.

    Nothing is written to a store that is up to date, so that readers do not wait for another process's transaction.
    """
    newest = len(migrations)
    if await _version(path, connection, newest) == newest:
        return
    await connection.execute("BEGIN IMMEDIATE")
    try:
        version = await _version(path, connection, newest)
        if version is None:
            await connection.execute("CREATE TABLE autotts_store (version INTEGER NOT NULL)")
            await connection.execute("INSERT INTO autotts_store (version) VALUES (0)")
        for migration in migrations[version or 0 :]:
            for statement in migration:
                await connection.execute(statement)
        await connection.execute("UPDATE autotts_store SET version = ?", (newest,))
        await connection.execute("COMMIT")
    except BaseException:
        await connection.execute("ROLLBACK")
        raise


async def _version(path: Path, connection: aiosqlite.Connection, newest: int) -> int | None:
    """The version of a store, None for an empty file. Raises StoreError if it is none, or above `newest`."""
    if not await _all(connection, "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'autotts_store'"):
        return None
    found = await _all(connection, "SELECT version FROM autotts_store")
    version = found[0][0] if len(found) == 1 else None
    if not isinstance(version, int) or version < 0:
        raise CorruptRow(f"{path}: its table autotts_store does not say the store's version; restore it from a backup")
    if version > newest:
        raise StoreError(f"{path}: the store has version {version}, this program knows up to {newest}; upgrade autotts")
    return version


class _Bad(NamedTuple):
    """A row that cannot be used."""

    number: int  # SQLite's own, for what the row says of itself may be what is wrong
    key: tuple[Any, ...]
    fault: str


async def _corrupt(connection: aiosqlite.Connection) -> dict[str, list[_Bad]]:
    """The rows that cannot be used, by table: unsound ones, unreadable ones, and recordings that lack branches."""
    bad: dict[str, list[_Bad]] = {}
    for table in COLUMNS:
        for number, *row in await _all(connection, select_statement(table).replace("SELECT ", "SELECT rowid, ", 1)):
            if fault := rows.row_fault(table, row):
                bad.setdefault(table, []).append(_Bad(number, rows.row_key(table, row), fault))
    short = await _all(
        connection,
        "SELECT rowid, id FROM recordings WHERE branches <> "
        "(SELECT COUNT(*) FROM branches AS b WHERE b.recording_id = recordings.id)",
    )
    known = {one.number for one in bad.get("recordings", ())}
    for number, key in short:
        if number not in known:
            bad.setdefault("recordings", []).append(_Bad(number, (key,), "not all of its branches are there"))
    return bad


async def _add(connection: aiosqlite.Connection, recordings: Sequence[RecordedQuestion]) -> AddedCounts:
    """Add recordings inside a transaction."""
    added, counts = rows.utc_now(), [0, 0, 0]
    number = await _one(connection, "SELECT COALESCE(MAX(number), -1) + 1 FROM recordings")
    for recorded in recordings:
        new = await _insert(connection, "questions", [rows.question_row(recorded, added)])
        counts[0] += new
        if recorded.reference is not None and not (new and rows.is_certain_reference(recorded)):
            label = Label(recorded.question, recorded.label_source, recorded.reference, recorded.confidence)
            await _insert(connection, "labels", [rows.label_row(label)])
        row = rows.recording_row(recorded, number, added)
        gone = 0 if new or recorded.request else await _replaced(connection, recorded)
        if gone is not None and await _insert(connection, "recordings", [row]):
            number += 1
            counts[1] += not gone
            counts[2] += await _insert(connection, "branches", rows.branch_rows(recorded)) - gone
            if recorded.chat_template or recorded.request:
                await _insert(connection, "provenance", [rows.provenance_row(recorded)])
    return AddedCounts(*counts)


async def _replaced(connection: aiosqlite.Connection, recorded: RecordedQuestion) -> int | None:
    """Remove the recordings that were made as `recorded` was and whose branches are all among its own; how many
    branches that were. None if another has all of its own: there is nothing to add."""
    found = await _all(
        connection,
        "SELECT recordings.id FROM recordings LEFT JOIN provenance ON provenance.recording_id = recordings.id "
        "WHERE question_id = ? AND model = ? AND benchmark = ? AND sampling = ? AND delta = ? AND probe_template = ? "
        "AND origin = ? AND COALESCE(chat_template, '') = ? AND COALESCE(request_id, '') = ''",
        rows.match_columns(recorded),
    )
    said = "SELECT tokens, complete, final, probes, probe_tokens FROM branches WHERE recording_id = ?"
    own = Counter(row[2:-1] for row in rows.branch_rows(recorded)) if found else Counter()
    gone, is_held = 0, False
    for (other,) in found:
        if other == rows.recording_digest(recorded) or own <= (
            theirs := Counter(await _all(connection, said, (other,)))
        ):
            is_held = True
        elif theirs <= own:
            gone += (await _drop_recording(connection, other))[1]
    return None if is_held else gone


async def _is_served(connection: aiosqlite.Connection, request: str) -> bool:
    """Whether there is an episode of `request`; nothing is known of none."""
    return not request or bool(await _all(connection, "SELECT 1 FROM episodes WHERE request_id = ?", (request,)))


async def _drop_served(
    connection: aiosqlite.Connection, where: str, value: str, requests: Iterable[str] = ()
) -> ForgottenCounts:
    """Remove the episodes and the feedback that `where` picks, and all else that came of those episodes' requests, or
    of `requests`. Labels that were counted of any of it go too: what is left is counted anew when labels are made."""
    served = {one for (one,) in await _all(connection, f"SELECT request_id FROM episodes WHERE {where}", (value,))}
    told = {one for (one,) in await _all(connection, f"SELECT request_id FROM feedback WHERE {where}", (value,))}
    served.update(requests)
    labels = heard = recordings = 0
    for one in sorted(served | told):
        labels += await _delete(
            connection,
            "labels WHERE source IN (?, ?) AND question_id IN (SELECT question_id FROM episodes WHERE request_id = ? "
            "UNION SELECT question_id FROM recordings JOIN provenance ON recording_id = recordings.id "
            "WHERE request_id = ? AND request_id <> '')",
            *(LabelSource.FEEDBACK, LabelSource.CONSENSUS, one, one),
        )
    for one in sorted(served):
        for recording in await _recordings_of(connection, one):
            recordings += (await _drop_recording(connection, recording))[0]
        heard += await _delete(connection, "feedback WHERE request_id = ?", one)  # whoever gave it
    heard += await _delete(connection, f"feedback WHERE {where}", value)
    episodes = await _delete(connection, f"episodes WHERE {where}", value)
    unused, questions = await _drop_unused(connection)
    return ForgottenCounts(episodes, heard, recordings, labels + unused, questions)


async def _recordings_of(connection: aiosqlite.Connection, request: str) -> set[str]:
    """The recordings made for a request; none were made for none."""
    found = "SELECT recording_id FROM provenance WHERE request_id = ? AND request_id <> ''"
    return {one for (one,) in await _all(connection, found, (request,))}


async def _drop_recording(connection: aiosqlite.Connection, recording: str) -> tuple[int, int]:
    """Remove a recording with all that belongs to it; how many recordings and branches there were."""
    branches = await _delete(connection, "branches WHERE recording_id = ?", recording)
    await _delete(connection, "provenance WHERE recording_id = ?", recording)
    return await _delete(connection, "recordings WHERE id = ?", recording), branches


async def _drop_unused(connection: aiosqlite.Connection) -> tuple[int, int]:
    """Remove the labels and questions that nothing refers to; how many there were."""
    recorded = "EXISTS (SELECT 1 FROM recordings WHERE recordings.question_id = {0})"
    served = "EXISTS (SELECT 1 FROM episodes WHERE episodes.question_id = {0})"
    unused = f"NOT {recorded} AND NOT {served}"
    labels = await _delete(connection, f"labels WHERE {unused.format('labels.question_id')}")
    return labels, await _delete(connection, f"questions WHERE {unused.format('questions.id')}")


def _made(make: Callable[[T], rows.Row], values: Sequence[T]) -> list[rows.Row]:
    return [make(value) for value in values]


def _told(path: Path, error: Exception) -> Exception:
    """The error to raise to whoever asked for work in which `error` was met."""
    if isinstance(error, _OF_A_ROW) or (isinstance(error, sqlite3.ProgrammingError) and "binding" in str(error)):
        return UnstorableValue(f"{path}: {error}")
    return StoreError(f"{path}: {error}") if isinstance(error, sqlite3.Error) else error


async def _insert(connection: aiosqlite.Connection, table: str, values: Iterable[Sequence[Any]]) -> int:
    cursor = await connection.executemany(insert_statement(table), values)
    return cursor.rowcount


async def _delete(connection: aiosqlite.Connection, where: str, *values: Any) -> int:
    cursor = await connection.execute(f"DELETE FROM {where}", values)
    return cursor.rowcount


async def _all(connection: aiosqlite.Connection, statement: str, values: Iterable[Any] = ()) -> list[Any]:
    return list(await connection.execute_fetchall(statement, values))


async def _one(connection: aiosqlite.Connection, statement: str) -> int:
    found = await _all(connection, statement)
    return int(found[0][0])
