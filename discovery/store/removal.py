"""Remove rows from a store, with everything derived from them, inside a transaction that the caller has begun."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from discovery.data.recordings import LabelSource, Origin
from discovery.store.databases.connection import DatabaseConnection
from discovery.store.records import AddedCounts, ForgottenCounts
from discovery.store.schema import COLUMNS
from discovery.store.transactions import drop_recording, find_bad_rows, recordings_of
from discovery.store.usage.sums import drop_usage, rebuild

RECORDING_TABLES: Final = ("branches", "branch_signals", "provenance", "recordings")
"""Tables whose keys start with a recording's id; the others refer to the last one."""


async def drop_served(
    connection: DatabaseConnection,
    where: str,
    values: Sequence[str],
    requests: Iterable[str] = (),
    limit: int | None = None,
) -> ForgottenCounts:
    """Remove the episodes and feedback that `where` selects, and other data derived from their requests.

    `requests` names further requests to remove. With a limit, only so many of either are removed, oldest first. Labels
    counted from any of it are removed too; they are recounted from what is left when labels are next computed.
    """
    chosen = f"FROM {{}} WHERE {where}" + (f" ORDER BY created LIMIT {limit}" if limit else "")
    episodes = await connection.fetch_all(f"SELECT request_id, id, created, tenant {chosen.format('episodes')}", values)
    rated = await connection.fetch_all(f"SELECT request_id, id {chosen.format('feedback')}", values)
    served = {request for request, *_ in episodes}.union(requests)
    names = sorted(served, key=repr)
    touched = sorted(served.union(request for request, _ in rated), key=repr)
    questions = await _questions_of(connection, touched)
    counted = f"labels WHERE source IN ('{LabelSource.FEEDBACK}', '{LabelSource.CONSENSUS}')"
    labels = await connection.delete_in(f"{counted} AND question_id", questions)
    of_requests = "SELECT recording_id FROM provenance WHERE request_id <> '' AND request_id"
    made = await connection.select_in(of_requests, names)
    recordings = 0
    for table in RECORDING_TABLES:
        key = "id" if table == "recordings" else "recording_id"
        recordings = await connection.delete_in(f"{table} WHERE {key}", made)
    feedback = await connection.delete_in("feedback WHERE request_id", names)  # from any tenant
    feedback += await connection.delete_in("feedback WHERE id", [identity for _, identity in rated])
    removed = await connection.delete_in("episodes WHERE id", [identity for _, identity, *_ in episodes])
    await drop_usage(connection, [row[1:] for row in episodes])
    unused, dropped = await drop_unused(connection, questions)
    return ForgottenCounts(removed, feedback, recordings, labels + unused, dropped)


async def _questions_of(connection: DatabaseConnection, requests: Sequence[str]) -> list[str]:
    """Return the questions of the episodes and recordings of requests."""
    served = await connection.select_in("SELECT question_id FROM episodes WHERE request_id", requests)
    of_recordings = (
        "SELECT question_id FROM recordings JOIN provenance ON recording_id = recordings.id "
        "WHERE request_id <> '' AND request_id"
    )
    recorded = await connection.select_in(of_recordings, requests)
    return sorted({question for question in (*served, *recorded) if question is not None}, key=repr)


async def drop_unused(connection: DatabaseConnection, questions: Sequence[str] | None = None) -> tuple[int, int]:
    """Remove labels and questions, of these or of all, that nothing refers to; return how many of each."""
    recorded = "EXISTS (SELECT 1 FROM recordings WHERE recordings.question_id = {0})"
    served = "EXISTS (SELECT 1 FROM episodes WHERE episodes.question_id = {0})"
    unused = f"NOT {recorded} AND NOT {served}"
    dropped = []
    for table, column in (("labels", "question_id"), ("questions", "id")):
        where = f"{table} WHERE {unused.format(f'{table}.{column}')}"
        if questions is None:
            dropped.append(await connection.delete_rows(where))
        else:
            dropped.append(await connection.delete_in(f"{where} AND {column}", questions))
    return dropped[0], dropped[1]


async def prune(
    connection: DatabaseConnection, cells: Callable[[str, str, Origin], bool], corrupt: bool
) -> AddedCounts:
    """Remove recordings that `cells` selects, and with `corrupt` every corrupt row, whole recordings at a time."""
    bad = await find_bad_rows(connection) if corrupt else {}
    doomed = {row.key[0] for table in RECORDING_TABLES for row in bad.get(table, ())}
    bad_questions = {row.key[0] for row in bad.get("questions", ())}
    for row in bad.get("episodes", ()):  # without the episode, a recording's owner and age are unknown
        doomed |= await recordings_of(connection, row.key[0])
    known = "SELECT id, question_id, model, benchmark, origin FROM recordings"
    for recording, question, model, benchmark, origin in await connection.fetch_all(known):
        is_selected = origin in list(Origin) and cells(model, benchmark, Origin(origin))
        if question in bad_questions or is_selected:
            doomed.add(recording)
    branches = recordings = 0
    for recording in sorted(doomed, key=repr):
        dropped = await drop_recording(connection, recording)
        recordings, branches = recordings + dropped[0], branches + dropped[1]
    for row in bad.get("runs", ()):
        await connection.delete_rows("candidates WHERE run_id = ?", row.key[0])
    for table in (*RECORDING_TABLES, "candidates", *COLUMNS):  # referring tables first
        for row in bad.get(table, ()):
            await connection.delete_rows(f"{table} WHERE {connection.row_number} = ?", row.number)
    if bad.get("episodes"):
        await rebuild(connection)  # a corrupt episode may have left facts under another name
    _, questions = await drop_unused(connection)
    return AddedCounts(questions, recordings, branches)
