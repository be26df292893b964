"""Verdict of the gate: the judgement of a finalist by the conditions it must meet, and the report on it.

No I/O, no randomness.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from discovery.data.atomic_files import atomic_write, json_object
from discovery.data.recordings import Cell, LabelSource
from discovery.evaluation.afs import mean_curve
from discovery.evaluation.paired_statistics import (
    ONE_SIDED,
    bootstrap_bounds,
    detectable_difference,
    questions_needed,
    sequential_alpha,
    sign_flip_p,
)
from discovery.evaluation.score_set import ControllerScores, ScoreSet, cheapest_at_accuracy
from discovery.evaluation.scores import BOTH_SIDES, SelectedByOutcome
from discovery.promotion.conditions import (
    HELD_OUT,
    Condition,
    GateTerms,
    accuracy_gains,
    afs_gains,
    check_accuracy,
    check_cells,
    check_failures,
    check_held_out,
    check_path,
    check_source,
    check_without_each_model,
    describe_interval,
    describe_tokens,
    finite_or_none,
    pool_questions,
)
from discovery.promotion.question_gains import CurveAxis

NON_INFERIORITY: Final = ONE_SIDED / 100
"""Level of the test that accuracy loses less than the margin."""


class GateVerdict(StrEnum):
    """Outcome of a judgement."""

    PROMOTE = "promote"  # every condition is met
    REJECT = "reject"  # a final condition is not met
    UNDECIDED = "undecided"  # more questions could decide


@dataclass(frozen=True)
class CellReport:
    """Both curves on one cell, and the finalist's gain."""

    model: str
    benchmark: str
    split: str
    questions: int
    delta_afs: float  # points
    low: float | None  # one-sided 95 % bounds; None with a single question
    high: float | None
    finalist: list[dict[str, float]]  # beta, tokens, accuracy in percent, path: p95 in tokens
    champion: list[dict[str, float]]
    judged_wrong: int = 0  # questions that clients judged wrong without a right answer; if any, only references count
    left_out_by_outcome: dict[LabelSource, int] = field(default_factory=dict)  # questions left out for that reason

    @property
    def selected(self) -> SelectedByOutcome:
        """The questions that are left out."""
        return SelectedByOutcome(self.judged_wrong, self.left_out_by_outcome)

    def leaving_out(self, selected: SelectedByOutcome) -> CellReport:
        """Return the report with these questions as those that are left out."""
        return replace(self, judged_wrong=selected.judged_wrong, left_out_by_outcome=dict(selected.left_out))


@dataclass(frozen=True)
class Headlines:
    """Figures for people; no condition depends on them."""

    beta: float
    savings: float | None  # percent fewer tokens than the champion at β, at the champion's accuracy there
    savings_cells: int  # cells in which the finalist reaches that accuracy
    accuracy: float  # points gained at the champion's tokens at β
    same_cost_beta: float | None = None  # β at which the finalist spends the champion's tokens at β; None if at none


def describe_savings(percent: float) -> str:
    """Return in words how many tokens are saved; a negative percentage is an additional cost."""
    return f"{abs(percent):.0f} % {'fewer' if percent >= 0 else 'more'} tokens at the champion's accuracy"


@dataclass(frozen=True)
class SequenceReport:
    """State of a sequential judgement, which goes on as questions are added."""

    id: str  # of its finalist, champion, models, benchmark and settings
    look: int  # number of this look, from 1
    branches: int  # recorded branches that a question needs to be included
    axes: dict[str, list[CurveAxis]]  # curves of finalist and champion by model, at which questions are valued
    axis_questions: list[str]  # shortened ids of the questions that gave the curves
    gains: dict[str, tuple[float, float]]  # points of AFS, and of accuracy at equal tokens, by shortened question id
    e_value: float  # evidence that the gain is above 0
    accuracy_e_value: float  # evidence that accuracy loses less than the margin
    waiting: int  # questions that have fewer branches
    excluded: int  # questions that another judgement at this level has used


@dataclass(frozen=True)
class GateReport:
    """Everything a verdict is based on."""

    digest: str
    name: str
    champion: str
    champion_digest: str
    verdict: GateVerdict
    alpha: float  # spent on this judgement
    k: int  # position among the judgements on these questions, from 1
    p: float
    delta_afs: float  # points
    interval: tuple[float, float] | None  # 95 %, over questions
    mde: float | None  # ΔAFS detected with 80 % power; None if none is
    questions: int
    conditions: list[Condition]
    cells: list[CellReport]
    headlines: Headlines
    split: str  # fingerprint
    created: str
    who: str
    answers: str = ""  # how answers are compared; empty if unknown
    model: str = ""  # the one model that it was judged for, on that model's cells only; empty: all models
    probe_tokens: int | None = None  # tokens charged per probe; None: as recorded
    gains: list[float] | None = None  # points of AFS of each question, from which p follows; None in a sequence
    more: int | None = None  # further questions that would likely decide, if undecided; None if unknown
    sequence: SequenceReport | None = None  # of a sequential judgement
    models_left_out: list[str] = field(default_factory=list)  # recorded on its split, but not chosen
    benchmarks_left_out: list[str] = field(default_factory=list)  # of the judged models

    def with_conditions(self, conditions: list[Condition]) -> GateReport:
        """Return the report with these conditions and the verdict that follows from them."""
        return replace(self, conditions=conditions, verdict=_verdict(conditions))

    def narrowed(self, condition: Condition) -> GateReport:
        """Return the report with a condition that is not met in place of the one of that name; else the report."""
        if condition.held:
            return self
        others = [one for one in self.conditions if one.name != condition.name]
        return replace(self.with_conditions([condition, *others]), more=None)

    @property
    def can_grow(self) -> bool:
        """Whether more questions like these could decide."""
        return self.verdict is GateVerdict.UNDECIDED and self.is_held_out

    @property
    def is_held_out(self) -> bool:
        """Whether no search has seen its questions, as far as known."""
        return all(one.held for one in self.conditions if one.name == HELD_OUT)

    @property
    def failed(self) -> list[Condition]:
        """The conditions that are not met."""
        return [one for one in self.conditions if not one.held]

    @property
    def headline(self) -> str:
        """The result in one line."""
        saved = self.headlines.savings
        savings = "" if saved is None else f", {describe_savings(saved)}"
        scope = f" on model {self.model}" if self.model else ""
        return f"{self.delta_afs:+.2f} points of AFS against {self.champion}{scope}{savings}"

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON, as it is written and kept in the ledger."""
        return {"headline": self.headline, **_REPORT.dump_python(self, mode="json")}

    def write(self, path: Path) -> None:
        """Write the report as JSON. Raises FileWriteError."""
        with atomic_write(path) as file:
            file.write((json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n").encode())


_REPORT: Final = TypeAdapter(GateReport)
REPORT_FILE: Final = json_object("a report of the gate", "verdict", "delta_afs", "conditions")


def report_of(data: Mapping[str, Any]) -> GateReport:
    """Parse a report from JSON. Raises ValueError if it is not valid."""
    return _REPORT.validate_python(data)


class JudgementContext(NamedTuple):
    """Facts about a judgement that do not follow from the scores."""

    k: int
    advice: Sequence[str]  # findings of the static check on the finalist's source
    split: str  # fingerprint
    created: str
    who: str
    model: str = ""  # the one model that it is judged for; empty: all models
    searched: int | None = None  # questions that the search for the finalist has seen; None if unknown


def judge(measured: ScoreSet, terms: GateTerms, about: JudgementContext) -> GateReport:
    """Judge the first side of `measured` against the second."""
    by_cell = afs_gains(measured)
    gains = pool_questions(by_cell, measured)
    accuracy = pool_questions(accuracy_gains(measured, terms.beta), measured)
    level = sequential_alpha(about.k, terms.alpha)
    p = sign_flip_p(gains, level)
    low, high = bootstrap_bounds(gains, BOTH_SIDES)
    text = f"p = {p:.4g}, {level:.4g} allowed: finalist {about.k}"
    if 0.5**gains.size > level:
        needed = math.ceil(-math.log2(level))
        text += f"; {gains.size} questions cannot give less than {0.5**gains.size:.4g}: at least {needed} are needed"
    conditions = [
        *first_conditions(measured, gains, describe_interval(low, high), about),
        Condition("significant", p <= level, False, p, level, text),
        check_accuracy(accuracy, describe_tokens(measured, terms.beta), terms),
        check_cells(by_cell, terms),
        check_path(measured, terms),
        check_without_each_model(by_cell, measured),
    ]
    report = make_report(measured, terms, about, by_cell, conditions)
    return replace(
        report,
        p=p,
        interval=(low, high) if math.isfinite(low) else None,
        mde=detectable_difference(gains, level),
        gains=gains.tolist(),
        more=_more_questions(gains, accuracy, terms, about.k) if report.can_grow else None,
    )


def first_conditions(
    measured: ScoreSet, gains: NDArray[np.float64], interval: str, about: JudgementContext
) -> list[Condition]:
    """Return the conditions on the questions, the source, the failures, and the sign of the gain."""
    delta = float(gains.mean())
    better = Condition("better", delta > 0, True, delta, 0.0, f"ΔAFS {delta:+.2f} points, {interval}")
    unseen = check_held_out(measured.baselines, about.searched)
    return [unseen, check_source(about.advice), check_failures(measured.sides[0]), better]


def make_report(
    measured: ScoreSet,
    terms: GateTerms,
    about: JudgementContext,
    gains: Mapping[Cell, NDArray[np.float64]],
    conditions: list[Condition],
) -> GateReport:
    """Return the report with the verdict that follows from the conditions, without p-value and interval."""
    finalist, champion = measured.sides
    pooled = pool_questions(gains, measured)
    return GateReport(
        digest=finalist.spec.digest,
        name=finalist.spec.name,
        champion=champion.spec.name,
        champion_digest=champion.spec.digest,
        verdict=_verdict(conditions),
        alpha=sequential_alpha(about.k, terms.alpha),
        k=about.k,
        p=1.0,
        delta_afs=float(pooled.mean()),
        interval=None,
        mde=None,
        questions=pooled.size,
        conditions=conditions,
        cells=[_cell(cell, gain, finalist, champion) for cell, gain in gains.items()],
        headlines=_headlines(finalist, champion, terms.beta),
        split=about.split,
        created=about.created,
        who=about.who,
        answers=measured.answers,
        model=about.model,
    )


def _verdict(conditions: Sequence[Condition]) -> GateVerdict:
    failed = [condition for condition in conditions if not condition.held]
    if not failed:
        return GateVerdict.PROMOTE
    return GateVerdict.REJECT if any(condition.final for condition in failed) else GateVerdict.UNDECIDED


def _more_questions(gains: NDArray[np.float64], accuracy: NDArray[np.float64], terms: GateTerms, k: int) -> int | None:
    """Return how many more questions would decide with probability `terms.power` if the observed effects are real.

    A judgement on more questions is the next one on these questions, so its level is lower. None if the observed
    effects are too small, or if they are not what is missing.
    """
    needed = [
        questions_needed(float(gains.mean()), _spread(gains), sequential_alpha(k + 1, terms.alpha), terms.power),
        questions_needed(float(accuracy.mean()) + terms.margin, _spread(accuracy), NON_INFERIORITY, terms.power),
    ]
    known = [count for count in needed if count is not None]
    return max(known) - gains.size if len(known) == len(needed) and max(known) > gains.size else None


def _spread(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) if values.size > 1 else math.inf


# Figures


def _cell(cell: Cell, gain: NDArray[np.float64], finalist: ControllerScores, champion: ControllerScores) -> CellReport:
    low, high = bootstrap_bounds(gain)
    graded = finalist.at(cell)[0].grading
    report = CellReport(
        model=cell.model,
        benchmark=cell.benchmark,
        split=cell.split,
        questions=gain.size,
        delta_afs=float(gain.mean()),
        low=finite_or_none(low),
        high=finite_or_none(high),
        finalist=list(_points(finalist, cell)),
        champion=list(_points(champion, cell)),
    )
    return report if graded is None else report.leaving_out(graded.selected)


def _points(side: ControllerScores, cell: Cell) -> Iterator[dict[str, float]]:
    for point in side.curves[cell].points:
        yield point._asdict()


def _headlines(finalist: ControllerScores, champion: ControllerScores, beta: float) -> Headlines:
    saved, gained = [], []
    for cell, curve in finalist.curves.items():
        (theirs,) = (point for point in champion.curves[cell].points if point.beta == beta)
        tokens = cheapest_at_accuracy([(one.tokens, one.accuracy) for one in curve.points], theirs.accuracy)
        if tokens is not None and theirs.tokens:
            saved.append(100 * (1 - tokens / theirs.tokens))
        gained.append(curve.accuracy_at(theirs.tokens) - theirs.accuracy)
    return Headlines(
        beta,
        float(np.mean(saved)) if saved else None,
        len(saved),
        float(np.mean(gained)),
        _same_cost_beta(finalist, champion, beta),
    )


def _same_cost_beta(finalist: ControllerScores, champion: ControllerScores, beta: float) -> float | None:
    """Return the smallest β at which the finalist spends the champion's mean tokens at `beta`; None if at none."""
    own, theirs = (mean_curve([*side.curves.values()]) for side in (finalist, champion))
    (wanted,) = (tokens for at, tokens, _ in theirs if at == beta)
    for (start, low, _), (end, high, _) in pairwise(own):
        if min(low, high) <= wanted <= max(low, high):
            return start if low == high else start + (end - start) * (wanted - low) / (high - low)
    return None


def card_of(report: GateReport, lineage: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """Return the card that goes with a controller's file: its identity, data, results and lineage.

    `lineage` holds digests, oldest first. `more` are further entries, such as the run that found the controller.
    """
    content = report.as_json()
    judgement = ("verdict", "champion", "champion_digest", "alpha", "k", "p", "delta_afs", "interval", "created", "who")
    cells = [{key: cell[key] for key in ("model", "benchmark", "split", "questions")} for cell in content["cells"]]
    return {
        "name": report.name,
        "digest": report.digest,
        "lineage": list(lineage),
        "data": {"fingerprint": report.split, "questions": report.questions, "cells": cells},
        "curve": {f"{cell.model} {cell.benchmark}": cell.finalist for cell in report.cells},
        "gate": {key: content[key] for key in judgement},
        "headlines": content["headlines"],
        **more,
    }
