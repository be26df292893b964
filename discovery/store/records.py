"""Records that the store keeps, and the summaries it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from typing_extensions import TypedDict  # the one pydantic takes on Python 3.11

from controllers.sandbox.proof import SandboxLevel
from discovery.data.recordings import Cell, LabelSource, RecordedQuestion
from discovery.data.safe_json import parse_json

SATISFIED_SCORE: Final = 0.5
"""Lowest feedback score that counts for an answer."""


def stored_time(time: datetime) -> str:
    """Return a time as the store writes it: in UTC, all of one length, so that texts sort in the order of time."""
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def utc_now() -> str:
    """Return the current time as the store writes it."""
    return stored_time(datetime.now(UTC))


class EpisodeDetails(TypedDict, total=False):
    """Further facts about a served episode, stored as one JSON object."""

    beta_source: str
    stage: str | None  # rollout stage that chose the controller; None if the request named it
    fallback: str | None  # why the baseline took over, if it did
    baseline: str  # name of the controller that took over, if one did
    decided: int  # rounds decided by the controller, before the baseline took over
    limits: Mapping[str, int | bool | None]  # fields of `controllers.Limits`
    spent: int  # tokens its rounds cost; the ledger also counts tokens spent outside rounds
    seconds: float  # duration from request to reply
    answers: Sequence[str]  # by label
    answer_kind: str  # answer kind by which they were extracted
    text: str  # the question's text, stored only if the operator allows it
    reply: str | None  # the text sent to the client, stored only if the operator allows it
    usage: Mapping[str, Any]  # as sent to the client
    sampling: Mapping[str, Any]  # temperature, top_p, …, as sent
    chat_template: str  # hash of the chat template
    probe_template: str
    streamed: bool
    votable: bool
    selected_by: str | None  # what decided among whole replies: vote, judge, overlap; None if nothing had to
    branch: str  # `reply` if its branches are whole replies of the upstream, which cannot be probed
    vote_class: str  # class of its answer, if that is a structured vote; recordings hold it in place of the text
    reply_class: str  # class of the reply's vote, if it differs: the vote on JSON selects by single fields
    signals: Sequence[str]  # signals that were measured, if any: for its controller, the shadow or a recording
    refused: str | None
    """Why the proxy ended the episode as `max_tokens`.

    `cut_short` or `sent_too_much`: it did not play the next round. `all_cut`: the controller gave no answer after the
    request's limit had cut every branch.
    """
    min_agreement: float  # share of the votes that the request asked for, if it did
    flagged: bool  # the reply had less; only with `min_agreement`, and if there was a reply
    escalated_at: int  # rounds before the baseline continued the episode at a larger β, if it did
    escalated_beta: float  # that β
    sampled: bool  # only if so: its branches are completed after the reply, for a recording
    client_request_id: str  # the client's own id of the request, if it sent one


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
    question: str | None = None  # `question_id`, if known
    created: str = field(default_factory=utc_now)
    sandbox: SandboxLevel = SandboxLevel.TRUSTED  # isolation of its controller
    tenant: str = ""  # hash of the tenant; empty for a caller without a key
    about: EpisodeDetails = field(default_factory=lambda: EpisodeDetails())
    trace: str = ""  # its rounds, as `discovery.data.packed_rounds` packs them

    @property
    def recorded_answer(self) -> str | None:
        """Its answer as recordings hold it."""
        return self.about.get("vote_class", self.answer)


@dataclass(frozen=True)
class Feedback:
    """A client's feedback on an answer. The latest counts; earlier feedback is kept."""

    id: str
    request_id: str
    kind: str  # "correct", "answer" or "score"
    value: str  # as JSON
    created: str = field(default_factory=utc_now)
    tenant: str = ""

    @property
    def parsed(self) -> object:
        """The value; None if it is not JSON."""
        try:
            return parse_json(self.value)
        except ValueError:
            return None

    @property
    def rating(self) -> float:
        """Weight of `correct` or `score` for the served answer: below 0 against it; 0 if it is neither or invalid."""
        value = self.parsed
        if self.kind == "correct" and isinstance(value, bool):
            return 1.0 if value else -1.0
        if self.kind == "score" and isinstance(value, (int, float)) and 0 <= value <= 1:
            return float(value) if value >= SATISFIED_SCORE else value - 1.0
        return 0.0


@dataclass(frozen=True)
class Label:
    """A reference answer of a question, and its source."""

    question: str  # `question_id`
    source: LabelSource
    answer: str
    confidence: float  # that it is right, from 0 to 1
    margin: float | None = None  # share of the votes by which the answer leads; None if it was not counted here
    created: str = field(default_factory=utc_now)


StoreItem = ServedEpisode | Feedback | RecordedQuestion
"""The records that the proxy writes."""


MAX_PROMPTS: Final = 128
"""Prompts that are served of one request at most. If there are several, each is recorded under a name of its own."""
_INDICES: Final = frozenset(map(str, range(MAX_PROMPTS)))


def prompt_name(request: str, index: int) -> str:
    """Return the name under which one of the prompts of a request is recorded."""
    return f"{request}-{index}"


def names_of(request: str) -> list[str]:
    """Return the names under which a request may be recorded: its own, and those of its prompts."""
    return [request, *(prompt_name(request, index) for index in range(MAX_PROMPTS))]


def request_of(name: str) -> str:
    """Return the request of which `name` would be a prompt, or the name itself."""
    request, _, index = name.rpartition("-")
    return request if index in _INDICES else name


class ForgottenCounts(NamedTuple):
    """How many rows `forget` or `expire` removed."""

    episodes: int
    feedback: int
    recordings: int
    labels: int
    questions: int


class TriedCandidate(NamedTuple):
    """One candidate of a search and its result."""

    digest: str
    name: str
    explorer: str
    parent: str | None  # digest of the candidate it was derived from
    score: float | None  # None if it failed
    failure: str
    usd: float
    source: str


@dataclass(frozen=True)
class SearchRun:
    """A run of `autotts discover`, up to the last event of its history."""

    id: str  # the last hash of its history
    explorer: str
    seed: int
    settings: Mapping[str, Any]
    tried: Sequence[TriedCandidate]
    created: str = field(default_factory=utc_now)


class AddedCounts(NamedTuple):
    """How many rows were new."""

    questions: int
    recordings: int
    branches: int


class ServedSummary(NamedTuple):
    """Totals of served requests."""

    episodes: int
    oldest: str | None  # when the first episode ended
    newest: str | None  # when the last episode ended
    stops: Mapping[str, int]  # episodes by stop reason
    feedback: Mapping[str, int]  # counts by kind


class CellSummary(NamedTuple):
    """Totals of one cell."""

    cell: Cell
    questions: int
    recordings: int
    complete: int  # recordings whose branches all ran to their end
    branches: int


class VerificationReport(NamedTuple):
    """The result of checking every row of a store."""

    rows: Mapping[str, int]  # row counts by table
    bad: Sequence[str]  # one message for each bad row


def is_surer(source: LabelSource, other: LabelSource) -> bool:
    """Return whether an answer known by `source` takes precedence over one known by `other`."""
    order = list(LabelSource)
    return order.index(source) < order.index(other)
