"""Quality of signals: how well they tell right answers from wrong ones to the same question.

The measure is the AUROC within a question: the probability that a right chain has a higher value than a wrong one,
where ties count half. 50 % carries no information. It is averaged over the questions that have both; intervals are
bootstrapped over these questions. What differs between questions, such as their difficulty, has no effect on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controllers.signals import LOG_CONFIDENCE
from discovery.data.recordings import NO_ANSWER, RecordedBranch, RecordedQuestion, Recording
from discovery.evaluation.paired_statistics import bootstrap_bounds
from discovery.evaluation.replay import shuffled_order
from discovery.evaluation.scores import BOTH_SIDES

PROBE_SHARES: Final = (0.25, 0.5, 0.75, 1.0)
"""Shares of a chain's probes at which the probes are judged."""
VOTERS: Final = (4, 8, 16, 32)
"""Numbers of chains whose votes are compared."""
NATS_PER_VOTE: Final = 8.0
"""Votes are weighted by exp(log-probability / this). Eight nats less count 1/e."""

Feature = Callable[[RecordedBranch, int], float]
"""Returns a value of a finished chain from its record and Δ; nan if it is unknown."""


class QualityFigure(NamedTuple):
    """A figure with its 95 % interval over questions, in percent. The bounds are infinite for a single question."""

    value: float
    low: float
    high: float
    questions: int


class ProbeQuality(NamedTuple):
    """The probes at one share of the chains."""

    share: float
    accuracy: float  # percent that give the reference answer
    auroc: QualityFigure | None  # of the probe's confidence, for being right; None if it is unknown


class VoteQuality(NamedTuple):
    """Accuracy of votes of so many chains, in percent."""

    chains: int
    plain: float
    weighted: QualityFigure | None  # points gained by weights; None if confidences are unknown


class SignalQuality(NamedTuple):
    """How well the signals of a cell tell right answers from wrong ones."""

    questions: int
    chains: int  # per question, on average
    accuracy: float  # of a single chain, percent
    by_chain: Mapping[str, QualityFigure]  # AUROC by the name of the value
    probes: Sequence[ProbeQuality]
    votes: Sequence[VoteQuality]

    def as_json(self) -> dict[str, Any]:
        """Return the figures as JSON."""
        return {
            **self._asdict(),
            "by_chain": {name: figure._asdict() for name, figure in self.by_chain.items()},
            "probes": [{**probe._asdict(), "auroc": probe.auroc and probe.auroc._asdict()} for probe in self.probes],
            "votes": [{**vote._asdict(), "weighted": vote.weighted and vote.weighted._asdict()} for vote in self.votes],
        }


def log_probability(chain: RecordedBranch, interval: int) -> float:
    """Return the sum of a chain's log-probabilities in nats, from its intervals' confidences; nan if unknown."""
    total = 0.0
    for at, confidence in enumerate(chain.confidences):
        if confidence is None:
            return math.nan
        total += LOG_CONFIDENCE[confidence] * min(interval, max(0, chain.tokens - at * interval))
    return total if chain.confidences else math.nan


def _mean_log_probability(chain: RecordedBranch, interval: int) -> float:
    return log_probability(chain, interval) / chain.tokens if chain.tokens else math.nan


def _lowest(chain: RecordedBranch, _: int) -> float:
    known = [lowest for lowest in chain.lowests if lowest is not None]
    return float(min(known)) if known and len(known) == len(chain.lowests) else math.nan


def _last_probe(chain: RecordedBranch, _: int) -> float:
    last = chain.probe_confidences[-1] if chain.probe_confidences else None
    return math.nan if last is None else float(last)


FEATURES: Final[Mapping[str, Feature]] = MappingProxyType(
    {
        "mean log-probability": _mean_log_probability,
        "sum of log-probabilities": log_probability,
        "least confident window": _lowest,
        "confidence of the last probe": _last_probe,
        "shorter": lambda chain, _: -float(chain.tokens),
    }
)
"""Values by which chains are ranked; larger ones should be right more often."""
AGREEMENT: Final = "agreement with other chains"


def measure_signals(
    recorded: Sequence[RecordedQuestion], recordings: Sequence[Recording], orders: int = 20
) -> SignalQuality:
    """Return the quality of the signals of a cell. `recordings` are the interned forms of `recorded`.

    `orders` is the number of branch orders over which votes are averaged.
    """
    right = [recording.are_right(recording.finals) for recording in recordings]
    by_chain = {name: list(_aurocs(recorded, right, feature)) for name, feature in FEATURES.items()}
    by_chain[AGREEMENT] = [
        area for recording, of in zip(recordings, right, strict=True) if (area := auroc(_agreement(recording), of)) >= 0
    ]
    return SignalQuality(
        questions=len(recorded),
        chains=round(float(np.mean([recording.branches for recording in recordings]))),
        accuracy=100 * float(np.mean([of.mean() for of in right])),
        by_chain={name: _figure(areas) for name, areas in by_chain.items() if areas},
        probes=[_probes(recorded, recordings, share) for share in PROBE_SHARES],
        votes=[
            _votes(recorded, recordings, chains, orders)
            for chains in VOTERS
            if chains <= min(recording.branches for recording in recordings)
        ],
    )


def auroc(values: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Return the percentage of pairs of a right and a wrong item in which the right one has the higher value.

    Ties count half. -1 if there are no such pairs or a value is unknown.
    """
    good, bad = values[right], values[~right]
    if not good.size or not bad.size or np.isnan(values).any():
        return -1.0
    differences = np.sign(good[:, None] - bad[None, :])
    return float(50 * (1 + differences.mean()))


def _aurocs(
    recorded: Sequence[RecordedQuestion], right: Sequence[NDArray[np.bool_]], feature: Feature
) -> Iterator[float]:
    for question, of in zip(recorded, right, strict=True):
        area = auroc(np.array([feature(chain, question.interval) for chain in question.branches]), of)
        if area >= 0:
            yield area


def _agreement(recording: Recording) -> NDArray[np.float64]:
    """Return for each chain how many chains end in its answer; unreadable answers agree with none."""
    same = recording.finals[:, None] == recording.finals[None, :]
    counts: NDArray[np.float64] = (same & (recording.finals != NO_ANSWER)).sum(axis=1).astype(np.float64)
    return counts


def _figure(values: Sequence[float]) -> QualityFigure:
    array = np.array(values)
    return QualityFigure(float(array.mean()), *bootstrap_bounds(array, BOTH_SIDES), len(values))


def _probes(recorded: Sequence[RecordedQuestion], recordings: Sequence[Recording], share: float) -> ProbeQuality:
    rights, areas = [], []
    for question, recording in zip(recorded, recordings, strict=True):
        places = [math.ceil(share * len(chain.probes)) - 1 for chain in question.branches]
        probed = [index for index, place in enumerate(places) if place >= 0]
        if not probed:
            continue
        right = recording.are_right(recording.probes[[recording.starts[i] + places[i] for i in probed]])
        rights.append(right.mean())
        confidences = [
            question.branches[i].probe_confidences[places[i]] if question.branches[i].probe_confidences else None
            for i in probed
        ]
        area = auroc(np.array([math.nan if value is None else value for value in confidences], float), right)
        if area >= 0:
            areas.append(area)
    return ProbeQuality(share, 100 * float(np.mean(rights)) if rights else 0.0, _figure(areas) if areas else None)


def _votes(
    recorded: Sequence[RecordedQuestion], recordings: Sequence[Recording], chains: int, orders: int
) -> VoteQuality:
    plain, gains = [], []
    for question, recording in zip(recorded, recordings, strict=True):
        sums = np.array([log_probability(chain, question.interval) for chain in question.branches])
        drawn = [shuffled_order(recording.branches, seed)[:chains] for seed in range(orders)]
        equal = [_winner(recording, order, np.ones(len(sums))) == recording.reference for order in drawn]
        plain.append(100 * float(np.mean(equal)))
        if np.isnan(sums).any():
            continue
        weights = np.exp((sums - sums.max()) / NATS_PER_VOTE)
        weighted = [_winner(recording, order, weights) == recording.reference for order in drawn]
        gains.append(100 * float(np.mean(weighted)) - plain[-1])
    return VoteQuality(chains, float(np.mean(plain)), _figure(gains) if gains else None)


def _winner(recording: Recording, order: Sequence[int], weights: NDArray[np.float64]) -> int | None:
    """Return the answer with the highest weight among the chains of `order`, the first of equals."""
    votes: dict[int, float] = {}
    for index in order:
        answer = int(recording.finals[index])
        if answer != NO_ANSWER:
            votes[answer] = votes.get(answer, 0.0) + float(weights[index])
    return max(votes, key=votes.__getitem__, default=None)
