"""Rows: what they stand for, and the checksum that tells whether they still say what was written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b, sha256
from typing import Any, Final, NamedTuple

from controllers.sandbox.proof import Level
from discovery.errors import CorruptRow
from discovery.recordings import Cell, LabelSource, Origin, RecordedBranch, RecordedQuestion, Split

Row = tuple[Any, ...]

MEND: Final = "restore the store from a backup, or drop what is corrupt with `autotts store prune --corrupt`"


@dataclass(frozen=True)
class Episode:
    """One served or replayed episode."""

    id: str
    request_id: str
    model: str
    controller: str
    digest: str  # hash of the controller
    beta: float
    rounds: int
    branches: int
    ledger: Mapping[str, int]  # tokens by what they were spent on
    stop: str
    answer: str | None = None
    question: str | None = None  # `question_id`, if it is known
    created: str = field(default_factory=lambda: now())
    sandbox: Level = Level.TRUSTED  # how its controller was held


@dataclass(frozen=True)
class Feedback:
    """What a client said of an answer. Later feedback counts; earlier is kept."""

    id: str
    request_id: str
    kind: str  # "correct", "answer" or "score"
    value: str
    created: str = field(default_factory=lambda: now())


class Tried(NamedTuple):
    """One candidate of a search, and what came of it."""

    digest: str
    name: str
    explorer: str
    parent: str | None  # digest of what it was made from
    score: float | None  # None if it failed
    failure: str
    usd: float
    source: str


@dataclass(frozen=True)
class Search:
    """A run of `autotts discover`, as far as its record went."""

    id: str  # the hash its record ends in
    explorer: str
    seed: int
    settings: Mapping[str, Any]
    tried: Sequence[Tried]
    created: str = field(default_factory=lambda: now())


class Added(NamedTuple):
    """How much of what was to be added was new."""

    questions: int
    recordings: int
    branches: int


class Summary(NamedTuple):
    """What a store holds of one cell."""

    cell: Cell
    questions: int
    recordings: int
    complete: int  # recordings of which every branch is
    branches: int


class Verified(NamedTuple):
    """Every row of a store, looked at."""

    rows: Mapping[str, int]  # how many there are, by table
    bad: Sequence[str]  # what is wrong with which


def now() -> str:
    """The time, as stored."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def checksum(values: Sequence[Any]) -> str:
    """Of a row's other columns."""
    return blake2b(_json(list(values)).encode(), digest_size=16).hexdigest()


def sealed(values: Sequence[Any]) -> Row:
    """A row with its checksum."""
    return (*values, checksum(values))


def is_sound(row: Sequence[Any]) -> bool:
    """Whether a row's checksum, its last column, is right."""
    return bool(checksum(row[:-1]) == row[-1])


def opened(store: object, table: str, rows: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    """The rows without their checksums. Raises CorruptRow at one that was changed."""
    for row in rows:
        if not is_sound(row):
            raise CorruptRow(f"{store}: {describe(table, key(table, row))} is not what was written; {MEND}")
        yield row[:-1]


def key(table: str, row: Sequence[Any]) -> tuple[Any, ...]:
    """The columns that name a row."""
    return tuple(row[: 2 if table == "branches" else 1])


def describe(table: str, key: Sequence[Any]) -> str:
    """A row by its table and key, for people."""
    return f"row {'/'.join(str(part)[:16] for part in key)} of {table}"


def fingerprint(recorded: RecordedQuestion) -> str:
    """What a recording is known by: the same data gives the same, whenever it is imported."""
    about = [recorded.question, recorded.model, recorded.benchmark, recorded.interval, dict(recorded.sampling)]
    branches = [[list(b.probes), b.tokens, b.final, list(b.probe_tokens), b.complete] for b in recorded.branches]
    return sha256(_json([*about, recorded.probe_template, recorded.origin, branches]).encode()).hexdigest()


def question_row(recorded: RecordedQuestion, added: str) -> Row:
    """Of table questions."""
    about = (recorded.question, recorded.split, recorded.reference, recorded.label_source, recorded.text, added)
    return sealed(about)


def recording_row(recorded: RecordedQuestion, number: int, added: str) -> Row:
    """Of table recordings."""
    return sealed(
        (
            fingerprint(recorded),
            number,
            recorded.question,
            recorded.model,
            recorded.benchmark,
            _json(dict(recorded.sampling)),
            recorded.interval,
            recorded.probe_template,
            recorded.origin,
            int(recorded.complete),
            len(recorded.branches),
            added,
        )
    )


def branch_rows(recorded: RecordedQuestion) -> Iterator[Row]:
    """Of table branches."""
    recording = fingerprint(recorded)
    for number, branch in enumerate(recorded.branches):
        probes, costs = _json(list(branch.probes)), _json(list(branch.probe_tokens))
        yield sealed((recording, number, branch.tokens, int(branch.complete), branch.final, probes, costs))


def episode_row(episode: Episode) -> Row:
    """Of table episodes."""
    about = (episode.id, episode.request_id, episode.question, episode.model, episode.controller, episode.digest)
    what = (float(episode.beta), episode.rounds, episode.branches, _json(dict(episode.ledger)), episode.stop)
    return sealed((*about, *what, episode.answer, episode.created, episode.sandbox))


def feedback_row(feedback: Feedback) -> Row:
    """Of table feedback."""
    return sealed((feedback.id, feedback.request_id, feedback.kind, feedback.value, feedback.created))


def search_row(search: Search) -> Row:
    """Of table runs."""
    about = (search.id, search.explorer, search.seed, _json(dict(search.settings)), len(search.tried), search.created)
    return sealed(about)


def tried_rows(search: Search) -> Iterator[Row]:
    """Of table candidates."""
    for number, one in enumerate(search.tried):
        yield sealed((f"{search.id}:{number}", search.id, *one))


def recorded(recording: Sequence[Any], question: Sequence[Any], branches: Sequence[Sequence[Any]]) -> RecordedQuestion:
    """What three tables say of one recording; rows without checksums."""
    identity, split, reference, label_source, text, _ = question
    _, _, _, model, benchmark, sampling, delta, template, origin, *_ = recording
    return RecordedQuestion(
        question=identity,
        model=model,
        benchmark=benchmark,
        interval=delta,
        branches=[
            RecordedBranch(json.loads(probes), tokens, final, json.loads(costs), bool(complete))
            for _, _, tokens, complete, final, probes, costs in branches
        ],
        reference=reference,
        label_source=LabelSource(label_source),
        split=Split(split),
        text=text,
        sampling=json.loads(sampling),
        probe_template=template,
        origin=Origin(origin),
    )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
