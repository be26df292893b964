"""Load recordings: join the rows of several tables, after checking each of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from discovery.data.recordings import RecordedQuestion
from discovery.errors import CorruptRow
from discovery.store import rows
from discovery.store.databases.connection import DatabaseConnection
from discovery.store.records import Label
from discovery.store.row_checks import REPAIR_HINT, checked_rows, read_rows
from discovery.store.schema import select_statement


async def load_recordings(
    connection: DatabaseConnection, condition: str, values: Sequence[Any]
) -> list[RecordedQuestion]:
    """Return the recordings that satisfy a condition on tables `recordings` and `questions`, in their order.

    Raises CorruptRow or StoreError.
    """

    async def select(table: str, rest: str) -> list[Sequence[Any]]:
        selected = await connection.fetch_all(select_statement(table, rest), values)
        return list(checked_rows(connection.place, table, selected))

    joined = f"JOIN questions ON questions.id = recordings.question_id WHERE {condition}"
    order = "ORDER BY recordings.number"
    recordings = await select("recordings", f"{joined} {order}")
    identities = f"SELECT questions.id FROM recordings {joined}"
    questions = await select("questions", f"WHERE id IN ({identities})")
    of_recording = "JOIN recordings ON recordings.id = {}.recording_id " + joined
    branches = await select("branches", f"{of_recording.format('branches')} {order}, branches.number")
    origins, signal_rows = [
        await select(table, of_recording.format(table)) for table in ("provenance", "branch_signals")
    ]
    by_id = {question[0]: question for question in questions}
    provenance = {row[0]: row for row in origins}
    signals: dict[str, dict[int, Sequence[Any]]] = {}
    for row in signal_rows:
        signals.setdefault(row[0], {})[row[1]] = row
    labels: dict[str, list[Label]] = {}
    own_labels = f"WHERE question_id IN ({identities}) ORDER BY question_id, source"
    label_rows = await connection.fetch_all(select_statement("labels", own_labels), values)
    for label in read_rows(connection.place, "labels", label_rows, rows.label_from_row):
        labels.setdefault(label.question, []).append(label)
    wrong = await _judged_wrong(connection, identities, values)
    by_recording = {key: list(group) for key, group in groupby(branches, key=lambda row: row[0])}
    loaded = []
    for recording in recordings:
        name = f"{connection.place}: recording {recording[0][:16]}"
        own = by_recording.get(recording[0], [])
        if len(own) != recording[10]:
            raise CorruptRow(f"{name} has {len(own)} of its {recording[10]} branches; {REPAIR_HINT}")
        related = by_id[recording[2]], own, provenance.get(recording[0]), labels.get(recording[2], ())
        own_signals = signals.get(recording[0], rows.NO_ROWS)
        try:
            loaded.append(rows.recording_from_rows(recording, *related, own_signals, recording[2] in wrong))
        except ValueError as error:
            raise CorruptRow(f"{name}: {error}; {REPAIR_HINT}") from None
    return loaded


async def _judged_wrong(connection: DatabaseConnection, identities: str, values: Sequence[Any]) -> set[str]:
    """Return those of the questions that `identities` selects of which the latest feedback on a request says wrong."""
    asked = await connection.fetch_all(
        "SELECT DISTINCT episodes.request_id, episodes.question_id FROM feedback "
        f"JOIN episodes ON episodes.request_id = feedback.request_id WHERE episodes.question_id IN ({identities})",
        values,
    )
    given = await connection.fetch_all(
        select_statement(
            "feedback",
            "WHERE request_id IN (SELECT episodes.request_id FROM episodes "
            f"WHERE episodes.question_id IN ({identities})) ORDER BY created, id",
        ),
        values,
    )
    read = read_rows(connection.place, "feedback", given, rows.feedback_from_row)
    latest = {feedback.request_id: feedback for feedback in read}
    return {question for request, question in asked if request in latest and latest[request].rating < 0}
