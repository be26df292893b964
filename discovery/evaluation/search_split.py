"""What an explorer may see of the recordings: the search split alone, and of that nothing that can be read.

To score by a recording it matters which answers are the same, and which is right; what they say does not. So answers
become tokens and questions salted hashes, and whoever reads the file learns neither.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from controllers.sandbox.deadline import Clock
from discovery.answers import Judge
from discovery.data.atomic_files import atomic_write
from discovery.data.importers import format_recording_line
from discovery.data.recordings import Cell, RecordedBranch, RecordedQuestion, Recording, Split, intern_answers
from discovery.errors import DiscoveryError, RecordingsNotFound
from discovery.evaluation.evaluate import AnswerComparison, pool_recordings, regrade
from discovery.evaluation.sources import RecordingSource, open_source


class SearchSplitSource:
    """A source of another's search split. The other splits are not shown, and not read."""

    def __init__(self, source: RecordingSource) -> None:
        self._source = source

    def cells(self) -> Sequence[Cell]:
        return [cell for cell in self._source.cells() if cell.split is Split.SEARCH]

    def load(self, cell: Cell) -> list[RecordedQuestion]:
        """The recordings of a cell. Raises DiscoveryError if it is of another split."""
        if cell.split is not Split.SEARCH:
            raise DiscoveryError(f"{' '.join(cell)}: explorers read the {Split.SEARCH} split and no other")
        return self._source.load(cell)


def search_split_of(source: RecordingSource) -> RecordingSource:
    """The same recordings as an explorer may read them."""
    return SearchSplitSource(source)


def export_search_split(
    recordings: Path, to: Path, salt: str | None = None, answers: AnswerComparison = AnswerComparison.AUTO
) -> int:
    """Write the search split of a store or folder as lines in which nothing can be read. How many lines there are.

    The exported strings are the same where `answers` says so now: evaluate the file with `Answers.EXACT`. The same
    `salt` gives the same file; without it one is drawn and forgotten.

    Raises RecordingsNotFound, BadRecording, FileWriteError.
    """
    source = search_split_of(open_source(recordings))
    salted = salt if salt is not None else secrets.token_hex(16)
    written = 0
    with Judge(clock=Clock.CPU) as judge, atomic_write(to) as file:
        for cell in source.cells():
            found = source.load(cell)
            tell: Callable[[RecordedQuestion], Recording] = (
                intern_answers if answers.resolve(found) is AnswerComparison.EXACT else lambda one: regrade(one, judge)
            )
            for recorded in pool_recordings(found):  # an answer's token is one recording's own
                file.write(format_recording_line(_opaque(recorded, tell(recorded), salted)).encode())
                written += 1
        if not written:
            raise RecordingsNotFound(f"{recordings}: nothing there is of the {Split.SEARCH} split")
    return written


def salted_id(known: str, salt: str) -> str:
    """What a question, or a request, is known by in the export."""
    return sha256(f"{salt} {known}".encode()).hexdigest()


def _opaque(recorded: RecordedQuestion, interned: Recording, salt: str) -> RecordedQuestion:
    """The recording with tokens for answers, numbered in an order that says nothing of which came first."""
    names = [f"a{number}" for number in range(len(interned.answers) + 1)]  # one more for a reference no branch gave
    random.Random(f"{salt} {recorded.question} {recorded.model}").shuffle(names)

    def name(number: int) -> str | None:
        return names[number] if number >= 0 else None

    spans = zip(interned.starts[:-1].tolist(), interned.starts[1:].tolist(), strict=True)
    branches = [
        RecordedBranch(
            probes=[name(number) for number in interned.probes[start:end].tolist()],
            tokens=branch.tokens,
            final=name(final),
            probe_tokens=list(branch.probe_tokens),
            complete=branch.complete,
        )
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
