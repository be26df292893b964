"""Placeholder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from math import fsum
from operator import itemgetter
from typing import Any, Final, NamedTuple

from controllers.voting import confidence, plurality, tally, top_two
from discovery.answers import Judge
from discovery.data.recordings import NO_ANSWER, LabelSource, RecordedBranch, RecordedQuestion
from discovery.evaluation.evaluate import regrade
from discovery.evaluation.paired_statistics import wilson_interval
from discovery.store import Label

MIN_MARGIN: Final = 0.2
"""Share of its branches by which a vote's leader must be ahead to be a label."""
MIN_BRANCHES: Final = 3
"""Branches that make a vote. So few are seldom enough, and their confidence says so: 0.75 at most, as reckoned."""
MIN_CALIBRATION_ANSWERS: Final = 20
"""Answers to questions with a reference by which it is told how often a source is right; with fewer it is reckoned."""


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
    kept = {one: found for one, found in clear.items() if not is_any_of(found.answer, refuted.get(one, ()), judge)}
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
        agreement_of(is_right for one, is_right in agrees.items() if one in kept),
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


def is_any_of(answer: str, others: Iterable[str], judge: Judge) -> bool:
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


def agreement_of(agreed: Iterable[bool]) -> Agreement:
    every = list(agreed)
    return Agreement(sum(every), len(every))
