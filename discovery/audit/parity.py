"""Whether replay tells the truth about live: served episodes held against replays of what was recorded of them.

Three questions. Shown the same facts, does a controller decide what it decided then (`again.py`)? Opened in live's
order, do the recorded branches bring live's answer at live's tokens? And are means over shuffled orders, which
evaluations go by, those of live traffic? The first two are exact; the third is told with its uncertainty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controllers import ControllerError, Limits, State, Stop, run_episode
from controllers.loading import Spec
from controllers.sandbox.deadline import Clock
from discovery.answers import Judge, Labels, canonical, is_redacted, redacted
from discovery.audit.decision_replay import (
    ControllerKey,
    Decider,
    EpisodeRun,
    KnownControllers,
    controller_key,
    find_controllers,
    replay_decisions,
    run_under_controller,
)
from discovery.audit.parity_report import (
    LiveReplayComparison,
    MeanInterval,
    ParityGroup,
    ParityReport,
    ReplayDifference,
    ReproductionReport,
)
from discovery.audit.served_episodes import limits_of
from discovery.data.recordings import LabelSource, Origin, RecordedQuestion, Recording, intern_answers
from discovery.errors import BranchCensored
from discovery.evaluation.paired_statistics import bootstrap_bounds, wilson_interval
from discovery.evaluation.replay import ReplayEnvironment, branch_order
from discovery.evaluation.scores import BLOCK, RESAMPLES, SEED
from discovery.store import ServedEpisode, Store
from discovery.store.records import is_surer

BOTH_SIDES: Final = 2.5
"""Percent beyond each end of an interval."""
SERVED: Final = frozenset({Stop.ANSWERED, Stop.MAX_TOKENS})
"""How episodes end that are a measure of their controllers, and may be recorded. A deadline cuts the costly ones:
replays that are not cut cannot stand for them."""


class KnownAnswer(NamedTuple):
    """An answer that is held for right."""

    answer: str
    source: LabelSource


@dataclass(frozen=True)
class ServedRecords:
    """What a store has of served requests."""

    episodes: Sequence[ServedEpisode]
    recordings: Mapping[str, RecordedQuestion]  # the complete ones made of requests, by request
    references: Mapping[str, KnownAnswer]  # by question: of each the surest


async def load_records(store: Store) -> ServedRecords:
    """All that is held against each other. Raises StoreError."""
    references: dict[str, KnownAnswer] = {}
    for label in await store.labels():
        known = references.get(label.question)
        if known is None or is_surer(label.source, known.source):
            references[label.question] = KnownAnswer(label.answer, label.source)
    recordings: dict[str, RecordedQuestion] = {}
    for summary in await store.summaries():
        for one in await store.load(summary.cell):
            if one.reference is not None:  # the surest of its own and the labels
                references[one.question] = KnownAnswer(one.reference, one.label_source)
            if one.origin is Origin.LIVE and one.request and one.complete:
                recordings.setdefault(one.request, one)
    return ServedRecords(await store.episodes(), recordings, references)


def check_parity(found: ServedRecords, given: Sequence[Spec] = (), shuffles: int = 20) -> ParityReport:
    """Hold what was served against its controllers, those from files as `given`, and against replays in so many orders.

    Raises TraceError, ControllerError if a file does not load, and SandboxUnavailable.
    """
    who = find_controllers(found.episodes, given)
    decisions = replay_decisions(found.episodes, who)
    with Judge(clock=Clock.CPU) as judge:
        truth = _Truth(found.references, judge)
        pairs = [pair for one in found.episodes if (pair := _pair(one, found, who, truth)) is not None]
        groups = list(_groups(found.episodes, pairs, truth, shuffles))
    return ParityReport(decisions, _reproduced(pairs), groups)


class _Pair(NamedTuple):
    """A served episode, and what was recorded of it."""

    episode: ServedEpisode
    spec: Spec
    limits: Limits  # live
    recording: Recording  # one text stands for all spellings of an answer: as live told them apart
    right: frozenset[str] | None  # the recorded answers that are right; None if nobody knows

    @property
    def replay_limits(self) -> Limits:
        """Live's, as far as there are recorded branches."""
        return replace(self.limits, max_branches=min(self.limits.max_branches, self.recording.branches))


def _pair(episode: ServedEpisode, found: ServedRecords, who: KnownControllers, truth: _Truth) -> _Pair | None:
    """None if nothing was recorded, or nobody can be asked, or there is nothing to hold it against."""
    recorded, spec = found.recordings.get(episode.request_id), who.known.get(controller_key(episode))
    if recorded is None or spec is None or "limits" not in episode.about or _left_out(episode) is not None:
        return None
    recording = intern_answers(recorded)
    return _Pair(episode, spec, limits_of(episode), recording, truth.right_among(recorded.question, recording.answers))


def _left_out(episode: ServedEpisode) -> str | None:
    """Why an episode is no measure of its controller; None if it is."""
    if episode.about.get("fallback") is not None:
        return "baseline decided"
    if (refused := episode.about.get("refused")) is not None:  # replay knows no such end
        return refused.replace("_", " ")
    if episode.stop not in SERVED:
        return episode.stop
    return None if "spent" in episode.about else "tokens not known"


class _Truth:
    """Which answers are right: as the proxy tells answers apart, hidden ones by their hashes."""

    def __init__(self, references: Mapping[str, KnownAnswer], judge: Judge) -> None:
        self._references = references
        self._judge = judge
        self._same: dict[tuple[str, str], bool] = {}

    def source(self, question: str | None) -> LabelSource | None:
        """How the right answer is known, if it is."""
        known = self._references.get(question or "")
        return None if known is None else known.source

    def is_right(self, question: str | None, answer: str | None) -> bool:
        """Whether `answer` is known to be right."""
        known = self._references.get(question or "")
        if known is None or answer is None:
            return False
        both = answer, known.answer
        if both not in self._same:
            self._same[both] = self._compare(*both)
        return self._same[both]

    def right_among(self, question: str, answers: Iterable[str]) -> frozenset[str] | None:
        """Those that are right; None if nobody knows."""
        if self.source(question) is None:
            return None
        return frozenset(answer for answer in answers if self.is_right(question, answer))

    def _compare(self, one: str, other: str) -> bool:
        if is_redacted(one) or is_redacted(other):
            return redacted(one) == redacted(other)
        form, other_form = canonical(one), canonical(other)
        if form is None or other_form is None:
            return one.strip() == other.strip()
        labels = Labels(self._judge)
        return labels.label_of(form, one) == labels.label_of(other_form, other)


class _Replayed(NamedTuple):
    """What came of a replay."""

    tokens: int
    answer: str | None
    width: int  # branches opened


def _replay(recording: Recording, order: Sequence[int], limits: Limits) -> EpisodeRun[_Replayed]:
    return partial(_run, recording, order, limits)


async def _run(recording: Recording, order: Sequence[int], limits: Limits, decider: Decider) -> _Replayed:
    environment, state = ReplayEnvironment(recording, order), State(limits)
    try:
        await run_episode(decider, environment, state)
    except ControllerError:
        state.end(Stop.CONTROLLER_ERROR)
    except BranchCensored:  # it opens more than were recorded: live it did not
        state.end(Stop.UPSTREAM_ERROR)
    answer = None if state.answer is None else recording.answers[environment.revealed[state.answer]]
    return _Replayed(state.spent, answer, state.width)


def _reproduced(pairs: Iterable[_Pair]) -> ReproductionReport:
    """Recorded episodes that their controllers ended, replayed in their own order under their own limits."""
    ended = [pair for pair in pairs if pair.episode.stop == Stop.ANSWERED]
    differing: list[ReplayDifference] = []
    for pair in ended:
        episode, order = pair.episode, range(pair.recording.branches)
        (replayed,) = run_under_controller(
            pair.spec, episode.beta, pair.limits, [_replay(pair.recording, order, pair.limits)]
        )
        spent = episode.about.get("spent")
        if (replayed.tokens, replayed.answer) != (spent, episode.answer):
            differing.append(
                ReplayDifference(episode.request_id, spent, replayed.tokens, episode.answer, replayed.answer)
            )
    return ReproductionReport(len(ended), differing)


_GroupKey = tuple[ControllerKey, float, str]


def _group_key(episode: ServedEpisode) -> _GroupKey:
    return controller_key(episode), episode.beta, episode.model


def _groups(
    episodes: Sequence[ServedEpisode], pairs: Sequence[_Pair], truth: _Truth, shuffles: int
) -> Iterable[ParityGroup]:
    """A group for each controller, β and model of which there are recordings."""
    for key in sorted({_group_key(pair.episode) for pair in pairs}):
        served = [one for one in episodes if _group_key(one) == key]
        yield _group(served, [pair for pair in pairs if _group_key(pair.episode) == key], truth, shuffles)


def _group(served: Sequence[ServedEpisode], pairs: Sequence[_Pair], truth: _Truth, shuffles: int) -> ParityGroup:
    live = [one for one in served if _left_out(one) is None]
    spec, beta = pairs[0].spec, pairs[0].episode.beta
    orders = [(pair, branch_order(pair.recording, seed)) for pair in pairs for seed in range(shuffles)]
    widest = Limits(1, max(pair.replay_limits.max_branches for pair in pairs))
    replays = run_under_controller(
        spec, beta, widest, [_replay(pair.recording, order, pair.replay_limits) for pair, order in orders]
    )
    by_pair = [replays[at : at + shuffles] for at in range(0, len(replays), shuffles)]
    tokens = _compared(
        [(_question(one), one.about["spent"]) for one in live],
        [
            _Row(_question(pair.episode), pair.episode.about["spent"], [one.tokens for one in played])
            for pair, played in zip(pairs, by_pair, strict=True)
        ],
    )
    known = [one for one in live if truth.source(one.question) is not None]
    rows = [
        _Row(
            _question(pair.episode),
            100 * truth.is_right(pair.recording.question, pair.episode.answer),
            [100 * (one.answer in pair.right) for one in played],
        )
        for pair, played in zip(pairs, by_pair, strict=True)
        if pair.right is not None
    ]
    right = [(_question(one), 100 * truth.is_right(one.question, one.answer)) for one in known]
    exhausted = [
        one.width == pair.recording.branches < pair.limits.max_branches
        for pair, played in zip(pairs, by_pair, strict=True)
        for one in played
    ]
    return ParityGroup(
        controller=spec.name,
        digest=spec.digest,
        beta=beta,
        model=pairs[0].episode.model,
        episodes=len(live),
        recorded=len(pairs),
        stops=_counted(one.stop for one in live),
        left_out=_counted(why for one in served if (why := _left_out(one)) is not None),
        labels=_counted(str(truth.source(one.question)) for one in known),
        finalise=_average(one.ledger.get("finalise", 0) for one in live),
        aborted=_average(one.ledger.get("aborted", 0) for one in live),
        exhausted=_average(exhausted),
        tokens=tokens,
        accuracy=_compared(right, rows, percent=True) if rows else None,
    )


def _question(episode: ServedEpisode) -> str:
    """What its intervals are drawn over; an episode whose question was not kept stands alone."""
    return episode.question or episode.request_id


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _average(values: Iterable[float]) -> float:
    every = list(values)
    return sum(every) / len(every)


class _Row(NamedTuple):
    """A figure of one recorded request."""

    question: str
    live: float
    replayed: Sequence[float]  # by shuffle


def _compared(live: Sequence[tuple[str, float]], rows: Sequence[_Row], percent: bool = False) -> LiveReplayComparison:
    return LiveReplayComparison(
        live=_mean(live, percent),
        replayed=_mean([(row.question, _average(row.replayed)) for row in rows], percent),
        paired=_paired(rows),
    )


def _mean(values: Sequence[tuple[str, float]], percent: bool) -> MeanInterval:
    """Its interval is bootstrapped over questions. Percentages that are all the same show no spread to draw from:
    theirs is Wilson's, for answers that were right or wrong."""
    by_question: dict[str, list[float]] = {}
    for question, value in values:
        by_question.setdefault(question, []).append(value)
    means = np.array([_average(of_one) for of_one in by_question.values()])
    mean, count = float(means.mean()), means.size
    if count < 2:
        return MeanInterval(mean, None, None, count)
    low, high = (
        wilson_interval(mean / 100, count) if percent and not np.ptp(means) else bootstrap_bounds(means, BOTH_SIDES)
    )
    return MeanInterval(mean, low, high, count)


def _paired(rows: Sequence[_Row]) -> MeanInterval:
    """Live less replayed, every question counting the same, with the interval chance leaves around it.

    If replay tells the truth, the live order is as good as any shuffled one: which of them it was is drawn anew for
    every request. That holds for few questions too, and where answers are nearly all right.
    """
    count = Counter(row.question for row in rows)
    weights = np.array([1 / (len(count) * count[row.question]) for row in rows])
    values = np.array([[row.live, *row.replayed] for row in rows], np.float64)
    others = (values.sum(axis=1, keepdims=True) - values) / (values.shape[1] - 1)
    apart = weights[:, None] * (values - others)  # of each order from the mean of the others: (requests, orders)
    mean = float(apart[:, 0].sum())
    if len(count) < 2:
        return MeanInterval(mean, None, None, len(count))
    generator = np.random.default_rng(SEED)
    requests = np.arange(len(rows))
    sums: list[NDArray[np.float64]] = []
    for _ in range(RESAMPLES // BLOCK):
        drawn = generator.integers(0, values.shape[1], (BLOCK, len(rows)))
        sums.append(apart[requests, drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(sums), [BOTH_SIDES, 100 - BOTH_SIDES])
    return MeanInterval(mean, mean - float(high), mean - float(low), len(count))
