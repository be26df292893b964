"""Sequential gate: judge a finalist again whenever questions have been added, until the test decides.

All looks of one sequence together spend one level of the ledger, because the test is valid at any time
(`betting_test`). A question enters the test once, in the order of its hash, with a value that stays as it was computed:
its gain on curves that were fixed before. These are measured on questions of the search and validation splits, or on
the first questions of the sealed split, which are left out of the test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from statistics import median_low
from typing import Final

import numpy as np
from numpy.typing import NDArray

from discovery.data.recordings import Cell, RecordedQuestion, Split
from discovery.errors import GateError, RecordingsNotFound
from discovery.evaluation.evaluate import read_scorable, scorable_recordings
from discovery.evaluation.score_set import ScoreSet
from discovery.evaluation.sources import RecordingSource
from discovery.promotion.betting_test import bet, confidence_interval, values_missing
from discovery.promotion.comparison import Comparison
from discovery.promotion.conditions import (
    HELD_OUT,
    Condition,
    GateTerms,
    afs_gains,
    at_equal_tokens,
    check_cells,
    check_failures,
    check_held_out,
    check_path,
    check_source,
    check_without_each_model,
    describe_tokens,
)
from discovery.promotion.ledger import Ledger, fingerprint
from discovery.promotion.question_gains import CurveAxis, afs_values, equal_token_gains, question_figures
from discovery.promotion.selected_source import SelectedSource, shorten_id
from discovery.promotion.verdict import (
    NON_INFERIORITY,
    GateReport,
    GateVerdict,
    JudgementContext,
    SequenceReport,
    make_report,
    report_of,
)
from discovery.store import StorePlace

AXIS_QUESTIONS: Final = 10
"""Fewest questions that the curves are measured on."""
MOST_AXIS_QUESTIONS: Final = 40
"""Most questions of the search and validation splits that the curves are measured on."""
POINTS: Final = 100.0
"""Largest difference in accuracy."""
INTERVAL_ERROR: Final = 0.05
"""Error of the reported interval, over all looks together."""

Gains = Mapping[str, tuple[float, float]]
"""Points of AFS, and of accuracy at equal tokens, by shortened question id."""


def run_sequential_gate(
    source: RecordingSource, cells: Sequence[Cell], comparison: Comparison, place: StorePlace
) -> GateReport:
    """Look at a sequential judgement: include the questions that are new, and return the verdict so far.

    A sequence that has ended, or has no new questions, gives the report of its latest look. Raises GateError if the
    finalist cannot be judged, and the errors of `Evaluation.run`; nothing has been spent then.
    """
    comparison.check()
    terms = comparison.terms
    if terms.bound <= 0 or terms.gain <= 0:
        raise GateError(f"gain {terms.gain:g} and bound {terms.bound:g} must both be above 0 points")
    if len({cell.benchmark for cell in cells}) > 1:
        raise GateError("a sequential judgement takes the questions of one benchmark; choose it with --benchmarks")
    look = _Look(comparison, source, cells, Ledger(place))
    report = comparison.describe(look.report(), source, cells)
    return report.narrowed(look.check_unseen(report.sequence))


class _Look:
    """One look of a sequence."""

    def __init__(self, comparison: Comparison, source: RecordingSource, cells: Sequence[Cell], ledger: Ledger) -> None:
        self._comparison = comparison
        self._terms = comparison.terms
        self._source = source
        self._cells = list(cells)
        self._ledger = ledger
        scorable = {cell: read_scorable(source, cell) for cell in cells}
        self._sealed = SelectedSource({cell: recordings for cell, (recordings, _) in scorable.items()})
        self._left_out = {cell: selected for cell, (_, selected) in scorable.items()}
        self._branches_by_id = self._count_branches()
        self._id = self._sequence_id()

    def check_unseen(self, state: SequenceReport | None, before: GateReport | None = None) -> Condition:
        """Check that no search has seen the questions, also those whose recordings have gone since they were tested.

        Without the card of the search, the finding of the look `before` stands.
        """
        tested = {} if state is None else state.gains
        searched = self._comparison.count_searched([*self._branches_by_id, *tested])
        unseen = check_held_out(self._cells, searched)
        if before is None or self._comparison.searched is not None:
            return unseen
        return next((one for one in before.failed if one.name == HELD_OUT), unseen)

    def report(self) -> GateReport:
        """Return the report of this look, or of the latest one if there is nothing new."""
        before = self._latest()
        if before is not None and before.verdict is not GateVerdict.UNDECIDED:
            return before
        k = self._ledger.next_k(sorted(self._branches_by_id)) if before is None else before.k
        taken = self._ledger.questions_at_level(k, self._id)
        state = self._begin(taken) if before is None or before.sequence is None else before.sequence
        self._check_labels(state)
        known = {*state.gains, *state.axis_questions}
        excluded = taken - known
        added = [question for question in self._branches_by_id if question not in known]
        waiting = [question for question in added if self._branches_by_id[question] < state.branches]
        fresh = sorted(set(added) - set(waiting) - excluded)
        if not fresh:
            if before is None:
                raise GateError(
                    f"there are {len(self._branches_by_id)} questions with all {state.branches} branches, of which the "
                    f"first {len(state.axis_questions)} only fix the budgets; collect more questions"
                )
            return before
        every = [question for question in (*state.gains, *fresh) if question in self._branches_by_id]
        measured = self._replay(self._sealed.select(every), every)
        values = _value_questions(measured, state.axes, self._terms.beta)
        state = replace(
            state,
            look=state.look + 1,
            gains={**state.gains, **{question: values[question] for question in fresh}},
            waiting=len(waiting),
            excluded=len(excluded.intersection(added)),
        )
        report = self._judge(measured, state, k, self.check_unseen(state, before))
        return self._record(report, before, fresh) or self.report()

    def _check_labels(self, state: SequenceReport) -> None:
        """Raise GateError if questions of earlier looks were chosen by their outcome, as feedback since then shows."""
        chosen = {
            question
            for cell, selected in self._left_out.items()
            if selected.left_out
            for item in self._source.load(cell)
            if item.label_source in selected.left_out
            and (question := shorten_id(item.question)) in state.gains
            and question not in self._branches_by_id
        }
        if chosen:
            raise GateError(
                f"{len(chosen)} tested questions are labelled by feedback and no longer count, because clients judged "
                "others wrong whose right answer is unknown. Send the right answers of these as feedback "
                '("answer"), or give references to `autotts label`; nothing was spent'
            )

    def _count_branches(self) -> dict[str, int]:
        """Return the fewest branches that any cell recorded of each question that is in all cells, by shortened id."""
        counts = [
            {shorten_id(item.question): len(item.branches) for item in items}
            for items in self._sealed.recordings.values()
        ]
        return {
            question: min(count[question] for count in counts)
            for question in counts[0]
            if all(question in count for count in counts)
        }

    def _sequence_id(self) -> str:
        """Return the id of the sequence; other settings or controllers are another sequence."""
        about = self._comparison
        parts: list[object] = [
            about.finalist.digest,
            about.champion.digest,
            sorted((cell.model, cell.benchmark, cell.split) for cell in self._cells),
            sorted(set(about.betas)),
            about.shuffles,
            about.rules.max_branches,
            about.answers,
            asdict(self._terms),
            about.model,
        ]
        if about.rules.probe_tokens is not None:
            parts.append(about.rules.probe_tokens)
        return sha256(json.dumps(parts).encode()).hexdigest()

    def _latest(self) -> GateReport | None:
        judgement = self._ledger.latest_look(self._id)
        try:
            return None if judgement is None else report_of(judgement.report)
        except ValueError as error:
            name = self._comparison.finalist.name
            raise GateError(f"the ledger's report on {name} is not valid: {error}") from None

    def _begin(self, taken: set[str]) -> SequenceReport:
        """Return the state of a new sequence: the curves at which questions are valued, and no values yet.

        Other judgements have `taken` questions at the level of the sequence.
        """
        if not self._branches_by_id:
            raise GateError("no question was recorded with every model; collect the same questions with all of them")
        branches = median_low(self._branches_by_id.values())
        usable = {question for question, count in self._branches_by_id.items() if count >= branches}
        usable -= taken
        others, axis_questions = self._other_splits(branches), list[str]()
        if others is None:
            axis_questions = sorted(usable)[:AXIS_QUESTIONS]
            others = self._sealed.select(axis_questions)
            if len(axis_questions) < AXIS_QUESTIONS:
                raise GateError(
                    f"{len(axis_questions)} questions are too few to fix the budgets; it takes {AXIS_QUESTIONS} of the "
                    "search and validation splits, or as many held-out questions, which are then not tested"
                )
        measured = self._replay(others, axis_questions)
        axes = {cell.model: [side.axis for side in question_figures(measured, cell)] for cell in self._cells}
        return SequenceReport(self._id, 0, branches, axes, axis_questions, {}, 1.0, 1.0, 0, 0)

    def _other_splits(self, branches: int) -> SelectedSource | None:
        """Return questions of the other splits, under the names of the sealed cells; None if a cell has too few."""
        available = self._source.cells()
        recordings: dict[Cell, list[RecordedQuestion]] = {}
        for cell in self._cells:
            others = [cell._replace(split=split) for split in Split if split is not cell.split]
            items = [
                item
                for other in others
                if other in available and other.split is not Split.HELD_OUT
                for item in _scorable_if_any(self._source, other)
                if len(item.branches) >= branches and item.question[:16] not in self._branches_by_id
            ]
            items.sort(key=lambda item: item.question)
            recordings[cell] = [replace(item, split=cell.split) for item in items[:MOST_AXIS_QUESTIONS]]
        return SelectedSource(recordings) if min(map(len, recordings.values())) >= AXIS_QUESTIONS else None

    def _replay(self, selected: SelectedSource, questions: Sequence[str]) -> ScoreSet:
        return self._comparison.judged_replay(selected, self._cells, self._ledger, questions)

    def _judge(self, measured: ScoreSet, state: SequenceReport, k: int, unseen: Condition) -> GateReport:
        """Return the report on all questions so far."""
        terms = self._terms
        gains, accuracy = np.array(list(state.gains.values())).T
        split = fingerprint([*state.gains, *state.axis_questions], (cell.model for cell in self._cells))
        about = self._comparison
        context = JudgementContext(k, about.advice, split, about.now, about.who, about.model)
        by_cell = afs_gains(measured)
        interval = confidence_interval(gains, terms.bound, INTERVAL_ERROR)
        report = make_report(measured, terms, context, by_cell, [])
        evidence = bet(gains, terms.bound)
        accuracy_evidence = bet(accuracy + terms.margin, POINTS)
        conditions = [
            unseen,
            check_source(about.advice),
            check_failures(measured.sides[0]),
            _check_better(gains, interval),
            _check_worthwhile(gains, terms),
            _check_significant(gains, terms, report.alpha, k),
            _check_accuracy(accuracy, describe_tokens(measured, terms.beta), terms),
        ]
        has_passed_tests = all(condition.held for condition in conditions)
        for condition in (check_cells(by_cell, terms), check_path(measured, terms)):
            # checked at each look, so that they are only final when the tests have decided
            conditions.append(condition if has_passed_tests else replace(condition, final=False))
        conditions.append(check_without_each_model(by_cell, measured))
        report = replace(
            report.with_conditions(conditions),
            p=evidence.p,
            delta_afs=float(gains.mean()),
            interval=interval,
            questions=gains.size,
            cells=[one.leaving_out(self._left_out[cell]) for cell, one in zip(by_cell, report.cells, strict=True)],
            probe_tokens=about.rules.probe_tokens,
            sequence=replace(state, e_value=evidence.e_value, accuracy_e_value=accuracy_evidence.e_value),
        )
        report = about.describe(report, self._source, self._cells)
        if not report.can_grow:
            return report
        return replace(report, more=_questions_missing(gains, accuracy, terms, report.alpha))

    def _record(self, report: GateReport, before: GateReport | None, fresh: Sequence[str]) -> GateReport | None:
        """Append the look to the ledger, unless another process has added one meanwhile; return the latest report.

        If another judgement has meanwhile spent the level of this look on its questions, nothing is added, and None is
        returned.
        """
        with self._ledger.locked():
            latest = self._latest()
            if latest is not None and (before is None or latest != before):
                return latest
            if before is None and self._ledger.next_k(sorted(self._branches_by_id)) != report.k:
                return None
            if not self._ledger.questions_at_level(report.k, self._id).isdisjoint(fresh):
                return None
            state = report.sequence
            questions = [] if state is None else [*state.gains, *state.axis_questions]
            self._comparison.record(self._ledger, report, questions, self._id)
        return report


def _scorable_if_any(source: RecordingSource, cell: Cell) -> list[RecordedQuestion]:
    """Return the scorable recordings of a cell of another split; empty if nothing of it can be scored."""
    try:
        return scorable_recordings(source, cell)
    except RecordingsNotFound:
        return []


def _value_questions(measured: ScoreSet, axes: Mapping[str, Sequence[CurveAxis]], beta: float) -> Gains:
    """Return the gains of each question on fixed curves, means over the models."""
    sums: dict[str, NDArray[np.float64]] = {}
    for cell, baseline in measured.baselines.items():
        finalist, champion = question_figures(measured, cell)
        own, other = axes[cell.model]
        afs = afs_values(finalist, own) - afs_values(champion, other)
        accuracy = equal_token_gains(finalist, champion, beta, (own, other))
        for question, values in zip(baseline.questions, np.array([afs, accuracy]).T, strict=True):
            sums[shorten_id(question)] = sums.get(shorten_id(question), 0) + values / len(measured.baselines)
    return {question: (float(values[0]), float(values[1])) for question, values in sums.items()}


def _check_better(gains: NDArray[np.float64], interval: tuple[float, float]) -> Condition:
    delta = float(gains.mean())
    text = f"ΔAFS {delta:+.2f} points, 95 % in [{interval[0]:+.2f}, {interval[1]:+.2f}] at all looks together"
    return Condition("better", delta > 0, False, delta, 0.0, text)


def _check_worthwhile(gains: NDArray[np.float64], terms: GateTerms) -> Condition:
    """Check that a gain of `terms.gain` is still possible; if it is not, going on is futile."""
    against, limit = bet(terms.gain - gains, terms.bound).highest, 1 / terms.futility
    text = f"evidence against a gain of {terms.gain:g} points: e = {against:.3g}, futile from {limit:.3g}"
    return Condition("worthwhile", against < limit, True, against, limit, text)


def _check_significant(gains: NDArray[np.float64], terms: GateTerms, level: float, k: int) -> Condition:
    evidence = bet(gains, terms.bound)
    text = f"e = {evidence.highest:.3g} at most so far, {1 / level:.3g} needed: finalist {k}"
    return Condition("significant", evidence.p <= level, False, evidence.p, level, text)


def _check_accuracy(accuracy: NDArray[np.float64], tokens: str, terms: GateTerms) -> Condition:
    """Check non-inferiority at equal tokens; final only if accuracy is significantly below the champion's."""
    evidence, limit = bet(accuracy + terms.margin, POINTS).highest, 1 / NON_INFERIORITY
    is_worse = bet(-accuracy, POINTS).highest >= limit
    text = f"{accuracy.mean():+.2f} points {at_equal_tokens(terms)}, e = {evidence:.3g}, {limit:.3g} needed; {tokens}"
    return Condition("accuracy", evidence >= limit, is_worse, float(accuracy.mean()), -terms.margin, text)


def _questions_missing(
    gains: NDArray[np.float64], accuracy: NDArray[np.float64], terms: GateTerms, level: float
) -> int | None:
    """Return after how many more questions the sequence is likely to end, if they are like those so far."""
    promoting = (
        values_missing(gains, terms.bound, level),
        values_missing(accuracy + terms.margin, POINTS, NON_INFERIORITY),
    )
    counts = [values_missing(terms.gain - gains, terms.bound, terms.futility)]
    if None not in promoting:
        counts.append(max(count for count in promoting if count is not None))
    return min((count for count in counts if count), default=None)
