"""Convert between records and rows of the store's tables.

Functions named `…_row` return complete rows, each ending in its checksum. Functions that read a row take it without its
checksum and raise ValueError where it cannot be used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from types import MappingProxyType
from typing import Any, Final

import msgspec
from pydantic import TypeAdapter

from discovery.data.recordings import (
    MAX_BRANCH_TOKENS,
    LabelSource,
    Origin,
    RecordedBranch,
    RecordedQuestion,
    Split,
    Version,
    check_signals,
)
from discovery.data.safe_json import compact_json, parse_json
from discovery.store.checksums import Row, canonical_json, with_checksum
from discovery.store.records import Feedback, Label, SearchRun, ServedEpisode, is_surer
from discovery.store.schema import COLUMNS

_FAST_JSON: Final = msgspec.json.Encoder(order="sorted")
_EPISODES: Final = TypeAdapter(ServedEpisode)
NO_ROWS: Final[Mapping[int, Sequence[Any]]] = MappingProxyType({})


def recording_digest(recorded: RecordedQuestion) -> str:
    """Return the id of a recording: a hash of its data, so that importing the same data again adds nothing."""
    about = [recorded.question, recorded.model, recorded.benchmark, recorded.interval, dict(recorded.sampling)]
    if recorded.chat_template or recorded.request:
        about += [recorded.chat_template, recorded.request]
    branches = [
        [
            list(b.probes),
            b.tokens,
            b.final,
            list(b.probe_tokens),
            b.complete,
            *(_signal_lists(b) if b.has_signals else ()),
        ]
        for b in recorded.branches
    ]
    return sha256(canonical_json([*about, recorded.probe_template, recorded.origin, branches]).encode()).hexdigest()


def is_certain_reference(recorded: RecordedQuestion) -> bool:
    """Return whether a recording's reference answer belongs to its question beyond doubt.

    Any other answer is stored as a label, which can change. Answers from feedback or votes are never certain, however
    confident they are.
    """
    return recorded.label_source is LabelSource.REFERENCE and recorded.confidence == 1.0


def question_row(recorded: RecordedQuestion, added: str) -> Row:
    """Return a row of table `questions`."""
    reference = recorded.reference if is_certain_reference(recorded) else None
    about = (recorded.question, recorded.split, reference, recorded.label_source, recorded.text, added)
    return with_checksum(about)


def question_label(row: Sequence[Any]) -> tuple[str, Label | None]:
    """Return the question of a `questions` row, and the answer it was added with, if any. Raises ValueError."""
    question, _, answer, source, _, added = row
    label_source = LabelSource(source)
    return question, None if answer is None else Label(question, label_source, answer, 1.0, None, added)


def recording_row(recorded: RecordedQuestion, number: int, added: str) -> Row:
    """Return a row of table `recordings`."""
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
    """Return the values that two recordings of the same branches share, in the order the matching query needs.

    Only recordings that were not made for a request are matched.
    """
    columns = (
        recorded.question,
        recorded.model,
        recorded.benchmark,
        canonical_json(dict(recorded.sampling)),
        recorded.interval,
    )
    return (*columns, recorded.probe_template, recorded.origin, recorded.chat_template)


def branch_rows(recorded: RecordedQuestion) -> Iterator[Row]:
    """Yield the rows of table `branches` for a recording."""
    recording = recording_digest(recorded)
    for number, branch in enumerate(recorded.branches):
        probes, costs = canonical_json(list(branch.probes)), canonical_json(list(branch.probe_tokens))
        yield with_checksum((recording, number, branch.tokens, int(branch.complete), branch.final, probes, costs))


def signal_rows(recorded: RecordedQuestion) -> Iterator[Row]:
    """Yield the rows of table `branch_signals` for a recording; branches without signals have none."""
    recording = recording_digest(recorded)
    for number, branch in enumerate(recorded.branches):
        if branch.has_signals:
            yield with_checksum((recording, number, *map(canonical_json, _signal_lists(branch))))


def _signal_lists(branch: RecordedBranch) -> list[list[int | None]]:
    return [list(branch.confidences), list(branch.lowests), list(branch.probe_confidences)]


def episode_row(episode: ServedEpisode) -> Row:
    """Return a row of table `episodes`. Raises ValueError if β is not finite."""
    identity = (episode.id, episode.request_id, episode.question, episode.model, episode.controller, episode.digest)
    if not math.isfinite(episode.beta):
        raise ValueError(f"beta is {episode.beta}; it must be a number from 0 to 1")
    figures = (float(episode.beta), episode.rounds, episode.branches, _details(episode.ledger), episode.stop)
    details = (episode.sandbox, episode.tenant, _details(episode.about), episode.trace)
    return with_checksum((*identity, *figures, episode.answer, episode.created, *details))


def _details(values: Mapping[str, Any]) -> str:
    """Return compact JSON, as `compact_json` does, in a fraction of its time."""
    try:
        return _FAST_JSON.encode(dict(values)).decode()
    except (UnicodeEncodeError, OverflowError, TypeError):  # lone surrogates, or integers of more than 64 bits
        return compact_json(dict(values))


def episode_from_row(row: Sequence[Any]) -> ServedEpisode:
    """Return the episode of an `episodes` row. Raises ValueError."""
    columns = dict(zip(COLUMNS["episodes"], row, strict=True))
    columns["question"] = columns.pop("question_id")
    for name in ("ledger", "about"):
        columns[name] = parse_json(columns[name])
    return _EPISODES.validate_python(columns)


def client_id_pattern(client_id: str) -> str:
    """Return the LIKE pattern, escaped by backslashes, of the `about` column of requests with a client's own id."""
    text = json.dumps({"client_request_id": client_id}, separators=(",", ":"), ensure_ascii=False)[1:-1]
    for special in "\\%_":
        text = text.replace(special, f"\\{special}")
    return f"%{text}%"


def feedback_row(feedback: Feedback) -> Row:
    """Return a row of table `feedback`."""
    about = (feedback.id, feedback.request_id, feedback.kind, feedback.value, feedback.created, feedback.tenant)
    return with_checksum(about)


def feedback_from_row(row: Sequence[Any]) -> Feedback:
    """Return the feedback of a `feedback` row. Raises ValueError."""
    made = Feedback(*row)
    parse_json(made.value)
    return made


def label_row(label: Label) -> Row:
    """Return a row of table `labels`."""
    identity = f"{label.source}:{label.question}"
    what = (label.question, label.source, label.answer, float(label.confidence), label.margin, label.created)
    return with_checksum((identity, *what))


def label_from_row(row: Sequence[Any]) -> Label:
    """Return the label of a `labels` row."""
    _, question, source, *rest = row
    return Label(question, LabelSource(source), *rest)


def provenance_row(recorded: RecordedQuestion) -> Row:
    """Return a row of table `provenance`."""
    return with_checksum((recording_digest(recorded), recorded.chat_template, recorded.request))


def version_from_columns(model: str, chat_template: str, sampling: str, delta: int, probe_template: str) -> Version:
    """Return the version of a recording from its columns, as `RecordedQuestion.version` would."""
    made = RecordedQuestion("", model, "", delta, (), sampling=_object(sampling), probe_template=probe_template)
    return made.version._replace(chat_template=chat_template)


def tombstone(kind: str, name: str) -> str:
    """Return the hash kept of a forgotten request or tenant. `kind` is "request" or "tenant"."""
    return sha256(f"{kind}:{name}".encode()).hexdigest()


def run_row(search: SearchRun) -> Row:
    """Return a row of table `runs`."""
    settings = compact_json(dict(search.settings))
    about = (search.id, search.explorer, search.seed, settings, len(search.tried), search.created)
    return with_checksum(about)


def candidate_rows(search: SearchRun) -> Iterator[Row]:
    """Yield the rows of table `candidates` for a search."""
    for number, candidate in enumerate(search.tried):
        yield with_checksum((f"{search.id}:{number}", search.id, *candidate))


def recording_from_rows(
    recording: Sequence[Any],
    question: Sequence[Any],
    branches: Sequence[Sequence[Any]],
    provenance: Sequence[Any] | None = None,
    labels: Sequence[Label] = (),
    signals: Mapping[int, Sequence[Any]] = NO_ROWS,
    judged_wrong: bool = False,
) -> RecordedQuestion:
    """Return the recording of rows read from five tables. `signals` has rows of `branch_signals` by branch number.

    `judged_wrong` says whether clients judged an answer to its question wrong.
    Of `labels` and the question's own answer, the one from the surest source becomes the reference. Raises ValueError.
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
        branches=[_branch(row, signals.get(row[1])) for row in branches],
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
        judged_wrong=judged_wrong and (reference is None or label_source == LabelSource.CONSENSUS),
    )
    check_replayable(made)
    return made


def check_replayable(recorded: RecordedQuestion) -> None:
    """Raise ValueError if replay cannot run a recording."""
    if not 1 <= recorded.interval <= MAX_BRANCH_TOKENS:
        raise ValueError(f"interval is {recorded.interval}; it must be from 1 to {MAX_BRANCH_TOKENS} tokens")
    for branch in recorded.branches:
        if not all(
            type(cost) is int and 0 <= cost <= MAX_BRANCH_TOKENS for cost in (branch.tokens, *branch.probe_tokens)
        ):
            raise ValueError(f"a branch has a token count that is not an integer from 0 to {MAX_BRANCH_TOKENS}")
        if not all(answer is None or isinstance(answer, str) for answer in (*branch.probes, branch.final)):
            raise ValueError("a branch has an answer that is not a string")
        if branch.probe_tokens and len(branch.probe_tokens) != len(branch.probes):
            raise ValueError(f"a branch has {len(branch.probe_tokens)} probe costs for {len(branch.probes)} probes")
        check_signals(branch)
    if not 0 <= recorded.confidence <= 1:
        raise ValueError(f"confidence is {recorded.confidence}; it must be a number from 0 to 1")


def _branch(row: Sequence[Any], signals: Sequence[Any] | None = None) -> RecordedBranch:
    """Return the branch of a `branches` row and its `branch_signals` row, if it has one. Raises ValueError."""
    _, _, tokens, complete, final, probes, costs = row
    branch = RecordedBranch(_list(probes), tokens, final, _list(costs), bool(complete))
    return branch if signals is None else RecordedBranch(*branch[:5], *_read_signals(signals))


def _object(text: str) -> dict[str, Any]:
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _list(text: str) -> list[Any]:
    value = parse_json(text)
    if not isinstance(value, list):
        raise ValueError("not a JSON list")
    return value


def _read_question(row: Sequence[Any]) -> object:
    return Split(row[1]), question_label(row)


def _read_recording(row: Sequence[Any]) -> None:
    _, _, question, model, benchmark, sampling, delta, _, origin, *_ = row
    check_replayable(
        RecordedQuestion(question, model, benchmark, delta, (), sampling=_object(sampling), origin=Origin(origin))
    )


def _read_branch(row: Sequence[Any]) -> None:
    check_replayable(RecordedQuestion("", "", "", 1, [_branch(row)]))


def _read_signals(row: Sequence[Any]) -> list[Sequence[Any]]:
    """Return the signals of a `branch_signals` row, () for each that is unknown. Raises ValueError."""
    return [_list(text) or () for text in row[2:]]


def _read_plain(row: Sequence[Any]) -> None:
    """Accept a row whose columns are all used as they are."""


ROW_READERS: Final[Mapping[str, Callable[[Sequence[Any]], object]]] = dict.fromkeys(COLUMNS, _read_plain) | {
    "questions": _read_question,
    "recordings": _read_recording,
    "branches": _read_branch,
    "branch_signals": _read_signals,
    "episodes": episode_from_row,
    "feedback": feedback_from_row,
    "labels": label_from_row,
    "runs": lambda row: _object(row[3]),
}
"""By table: a function that reads a row and raises an exception if the row cannot be used."""
