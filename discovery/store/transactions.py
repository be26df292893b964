"""Changes to the store's tables, made inside a transaction that the caller has begun, and helpers to run statements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import aiosqlite

from discovery.data.recordings import LabelSource, RecordedQuestion
from discovery.store import rows
from discovery.store.records import AddedCounts, ForgottenCounts, Label, utc_now
from discovery.store.row_checks import row_fault, row_key
from discovery.store.schema import COLUMNS, insert_statement, select_statement


class BadRow(NamedTuple):
    """A row that cannot be used."""

    rowid: int  # SQLite's own number of the row, because the row's content may be wrong
    key: tuple[Any, ...]
    fault: str


async def find_bad_rows(connection: aiosqlite.Connection) -> dict[str, list[BadRow]]:
    """Return, by table, rows with a wrong checksum, unreadable rows, and recordings that lack branches."""
    bad: dict[str, list[BadRow]] = {}
    for table in COLUMNS:
        statement = select_statement(table).replace("SELECT ", "SELECT rowid, ", 1)
        for rowid, *row in await fetch_all(connection, statement):
            if fault := row_fault(table, row):
                bad.setdefault(table, []).append(BadRow(rowid, row_key(table, row), fault))
    incomplete = await fetch_all(
        connection,
        "SELECT rowid, id FROM recordings WHERE branches <> "
        "(SELECT COUNT(*) FROM branches AS b WHERE b.recording_id = recordings.id)",
    )
    known = {row.rowid for row in bad.get("recordings", ())}
    for rowid, key in incomplete:
        if rowid not in known:
            bad.setdefault("recordings", []).append(BadRow(rowid, (key,), "some of its branches are missing"))
    return bad


async def add_recordings(connection: aiosqlite.Connection, recordings: Sequence[RecordedQuestion]) -> AddedCounts:
    """Add recordings with their questions, labels, branches and provenance."""
    added, counts = utc_now(), [0, 0, 0]
    number = await fetch_number(connection, "SELECT COALESCE(MAX(number), -1) + 1 FROM recordings")
    for recorded in recordings:
        is_new = await insert_rows(connection, "questions", [rows.question_row(recorded, added)])
        counts[0] += is_new
        if recorded.reference is not None and not (is_new and rows.is_certain_reference(recorded)):
            label = Label(recorded.question, recorded.label_source, recorded.reference, recorded.confidence)
            await insert_rows(connection, "labels", [rows.label_row(label)])
        row = rows.recording_row(recorded, number, added)
        replaced = 0 if is_new or recorded.request else await _replace_parts_of(connection, recorded)
        if replaced is not None and await insert_rows(connection, "recordings", [row]):
            number += 1
            counts[1] += not replaced
            counts[2] += await insert_rows(connection, "branches", rows.branch_rows(recorded)) - replaced
            if recorded.chat_template or recorded.request:
                await insert_rows(connection, "provenance", [rows.provenance_row(recorded)])
    return AddedCounts(*counts)


async def _replace_parts_of(connection: aiosqlite.Connection, recorded: RecordedQuestion) -> int | None:
    """Remove recordings made like `recorded` whose branches are all among its own; return how many branches they had.

    Returns None if another recording already has all of its branches: then there is nothing to add.
    """
    candidates = await fetch_all(
        connection,
        "SELECT recordings.id FROM recordings LEFT JOIN provenance ON provenance.recording_id = recordings.id "
        "WHERE question_id = ? AND model = ? AND benchmark = ? AND sampling = ? AND delta = ? AND probe_template = ? "
        "AND origin = ? AND COALESCE(chat_template, '') = ? AND COALESCE(request_id, '') = ''",
        rows.match_columns(recorded),
    )
    contents = "SELECT tokens, complete, final, probes, probe_tokens FROM branches WHERE recording_id = ?"
    own = Counter(row[2:-1] for row in rows.branch_rows(recorded)) if candidates else Counter()
    removed, is_held = 0, False
    for (other,) in candidates:
        is_same = other == rows.recording_digest(recorded)
        if is_same or own <= (theirs := Counter(await fetch_all(connection, contents, (other,)))):
            is_held = True
        elif theirs <= own:
            removed += (await drop_recording(connection, other))[1]
    return None if is_held else removed


async def is_served(connection: aiosqlite.Connection, request: str) -> bool:
    """Return whether `request` is empty or has an episode."""
    return not request or bool(await fetch_all(connection, "SELECT 1 FROM episodes WHERE request_id = ?", (request,)))


async def drop_served(
    connection: aiosqlite.Connection, where: str, value: str, requests: Iterable[str] = ()
) -> ForgottenCounts:
    """Remove the episodes and feedback that `where` selects, and other data derived from their requests.

    `requests` names further requests to remove. Labels counted from any of it are removed too; they are recounted from
    what is left when labels are next computed.
    """
    served = {request for (request,) in await _request_ids(connection, "episodes", where, value)}
    rated = {request for (request,) in await _request_ids(connection, "feedback", where, value)}
    served.update(requests)
    labels = feedback = recordings = 0
    for request in sorted(served | rated):
        labels += await delete_rows(
            connection,
            "labels WHERE source IN (?, ?) AND question_id IN (SELECT question_id FROM episodes WHERE request_id = ? "
            "UNION SELECT question_id FROM recordings JOIN provenance ON recording_id = recordings.id "
            "WHERE request_id = ? AND request_id <> '')",
            *(LabelSource.FEEDBACK, LabelSource.CONSENSUS, request, request),
        )
    for request in sorted(served):
        for recording in await recordings_of(connection, request):
            recordings += (await drop_recording(connection, recording))[0]
        feedback += await delete_rows(connection, "feedback WHERE request_id = ?", request)  # from any tenant
    feedback += await delete_rows(connection, f"feedback WHERE {where}", value)
    episodes = await delete_rows(connection, f"episodes WHERE {where}", value)
    unused, questions = await drop_unused(connection)
    return ForgottenCounts(episodes, feedback, recordings, labels + unused, questions)


async def _request_ids(connection: aiosqlite.Connection, table: str, where: str, value: str) -> list[Any]:
    return await fetch_all(connection, f"SELECT request_id FROM {table} WHERE {where}", (value,))


async def recordings_of(connection: aiosqlite.Connection, request: str) -> set[str]:
    """Return the ids of the recordings made for a request; an empty request has none."""
    statement = "SELECT recording_id FROM provenance WHERE request_id = ? AND request_id <> ''"
    return {recording for (recording,) in await fetch_all(connection, statement, (request,))}


async def drop_recording(connection: aiosqlite.Connection, recording: str) -> tuple[int, int]:
    """Remove a recording with its branches and provenance; return how many recordings and branches were removed."""
    branches = await delete_rows(connection, "branches WHERE recording_id = ?", recording)
    await delete_rows(connection, "provenance WHERE recording_id = ?", recording)
    return await delete_rows(connection, "recordings WHERE id = ?", recording), branches


async def drop_unused(connection: aiosqlite.Connection) -> tuple[int, int]:
    """Remove labels and questions that nothing refers to; return how many of each."""
    recorded = "EXISTS (SELECT 1 FROM recordings WHERE recordings.question_id = {0})"
    served = "EXISTS (SELECT 1 FROM episodes WHERE episodes.question_id = {0})"
    unused = f"NOT {recorded} AND NOT {served}"
    labels = await delete_rows(connection, f"labels WHERE {unused.format('labels.question_id')}")
    return labels, await delete_rows(connection, f"questions WHERE {unused.format('questions.id')}")


async def insert_rows(connection: aiosqlite.Connection, table: str, values: Iterable[Sequence[Any]]) -> int:
    """Insert complete rows, skipping those whose key exists; return how many were new."""
    cursor = await connection.executemany(insert_statement(table), values)
    return cursor.rowcount


async def delete_rows(connection: aiosqlite.Connection, where: str, *values: Any) -> int:
    """Run `DELETE FROM {where}`; return how many rows it removed."""
    cursor = await connection.execute(f"DELETE FROM {where}", values)
    return cursor.rowcount


async def fetch_all(connection: aiosqlite.Connection, statement: str, values: Iterable[Any] = ()) -> list[Any]:
    """Return all rows of a query."""
    return list(await connection.execute_fetchall(statement, values))


async def fetch_number(connection: aiosqlite.Connection, statement: str) -> int:
    """Return the one integer that a query yields."""
    ((number,),) = await fetch_all(connection, statement)
    return int(number)
