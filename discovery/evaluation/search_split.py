"""Export of what explorers may see of recordings: only the search split, without readable questions or answers.

Scoring only needs to know which answers are equal and which is right. The export therefore replaces answers by opaque
tokens, and questions by salted hashes.
"""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from controllers.sandbox.deadline import Clock
from discovery.answers import Judge
from discovery.data.atomic_files import atomic_write
from discovery.data.importers import format_recording_line
from discovery.data.recordings import Cell, RecordedQuestion, Recording, Split
from discovery.errors import DiscoveryError, RecordingsNotFound
from discovery.evaluation.evaluate import AnswerComparison, intern_compared, pool_recordings
from discovery.evaluation.sources import RecordingSource, open_source
from discovery.store import StorePlace


class SearchSplitSource:
    """The search split of another source. The other splits are neither listed nor read."""

    def __init__(self, source: RecordingSource) -> None:
        self._source = source

    def cells(self) -> Sequence[Cell]:
        return [cell for cell in self._source.cells() if cell.split is Split.SEARCH]

    def load(self, cell: Cell) -> list[RecordedQuestion]:
        """Return the recordings of a cell. Raises DiscoveryError if it is of another split."""
        if cell.split is not Split.SEARCH:
            raise DiscoveryError(f"{' '.join(cell)}: explorers may read only the {Split.SEARCH} split")
        return self._source.load(cell)


def search_split_of(source: RecordingSource) -> RecordingSource:
    """Return a source limited to what explorers may read."""
    return SearchSplitSource(source)


def export_search_split(
    recordings: StorePlace, to: Path, salt: str | None = None, answers: AnswerComparison = AnswerComparison.AUTO
) -> int:
    """Write the search split of a store or folder as lines without readable text; return the number of lines.

    Exported strings are equal where `answers` treats the answers as the same: evaluate the file with
    `AnswerComparison.EXACT`. The same `salt` gives the same file; by default a random one is used.

    Raises RecordingsNotFound, BadRecording, FileWriteError.
    """
    source = search_split_of(open_source(recordings))
    salted = salt if salt is not None else secrets.token_hex(16)
    written = 0
    with Judge(clock=Clock.CPU) as judge, atomic_write(to) as file:
        for cell in source.cells():
            loaded = source.load(cell)
            comparison = answers.resolve(loaded)
            for recorded in pool_recordings(loaded):  # an answer's token differs between recordings
                interned = intern_compared(recorded, comparison, judge)
                file.write(format_recording_line(_opaque(recorded, interned, salted)).encode())
                written += 1
        if not written:
            raise RecordingsNotFound(f"{recordings}: holds no recordings of the {Split.SEARCH} split")
    return written


def exported_questions(recordings: StorePlace) -> set[str]:
    """Return the ids of the questions that `export_search_split` shows. Raises BadRecording."""
    source = search_split_of(open_source(recordings))
    return {recorded.question for cell in source.cells() for recorded in source.load(cell)}


def salted_id(known: str, salt: str) -> str:
    """Return the hash that stands for a question or a request in the export."""
    return sha256(f"{salt} {known}".encode()).hexdigest()


def _opaque(recorded: RecordedQuestion, interned: Recording, salt: str) -> RecordedQuestion:
    """Return the recording with answers replaced by tokens, whose numbers do not show which came first."""
    names = [f"a{number}" for number in range(len(interned.answers) + 1)]  # one more for a reference no branch gave
    random.Random(f"{salt} {recorded.question} {recorded.model}").shuffle(names)

    def name(number: int) -> str | None:
        return names[number] if number >= 0 else None

    spans = zip(interned.starts[:-1].tolist(), interned.starts[1:].tolist(), strict=True)
    branches = [
        branch._replace(probes=[name(number) for number in interned.probes[start:end].tolist()], final=name(final))
        for branch, final, (start, end) in zip(recorded.branches, interned.finals.tolist(), spans, strict=True)
    ]
    return replace(
        recorded,
        question=salted_id(recorded.question, salt),
        branches=branches,
        reference=None if recorded.reference is None else names[interned.reference],
        text=None,
        request=salted_id(recorded.request, salt) if recorded.request else "",
    )


def recordings_digest(cells: Mapping[Cell, Sequence[Recording]]) -> str:
    """Return a short hash of all that replay reads of recordings."""
    hashed = sha256()
    for cell, recordings in cells.items():
        for item in recordings:
            about = (cell, item.question, item.interval, item.reference, item.greedy_first, item.has_probes)
            branches = (item.starts, item.probes, item.probe_tokens, item.tokens, item.finals, item.complete)
            signals = (item.confidences, item.lowests, item.probe_confidences)
            hashed.update(json.dumps(about).encode())
            for array in (*branches, *signals):
                hashed.update(f"{array.size} ".encode() + array.tobytes())
    return hashed.hexdigest()[:16]
