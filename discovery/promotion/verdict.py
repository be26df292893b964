"""Verdict of the gate: the conditions a finalist must meet and the report on them. No I/O, no randomness."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from discovery.data.atomic_files import atomic_write
from discovery.data.recordings import Cell
from discovery.evaluation.paired_statistics import (
    bootstrap_bounds,
    detectable_difference,
    question_values,
    sequential_alpha,
    sign_flip_p,
)
from discovery.evaluation.score_set import ControllerScores, ScoreSet, cheapest_at_accuracy
from discovery.evaluation.scores import BOTH_SIDES


class GateVerdict(StrEnum):
    """Outcome of a judgement."""

    PROMOTE = "promote"  # every condition is met
    REJECT = "reject"  # a final condition is not met
    UNDECIDED = "undecided"  # more questions could decide


@dataclass(frozen=True)
class GateTerms:
    """Requirements on a finalist."""

    alpha: float = 0.05  # probability of ever promoting a finalist that is no better, over the split's lifetime
    beta: float = 0.5  # the deployed β, at which accuracy must not drop
    margin: float = 1.0  # points of accuracy that may be lost at the deployed β
    losing: float = 2.0  # points of AFS that no single cell may lose
    slowdown: float = 1.25  # maximum critical path as a multiple of the champion's, plus one interval


DEFAULT_TERMS: Final = GateTerms()


@dataclass(frozen=True)
class Condition:
    """One condition and whether it is met."""

    name: str
    held: bool
    final: bool  # if it is not met, more questions would not change that
    figure: float | None  # None if unknown
    bound: float | None
    words: str


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


@dataclass(frozen=True)
class Headlines:
    """Figures for people; no condition depends on them."""

    beta: float
    savings: float | None  # percent fewer tokens than the champion at β for the same accuracy
    savings_cells: int  # cells in which the finalist reaches that accuracy
    accuracy: float  # points gained at the champion's tokens at β


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

    @property
    def failed(self) -> list[Condition]:
        """The conditions that are not met."""
        return [one for one in self.conditions if not one.held]

    @property
    def headline(self) -> str:
        """The result in one line."""
        saved = self.headlines.savings
        savings = "" if saved is None else f", {saved:.0f} % fewer tokens at equal accuracy"
        return f"{self.delta_afs:+.2f} points of AFS against {self.champion}{savings}"

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON, as it is written and kept in the ledger."""
        return {"headline": self.headline, **_REPORT.dump_python(self, mode="json")}

    def write(self, path: Path) -> None:
        """Write the report as JSON. Raises FileWriteError."""
        with atomic_write(path) as file:
            file.write((json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n").encode())


_REPORT: Final = TypeAdapter(GateReport)


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


def judge(measured: ScoreSet, terms: GateTerms, about: JudgementContext) -> GateReport:
    """Judge the first side of `measured` against the second."""
    finalist, champion = measured.sides
    gains = {cell: finalist.parts(cell) - champion.parts(cell) for cell in measured.baselines}
    cells = [_cell(cell, gain, finalist, champion) for cell, gain in gains.items()]
    of_questions = _pooled(gains, measured)
    spent = sequential_alpha(about.k, terms.alpha)
    p = sign_flip_p(of_questions, spent)
    delta = float(of_questions.mean())
    low, high = bootstrap_bounds(of_questions, BOTH_SIDES)
    conditions = [
        _static(about.advice),
        _failures(finalist),
        Condition("better", delta > 0, True, delta, 0.0, f"ΔAFS {delta:+.2f} points, {_between(low, high)}"),
        Condition("significant", p <= spent, False, p, spent, f"p = {p:.4g}, {spent:.4g} allowed: finalist {about.k}"),
        _accuracy(measured, terms),
        _losing(cells, terms),
        _path(measured, terms),
        _without_each_model(gains, measured),
    ]
    return GateReport(
        digest=finalist.spec.digest,
        name=finalist.spec.name,
        champion=champion.spec.name,
        champion_digest=champion.spec.digest,
        verdict=_verdict(conditions),
        alpha=spent,
        k=about.k,
        p=p,
        delta_afs=delta,
        interval=(low, high) if math.isfinite(low) else None,
        mde=detectable_difference(of_questions, spent),
        questions=of_questions.size,
        conditions=conditions,
        cells=cells,
        headlines=_headlines(finalist, champion, terms.beta),
        split=about.split,
        created=about.created,
        who=about.who,
        answers=measured.answers,
    )


def _verdict(conditions: Sequence[Condition]) -> GateVerdict:
    failed = [condition for condition in conditions if not condition.held]
    if not failed:
        return GateVerdict.PROMOTE
    return GateVerdict.REJECT if any(condition.final for condition in failed) else GateVerdict.UNDECIDED


def _pooled(values: Mapping[Cell, NDArray[np.float64]], measured: ScoreSet) -> NDArray[np.float64]:
    return question_values(values, {cell: measured.baselines[cell].questions for cell in values})


# Conditions


def _static(advice: Sequence[str]) -> Condition:
    return Condition("static", not advice, True, len(advice), 0, "; ".join(advice) or "no findings in the source")


def _failures(finalist: ControllerScores) -> Condition:
    failures = [failure for score in finalist.scores for failure in score.failures]
    text = f"{len(failures)} episodes failed: {failures[0].message}" if failures else "no episode failed"
    return Condition("failures", not failures, True, len(failures), 0, text)


def _accuracy(measured: ScoreSet, terms: GateTerms) -> Condition:
    """Check non-inferiority at the deployed β; final only if accuracy is significantly below the champion's."""
    finalist, champion = measured.sides
    gains = {cell: finalist.right(cell, terms.beta) - champion.right(cell, terms.beta) for cell in measured.baselines}
    of_questions = _pooled(gains, measured)
    low, high = bootstrap_bounds(of_questions)
    text = f"{of_questions.mean():+.2f} points at β = {terms.beta:g}, {_between(low, high, 90)}"
    return Condition("accuracy", low >= -terms.margin, high < 0, _known(low), -terms.margin, text)


def _losing(cells: Sequence[CellReport], terms: GateTerms) -> Condition:
    """Check that no cell loses more than allowed, significantly."""
    lost = [cell for cell in cells if cell.delta_afs < -terms.losing and cell.high is not None and cell.high < 0]
    worst = min(lost or cells, key=lambda cell: cell.delta_afs)
    text = f"{worst.model} {worst.benchmark}: ΔAFS {worst.delta_afs:+.2f}"
    return Condition("cells", not lost, True, worst.delta_afs, -terms.losing, text)


def _path(measured: ScoreSet, terms: GateTerms) -> Condition:
    """Check the p95 critical path, averaged over cells, at the β where it exceeds its limit most."""
    finalist, champion = ([side.curves[cell].points for cell in measured.baselines] for side in measured.sides)
    interval = np.mean([baseline.interval for baseline in measured.baselines.values()])
    paths, allowed = (np.array([[point.path for point in points] for points in side]) for side in (finalist, champion))
    mean, bound = paths.mean(axis=0), terms.slowdown * allowed.mean(axis=0) + interval
    at = int(np.argmax(mean - bound))
    text = f"{mean[at]:,.0f} tokens at β = {finalist[0][at].beta:g}, {bound[at]:,.0f} allowed"
    return Condition("path", bool(mean[at] <= bound[at]), True, float(mean[at]), float(bound[at]), text)


def _without_each_model(gains: Mapping[Cell, NDArray[np.float64]], measured: ScoreSet) -> Condition:
    """Check that the gain remains if any one model is left out. Never final, because it does not show a loss."""
    left: dict[str, float] = {}
    for model in dict.fromkeys(cell.model for cell in gains):
        rest = {cell: gain for cell, gain in gains.items() if cell.model != model}
        if rest:
            left[model] = float(_pooled(rest, measured).mean())
    if not left:
        return Condition("models", True, False, None, 0.0, "only one model; none can be left out")
    model = min(left, key=left.__getitem__)
    text = f"without {model}: ΔAFS {left[model]:+.2f}"
    return Condition("models", left[model] > 0, False, left[model], 0.0, text)


# Figures


def _cell(cell: Cell, gain: NDArray[np.float64], finalist: ControllerScores, champion: ControllerScores) -> CellReport:
    low, high = bootstrap_bounds(gain)
    return CellReport(
        model=cell.model,
        benchmark=cell.benchmark,
        split=cell.split,
        questions=gain.size,
        delta_afs=float(gain.mean()),
        low=_known(low),
        high=_known(high),
        finalist=list(_points(finalist, cell)),
        champion=list(_points(champion, cell)),
    )


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
    return Headlines(beta, float(np.mean(saved)) if saved else None, len(saved), float(np.mean(gained)))


def _between(low: float, high: float, percent: int = 95) -> str:
    return f"{percent} % in [{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else "only one question"


def _known(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None


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
