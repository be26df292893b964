"""Labels from client feedback and from votes of branches, and how confident each label is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from math import fsum
from operator import itemgetter
from typing import Any, Final, NamedTuple

from controllers.voting import confidence as lead_confidence
from controllers.voting import plurality, tally, top_two
from discovery.answers import Judge
from discovery.data.recordings import NO_ANSWER, LabelSource, RecordedBranch, RecordedQuestion
from discovery.evaluation.evaluate import regrade
from discovery.evaluation.paired_statistics import wilson_interval
from discovery.store import Label

MIN_MARGIN: Final = 0.2
"""Share of a question's branches by which the leading answer must be ahead for a label by consensus."""
MIN_BRANCHES: Final = 3
"""Fewest branches that make a vote. With so few, the estimated confidence is 0.75 at most."""
MIN_CALIBRATION_ANSWERS: Final = 20
"""Answers to questions with a reference that are needed to calibrate a source; with fewer, confidence is estimated."""


class AnswerFeedback(NamedTuple):
    """A client's feedback on one answer to a question."""

    question: str
    answer: str
    weight: float  # above 0 and up to 1 for the answer; below 0 and down to -1 against it
    tenant: str = ""  # callers without a key count as one tenant


class BranchVote(NamedTuple):
    """The vote of a question's branches, one vote each."""

    answer: str  # the leading answer, in its most common spelling
    first: int  # votes for the leading answer
    second: int  # votes for the next answer
    branches: int

    @property
    def margin(self) -> float:
        """Share of the branches by which the leading answer is ahead."""
        return (self.first - self.second) / self.branches


class Agreement(NamedTuple):
    """How often a source is right, counted where a reference is known."""

    right: int
    of: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The Wilson interval of the share that is right: 95 %, in percent. None if nothing was counted."""
        return wilson_interval(self.right / self.of, self.of) if self.of else None

    def as_json(self) -> dict[str, Any]:
        """Return the counts and the interval, in percent, as JSON."""
        low, high = self.interval or (None, None)
        return {"right": self.right, "of": self.of, "low": low, "high": high}


class FeedbackResult(NamedTuple):
    """The result of the feedback on one question."""

    question: str
    label: Label | None  # the best-supported answer; None if there is none
    refuted: Sequence[str]  # answers with at least as much feedback against as for them


def label_by_feedback(feedback: Sequence[AnswerFeedback], judge: Judge) -> FeedbackResult:
    """Return the label that follows from all feedback on one question, which is given latest last.

    Each tenant gets one vote per answer, its latest, and supports one answer at most, its latest. The label is the
    answer with the largest net support; there is none if two are level. Its confidence is `rule_of_succession` of its
    weighted supporters, among the votes that support any answer or oppose this one.
    """
    numbers = group_answers([vote.answer for vote in feedback], judge)
    votes: dict[str, dict[int, float]] = {}
    for vote, number in zip(feedback, numbers, strict=True):
        if number != NO_ANSWER:
            before = votes.get(vote.tenant, {}).items()
            still = {other: weight for other, weight in before if weight < 0 or vote.weight < 0}
            votes[vote.tenant] = still | {number: vote.weight}
    weights: dict[int, list[float]] = {}
    for number, weight in (item for by_answer in votes.values() for item in by_answer.items()):
        weights.setdefault(number, []).append(weight)
    net = {number: fsum(weights_of) for number, weights_of in weights.items()}
    refuted = [feedback[numbers.index(number)].answer for number, support in net.items() if support <= 0]
    leading = sorted((number for number, support in net.items() if support > 0), key=net.__getitem__, reverse=True)
    behind = net[leading[1]] if len(leading) > 1 else 0.0
    question = feedback[0].question
    if not leading or net[leading[0]] == behind:
        return FeedbackResult(question, None, refuted)
    best = leading[0]
    count = sum(weight > 0 for weights_of in weights.values() for weight in weights_of)
    count += sum(weight < 0 for weight in weights[best])
    confidence = rule_of_succession(fsum(weight for weight in weights[best] if weight > 0), count)
    answer, margin = feedback[numbers.index(best)].answer, (net[best] - behind) / count
    return FeedbackResult(question, Label(question, LabelSource.FEEDBACK, answer, confidence, margin), refuted)


class VotingResult(NamedTuple):
    """The result of all votes."""

    labels: Sequence[Label]
    votes: int  # questions with a vote
    close: int  # votes that are too close
    refuted: int  # clear votes whose leading answer was refuted by feedback
    calibrated: int  # votes that confidences are calibrated on; 0 if they are estimated
    judged: Sequence[tuple[BranchVote, bool]]  # votes on questions with a reference, and whether they are right
    agreement: Agreement  # of the labels with references


def label_by_votes(
    finals: Mapping[str, Iterable[Sequence[str | None]]],
    right: Mapping[str, str],
    refuted: Mapping[str, Sequence[str]],
    min_margin: float,
    min_branches: int,
    judge: Judge,
) -> VotingResult:
    """Return labels by consensus: answers that lead large and clear votes and were not refuted by feedback."""
    votes = {
        question: vote
        for question, answers in finals.items()
        if (vote := clearest_vote(answers, judge, min_branches)) is not None
    }
    clear = {
        question: vote for question, vote in votes.items() if vote.second < vote.first and vote.margin >= min_margin
    }
    kept = {
        question: vote
        for question, vote in clear.items()
        if not is_any_of(vote.answer, refuted.get(question, ()), judge)
    }
    agrees = {
        question: are_same_answer(vote.answer, right[question], judge)
        for question, vote in votes.items()
        if question in right
    }
    judged = [(votes[question], is_right) for question, is_right in agrees.items()]
    calibrated = calibrate_confidence([(estimated_confidence(vote), is_right) for vote, is_right in judged])
    return VotingResult(
        [
            Label(question, LabelSource.CONSENSUS, vote.answer, calibrated(estimated_confidence(vote)), vote.margin)
            for question, vote in kept.items()
        ],
        len(votes),
        len(votes) - len(clear),
        len(clear) - len(kept),
        len(judged) if len(judged) >= MIN_CALIBRATION_ANSWERS else 0,
        judged,
        agreement_of(is_right for question, is_right in agrees.items() if question in kept),
    )


def count_votes(finals: Sequence[str | None], judge: Judge, min_branches: int = MIN_BRANCHES) -> BranchVote | None:
    """Return the vote of branches that ended in `finals`; None if they are fewer than `min_branches` or have no
    answers.
    """
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
    """Return, of several models' votes, the one with the highest estimated confidence, then the largest; None without
    votes.
    """
    votes = [vote for answers in finals if (vote := count_votes(answers, judge, min_branches)) is not None]
    return max(votes, key=lambda vote: (estimated_confidence(vote), vote.branches), default=None)


def group_answers(answers: Sequence[str | None], judge: Judge) -> list[int]:
    """Return a number for each answer, equal for answers that `regrade` treats as the same; NO_ANSWER for none."""
    branches = [RecordedBranch((), 0, answer) for answer in answers]
    numbers: list[int] = regrade(RecordedQuestion("", "", "", 1, branches), judge).finals.tolist()
    return numbers


def are_same_answer(answer: str, other: str, judge: Judge) -> bool:
    """Return whether two answers are the same. Either may be redacted."""
    number, other_number = group_answers([answer, other], judge)
    return number == other_number != NO_ANSWER


def is_any_of(answer: str, others: Iterable[str], judge: Judge) -> bool:
    return any(are_same_answer(answer, other, judge) for other in others)


def estimated_confidence(vote: BranchVote) -> float:
    """Estimate a vote's confidence from its counts: the share of the leader, times the confidence that it leads at all.

    A few votes make it certain which answer leads, but not that it is right. On the public recordings, votes are right
    at least as often as estimated. For Qwen3-1.7B the shares are 0.75 right and 0.70 estimated with 16 branches, 0.67
    and 0.59 with 3. The smallest model is the exception: 0.52 and 0.59, 0.39 and 0.50. The confidence of the lead
    alone is 0.98.
    """
    return lead_confidence(vote.first, vote.second) * rule_of_succession(vote.first, vote.branches)


def rule_of_succession(right: float, of: int) -> float:
    """Return Laplace's estimate of the chance that the next trial succeeds when `right` of `of` did.

    It is never 0 or 1, and one half without trials, so a single vote gives limited confidence.
    """
    return (right + 1) / (of + 2)


def calibrate_confidence(judged: Sequence[tuple[float, bool]]) -> Callable[[float], float]:
    """Return a function from estimated to calibrated confidence, fitted to `judged` pairs of an estimate and the
    outcome.

    It is a rising step function (isotonic regression): neighbouring steps that would fall are merged. The value of a
    step is `rule_of_succession` of its outcomes. With fewer than `MIN_CALIBRATION_ANSWERS` pairs, estimates are
    returned unchanged.
    """
    if len(judged) < MIN_CALIBRATION_ANSWERS:
        return lambda estimate: estimate
    steps: list[tuple[float, int, int]] = []  # lowest estimate, how many were right, of how many
    for least, group in groupby(sorted(judged), key=itemgetter(0)):
        agreed = [is_right for _, is_right in group]
        right, of = sum(agreed), len(agreed)
        while steps and rule_of_succession(*steps[-1][1:]) >= rule_of_succession(right, of):
            least, before, of_them = steps.pop()
            right, of = right + before, of + of_them
        steps.append((least, right, of))

    def calibrated(estimate: float) -> float:
        below = [step for step in steps if step[0] <= estimate]
        return rule_of_succession(*(below or steps[:1])[-1][1:])

    return calibrated


def agreement_of(agreed: Iterable[bool]) -> Agreement:
    every = list(agreed)
    return Agreement(sum(every), len(every))
