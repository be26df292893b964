"""Read what is recorded: totals by model, benchmark and split, labels by source, and how far back requests go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from discovery.store.usage.reader import UsageReader


class RecordedCell(NamedTuple):
    """Totals of the recordings of one model on one benchmark and split."""

    model: str
    benchmark: str
    split: str
    questions: int
    recordings: int
    complete: int  # recordings whose branches all ran to their end
    branches: int
    latest: str  # when the latest of them was added


class LabelSourceTotal(NamedTuple):
    """Totals of the answers that one source gave."""

    source: str
    questions: int
    confidence: float  # mean


class RecordedData(NamedTuple):
    """Totals of a store."""

    cells: Sequence[RecordedCell]
    labels: Sequence[LabelSourceTotal]
    requests: int
    oldest: str | None  # when the first request ended
    feedback: int


async def recorded_data(reader: UsageReader) -> RecordedData:
    """Return the totals of a store. Raises StoreError."""
    cells = await reader.read(
        "SELECT model, benchmark, split, COUNT(DISTINCT question_id), COUNT(*), SUM(complete), SUM(branches), "
        "MAX(recordings.added) FROM recordings JOIN questions ON questions.id = recordings.question_id "
        "GROUP BY model, benchmark, split ORDER BY model, benchmark, split"
    )
    labels = await reader.read(
        "SELECT source, COUNT(*), AVG(confidence) FROM "
        "(SELECT label_source AS source, 1.0 AS confidence FROM questions WHERE reference IS NOT NULL "
        "UNION ALL SELECT source, confidence FROM labels) AS answers GROUP BY 1 ORDER BY 1"
    )
    ((requests, oldest),) = await reader.read("SELECT COUNT(*), MIN(created) FROM episode_facts")
    ((feedback,),) = await reader.read("SELECT COUNT(*) FROM feedback")
    return RecordedData(
        [RecordedCell(*cell) for cell in cells],
        [LabelSourceTotal(*label) for label in labels],
        *(int(requests), oldest, int(feedback)),
    )
