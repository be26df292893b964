"""Right answers of a store's questions: from references, from what clients say, from votes; and how far these agree.

Each source gives a question one label, of its own; which of them counts is settled when recordings are read, a surer
source going before a less sure one. What was refuted by clients is no label of theirs, nor a vote's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from math import fsum
from operator import attrgetter, itemgetter
from typing import Any, Final, NamedTuple

from controllers.sandbox.worker import Clock
from controllers.voting import confidence, plurality, tally, top_two
from discovery.answers import Judge
from discovery.data.questions import Question
from discovery.data.recordings import NO_ANSWER, LabelSource, RecordedBranch, RecordedQuestion, Version
from discovery.data.safe_json import parse_json
from discovery.evaluation.evaluate import regrade
from discovery.evaluation.paired_statistics import wilson_interval
from discovery.store import Feedback, Label, ServedEpisode, Store
from discovery.store.records import is_surer

MIN_MARGIN: Final = 0.2
"""Share of its branches by which a vote's leader must be ahead to be a label."""
MIN_BRANCHES: Final = 3
"""Branches that make a vote. So few are seldom enough, and their confidence says so: 0.75 at most, as reckoned."""
MIN_CALIBRATION_ANSWERS: Final = 20
"""Answers to questions with a reference by which it is told how often a source is right; with fewer it is reckoned."""
SATISFIED_SCORE: Final = 0.5
"""The least score of a client who is content."""
MARGIN_BINS: Final = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Between these, votes are counted together."""


class AnswerFeedback(NamedTuple):
    """What a client said of an answer to a question."""

    question: str
    answer: str
    weight: float  # from 0 to 1 for the answer, from -1 to 0 against it
    tenant: str = ""  # who says so; callers without a key are one


class BranchVote(NamedTuple):
    """What the branches of a question say, each having one vote."""

    answer: str  # of those that most say the first, as most of them write it
    first: int  # votes
    second: int  # of the next answer
    branches: int

    @property
    def margin(self) -> float:
        """By how large a share of the branches the first is ahead."""
        return (self.first - self.second) / self.branches


@dataclass(frozen=True)
class LabelInputs:
    """What labels are made of."""

    questions: Mapping[str, Label | None]  # all there are, with the answers they came with
    labels: Sequence[Label]  # as they are now
    said: Sequence[AnswerFeedback]  # the latest of each request, the latest last
    unheard: int  # requests of which something was said that bears on no answer
    finals: Mapping[str, Sequence[Sequence[str | None]]]  # by question: what its branches say, for each model


class Agreement(NamedTuple):
    """How often a source is right where a reference says so."""

    right: int
    of: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's, of 95 %, in percent; None of nothing."""
        return wilson_interval(self.right / self.of, self.of) if self.of else None

    def as_json(self) -> dict[str, Any]:
        """For `--json`; shares in percent."""
        low, high = self.interval or (None, None)
        return {"right": self.right, "of": self.of, "low": low, "high": high}


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


# What there is


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


# What follows


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
        if label.source is not LabelSource.REFERENCE and _is_any(label.answer, refuted.get(label.question, ()), judge)
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
        feedback=_agreement(is_right for _, is_right in agreed),
        by_margin=[
            (low, high, _agreement(is_right for found, is_right in voted.judged if _bin(found.margin) == low))
            for low, high in pairwise(MARGIN_BINS)
        ],
    )
    return LabelChanges(labels, gone, report)


class FeedbackResult(NamedTuple):
    """What clients say of a question."""

    question: str
    label: Label | None  # what most hold for right
    refuted: Sequence[str]  # answers that are spoken against no less than for


def label_by_feedback(said: Sequence[AnswerFeedback], judge: Judge) -> FeedbackResult:
    """What was said of one question's answers, all together, the latest last.

    A tenant has one voice on an answer, its latest, and holds one answer for right at most, its latest. The label is
    the answer most is said for, less what is said against it; none if two are level. It is as sure as the share of
    voices that say so (`succession`), of those that hold anything for right or speak against it, each weighed by how
    sure it is itself.
    """
    numbers = group_answers([one.answer for one in said], judge)
    voices: dict[str, dict[int, float]] = {}
    for one, number in zip(said, numbers, strict=True):
        if number != NO_ANSWER:
            before = voices.get(one.tenant, {}).items()
            still = {other: weight for other, weight in before if weight < 0 or one.weight < 0}
            voices[one.tenant] = still | {number: one.weight}
    weights: dict[int, list[float]] = {}
    for number, weight in (held for voice in voices.values() for held in voice.items()):
        weights.setdefault(number, []).append(weight)
    net = {number: fsum(of_one) for number, of_one in weights.items()}
    refuted = [said[numbers.index(number)].answer for number, support in net.items() if support <= 0]
    leading = sorted((number for number, support in net.items() if support > 0), key=net.__getitem__, reverse=True)
    behind = net[leading[1]] if len(leading) > 1 else 0.0
    question = said[0].question
    if not leading or net[leading[0]] == behind:
        return FeedbackResult(question, None, refuted)
    best = leading[0]
    count = sum(weight > 0 for of_one in weights.values() for weight in of_one)
    count += sum(weight < 0 for weight in weights[best])
    sure = rule_of_succession(fsum(weight for weight in weights[best] if weight > 0), count)
    answer, margin = said[numbers.index(best)].answer, (net[best] - behind) / count
    return FeedbackResult(question, Label(question, LabelSource.FEEDBACK, answer, sure, margin), refuted)


class VotingResult(NamedTuple):
    """What came of all votes."""

    labels: Sequence[Label]
    votes: int
    close: int  # of which too close
    refuted: int  # of the others
    calibrated: int  # votes their confidence is read off; 0 if none
    judged: Sequence[tuple[BranchVote, bool]]  # those with a reference, and whether they are right
    agreement: Agreement  # of the labels


def label_by_votes(
    finals: Mapping[str, Iterable[Sequence[str | None]]],
    right: Mapping[str, str],
    refuted: Mapping[str, Sequence[str]],
    min_margin: float,
    min_branches: int,
    judge: Judge,
) -> VotingResult:
    """Labels by consensus: of votes that are large and clear and whose leaders nobody refuted."""
    votes = {
        one: found for one, said in finals.items() if (found := clearest_vote(said, judge, min_branches)) is not None
    }
    clear = {one: found for one, found in votes.items() if found.second < found.first and found.margin >= min_margin}
    kept = {one: found for one, found in clear.items() if not _is_any(found.answer, refuted.get(one, ()), judge)}
    agrees = {one: are_same_answer(found.answer, right[one], judge) for one, found in votes.items() if one in right}
    judged = [(votes[one], is_right) for one, is_right in agrees.items()]
    sure = calibrate_confidence([(estimated_confidence(found), is_right) for found, is_right in judged])
    return VotingResult(
        [
            Label(one, LabelSource.CONSENSUS, found.answer, sure(estimated_confidence(found)), found.margin)
            for one, found in kept.items()
        ],
        len(votes),
        len(votes) - len(clear),
        len(clear) - len(kept),
        len(judged) if len(judged) >= MIN_CALIBRATION_ANSWERS else 0,
        judged,
        _agreement(is_right for one, is_right in agrees.items() if one in kept),
    )


def count_votes(finals: Sequence[str | None], judge: Judge, min_branches: int = MIN_BRANCHES) -> BranchVote | None:
    """What branches say that ended in `finals`, each having a vote; None if they are too few, or say nothing."""
    numbers = group_answers(finals, judge)
    votes = tally(number for number in numbers if number != NO_ANSWER)
    leader = plurality(votes)
    if leader is None or len(finals) < min_branches:
        return None
    spelled = Counter(final for final, number in zip(finals, numbers, strict=True) if number == leader)
    return BranchVote(str(spelled.most_common(1)[0][0]), *top_two(votes), len(finals))


def clearest_vote(
    finals: Iterable[Sequence[str | None]], judge: Judge, min_branches: int = MIN_BRANCHES
) -> BranchVote | None:
    """Of several models' votes the one that is surest by its counts, then the largest; None if there is none."""
    votes = [found for of_one in finals if (found := count_votes(of_one, judge, min_branches)) is not None]
    return max(votes, key=lambda found: (estimated_confidence(found), found.branches), default=None)


def group_answers(answers: Sequence[str | None], judge: Judge) -> list[int]:
    """Answers as numbers, the same where they are the same as a regraded recording has it; NO_ANSWER for none."""
    branches = [RecordedBranch((), 0, answer) for answer in answers]
    found: list[int] = regrade(RecordedQuestion("", "", "", 1, branches), judge).finals.tolist()
    return found


def are_same_answer(one: str, other: str, judge: Judge) -> bool:
    """Whether two answers are the same, one of which may be veiled."""
    number, other_number = group_answers([one, other], judge)
    return number == other_number != NO_ANSWER


def _is_any(answer: str, others: Iterable[str], judge: Judge) -> bool:
    return any(are_same_answer(answer, other, judge) for other in others)


def estimated_confidence(found: BranchVote) -> float:
    """How sure a vote is by its counts alone: the share that says it, as far as it is sure that it leads at all.

    That it leads is soon sure and says little of whether it is right. On the public recordings this is right no less
    often than it says (0.75 where it says 0.70, of Qwen3-1.7B's votes of 16 branches; 0.67 and 0.59 of 3), but of the
    smallest model (0.52 and 0.59; 0.39 and 0.50), and that it leads alone 0.98.
    """
    return confidence(found.first, found.second) * rule_of_succession(found.first, found.branches)


def rule_of_succession(right: float, of: int) -> float:
    """Laplace's rule of succession: how likely the next is right where `right` of `of` were. It is never certain, and
    one half of nothing: whoever speaks alone is believed, but not beyond doubt."""
    return (right + 1) / (of + 2)


def calibrate_confidence(judged: Sequence[tuple[float, bool]]) -> Callable[[float], float]:
    """How often what is reckoned so sure is right, by `judged`: how sure each was, and whether it was right.

    It is a flight of steps that rises: what is surer is no less often right, and neighbours that say otherwise are one
    step. A step is as sure as `succession` has it of its own. With fewer than `ENOUGH` all stays as reckoned.
    """
    if len(judged) < MIN_CALIBRATION_ANSWERS:
        return lambda reckoned: reckoned
    steps: list[tuple[float, int, int]] = []  # least that was reckoned, how many were right, of how many
    for least, group in groupby(sorted(judged), key=itemgetter(0)):
        agreed = [is_right for _, is_right in group]
        right, of = sum(agreed), len(agreed)
        while steps and rule_of_succession(*steps[-1][1:]) >= rule_of_succession(right, of):
            least, before, of_them = steps.pop()
            right, of = right + before, of + of_them
        steps.append((least, right, of))

    def sure(reckoned: float) -> float:
        below = [step for step in steps if step[0] <= reckoned]
        return rule_of_succession(*(below or steps[:1])[-1][1:])

    return sure


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


def _agreement(agreed: Iterable[bool]) -> Agreement:
    every = list(agreed)
    return Agreement(sum(every), len(every))


def _bin(margin: float) -> float:
    """Where the bin of a margin begins; the last has its end in it."""
    return max(low for low in MARGIN_BINS[:-1] if low <= margin)
