"""Compute the labels of a store's questions from references, client feedback and votes, and report how far they agree.

Each source gives a question at most one label. Which label counts is decided when recordings are read: a surer source
takes precedence. An answer that clients refuted is never a label by feedback or consensus.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter
from typing import Any, Final

from controllers.sandbox.deadline import Clock
from discovery.answers import Judge
from discovery.data.questions import Question
from discovery.data.recordings import LabelSource, Version
from discovery.evaluation.answer_votes import (
    MIN_BRANCHES,
    MIN_CALIBRATION_ANSWERS,
    MIN_MARGIN,
    Agreement,
    AnswerFeedback,
    agreement_of,
    are_same_answer,
    calibrate_confidence,
    is_any_of,
    label_by_feedback,
    label_by_votes,
)
from discovery.store import Feedback, Label, ServedEpisode, Store
from discovery.store.records import is_surer

MARGIN_BINS: Final = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Edges of the bins in which the report counts votes by margin."""


@dataclass(frozen=True)
class LabelInputs:
    """Everything that labels are computed from."""

    questions: Mapping[str, Label | None]  # all questions, with the answers they were added with
    labels: Sequence[Label]  # the current labels
    feedback: Sequence[AnswerFeedback]  # the latest on each request, latest last
    unheard: int  # requests whose feedback concerns no answer
    finals: Mapping[str, Sequence[Sequence[str | None]]]  # by question: for each model, its branches' answers


@dataclass(frozen=True)
class LabelReport:
    """How a store's labels changed, and how far they agree with references."""

    effective: Mapping[LabelSource | None, int]  # questions by the source that counts; None without a label
    written: Mapping[LabelSource, int]  # labels that are new or have changed
    removed: Mapping[LabelSource, int]  # labels that nothing supports any more
    unknown: int  # references for questions that are not in the store
    contradicted: int  # references that differ from the answers of their questions, which are kept
    unheard: int  # requests whose feedback concerns no answer
    votes: int  # questions with a vote
    close: int  # votes that are too close
    refuted: int  # clear votes whose leading answer clients refuted
    calibrated: int  # votes that confidences are calibrated on; 0 if they are estimated from counts
    consensus: Agreement  # of labels by consensus with references
    feedback: Agreement  # of labels by feedback with references; with enough of them, confidences are calibrated
    by_margin: Sequence[tuple[float, float, Agreement]]  # of all votes, by margin: from, to

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON."""
        bins = [{"from": low, "to": high, **agreement.as_json()} for low, high, agreement in self.by_margin]
        return {
            "questions": {str(source or "none"): count for source, count in self.effective.items()},
            "written": {str(source): count for source, count in self.written.items()},
            "removed": {str(source): count for source, count in self.removed.items()},
            "references": {"unknown": self.unknown, "contradicted": self.contradicted},
            "feedback": {
                "unheard": self.unheard,
                "confidence": "calibrated" if self.feedback.of >= MIN_CALIBRATION_ANSWERS else "reckoned",
                "agreement": self.feedback.as_json(),
            },
            "consensus": {
                "votes": self.votes,
                "close": self.close,
                "refuted": self.refuted,
                "confidence": "calibrated" if self.calibrated else "reckoned",
                "calibrated_on": self.calibrated,
                "agreement": self.consensus.as_json(),
                "by_margin": bins,
            },
        }


@dataclass(frozen=True)
class LabelChanges:
    """Labels that have changed, and the report on them."""

    labels: Sequence[Label]
    removed: Sequence[Label]
    report: LabelReport


async def update_labels(
    store: Store,
    references: Sequence[Question] = (),
    min_margin: float = MIN_MARGIN,
    min_branches: int = MIN_BRANCHES,
) -> LabelReport:
    """Bring a store's labels up to date. Nothing is written if nothing has changed. Raises StoreError."""
    inputs = await load_inputs(store)
    with Judge(clock=Clock.CPU) as judge:
        changes = compute_labels(inputs, references, min_margin, min_branches, judge)
    if changes.labels or changes.removed:
        await store.set_labels(changes.labels, changes.removed)
    return changes.report


async def load_inputs(store: Store) -> LabelInputs:
    """Read what labels are computed from. Raises StoreError."""
    latest = {feedback.request_id: feedback for feedback in await store.feedback()}
    in_time = sorted(latest.values(), key=attrgetter("created"))
    interpreted = [interpret_feedback(await store.episode(feedback.request_id), feedback) for feedback in in_time]
    kept = [feedback for feedback in interpreted if feedback is not None]
    return LabelInputs(
        await store.questions(), await store.labels(), kept, len(interpreted) - len(kept), await _finals(store)
    )


def interpret_feedback(episode: ServedEpisode | None, feedback: Feedback) -> AnswerFeedback | None:
    """Return what feedback means for an answer; None if it concerns no answer."""
    if episode is None or episode.question is None:
        return None
    answer, weight = episode.about.get("reply_class", episode.recorded_answer), feedback.rating
    stated = feedback.parsed
    if feedback.kind == "answer" and isinstance(stated, str):
        answer, weight = stated, 1.0
    return None if answer is None or not weight else AnswerFeedback(episode.question, answer, weight, episode.tenant)


async def _finals(store: Store) -> dict[str, list[list[str | None]]]:
    """Return the answers of complete recordings' branches, by question: for each model, those of the newest version."""
    by_question: dict[str, dict[Version, list[str | None]]] = {}
    order: dict[Version, None] = {}  # the newest last
    for summary in await store.summaries():
        for recorded in await store.load(summary.cell):
            order.pop(recorded.version, None)
            order[recorded.version] = None
            if recorded.complete:
                finals = by_question.setdefault(recorded.question, {}).setdefault(recorded.version, [])
                counted = 1 if finals and recorded.greedy_first else 0  # the same greedy branch counts once
                finals.extend(branch.final for branch in recorded.branches[counted:])
    for model in dict.fromkeys([version.model for version in order]):
        for version in reversed(await store.versions(model)):  # the order across cells
            order.pop(version, None)
            order[version] = None
    ranks = {version: rank for rank, version in enumerate(order)}
    newest = {
        question: {version.model: versions[version] for version in sorted(versions, key=ranks.__getitem__)}
        for question, versions in by_question.items()
    }
    return {question: list(by_model.values()) for question, by_model in newest.items()}


def compute_labels(
    inputs: LabelInputs, references: Sequence[Question], min_margin: float, min_branches: int, judge: Judge
) -> LabelChanges:
    """Return the labels that differ from the current ones. The same inputs give the same result."""
    stated = ((item.question, item.recorded_reference) for item in references)
    given = {question: reference for question, reference in stated if reference is not None}
    known = {question: answer for question, answer in given.items() if question in inputs.questions}
    own = _answers_by_question(LabelSource.REFERENCE, filter(None, inputs.questions.values()))
    right = {**_answers_by_question(LabelSource.REFERENCE, inputs.labels), **known, **own}
    referenced = [
        Label(question, LabelSource.REFERENCE, answer, 1.0) for question, answer in known.items() if question not in own
    ]

    rated = [label_by_feedback(feedback, judge) for feedback in _by_question(inputs.feedback)]
    refuted = {result.question: result.refuted for result in rated}
    supported = [result.label for result in rated if result.label is not None]
    agreed = [
        (label.confidence, are_same_answer(label.answer, right[label.question], judge))
        for label in supported
        if label.question in right
    ]
    calibrated = calibrate_confidence(agreed)
    supported = [replace(label, confidence=calibrated(label.confidence)) for label in supported]

    voted = label_by_votes(inputs.finals, right, refuted, min_margin, min_branches, judge)
    wanted = [*referenced, *supported, *voted.labels]
    invalid = {
        (label.source, label.question)
        for label in inputs.labels
        if label.source is not LabelSource.REFERENCE and is_any_of(label.answer, refuted.get(label.question, ()), judge)
    }
    labels, removed = _changes(inputs.labels, wanted, invalid)
    contradicted = [
        question
        for question, answer in known.items()
        if question in own and not are_same_answer(own[question], answer, judge)
    ]
    report = LabelReport(
        effective=_effective(inputs, wanted, removed),
        written=_count_by_source(labels),
        removed=_count_by_source(removed),
        unknown=len(given) - len(known),
        contradicted=len(contradicted),
        unheard=inputs.unheard,
        votes=voted.votes,
        close=voted.close,
        refuted=voted.refuted,
        calibrated=voted.calibrated,
        consensus=voted.agreement,
        feedback=agreement_of(is_right for _, is_right in agreed),
        by_margin=[
            (low, high, agreement_of(is_right for vote, is_right in voted.judged if _bin(vote.margin) == low))
            for low, high in pairwise(MARGIN_BINS)
        ],
    )
    return LabelChanges(labels, removed, report)


def _answers_by_question(source: LabelSource, labels: Iterable[Label]) -> dict[str, str]:
    return {label.question: label.answer for label in labels if label.source is source}


def _by_question(feedback: Iterable[AnswerFeedback]) -> Iterable[Sequence[AnswerFeedback]]:
    groups: dict[str, list[AnswerFeedback]] = {}
    for item in feedback:
        groups.setdefault(item.question, []).append(item)
    return groups.values()


def _changes(
    labels: Iterable[Label], wanted: Sequence[Label], invalid: Container[tuple[LabelSource, str]]
) -> tuple[list[Label], list[Label]]:
    """Return `(to_write, to_remove)`: wanted labels that are new or different, and labels that are no longer wanted.

    Labels that were computed here have a margin. A label without one was imported, and stays until a wanted label
    replaces it or it is `invalid`.
    """
    current = {(label.source, label.question): label for label in labels}
    kept = {(label.source, label.question) for label in wanted}
    removable = [key for key, label in current.items() if label.margin is not None or key in invalid]
    return (
        [label for label in wanted if not _is_equal(label, current.get((label.source, label.question)))],
        [current[key] for key in removable if key not in kept],
    )


def _is_equal(label: Label, other: Label | None) -> bool:
    return other is not None and replace(label, created=other.created) == other


def _effective(inputs: LabelInputs, wanted: Iterable[Label], removed: Iterable[Label]) -> dict[LabelSource | None, int]:
    """Return how many questions have a label from each source, counting the surest of each question's labels."""
    labels = {(label.source, label.question) for label in (*inputs.labels, *wanted)}
    labels -= {(label.source, label.question) for label in removed}
    labels |= {(label.source, question) for question, label in inputs.questions.items() if label is not None}
    surest: dict[str, LabelSource] = {}
    for source, question in labels:
        if question not in surest or is_surer(source, surest[question]):
            surest[question] = source
    counts = Counter(surest.get(question) for question in inputs.questions)
    return {source: counts[source] for source in (*LabelSource, None)}


def _count_by_source(labels: Iterable[Label]) -> dict[LabelSource, int]:
    counts = Counter(label.source for label in labels)
    return {source: counts[source] for source in LabelSource}


def _bin(margin: float) -> float:
    """Return the lower edge of a margin's bin; the last bin includes its upper edge."""
    return max(low for low in MARGIN_BINS[:-1] if low <= margin)
