"""Plan of a judgement: how many questions, with how many branches each, a wanted gain needs.

The variance of a question's paired gain has three parts, which are measured on recordings of the search and validation
splits by replaying two disjoint halves of each question's branches:

    variance(branches, orders) = between questions + within / branches + by order / orders

More branches per question reduce only the second part, more orders only the third, and more questions all. Held-out
questions are not opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean, median_low
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from discovery.data.atomic_files import atomic_write, json_object
from discovery.data.recordings import Cell, RecordedQuestion, Split
from discovery.errors import GateError
from discovery.evaluation.evaluate import each_scorable, scorable_recordings
from discovery.evaluation.paired_statistics import (
    detectable_mean,
    question_values,
    questions_needed,
    sequential_alpha,
)
from discovery.evaluation.score_set import ControllerScores, ScoreSet
from discovery.evaluation.scores import SEED, Score
from discovery.evaluation.sources import RecordingSource
from discovery.promotion.betting_test import log_wealth
from discovery.promotion.comparison import Comparison
from discovery.promotion.conditions import GateTerms, accuracy_gains, afs_gains
from discovery.promotion.ledger import Ledger
from discovery.promotion.selected_source import SelectedSource
from discovery.promotion.verdict import NON_INFERIORITY

ORDERS: Final = 20
"""Default number of branch orders that a plan replays, and that a sequential judgement takes; it is even."""
FEWEST_QUESTIONS: Final = 5
FEWEST_BRANCHES: Final = 4
LIMITED: Final = 0.1
"""A number of branches is recommended if at most this share of the episodes at any β would open all of them."""
QUESTION_COUNTS: Final = (50, 100, 200, 400, 800)
"""Numbers of questions in the table."""
SEQUENCES: Final = 200
"""Sequential judgements that are simulated."""
RESAMPLED_PLANS: Final = 400


class VarianceSplit(NamedTuple):
    """Variance of a question's paired difference, by source."""

    between: float  # of the questions' true differences
    within: float  # by the sampled branches, for a single branch
    by_order: float  # by the order of the branches, for a single order

    def at(self, branches: float, orders: float) -> float:
        """Return the variance with so many branches and orders per question."""
        return self.between + self.within / branches + self.by_order / orders


def split_variance(values: NDArray[np.float64], branches: float, orders: int) -> VarianceSplit:
    """Split the variance of (2 halves of the branches, 2 halves of the orders, questions) values.

    Each value is a mean over `orders` orders of one half's `branches` branches.
    """
    by_order = orders * float(((values[:, 0] - values[:, 1]) ** 2 / 2).mean())
    halves = values.mean(axis=1)
    of_half = float(((halves[0] - halves[1]) ** 2 / 2).mean())
    within = max(0.0, of_half - by_order / (2 * orders)) * branches
    between = max(0.0, float(halves.mean(axis=0).var(ddof=1)) - of_half / 2)
    return VarianceSplit(between, within, by_order)


class PlannedOrders(NamedTuple):
    """Branch orders per question that judgements take. A plan may be measured with fewer."""

    single: int
    sequential: int


class PlanRow(NamedTuple):
    """A number of branches per question, and what it takes with it."""

    branches: int
    limited: float | None  # largest share of a controller's episodes at a β that open all; None: not recorded
    detectable: list[float]  # points of AFS detected with the wanted power, by QUESTION_COUNTS
    questions: int | None  # needed for the wanted gain; None if too many
    tokens: int | None  # to collect these questions


@dataclass(frozen=True)
class PowerPlan:
    """Questions and branches that a judgement of a finalist against a champion needs."""

    finalist: str
    champion: str
    gain: float  # wanted, in points of AFS
    power: float
    k: int  # position of the planned judgement in the ledger
    alpha: float  # its level
    measured_questions: int
    measured_branches: int
    measured_orders: int  # branch orders per question
    orders: PlannedOrders
    max_branches: int  # that an episode may open
    observed_gain: float  # on the search and validation splits; too high if the finalist was chosen on them
    variance: VarianceSplit  # of the gain in AFS
    accuracy_variance: VarianceSplit  # of the gain in accuracy at equal tokens
    tokens_per_branch: float  # probes included, summed over models
    rows: list[PlanRow]
    recommended: PlanRow | None  # the cheapest with enough branches for both controllers
    interval: tuple[int, int] | None  # 90 % interval of the recommended questions, as far as the variance is known
    sequential: int | None  # median questions of a sequential judgement with the recommended branches

    def write(self, path: Path) -> None:
        """Write the plan as JSON. Raises FileWriteError."""
        with atomic_write(path) as file:
            file.write((json.dumps(_named(self), indent=2, ensure_ascii=False) + "\n").encode())


PLAN_FILE: Final = json_object("a plan of the gate", "variance", "observed_gain", "rows")


def _named(plan: PowerPlan) -> dict[str, Any]:
    """Return the plan with its rows as objects."""
    content = {field.name: getattr(plan, field.name) for field in fields(plan)}
    for name in ("variance", "accuracy_variance", "orders", "recommended"):
        content[name] = None if content[name] is None else content[name]._asdict()
    return content | {"rows": [row._asdict() for row in plan.rows], "question_counts": QUESTION_COUNTS}


def make_plan(
    comparison: Comparison,
    source: RecordingSource,
    cells: Sequence[Cell],
    ledger: Ledger | None,
    orders: PlannedOrders | None = None,
) -> PowerPlan:
    """Plan a judgement from the search and validation cells among `cells`. Raises GateError if they are too few.

    It is measured with the comparison's orders, and planned for `orders` (None: the same).
    """
    comparison.check()
    terms = comparison.terms
    if comparison.shuffles < 2 or comparison.shuffles % 2:
        raise GateError(f"a plan needs an even number of branch orders, not {comparison.shuffles}; give --shuffles")
    if terms.gain <= 0 or not 0.5 <= terms.power < 1:
        raise GateError(f"gain {terms.gain:g} must be above 0 points, and power {terms.power:g} from 0.5 to below 1")
    recordings = _unsealed(source, cells)
    branches = median_low([len(item.branches) for items in recordings.values() for item in items])
    if branches < FEWEST_BRANCHES:
        raise GateError(f"{branches} branches per question are too few to split in halves; it takes {FEWEST_BRANCHES}")
    known = [item.question for items in recordings.values() for item in items]
    k = 1 if ledger is None else ledger.next_k_beyond(known)
    measured = comparison.replay(SelectedSource(recordings), list(recordings))
    values = np.array([list(_values_by_order(comparison, half)) for half in _halves(recordings)])
    afs, accuracy = values[:, :, 0], values[:, :, 1]
    of_half = branches / 2
    of_half_orders = comparison.shuffles // 2
    plan = PowerPlan(
        finalist=comparison.finalist.name,
        champion=comparison.champion.name,
        gain=terms.gain,
        power=terms.power,
        k=k,
        alpha=sequential_alpha(k, terms.alpha),
        measured_questions=afs.shape[-1],
        measured_branches=branches,
        measured_orders=comparison.shuffles,
        orders=orders or PlannedOrders(comparison.shuffles, comparison.shuffles),
        max_branches=comparison.rules.max_branches,
        observed_gain=float(_pool(afs_gains(measured), measured).mean()),
        variance=split_variance(afs, of_half, of_half_orders),
        accuracy_variance=split_variance(accuracy, of_half, of_half_orders),
        tokens_per_branch=_tokens_per_branch(recordings),
        rows=[],
        recommended=None,
        interval=None,
        sequential=None,
    )
    largest = min(comparison.rules.max_branches, branches)
    rows = [
        plan_row(plan, terms, count, _limited_share(measured, count, branches, comparison.rules.max_branches))
        for count in _branch_counts(branches, comparison.rules.max_branches)
    ]
    suitable = [
        row
        for row in rows
        if row.tokens is not None and row.limited is not None and (row.limited <= LIMITED or row.branches >= largest)
    ]
    best = min(suitable, key=lambda row: row.tokens or 0, default=None)
    plan = replace(plan, rows=rows, recommended=best)
    if best is None or best.questions is None:
        return plan
    return replace(
        plan,
        interval=_questions_interval(plan, terms, afs, accuracy, best.branches, of_half_orders),
        sequential=_sequential_questions(plan, terms, afs.mean(axis=(0, 1)), best),
    )


def _unsealed(source: RecordingSource, cells: Sequence[Cell]) -> dict[Cell, list[RecordedQuestion]]:
    """Return the scorable recordings of the search and validation splits, merged by model and benchmark.

    Cells of which nothing can be scored are left out, as by the gate.
    """
    recordings: dict[Cell, list[RecordedQuestion]] = {}
    unsealed = [cell for cell in cells if cell.split is not Split.HELD_OUT]
    for cell, scorable in each_scorable(unsealed, lambda cell: scorable_recordings(source, cell)):
        items = [replace(item, split=Split.SEARCH) for item in scorable]
        recordings.setdefault(cell._replace(split=Split.SEARCH), []).extend(items)
    fewest = min(recordings, key=lambda cell: len(recordings[cell]), default=None)
    count = 0 if fewest is None else len(recordings[fewest])
    if count < FEWEST_QUESTIONS:
        where = "" if fewest is None else f" of {fewest.model} {fewest.benchmark}"
        others = "; leave it out with --models or --benchmarks" if len(recordings) > 1 else ""
        raise GateError(
            f"a plan needs recordings of at least {FEWEST_QUESTIONS} questions of the search and validation splits, "
            f"not {count}{where}; held-out questions are not opened for it{others}"
        )
    return recordings


def _halves(recordings: Mapping[Cell, Sequence[RecordedQuestion]]) -> Iterator[SelectedSource]:
    """Yield two sources, each with every other branch of each question."""
    for start in (0, 1):
        halves = {
            cell: [replace(item, branches=list(item.branches)[start::2]) for item in items]
            for cell, items in recordings.items()
        }
        yield SelectedSource(halves)


def _values_by_order(comparison: Comparison, half: SelectedSource) -> Iterator[list[NDArray[np.float64]]]:
    """Yield the questions' gains in AFS, and in accuracy at equal tokens, for each half of the orders."""
    measured = comparison.replay(half, half.cells(), is_warning=False)  # half of the branches are left out here
    for start in (0, 1):
        sides = [replace(side, scores=[_with_orders(score, start) for score in side.scores]) for side in measured.sides]
        chosen = replace(measured, sides=sides)
        gains = afs_gains(chosen), accuracy_gains(chosen, comparison.terms.beta)
        yield [_pool(by_cell, chosen) for by_cell in gains]


def _with_orders(score: Score, start: int) -> Score:
    """Return a score over every other order."""
    return replace(score, outcomes=score.outcomes[:, start::2])


def _pool(values: Mapping[Cell, NDArray[np.float64]], measured: ScoreSet) -> NDArray[np.float64]:
    return question_values(values, {cell: measured.baselines[cell].questions for cell in values})


def _tokens_per_branch(recordings: Mapping[Cell, Sequence[RecordedQuestion]]) -> float:
    """Return the tokens that one branch of a question costs, summed over the models of a benchmark."""
    by_cell = {
        cell: fmean(fmean(branch.tokens + sum(branch.probe_tokens) for branch in item.branches) for item in items)
        for cell, items in recordings.items()
    }
    benchmarks = {cell.benchmark for cell in by_cell}
    return sum(by_cell.values()) / len(benchmarks)


def _branch_counts(branches: int, most: int) -> list[int]:
    """Return the numbers of branches in the table: fractions of the recorded number, and up to its double."""
    counts = {max(FEWEST_BRANCHES, branches // 4), max(FEWEST_BRANCHES, branches // 2), branches, 2 * branches}
    return sorted(counts | {most} if most < 4 * branches else counts)


def _limited_share(measured: ScoreSet, branches: int, recorded: int, most: int) -> float | None:
    """Return the largest share of a controller's episodes at a β that open at least `branches` branches.

    It is None for more branches than were recorded. With the `most` that an episode may open, these would perhaps open
    more.
    """
    if branches > recorded:
        return None
    return max(_share(side, min(branches, most)) for side in measured.sides)


def _share(side: ControllerScores, branches: int) -> float:
    by_beta: dict[float, list[float]] = {}
    for score in side.scores:
        by_beta.setdefault(score.beta, []).append(float((score.column("branches") >= branches).mean()))
    return max(fmean(shares) for shares in by_beta.values())


def plan_row(plan: PowerPlan, terms: GateTerms, branches: int, limited: float | None) -> PlanRow:
    """Return what it takes with so many branches per question, for both tests: of the gain, and of accuracy.

    The finalist is assumed to gain as much accuracy at the deployed β as AFS.
    """
    spread, accuracy_spread = _spreads(plan, branches, plan.orders.single)
    detectable = [
        max(
            detectable_mean(spread, count, plan.alpha, plan.power),
            detectable_mean(accuracy_spread, count, NON_INFERIORITY, plan.power) - terms.margin,
        )
        for count in QUESTION_COUNTS
    ]
    questions = _needed(plan, terms, spread, accuracy_spread)
    tokens = None if questions is None else round(questions * branches * plan.tokens_per_branch)
    return PlanRow(branches, limited, detectable, questions, tokens)


def _spreads(plan: PowerPlan, branches: int, orders: int) -> tuple[float, float]:
    first, second = (part.at(branches, orders) for part in (plan.variance, plan.accuracy_variance))
    return math.sqrt(first), math.sqrt(second)


def _needed(plan: PowerPlan, terms: GateTerms, spread: float, accuracy_spread: float) -> int | None:
    needed = (
        questions_needed(plan.gain, spread, plan.alpha, plan.power),
        questions_needed(plan.gain + terms.margin, accuracy_spread, NON_INFERIORITY, plan.power),
    )
    return None if None in needed else max(count for count in needed if count is not None)


def _questions_interval(
    plan: PowerPlan,
    terms: GateTerms,
    afs: NDArray[np.float64],
    accuracy: NDArray[np.float64],
    branches: int,
    orders: int,
) -> tuple[int, int] | None:
    """Return the 90 % bootstrap interval of the number of questions: the variance is measured on few questions."""
    generator = np.random.default_rng(SEED)
    counts = []
    for _ in range(RESAMPLED_PLANS):
        drawn = generator.integers(0, afs.shape[-1], afs.shape[-1])
        splits = (split_variance(values[:, :, drawn], plan.measured_branches / 2, orders) for values in (afs, accuracy))
        resampled = replace(plan, variance=next(splits), accuracy_variance=next(splits))
        count = _needed(resampled, terms, *_spreads(resampled, branches, plan.orders.single))
        if count is not None:
            counts.append(count)
    if not counts:
        return None
    low, high = np.percentile(counts, [5, 95])
    return round(low), round(high)


def _sequential_questions(plan: PowerPlan, terms: GateTerms, values: NDArray[np.float64], row: PlanRow) -> int | None:
    """Return the median number of questions after which a sequential test finds the gain; None if it takes too many.

    The simulated questions have the measured values, moved to the wanted mean and scaled to the planned spread.
    """
    if row.questions is None or values.std() == 0:
        return None
    spread, _ = _spreads(plan, row.branches, plan.orders.sequential)
    shifted = plan.gain + (values - values.mean()) * spread / values.std()
    length = min(3 * row.questions + 50, 3000)
    drawn = np.random.default_rng(SEED).choice(shifted, (SEQUENCES, length))
    reached = log_wealth(drawn, terms.bound) >= math.log(1 / plan.alpha)
    ends = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, length + 1)
    median = int(np.median(ends))
    return None if median > length else median
