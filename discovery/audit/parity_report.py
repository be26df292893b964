"""Results of the parity check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple

from discovery.audit.decision_replay import DecisionReport
from discovery.evaluation.paired_statistics import TIE

MIN_QUESTIONS: Final = 10
"""Recorded questions that are needed for a verdict on means."""


class ReplayDifference(NamedTuple):
    """A recorded episode that a replay in its own order does not reproduce."""

    request: str
    spent: int | None  # tokens, live; None if unknown
    replayed: int  # tokens, replayed
    answer: str | None
    replayed_answer: str | None


@dataclass(frozen=True)
class ReproductionReport:
    """Recorded episodes that their controllers ended, replayed in the order in which they opened their branches."""

    episodes: int
    differing: Sequence[ReplayDifference]


class ParityVerdict(StrEnum):
    """Verdict on means."""

    AGREE = "agree"
    DISAGREE = "disagree"
    TOO_LITTLE = "too little data"


class MeanInterval(NamedTuple):
    """A mean over questions with its 95 % interval; None with a single question."""

    mean: float
    low: float | None
    high: float | None
    questions: int


@dataclass(frozen=True)
class LiveReplayComparison:
    """One figure, live and replayed."""

    live: MeanInterval
    replayed: MeanInterval
    paired: MeanInterval  # live less replayed, on the requests that were recorded

    @property
    def verdict(self) -> ParityVerdict:
        """Whether the intervals overlap, and the paired one contains 0."""
        slack = TIE * max(1.0, abs(self.live.mean), abs(self.replayed.mean))
        if min(self.live.questions, self.replayed.questions, self.paired.questions) < MIN_QUESTIONS:
            return ParityVerdict.TOO_LITTLE
        agrees = _overlap(self.live, self.replayed, slack) and _overlap(self.paired, MeanInterval(0, 0, 0, 0), slack)
        return ParityVerdict.AGREE if agrees else ParityVerdict.DISAGREE

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as JSON."""
        means = {name: getattr(self, name)._asdict() for name in ("live", "replayed", "paired")}
        return {**means, "verdict": str(self.verdict)}


def _overlap(mean: MeanInterval, other: MeanInterval, slack: float) -> bool:
    """Return whether two intervals overlap, with a tolerance of `slack`."""
    ends = mean.low, mean.high, other.low, other.high
    low, high, other_low, other_high = (0.0 if end is None else end for end in ends)
    return max(low, other_low) <= min(high, other_high) + slack


@dataclass(frozen=True)
class ParityGroup:
    """One controller at one β on one model."""

    controller: str
    digest: str
    beta: float
    model: str
    episodes: int  # live episodes that measure it
    recorded: int  # of them, those that were recorded
    stops: Mapping[str, int]  # how they ended
    left_out: Mapping[str, int]  # other live episodes, by reason
    judged_wrong: int  # live episodes that clients judged wrong and whose right answer is unknown
    labels: Mapping[str, int]  # live episodes that accuracy counts, by the source of the right answer
    finalise: float  # mean tokens per live episode for closing its reply, which replay does not count
    aborted: float  # mean tokens per live episode in aborted requests, which replay does not count
    exhausted: float  # share of replays that opened all recorded branches although live allowed more
    tokens: LiveReplayComparison
    accuracy: LiveReplayComparison | None  # percent; None without right answers. If `judged_wrong`, of references alone

    @property
    def verdict(self) -> ParityVerdict:
        """The worse verdict of tokens and accuracy."""
        both = self.tokens.verdict, ParityVerdict.TOO_LITTLE if self.accuracy is None else self.accuracy.verdict
        worst = (ParityVerdict.DISAGREE, ParityVerdict.TOO_LITTLE, ParityVerdict.AGREE)
        return next(verdict for verdict in worst if verdict in both)

    def as_json(self) -> dict[str, Any]:
        """Return the group as JSON."""
        accuracy = None if self.accuracy is None else self.accuracy.as_json()
        return asdict(self) | {"tokens": self.tokens.as_json(), "accuracy": accuracy, "verdict": str(self.verdict)}


@dataclass(frozen=True)
class ParityReport:
    """The results of all three checks."""

    decisions: DecisionReport
    reproduced: ReproductionReport
    groups: Sequence[ParityGroup]
    unrecorded: int = 0  # sampled episodes without a recording, so far

    @property
    def checked(self) -> bool:
        """Whether there was anything to check."""
        return bool(self.decisions.rounds or self.reproduced.episodes or self.groups)

    @property
    def holds(self) -> bool:
        """Whether something was checked and nothing contradicts replay."""
        exact = self.decisions.agreed == self.decisions.rounds and not self.reproduced.differing
        return self.checked and exact and all(group.verdict is not ParityVerdict.DISAGREE for group in self.groups)

    def as_json(self) -> dict[str, Any]:
        """Return the report as `--json` writes it."""
        decisions, reproduced = self.decisions, self.reproduced
        return {
            "checked": self.checked,
            "holds": self.holds,
            "decisions": {
                **vars(decisions),
                "disagreements": [disagreement._asdict() for disagreement in decisions.disagreements],
                "unchecked": [controller._asdict() for controller in decisions.unchecked],
            },
            "reproduced": {
                "episodes": reproduced.episodes,
                "differing": [difference._asdict() for difference in reproduced.differing],
            },
            "unrecorded": self.unrecorded,
            "means": [group.as_json() for group in self.groups],
        }
