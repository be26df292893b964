"""Placeholder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple

from discovery.audit.decision_replay import (
    DecisionReport,
)
from discovery.evaluation.paired_statistics import TIE

LEAST: Final = 10
"""Recorded questions below which nothing is said of means."""


class ReplayDifference(NamedTuple):
    """A recorded episode that a replay in its own order does not reproduce."""

    request: str
    spent: int | None  # tokens, live; None if it is not known
    replayed: int
    answer: str | None
    replayed_answer: str | None


@dataclass(frozen=True)
class ReproductionReport:
    """Recorded episodes that their controllers ended, replayed in the order in which they opened their branches."""

    episodes: int
    differing: Sequence[ReplayDifference]


class ParityVerdict(StrEnum):
    """What is said of means."""

    AGREE = "agree"
    DISAGREE = "disagree"
    TOO_LITTLE = "too little data"


class MeanInterval(NamedTuple):
    """A mean in which every question counts the same, with its 95 % interval; None where one question says nothing."""

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
        """Whether the intervals overlap, and the paired one has 0 in it."""
        slack = TIE * max(1.0, abs(self.live.mean), abs(self.replayed.mean))
        if min(self.live.questions, self.replayed.questions, self.paired.questions) < LEAST:
            return ParityVerdict.TOO_LITTLE
        agrees = _meet(self.live, self.replayed, slack) and _meet(self.paired, MeanInterval(0, 0, 0, 0), slack)
        return ParityVerdict.AGREE if agrees else ParityVerdict.DISAGREE

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        means = {name: getattr(self, name)._asdict() for name in ("live", "replayed", "paired")}
        return {**means, "verdict": str(self.verdict)}


def _meet(one: MeanInterval, other: MeanInterval, slack: float) -> bool:
    """Whether two intervals overlap."""
    ends = one.low, one.high, other.low, other.high
    low, high, other_low, other_high = (0.0 if end is None else end for end in ends)
    return max(low, other_low) <= min(high, other_high) + slack


@dataclass(frozen=True)
class ParityGroup:
    """One controller at one β on one model."""

    controller: str
    digest: str
    beta: float
    model: str
    episodes: int  # live ones that are a measure of it
    recorded: int  # of which so many were recorded
    stops: Mapping[str, int]  # how they ended
    left_out: Mapping[str, int]  # other live ones, by why
    labels: Mapping[str, int]  # live episodes of which a right answer is known, by how it is
    finalise: float  # mean tokens of a live episode for closing its reply: replay does not see them,
    aborted: float  # nor those generated in requests that were cut
    exhausted: float  # share of replays that opened all that was recorded where live would have allowed more
    tokens: LiveReplayComparison
    accuracy: LiveReplayComparison | None  # percent; None if of no recorded question a right answer is known

    @property
    def verdict(self) -> ParityVerdict:
        """Of tokens and accuracy together."""
        both = self.tokens.verdict, ParityVerdict.TOO_LITTLE if self.accuracy is None else self.accuracy.verdict
        worst = (ParityVerdict.DISAGREE, ParityVerdict.TOO_LITTLE, ParityVerdict.AGREE)
        return next(verdict for verdict in worst if verdict in both)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        accuracy = None if self.accuracy is None else self.accuracy.as_json()
        return asdict(self) | {"tokens": self.tokens.as_json(), "accuracy": accuracy, "verdict": str(self.verdict)}


@dataclass(frozen=True)
class ParityReport:
    """Everything that was found."""

    decisions: DecisionReport
    reproduced: ReproductionReport
    groups: Sequence[ParityGroup]

    @property
    def checked(self) -> bool:
        """Whether there was anything that could have spoken against replay."""
        return bool(self.decisions.rounds or self.reproduced.episodes or self.groups)

    @property
    def holds(self) -> bool:
        """Whether something was checked, and nothing that was found speaks against replay."""
        exact = self.decisions.agreed == self.decisions.rounds and not self.reproduced.differing
        return self.checked and exact and all(group.verdict is not ParityVerdict.DISAGREE for group in self.groups)

    def as_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        decisions, reproduced = self.decisions, self.reproduced
        return {
            "checked": self.checked,
            "holds": self.holds,
            "decisions": {
                **vars(decisions),
                "disagreements": [one._asdict() for one in decisions.disagreements],
                "unchecked": [one._asdict() for one in decisions.unchecked],
            },
            "reproduced": {
                "episodes": reproduced.episodes,
                "differing": [one._asdict() for one in reproduced.differing],
            },
            "means": [group.as_json() for group in self.groups],
        }
