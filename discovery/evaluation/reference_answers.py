"""Right answers of a store's questions: from references, from what clients say, from votes; and how far these agree.

Each source gives a question one label, of its own; which of them counts is settled when recordings are read, a surer
source going before a less sure one. What was refuted by clients is no label of theirs, nor a vote's.
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
from discovery.data.safe_json import parse_json
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

SATISFIED_SCORE: Final = 0.5
"""The least score of a client who is content."""
MARGIN_BINS: Final = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Between these, votes are counted together."""


@dataclass(frozen=True)
class LabelInputs:
    """What labels are made of."""

    questions: Mapping[str, Label | None]  # all there are, with the answers they came with
    labels: Sequence[Label]  # as they are now
    said: Sequence[AnswerFeedback]  # the latest of each request, the latest last
    unheard: int  # requests of which something was said that bears on no answer
    finals: Mapping[str, Sequence[Sequence[str | None]]]  # by question: what its branches say, for each model


@dataclass(frozen=True)
class LabelReport:
    """What became of a store's labels."""

    effective: Mapping[LabelSource | None, int]  # questions by the source that counts; None where there is none
    written: Mapping[LabelSource, int]  # labels that are new or have changed
    removed: Mapping[LabelSource, int]  # that nothing speaks for any more
    unknown: int  # references of questions that are not in the store
    contradicted: int  # references that are not what their questions came with, which stays
    unheard: int  # requests of which something was said that bears on no answer
    votes: int  # questions with a vote
    close: int  # of which too close
    refuted: int  # of the others, those whose leader clients refuted
    calibrated: int  # votes their confidence is read off; 0 where it is reckoned from counts alone
    consensus: Agreement  # of labels by consensus
    feedback: Agreement  # of labels by feedback, whose confidence is read off it where there are enough
    by_margin: Sequence[tuple[float, float, Agreement]]  # of every vote, by its margin: from, to

    def as_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        bins = [{"from": low, "to": high, **found.as_json()} for low, high, found in self.by_margin]
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
    """Labels that have changed, and what is told of them."""

    labels: Sequence[Label]
    gone: Sequence[Label]
    report: LabelReport


async def update_labels(
    store: Store,
    references: Sequence[Question] = (),
    min_margin: float = MIN_MARGIN,
    min_branches: int = MIN_BRANCHES,
) -> LabelReport:
    """Bring a store's labels up to date. Where nothing has changed nothing is written. Raises StoreError."""
    material = await load_inputs(store)
    with Judge(clock=Clock.CPU) as judge:
        made = compute_labels(material, references, min_margin, min_branches, judge)
    if made.labels or made.gone:
        await store.set_labels(made.labels, made.gone)
    return made.report


async def load_inputs(store: Store) -> LabelInputs:
    """What a store's labels are made of. Raises StoreError."""
    latest = {one.request_id: one for one in await store.feedback()}
    in_time = sorted(latest.values(), key=attrgetter("created"))
    said = [interpret_feedback(await store.episode(feedback.request_id), feedback) for feedback in in_time]
    kept = [one for one in said if one is not None]
    return LabelInputs(await store.questions(), await store.labels(), kept, len(said) - len(kept), await _finals(store))


def interpret_feedback(episode: ServedEpisode | None, feedback: Feedback) -> AnswerFeedback | None:
    """What feedback says of an answer; None if it bears on none."""
    if episode is None or episode.question is None:
        return None
    try:
        value = parse_json(feedback.value)
    except ValueError:
        return None
    answer, weight = episode.answer, 0.0
    if feedback.kind == "answer" and isinstance(value, str):
        answer, weight = value, 1.0
    elif feedback.kind == "correct" and isinstance(value, bool):
        weight = 1.0 if value else -1.0
    elif feedback.kind == "score" and isinstance(value, (int, float)) and 0 <= value <= 1:
        weight = float(value) if value >= SATISFIED_SCORE else value - 1.0
    return None if answer is None or not weight else AnswerFeedback(episode.question, answer, weight, episode.tenant)


async def _finals(store: Store) -> dict[str, list[list[str | None]]]:
    """What the branches of complete recordings say, by question: for each model, of the newest version."""
    found: dict[str, dict[Version, list[str | None]]] = {}
    order: dict[Version, None] = {}  # the newest last
    for summary in await store.summaries():
        for one in await store.load(summary.cell):
            order.pop(one.version, None)
            order[one.version] = None
            if one.complete:
                finals = found.setdefault(one.question, {}).setdefault(one.version, [])
                finals.extend(branch.final for branch in one.branches)
    for model in dict.fromkeys([version.model for version in order]):
        for version in reversed(await store.versions(model)):  # which of several cells' is newer it alone knows
            order.pop(version, None)
            order[version] = None
    ranks = {version: rank for rank, version in enumerate(order)}
    newest = {
        question: {version.model: finals for version, finals in sorted(of_one.items(), key=lambda it: ranks[it[0]])}
        for question, of_one in found.items()
    }
    return {question: list(by_model.values()) for question, by_model in newest.items()}


def compute_labels(
    material: LabelInputs, references: Sequence[Question], min_margin: float, min_branches: int, judge: Judge
) -> LabelChanges:
    """The labels there should be, as far as they are not those there are. Of the same comes the same."""
    given = {one.question: one.reference for one in references if one.reference is not None}
    known = {question: answer for question, answer in given.items() if question in material.questions}
    own = _of(LabelSource.REFERENCE, filter(None, material.questions.values()))
    right = {**_of(LabelSource.REFERENCE, material.labels), **known, **own}
    told = [Label(one, LabelSource.REFERENCE, answer, 1.0) for one, answer in known.items() if one not in own]

    heard = [label_by_feedback(said, judge) for said in _by_question(material.said)]
    refuted = {one.question: one.refuted for one in heard}
    liked = [one.label for one in heard if one.label is not None]
    agreed = [
        (label.confidence, are_same_answer(label.answer, right[label.question], judge))
        for label in liked
        if label.question in right
    ]
    sure = calibrate_confidence(agreed)
    liked = [replace(label, confidence=sure(label.confidence)) for label in liked]

    voted = label_by_votes(material.finals, right, refuted, min_margin, min_branches, judge)
    wanted = [*told, *liked, *voted.labels]
    spoilt = {
        (label.source, label.question)
        for label in material.labels
        if label.source is not LabelSource.REFERENCE and is_any_of(label.answer, refuted.get(label.question, ()), judge)
    }
    labels, gone = _changes(material.labels, wanted, spoilt)
    report = LabelReport(
        effective=_effective(material, wanted, gone),
        written=_counted(labels),
        removed=_counted(gone),
        unknown=len(given) - len(known),
        contradicted=sum(not are_same_answer(own[one], answer, judge) for one, answer in known.items() if one in own),
        unheard=material.unheard,
        votes=voted.votes,
        close=voted.close,
        refuted=voted.refuted,
        calibrated=voted.calibrated,
        consensus=voted.agreement,
        feedback=agreement_of(is_right for _, is_right in agreed),
        by_margin=[
            (low, high, agreement_of(is_right for found, is_right in voted.judged if _bin(found.margin) == low))
            for low, high in pairwise(MARGIN_BINS)
        ],
    )
    return LabelChanges(labels, gone, report)


def _of(source: LabelSource, labels: Iterable[Label]) -> dict[str, str]:
    return {label.question: label.answer for label in labels if label.source is source}


def _by_question(said: Iterable[AnswerFeedback]) -> Iterable[Sequence[AnswerFeedback]]:
    found: dict[str, list[AnswerFeedback]] = {}
    for one in said:
        found.setdefault(one.question, []).append(one)
    return found.values()


def _changes(
    labels: Iterable[Label], wanted: Sequence[Label], spoilt: Container[tuple[LabelSource, str]]
) -> tuple[list[Label], list[Label]]:
    """Of `wanted` those that are new or say something else; and of `labels` those counted here that are no more.

    What is counted here has a margin: a label without one came from elsewhere, and stays until it is known better, or
    is `spoilt`.
    """
    there = {(label.source, label.question): label for label in labels}
    kept = {(label.source, label.question) for label in wanted}
    fleeting = [name for name, label in there.items() if label.margin is not None or name in spoilt]
    return (
        [label for label in wanted if not _is_equal(label, there.get((label.source, label.question)))],
        [there[name] for name in fleeting if name not in kept],
    )


def _is_equal(label: Label, other: Label | None) -> bool:
    return other is not None and replace(label, created=other.created) == other


def _effective(material: LabelInputs, wanted: Iterable[Label], gone: Iterable[Label]) -> dict[LabelSource | None, int]:
    """How many questions are known by each source, by the surest of those they have."""
    labels = {(label.source, label.question) for label in (*material.labels, *wanted)}
    labels -= {(label.source, label.question) for label in gone}
    labels |= {(label.source, question) for question, label in material.questions.items() if label is not None}
    surest: dict[str, LabelSource] = {}
    for source, question in labels:
        if question not in surest or is_surer(source, surest[question]):
            surest[question] = source
    found = Counter(surest.get(question) for question in material.questions)
    return {source: found[source] for source in (*LabelSource, None)}


def _counted(labels: Iterable[Label]) -> dict[LabelSource, int]:
    found = Counter(label.source for label in labels)
    return {source: found[source] for source in LabelSource}


def _bin(margin: float) -> float:
    """Where the bin of a margin begins; the last has its end in it."""
    return max(low for low in MARGIN_BINS[:-1] if low <= margin)
