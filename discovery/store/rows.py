"""Rows: what they stand for, and the checksum that tells whether they still say what was written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b, sha256
from typing import Any, Final, NamedTuple, TypeVar

from pydantic import TypeAdapter
from typing_extensions import TypedDict  # the one pydantic takes on Python 3.11

from controllers.sandbox.proof import Level
from discovery.data.recordings import (
    MAX_BRANCH_TOKENS,
    Cell,
    LabelSource,
    Origin,
    RecordedBranch,
    RecordedQuestion,
    Split,
    Version,
)
from discovery.data.safe_json import compact_json, parse_json
from discovery.errors import CorruptRow
from discovery.store.schema import COLUMNS, NUMBERS

Row = tuple[Any, ...]
T = TypeVar("T")

REPAIR_HINT: Final = "restore the store from a backup, or drop what is corrupt with `autotts store prune --corrupt`"


class EpisodeDetails(TypedDict, total=False):
    """What else is known of a served episode."""

    beta_source: str
    stage: str | None  # its controller was chosen for; None if the request named it
    fallback: str | None  # why the baseline decided in the end, if it did
    decided: int  # rounds its controller decided, before the baseline took over
    limits: Mapping[str, int | None]  # fields of `controllers.Limits`
    spent: int  # tokens its rounds cost; the ledger has what was spent besides
    seconds: float  # from the request to its reply
    answers: Sequence[str]  # by label
    answer_kind: str  # how they were read
    text: str  # of the question, and of
    reply: str | None  # what the client read: both only where the operator has text stored
    usage: Mapping[str, Any]  # as the client was told
    sampling: Mapping[str, Any]  # temperature, top_p, …, as sent
    chat_template: str  # its hash
    probe_template: str
    streamed: bool
    votable: bool
    refused: str | None
    """Why the proxy ended it as `max_tokens`: it did not play the next round (`cut_short`, `sent_too_much`), or the
    controller answered nothing after the request's limit had cut all branches (`all_cut`)."""
    client_request_id: str  # what the client calls the request, if it said so


@dataclass(frozen=True)
class ServedEpisode:
    """One served episode."""

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
    created: str = field(default_factory=lambda: utc_now())
    sandbox: Level = Level.TRUSTED  # how its controller was held
    tenant: str = ""  # whose request it was; empty for a caller without a key
    about: EpisodeDetails = field(default_factory=lambda: EpisodeDetails())
    trace: str = ""  # its rounds, as `discovery.data.packed_rounds` packs them


@dataclass(frozen=True)
class Feedback:
    """What a client said of an answer. Later feedback counts; earlier is kept."""

    id: str
    request_id: str
    kind: str  # "correct", "answer" or "score"
    value: str  # as JSON
    created: str = field(default_factory=lambda: utc_now())
    tenant: str = ""


@dataclass(frozen=True)
class Label:
    """An answer that is held for right, and why."""

    question: str  # `question_id`
    source: LabelSource
    answer: str
    confidence: float  # that it is right, from 0 to 1
    margin: float | None = None  # of a vote: by how large a share of it the answer leads
    created: str = field(default_factory=lambda: utc_now())


StoreItem = ServedEpisode | Feedback | RecordedQuestion
"""What the proxy writes down."""


class ForgottenCounts(NamedTuple):
    """How much of what was to be forgotten there was."""

    episodes: int
    feedback: int
    recordings: int
    labels: int
    questions: int


class TriedCandidate(NamedTuple):
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
class SearchRun:
    """A run of `autotts discover`, as far as its record went."""

    id: str  # the hash its record ends in
    explorer: str
    seed: int
    settings: Mapping[str, Any]
    tried: Sequence[TriedCandidate]
    created: str = field(default_factory=lambda: utc_now())


class AddedCounts(NamedTuple):
    """How much of what was to be added was new."""

    questions: int
    recordings: int
    branches: int


class ServedSummary(NamedTuple):
    """How much there is of served requests."""

    episodes: int
    oldest: str | None  # when the first and the last of them ended
    newest: str | None
    stops: Mapping[str, int]  # episodes by why they ended
    feedback: Mapping[str, int]  # by kind


class CellSummary(NamedTuple):
    """What a store holds of one cell."""

    cell: Cell
    questions: int
    recordings: int
    complete: int  # recordings of which every branch is
    branches: int


class VerificationReport(NamedTuple):
    """Every row of a store, looked at."""

    rows: Mapping[str, int]  # how many there are, by table
    bad: Sequence[str]  # what is wrong with which


def utc_now() -> str:
    """The time, as stored."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def checksum(values: Sequence[Any]) -> str:
    """Of a row's other columns."""
    return blake2b(_json(list(values)).encode(), digest_size=16).hexdigest()


def with_checksum(values: Sequence[Any]) -> Row:
    """A row with its checksum."""
    return (*values, checksum(values))


def has_valid_checksum(row: Sequence[Any]) -> bool:
    """Whether a row's checksum, its last column, is right."""
    try:
        return bool(checksum(row[:-1]) == row[-1])
    except (TypeError, ValueError):  # bytes, or text in no encoding: never written by this program
        return False


def row_fault(table: str, row: Sequence[Any]) -> str:
    """Return what is wrong with a row: nothing, "not what was written" or "cannot be read"."""
    if not has_valid_checksum(row):
        return "not what was written"
    try:
        _check_types(table, row)
        _READERS[table](row[:-1])
    except Exception:  # whatever it is, no command can use the row
        return "cannot be read"
    return ""


def read_rows(store: object, table: str, rows: Iterable[Sequence[Any]], make: Callable[[Sequence[Any]], T]) -> list[T]:
    """Return what `make` builds of rows without their checksums. Raises CorruptRow at an unsound or unreadable one."""
    made = []
    for row in checked_rows(store, table, rows):
        try:
            made.append(make(row))
        except Exception:  # whatever it is, it is the row's
            raise CorruptRow(
                f"{store}: {describe_row(table, row_key(table, row))} cannot be read; {REPAIR_HINT}"
            ) from None
    return made


def checked_rows(store: object, table: str, rows: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    """The rows without their checksums. Raises CorruptRow at one that was changed, or has values of wrong types."""
    for row in rows:
        if not has_valid_checksum(row):
            raise CorruptRow(
                f"{store}: {describe_row(table, row_key(table, row))} is not what was written; {REPAIR_HINT}"
            )
        try:
            _check_types(table, row)
        except ValueError as error:
            raise CorruptRow(f"{store}: {describe_row(table, row_key(table, row))}: {error}; {REPAIR_HINT}") from None
        yield row[:-1]


def _check_types(table: str, row: Sequence[Any]) -> None:
    """Raise ValueError unless every column holds a text or a number as the table has it, or nothing."""
    for column, value in zip(COLUMNS[table], row, strict=False):
        if value is not None and isinstance(value, str) == (column in NUMBERS):
            raise ValueError(f"its {column} is not a {'number' if column in NUMBERS else 'text'}")
    if None in row_key(table, row):
        raise ValueError("it has no key")


def row_key(table: str, row: Sequence[Any]) -> tuple[Any, ...]:
    """The columns that name a row."""
    return tuple(row[: 2 if table == "branches" else 1])


def describe_row(table: str, key: Sequence[Any]) -> str:
    """A row by its table and key, for people."""
    return f"row {'/'.join(str(part)[:16] for part in key)} of {table}"


def recording_digest(recorded: RecordedQuestion) -> str:
    """What a recording is known by: the same data gives the same, whenever it is imported."""
    about = [recorded.question, recorded.model, recorded.benchmark, recorded.interval, dict(recorded.sampling)]
    if recorded.chat_template or recorded.request:
        about += [recorded.chat_template, recorded.request]
    branches = [[list(b.probes), b.tokens, b.final, list(b.probe_tokens), b.complete] for b in recorded.branches]
    return sha256(_json([*about, recorded.probe_template, recorded.origin, branches]).encode()).hexdigest()


def is_certain_reference(recorded: RecordedQuestion) -> bool:
    """Whether a recording's answer is its question's own, beyond doubt; one that is not is a label, which can change.

    What clients or votes say never is, however sure they are.
    """
    return recorded.label_source is LabelSource.REFERENCE and recorded.confidence == 1.0


def question_row(recorded: RecordedQuestion, added: str) -> Row:
    """Of table questions."""
    reference = recorded.reference if is_certain_reference(recorded) else None
    about = (recorded.question, recorded.split, reference, recorded.label_source, recorded.text, added)
    return with_checksum(about)


def question_label(row: Sequence[Any]) -> tuple[str, Label | None]:
    """Which question a row of table questions is of, and the answer it came with, if it did. Raises ValueError."""
    question, _, answer, source, _, added = row
    label_source = LabelSource(source)
    return question, None if answer is None else Label(question, label_source, answer, 1.0, None, added)


def recording_row(recorded: RecordedQuestion, number: int, added: str) -> Row:
    """Of table recordings."""
    return with_checksum(
        (
            recording_digest(recorded),
            number,
            recorded.question,
            recorded.model,
            recorded.benchmark,
            compact_json(dict(recorded.sampling)),
            recorded.interval,
            recorded.probe_template,
            recorded.origin,
            int(recorded.complete),
            len(recorded.branches),
            added,
        )
    )


def match_columns(recorded: RecordedQuestion) -> Row:
    """What two recordings without a request share that may be of the same branches, in this order."""
    about = (recorded.question, recorded.model, recorded.benchmark, _json(dict(recorded.sampling)), recorded.interval)
    return (*about, recorded.probe_template, recorded.origin, recorded.chat_template)


def branch_rows(recorded: RecordedQuestion) -> Iterator[Row]:
    """Of table branches."""
    recording = recording_digest(recorded)
    for number, branch in enumerate(recorded.branches):
        probes, costs = _json(list(branch.probes)), _json(list(branch.probe_tokens))
        yield with_checksum((recording, number, branch.tokens, int(branch.complete), branch.final, probes, costs))


def episode_row(episode: ServedEpisode) -> Row:
    """Of table episodes."""
    about = (episode.id, episode.request_id, episode.question, episode.model, episode.controller, episode.digest)
    if not math.isfinite(episode.beta):
        raise ValueError(f"beta is {episode.beta}, not a number from 0 to 1")
    what = (float(episode.beta), episode.rounds, episode.branches, compact_json(dict(episode.ledger)), episode.stop)
    rest = (episode.sandbox, episode.tenant, compact_json(dict(episode.about)), episode.trace)
    return with_checksum((*about, *what, episode.answer, episode.created, *rest))


def episode_from_row(row: Sequence[Any]) -> ServedEpisode:
    """Return the episode of a row without its checksum. Raises ValueError."""
    columns = dict(zip(COLUMNS["episodes"], row, strict=True))
    columns["question"] = columns.pop("question_id")
    for name in ("ledger", "about"):
        columns[name] = parse_json(columns[name])
    made: ServedEpisode = _ADAPTERS["episode"][1].validate_python(columns)
    return made


def feedback_row(feedback: Feedback) -> Row:
    """Of table feedback."""
    about = (feedback.id, feedback.request_id, feedback.kind, feedback.value, feedback.created, feedback.tenant)
    return with_checksum(about)


def feedback_from_row(row: Sequence[Any]) -> Feedback:
    """Return the feedback of a row without its checksum. Raises ValueError."""
    made = Feedback(*row)
    parse_json(made.value)
    return made


def label_row(label: Label) -> Row:
    """Of table labels."""
    identity = f"{label.source}:{label.question}"
    what = (label.question, label.source, label.answer, float(label.confidence), label.margin, label.created)
    return with_checksum((identity, *what))


def label_from_row(row: Sequence[Any]) -> Label:
    """What a row of table labels says; without its checksum."""
    _, question, source, *rest = row
    return Label(question, LabelSource(source), *rest)


def is_surer(one: LabelSource, other: LabelSource) -> bool:
    """Whether an answer known by `one` counts rather than one known by `other`."""
    order = list(LabelSource)
    return order.index(one) < order.index(other)


def provenance_row(recorded: RecordedQuestion) -> Row:
    """Of table provenance."""
    return with_checksum((recording_digest(recorded), recorded.chat_template, recorded.request))


def version_from_columns(model: str, chat_template: str, sampling: str, delta: int, probe_template: str) -> Version:
    """The version of recordings whose rows say so: as `RecordedQuestion.version` writes it."""
    made = RecordedQuestion("", model, "", delta, (), sampling=_object(sampling), probe_template=probe_template)
    return made.version._replace(chat_template=chat_template)


def tombstone(what: str, name: str) -> str:
    """What is remembered of a request or a tenant that was forgotten; `what` is one of these words."""
    return sha256(f"{what}:{name}".encode()).hexdigest()


def encode_item(item: StoreItem) -> bytes:
    """An item as JSON in one line, without its end."""
    kind = next(name for name, adapter in _ADAPTERS.items() if isinstance(item, adapter[0]))
    return b'["' + kind.encode() + b'",' + _ADAPTERS[kind][1].dump_json(item) + b"]"


def decode_item(line: bytes) -> StoreItem:
    """Return the item that `line` wrote. Raises ValueError for anything else."""
    try:
        kind, content = parse_json(line, finite=True)
        found: StoreItem = _ADAPTERS[kind][1].validate_python(content)
        if isinstance(found, RecordedQuestion):
            _check(found)
        if isinstance(found, Feedback):
            parse_json(found.value)
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not a record: {type(error).__name__}") from None
    return found


def run_row(search: SearchRun) -> Row:
    """Of table runs."""
    settings = compact_json(dict(search.settings))
    about = (search.id, search.explorer, search.seed, settings, len(search.tried), search.created)
    return with_checksum(about)


def candidate_rows(search: SearchRun) -> Iterator[Row]:
    """Of table candidates."""
    for number, one in enumerate(search.tried):
        yield with_checksum((f"{search.id}:{number}", search.id, *one))


def recording_from_rows(
    recording: Sequence[Any],
    question: Sequence[Any],
    branches: Sequence[Sequence[Any]],
    provenance: Sequence[Any] | None = None,
    labels: Sequence[Label] = (),
) -> RecordedQuestion:
    """Return the recording of rows without checksums. The surest of `labels` and the question's own counts.

    Raises ValueError.
    """
    identity, split, reference, label_source, text, _ = question
    _, _, _, model, benchmark, sampling, delta, template, origin, *_ = recording
    confidence = 1.0
    for label in labels:
        if reference is None or is_surer(label.source, LabelSource(label_source)):
            reference, label_source, confidence = label.answer, label.source, label.confidence
    _, chat_template, request = provenance or ("", "", "")
    made = RecordedQuestion(
        question=identity,
        model=model,
        benchmark=benchmark,
        interval=delta,
        branches=[
            RecordedBranch(_list(probes), tokens, final, _list(costs), bool(complete))
            for _, _, tokens, complete, final, probes, costs in branches
        ],
        reference=reference,
        label_source=LabelSource(label_source),
        split=Split(split),
        text=text,
        sampling=_object(sampling),
        probe_template=template,
        origin=Origin(origin),
        chat_template=chat_template,
        request=request,
        confidence=confidence,
    )
    _check(made)
    return made


def _check(recorded: RecordedQuestion) -> None:
    """Raise ValueError at what replay cannot run."""
    if not 1 <= recorded.interval <= MAX_BRANCH_TOKENS:
        raise ValueError(f"interval is {recorded.interval}, not a number of tokens")
    for branch in recorded.branches:
        if not all(
            type(cost) is int and 0 <= cost <= MAX_BRANCH_TOKENS for cost in (branch.tokens, *branch.probe_tokens)
        ):
            raise ValueError("a branch has a number of tokens that is none")
        if not all(answer is None or isinstance(answer, str) for answer in (*branch.probes, branch.final)):
            raise ValueError("a branch has an answer that is not a text")
        if branch.probe_tokens and len(branch.probe_tokens) != len(branch.probes):
            raise ValueError(f"a branch has {len(branch.probe_tokens)} costs for {len(branch.probes)} probes")
    if not 0 <= recorded.confidence <= 1:
        raise ValueError(f"confidence is {recorded.confidence}, not a number from 0 to 1")


def _object(text: str) -> dict[str, Any]:
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _list(text: str) -> list[Any]:
    value = parse_json(text)
    if not isinstance(value, list):
        raise ValueError("not a list")
    return value


def _read_question(row: Sequence[Any]) -> object:
    return Split(row[1]), question_label(row)


def _read_recording(row: Sequence[Any]) -> None:
    _, _, question, model, benchmark, sampling, delta, _, origin, *_ = row
    _check(RecordedQuestion(question, model, benchmark, delta, (), sampling=_object(sampling), origin=Origin(origin)))


def _read_branch(row: Sequence[Any]) -> None:
    _, _, tokens, complete, final, probes, costs = row
    branch = RecordedBranch(_list(probes), tokens, final, _list(costs), bool(complete))
    _check(RecordedQuestion("", "", "", 1, [branch]))


def _read_plain(row: Sequence[Any]) -> None:
    """A row of which every column is used as it is."""


_READERS: Final[Mapping[str, Callable[[Sequence[Any]], object]]] = dict.fromkeys(COLUMNS, _read_plain) | {
    "questions": _read_question,
    "recordings": _read_recording,
    "branches": _read_branch,
    "episodes": episode_from_row,
    "feedback": feedback_from_row,
    "labels": label_from_row,
    "runs": lambda row: _object(row[3]),
}
"""Functions that read a row of each table and raise an error where it cannot be used."""

_ADAPTERS: Final[Mapping[str, tuple[type, TypeAdapter[Any]]]] = {
    kind: (made, TypeAdapter(made))
    for kind, made in (("episode", ServedEpisode), ("feedback", Feedback), ("recording", RecordedQuestion))
}


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
