"""Parity: whether replay agrees with live traffic, checked on served episodes and what was recorded of them.

There are three checks. (1) Shown the same facts, a controller decides as it did live (`decision_replay`). (2) Opened in
the live order, the recorded branches give the live answer at the live cost. (3) Means over shuffled orders, which
evaluations use, agree with the means of live traffic. The first two are exact; the third uses intervals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controllers import ControllerError, Limits, State, Stop, run_episode
from controllers.loading import Spec
from controllers.sandbox.deadline import Clock
from discovery.answers import Judge, Labels, are_same_redacted, canonical, is_redacted
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
from discovery.evaluation.evaluate import unselected_sources
from discovery.evaluation.paired_statistics import bootstrap_bounds, wilson_interval
from discovery.evaluation.replay import ReplayEnvironment, branch_order
from discovery.evaluation.scores import BLOCK, BOTH_SIDES, RESAMPLES, SEED
from discovery.store import ServedEpisode, Store
from discovery.store.records import is_surer

SERVED: Final = frozenset({Stop.ANSWERED, Stop.MAX_TOKENS})
"""Stop reasons of the episodes that are compared.

Episodes that ended by a deadline are left out: it cuts mainly costly ones, and replay has no deadline.
"""


class KnownAnswer(NamedTuple):
    """A reference answer and its source."""

    answer: str
    source: LabelSource


@dataclass(frozen=True)
class ServedRecords:
    """Served requests of a store, with their recordings and reference answers."""

    episodes: Sequence[ServedEpisode]
    recordings: Mapping[str, RecordedQuestion]  # complete live recordings, by request
    references: Mapping[str, KnownAnswer]  # by question: the surest answer of each
    judged_wrong: Set[str] = frozenset()  # requests whose latest feedback says that the answer is wrong


async def load_records(store: Store) -> ServedRecords:
    """Load everything that is compared. Raises StoreError."""
    references: dict[str, KnownAnswer] = {}
    for label in await store.labels():
        known = references.get(label.question)
        if known is None or is_surer(label.source, known.source):
            references[label.question] = KnownAnswer(label.answer, label.source)
    recordings: dict[str, RecordedQuestion] = {}
    for summary in await store.summaries():
        for recorded in await store.load(summary.cell):
            if recorded.reference is not None:  # the surest of its own and the labels
                references[recorded.question] = KnownAnswer(recorded.reference, recorded.label_source)
            if recorded.origin is Origin.LIVE and recorded.request and recorded.complete:
                recordings.setdefault(recorded.request, recorded)
    latest = {feedback.request_id: feedback for feedback in await store.feedback()}
    judged_wrong = {request for request, feedback in latest.items() if feedback.rating < 0}
    return ServedRecords(await store.episodes(), recordings, references, judged_wrong)


def check_parity(served: ServedRecords, given: Sequence[Spec] = (), shuffles: int = 20) -> ParityReport:
    """Compare served episodes with the decisions of their controllers now, and with replays in `shuffles` orders.

    `given` are controllers from files.

    Raises TraceError, ControllerError if a file does not load, and SandboxUnavailable.
    """
    controllers = find_controllers(served.episodes, given)
    decisions = replay_decisions(served.episodes, controllers)
    with Judge(clock=Clock.CPU) as judge:
        truth = _Truth(served.references, judge)
        pairs = [
            pair for episode in served.episodes if (pair := _pair(episode, served, controllers, truth)) is not None
        ]
        groups = list(_groups(served, pairs, truth, shuffles))
    sampled = (episode.request_id for episode in served.episodes if episode.about.get("sampled"))
    unrecorded = sum(request not in served.recordings for request in sampled)
    return ParityReport(decisions, _reproduced(pairs), groups, unrecorded)


class _Pair(NamedTuple):
    """A served episode and its recording."""

    episode: ServedEpisode
    spec: Spec
    limits: Limits  # live
    recording: Recording  # answers are compared as strings: live recorded one spelling for each distinct answer
    right: frozenset[str] | None  # the recorded answers that are right; None if no reference is known

    @property
    def replay_limits(self) -> Limits:
        """The live limits, with at most as many branches as were recorded."""
        return replace(self.limits, max_branches=min(self.limits.max_branches, self.recording.branches))


def _pair(episode: ServedEpisode, served: ServedRecords, controllers: KnownControllers, truth: _Truth) -> _Pair | None:
    """Return an episode with its recording.

    None if it was not recorded, its controller is unknown, or it does not measure its controller.
    """
    recorded, spec = served.recordings.get(episode.request_id), controllers.known.get(controller_key(episode))
    if recorded is None or spec is None or "limits" not in episode.about or _left_out(episode) is not None:
        return None
    recording = intern_answers(recorded)
    return _Pair(episode, spec, limits_of(episode), recording, truth.right_among(recorded.question, recording.answers))


def _left_out(episode: ServedEpisode) -> str | None:
    """Return why an episode does not measure its controller; None if it does."""
    if episode.about.get("fallback") is not None:
        return "baseline decided"
    if "escalated_at" in episode.about:
        return "continued at a larger β"
    if (refused := episode.about.get("refused")) is not None:  # replay has no such end
        return refused.replace("_", " ")
    if episode.stop not in SERVED:
        return episode.stop
    return None if "spent" in episode.about else "tokens unknown"


class _Truth:
    """Reference answers. Compares answers as the proxy does, and redacted ones by their hashes."""

    def __init__(self, references: Mapping[str, KnownAnswer], judge: Judge) -> None:
        self._references = references
        self._judge = judge
        self._same: dict[tuple[str, str], bool] = {}

    def source(self, question: str | None) -> LabelSource | None:
        """Return how the right answer to a question is known, or None."""
        known = self._references.get(question or "")
        return None if known is None else known.source

    def is_right(self, question: str | None, answer: str | None) -> bool:
        """Return whether `answer` is known to be right."""
        known = self._references.get(question or "")
        if known is None or answer is None:
            return False
        both = answer, known.answer
        if both not in self._same:
            self._same[both] = self._compare(*both)
        return self._same[both]

    def right_among(self, question: str, answers: Iterable[str]) -> frozenset[str] | None:
        """Return those of `answers` that are right; None if no reference is known."""
        if self.source(question) is None:
            return None
        return frozenset(answer for answer in answers if self.is_right(question, answer))

    def _compare(self, answer: str, other: str) -> bool:
        if is_redacted(answer) or is_redacted(other):
            return are_same_redacted(answer, other)
        form, other_form = canonical(answer), canonical(other)
        if form is None or other_form is None:
            return answer.strip() == other.strip()
        labels = Labels(self._judge)
        return labels.label_of(form, answer) == labels.label_of(other_form, other)


class _Replayed(NamedTuple):
    """The result of a replay."""

    tokens: int
    answer: str | None
    width: int  # branches opened


def _replay(pair: _Pair, order: Sequence[int], limits: Limits) -> EpisodeRun[_Replayed]:
    return partial(_run, pair, order, limits)


async def _run(pair: _Pair, order: Sequence[int], limits: Limits, decider: Decider) -> _Replayed:
    recording = pair.recording
    environment, state = ReplayEnvironment(recording, order, signals=pair.spec.signals), State(limits)
    try:
        await run_episode(decider, environment, state)
    except ControllerError:
        state.end(Stop.CONTROLLER_ERROR)
    except BranchCensored:  # it opens more branches than were recorded, which it did not do live
        state.end(Stop.UPSTREAM_ERROR)
    answer = None if state.answer is None else recording.answers[environment.revealed[state.answer]]
    return _Replayed(state.spent, answer, state.width)


def _reproduced(pairs: Iterable[_Pair]) -> ReproductionReport:
    """Replay recorded episodes that their controllers ended, in their own order and under their own limits."""
    ended = [pair for pair in pairs if pair.episode.stop == Stop.ANSWERED]
    differing: list[ReplayDifference] = []
    for pair in ended:
        episode, order = pair.episode, range(pair.recording.branches)
        (replayed,) = run_under_controller(pair.spec, episode.beta, pair.limits, [_replay(pair, order, pair.limits)])
        spent = episode.about.get("spent")
        answer = episode.recorded_answer
        if (replayed.tokens, replayed.answer) != (spent, answer):
            differing.append(ReplayDifference(episode.request_id, spent, replayed.tokens, answer, replayed.answer))
    return ReproductionReport(len(ended), differing)


_GroupKey = tuple[ControllerKey, float, str]


def _group_key(episode: ServedEpisode) -> _GroupKey:
    return controller_key(episode), episode.beta, episode.model


def _groups(served: ServedRecords, pairs: Sequence[_Pair], truth: _Truth, shuffles: int) -> Iterable[ParityGroup]:
    """Yield a group for each controller, β and model with recordings."""
    for key in sorted({_group_key(pair.episode) for pair in pairs}):
        of_group = replace(served, episodes=[episode for episode in served.episodes if _group_key(episode) == key])
        yield _group(of_group, [pair for pair in pairs if _group_key(pair.episode) == key], truth, shuffles)


def _group(served: ServedRecords, pairs: Sequence[_Pair], truth: _Truth, shuffles: int) -> ParityGroup:
    live = [episode for episode in served.episodes if _left_out(episode) is None]
    spec, beta = pairs[0].spec, pairs[0].episode.beta
    orders = [(pair, branch_order(pair.recording, seed)) for pair in pairs for seed in range(shuffles)]
    widest = Limits(1, max(pair.replay_limits.max_branches for pair in pairs))
    replays = run_under_controller(
        spec, beta, widest, [_replay(pair, order, pair.replay_limits) for pair, order in orders]
    )
    by_pair = [replays[at : at + shuffles] for at in range(0, len(replays), shuffles)]
    tokens = _compared(
        [(_question(episode), episode.about["spent"]) for episode in live],
        [
            _Row(_question(pair.episode), pair.episode.about["spent"], [replay.tokens for replay in played])
            for pair, played in zip(pairs, by_pair, strict=True)
        ],
    )
    unanswered = [
        episode
        for episode in live
        if episode.request_id in served.judged_wrong and episode.question and truth.source(episode.question) is None
    ]
    sources = unselected_sources(len(unanswered))
    known = [episode for episode in live if truth.source(episode.question) in sources]
    rows = [
        _Row(
            _question(pair.episode),
            100 * truth.is_right(pair.recording.question, pair.episode.recorded_answer),
            [100 * (replay.answer in pair.right) for replay in played],
        )
        for pair, played in zip(pairs, by_pair, strict=True)
        if pair.right is not None and truth.source(pair.recording.question) in sources
    ]
    right = [(_question(episode), 100 * truth.is_right(episode.question, episode.recorded_answer)) for episode in known]
    exhausted = [
        replay.width == pair.recording.branches < pair.limits.max_branches
        for pair, played in zip(pairs, by_pair, strict=True)
        for replay in played
    ]
    return ParityGroup(
        controller=spec.name,
        digest=spec.digest,
        beta=beta,
        model=pairs[0].episode.model,
        episodes=len(live),
        recorded=len(pairs),
        stops=_counted(episode.stop for episode in live),
        left_out=_counted(why for episode in served.episodes if (why := _left_out(episode)) is not None),
        judged_wrong=len(unanswered),
        labels=_counted(str(truth.source(episode.question)) for episode in known),
        finalise=_average(episode.ledger.get("finalise", 0) for episode in live),
        aborted=_average(episode.ledger.get("aborted", 0) for episode in live),
        exhausted=_average(exhausted),
        tokens=tokens,
        accuracy=_compared(right, rows, percent=True) if rows else None,
    )


def _question(episode: ServedEpisode) -> str:
    """Return the unit of resampling: the question, or the request if its question was not kept."""
    return episode.question or episode.request_id


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _average(values: Iterable[float]) -> float:
    every = list(values)
    return sum(every) / len(every)


class _Row(NamedTuple):
    """One figure of a recorded request, live and replayed."""

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
    """Return the mean over questions and its interval, bootstrapped over questions.

    Percentages that are all equal have no spread to bootstrap; they get Wilson's interval for right or wrong answers.
    """
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
    """Return the mean of live less replayed, every question counting the same, with the interval expected by chance.

    If replay agrees with live, the live order is as good as any shuffled one. For the interval, every request therefore
    gets a random one of its orders as the live one. This is valid even for few questions and if nearly all answers are
    right.
    """
    count = Counter(row.question for row in rows)
    weights = np.array([1 / (len(count) * count[row.question]) for row in rows])
    values = np.array([[row.live, *row.replayed] for row in rows], np.float64)
    others = (values.sum(axis=1, keepdims=True) - values) / (values.shape[1] - 1)
    deviations = weights[:, None] * (values - others)  # of each order from the mean of the others: (requests, orders)
    mean = float(deviations[:, 0].sum())
    if len(count) < 2:
        return MeanInterval(mean, None, None, len(count))
    generator = np.random.default_rng(SEED)
    requests = np.arange(len(rows))
    sums: list[NDArray[np.float64]] = []
    for _ in range(RESAMPLES // BLOCK):
        drawn = generator.integers(0, values.shape[1], (BLOCK, len(rows)))
        sums.append(deviations[requests, drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(sums), [BOTH_SIDES, 100 - BOTH_SIDES])
    return MeanInterval(mean, mean - float(high), mean - float(low), len(count))
