"""Source of selected recordings in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from discovery.data.recordings import Cell, RecordedQuestion
from discovery.promotion.ledger import shorten_ids


@dataclass(frozen=True)
class SelectedSource:
    """Recordings in memory that `read_scorable` has returned, as a source."""

    recordings: Mapping[Cell, Sequence[RecordedQuestion]]

    def cells(self) -> Sequence[Cell]:
        return list(self.recordings)

    def load(self, cell: Cell) -> list[RecordedQuestion]:
        return list(self.recordings[cell])

    def select(self, questions: Sequence[str]) -> SelectedSource:
        """Return the recordings of questions, by shortened ids."""
        wanted = frozenset(questions)
        chosen = {
            cell: [item for item in items if shorten_id(item.question) in wanted]
            for cell, items in self.recordings.items()
        }
        return SelectedSource(chosen)


def shorten_id(question: str) -> str:
    """Return a question's id as the ledger keeps it."""
    return shorten_ids([question])[0]
