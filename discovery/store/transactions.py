"""Changes to the store's tables, made inside a transaction that the caller has begun."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from discovery.data.recordings import RecordedQuestion
from discovery.store import rows
from discovery.store.databases.connection import DatabaseConnection
from discovery.store.records import AddedCounts, Label, ServedEpisode, request_of, utc_now
from discovery.store.row_checks import row_fault, row_key
from discovery.store.schema import COLUMNS, select_statement


class BadRow(NamedTuple):
    """A row that cannot be used."""

    number: Any  # the database's own number of the row, because the row's content may be wrong
    key: tuple[Any, ...]
    fault: str


async def find_bad_rows(connection: DatabaseConnection) -> dict[str, list[BadRow]]:
    """Return, by table, rows with a wrong checksum, unreadable rows, and recordings that lack branches."""
    bad: dict[str, list[BadRow]] = {}
    for table in COLUMNS:
        statement = select_statement(table).replace("SELECT ", f"SELECT {table}.{connection.row_number}, ", 1)
        async for part in connection.pages(statement):
            for number, *row in part:
                if fault := row_fault(table, row):
                    bad.setdefault(table, []).append(BadRow(number, row_key(table, row), fault))
    incomplete = await connection.fetch_all(
        f"SELECT {connection.row_number}, id FROM recordings WHERE branches <> "
        "(SELECT COUNT(*) FROM branches AS b WHERE b.recording_id = recordings.id)",
    )
    known = {row.number for row in bad.get("recordings", ())}
    for number, key in incomplete:
        if number not in known:
            bad.setdefault("recordings", []).append(BadRow(number, (key,), "some of its branches are missing"))
    return bad


async def add_recordings(connection: DatabaseConnection, recordings: Sequence[RecordedQuestion]) -> AddedCounts:
    """Add recordings with their questions, labels, branches, signals and provenance."""
    added, counts = utc_now(), [0, 0, 0]
    number = await connection.fetch_number("SELECT COALESCE(MAX(number), -1) + 1 FROM recordings")
    for recorded in recordings:
        is_new = await connection.insert_rows("questions", [rows.question_row(recorded, added)])
        counts[0] += is_new
        if recorded.reference is not None and not (is_new and rows.is_certain_reference(recorded)):
            label = Label(recorded.question, recorded.label_source, recorded.reference, recorded.confidence)
            await connection.insert_rows("labels", [rows.label_row(label)])
        row = rows.recording_row(recorded, number, added)
        replaced = 0 if is_new or recorded.request else await _replace_parts_of(connection, recorded)
        if replaced is not None and await connection.insert_rows("recordings", [row]):
            number += 1
            counts[1] += not replaced
            counts[2] += await connection.insert_rows("branches", rows.branch_rows(recorded)) - replaced
            if signals := list(rows.signal_rows(recorded)):
                await connection.insert_rows("branch_signals", signals)
            if recorded.chat_template or recorded.request:
                await connection.insert_rows("provenance", [rows.provenance_row(recorded)])
    return AddedCounts(*counts)


async def _replace_parts_of(connection: DatabaseConnection, recorded: RecordedQuestion) -> int | None:
    """Remove recordings made like `recorded` whose branches are all among its own; return how many branches they had.

    Returns None if another recording already has all of its branches: then there is nothing to add. A branch without
    signals counts as equal to one with signals that is otherwise the same, and the latter is kept.
    """
    candidates = await connection.fetch_all(
        "SELECT recordings.id FROM recordings LEFT JOIN provenance ON provenance.recording_id = recordings.id "
        "WHERE question_id = ? AND model = ? AND benchmark = ? AND sampling = ? AND delta = ? AND probe_template = ? "
        "AND origin = ? AND COALESCE(chat_template, '') = ? AND COALESCE(request_id, '') = ''",
        rows.match_columns(recorded),
    )
    contents = (
        "SELECT tokens, complete, final, probes, probe_tokens, confidences, lowests, probe_confidences FROM branches "
        "LEFT JOIN branch_signals USING (recording_id, number) WHERE recording_id = ?"
    )
    own = _contents_of(recorded) if candidates else []
    removed, is_held = 0, False
    for (other,) in candidates:
        is_same = other == rows.recording_digest(recorded)
        if is_same or _are_among(own, theirs := await connection.fetch_all(contents, (other,))):
            is_held = True
        elif _are_among(theirs, own):
            removed += (await drop_recording(connection, other))[1]
    return None if is_held else removed


def _contents_of(recorded: RecordedQuestion) -> list[tuple[Any, ...]]:
    """Return the columns of a recording's branches and their signals, None for branches without signals."""
    signals = {row[1]: row[2:-1] for row in rows.signal_rows(recorded)}
    return [(*row[2:-1], *signals.get(row[1], (None,) * 3)) for row in rows.branch_rows(recorded)]


def _are_among(branches: Sequence[tuple[Any, ...]], others: Sequence[tuple[Any, ...]]) -> bool:
    """Return whether all branches, as often as they occur, are among others, which may also have their signals."""
    left = Counter(map(tuple, others)) - Counter(map(tuple, branches))
    missing = Counter(map(tuple, branches)) - Counter(map(tuple, others))
    if any(branch[5] is not None for branch in missing):
        return False
    return Counter(branch[:5] for branch in missing.elements()) <= Counter(branch[:5] for branch in left.elements())


async def without_forgotten(connection: DatabaseConnection, episodes: Sequence[ServedEpisode]) -> list[ServedEpisode]:
    """Return the episodes whose requests were not forgotten, alone, with their other prompts, or with their tenants.

    Only the names that the episodes have are looked up: what was forgotten is kept for good.
    """
    if not await connection.fetch_all("SELECT 1 FROM forgotten LIMIT 1"):
        return list(episodes)
    tenants = {episode.tenant: rows.tombstone("tenant", episode.tenant) for episode in episodes}
    requests = {
        name: {rows.tombstone("request", each) for each in (name, request_of(name))}
        for name in (episode.request_id for episode in episodes)
    }
    asked = sorted({*tenants.values(), *chain(*requests.values())})
    forgotten = dict(await connection.rows_in("SELECT id, created FROM forgotten WHERE id", asked))
    return [
        episode
        for episode in episodes
        if requests[episode.request_id].isdisjoint(forgotten)
        and episode.created > forgotten.get(tenants[episode.tenant], "")
    ]


async def questions_among(connection: DatabaseConnection, asked: Iterable[str]) -> set[str]:
    """Return those questions that were recorded or served."""
    questions = sorted(set(asked))
    recorded = await connection.select_in("SELECT id FROM questions WHERE id", questions)
    served = await connection.select_in("SELECT DISTINCT question_id FROM episodes WHERE question_id", questions)
    return {*recorded, *served}


async def served_among(connection: DatabaseConnection, requests: Iterable[str]) -> set[str]:
    """Return those requests that have an episode, or are empty."""
    asked = sorted(requests)
    return {"", *await connection.select_in("SELECT request_id FROM episodes WHERE request_id", asked)}


async def recordings_of(connection: DatabaseConnection, request: str) -> set[str]:
    """Return the ids of the recordings made for a request; an empty request has none."""
    statement = "SELECT recording_id FROM provenance WHERE request_id = ? AND request_id <> ''"
    return {recording for (recording,) in await connection.fetch_all(statement, (request,))}


async def drop_recording(connection: DatabaseConnection, recording: str) -> tuple[int, int]:
    """Remove a recording with its branches, signals and provenance.

    Returns how many recordings and branches were removed.
    """
    branches = await connection.delete_rows("branches WHERE recording_id = ?", recording)
    for table in ("branch_signals", "provenance"):
        await connection.delete_rows(f"{table} WHERE recording_id = ?", recording)
    return await connection.delete_rows("recordings WHERE id = ?", recording), branches
