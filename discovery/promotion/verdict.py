"""A verdict: what is asked of a finalist, how it fared against the champion, and what follows. No I/O, no chance."""

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

BOTH_SIDES: Final = 2.5
"""Percent beyond each end of an interval."""


class GateVerdict(StrEnum):
    """What follows."""

    PROMOTE = "promote"  # every condition holds
    REJECT = "reject"  # one fails for good
    UNDECIDED = "undecided"  # more questions could tell


@dataclass(frozen=True)
class GateTerms:
    """What is asked of a finalist."""

    alpha: float = 0.05  # of ever promoting one that is no better, over the split's lifetime
    beta: float = 0.5  # the deployed β, at which accuracy must not fall
    margin: float = 1.0  # points it may fall there
    losing: float = 2.0  # points of AFS no single cell may lose
    slowdown: float = 1.25  # how many times the champion's critical path may be, one interval aside


DEFAULT_TERMS: Final = GateTerms()


@dataclass(frozen=True)
class Condition:
    """One thing that must hold."""

    name: str
    held: bool
    final: bool  # where it does not hold, more questions would not mend it
    figure: float | None  # None where nothing is known
    bound: float | None
    words: str


@dataclass(frozen=True)
class CellReport:
    """One cell: both curves, and what the finalist gains."""

    model: str
    benchmark: str
    split: str
    questions: int
    delta_afs: float  # points
    low: float | None  # one-sided 95 % bounds, None where one question says nothing of others
    high: float | None
    finalist: list[dict[str, float]]  # beta, tokens, accuracy in percent, path: p95 in tokens
    champion: list[dict[str, float]]


@dataclass(frozen=True)
class Headlines:
    """For people; shown and never used."""

    beta: float
    savings: float | None  # percent of the champion's tokens at β that the same accuracy costs less
    savings_cells: int  # cells in which the finalist comes to that accuracy at all
    accuracy: float  # points more at the tokens the champion spends at β


@dataclass(frozen=True)
class GateReport:
    """Everything a verdict rests on."""

    digest: str
    name: str
    champion: str
    champion_digest: str
    verdict: GateVerdict
    alpha: float  # spent on this judgement
    k: int  # it was the k-th on these questions
    p: float
    delta_afs: float  # points
    interval: tuple[float, float] | None  # 95 %, over questions
    mde: float | None  # the ΔAFS four tests in five would notice; None if they would notice none
    questions: int
    conditions: list[Condition]
    cells: list[CellReport]
    headlines: Headlines
    split: str  # fingerprint
    created: str
    who: str
    answers: str = ""  # when two were the same; empty if unknown

    @property
    def failed(self) -> list[Condition]:
        """What does not hold."""
        return [one for one in self.conditions if not one.held]

    @property
    def headline(self) -> str:
        """It in a line."""
        saved = self.headlines.savings
        words = "" if saved is None else f", {saved:.0f} % fewer tokens at equal accuracy"
        return f"{self.delta_afs:+.2f} points of AFS against {self.champion}{words}"

    def as_json(self) -> dict[str, Any]:
        """What is written, and what the ledger keeps."""
        return {"headline": self.headline, **_REPORT.dump_python(self, mode="json")}

    def write(self, path: Path) -> None:
        """Write it as JSON. Raises FileWriteError."""
        with atomic_write(path) as file:
            file.write((json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n").encode())


_REPORT: Final = TypeAdapter(GateReport)


def report_of(data: Mapping[str, Any]) -> GateReport:
    """A report from its JSON. Raises ValueError if it is none."""
    return _REPORT.validate_python(data)


class JudgementContext(NamedTuple):
    """What a judgement is told of itself."""

    k: int
    advice: Sequence[str]  # against the finalist's text
    split: str  # fingerprint
    created: str
    who: str


def judge(measured: ScoreSet, terms: GateTerms, about: JudgementContext) -> GateReport:
    """The verdict on the first side of `measured` against the second."""
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
    failed = [one for one in conditions if not one.held]
    if not failed:
        return GateVerdict.PROMOTE
    return GateVerdict.REJECT if any(one.final for one in failed) else GateVerdict.UNDECIDED


def _pooled(values: Mapping[Cell, NDArray[np.float64]], measured: ScoreSet) -> NDArray[np.float64]:
    return question_values(values, {cell: measured.baselines[cell].questions for cell in values})


# Conditions


def _static(advice: Sequence[str]) -> Condition:
    return Condition("static", not advice, True, len(advice), 0, "; ".join(advice) or "nothing against its text")


def _failures(finalist: ControllerScores) -> Condition:
    failures = [failure for score in finalist.scores for failure in score.failures]
    words = f"{len(failures)} episodes failed: {failures[0].message}" if failures else "no episode failed"
    return Condition("failures", not failures, True, len(failures), 0, words)


def _accuracy(measured: ScoreSet, terms: GateTerms) -> Condition:
    """Not inferior at the deployed β; for good only where it is surely below the champion, not merely unsure."""
    finalist, champion = measured.sides
    gains = {cell: finalist.right(cell, terms.beta) - champion.right(cell, terms.beta) for cell in measured.baselines}
    of_questions = _pooled(gains, measured)
    low, high = bootstrap_bounds(of_questions)
    words = f"{of_questions.mean():+.2f} points at β = {terms.beta:g}, {_between(low, high, 90)}"
    return Condition("accuracy", low >= -terms.margin, high < 0, _known(low), -terms.margin, words)


def _losing(cells: Sequence[CellReport], terms: GateTerms) -> Condition:
    """No cell that badly and surely loses."""
    lost = [one for one in cells if one.delta_afs < -terms.losing and one.high is not None and one.high < 0]
    worst = min(lost or cells, key=lambda one: one.delta_afs)
    words = f"{worst.model} {worst.benchmark}: ΔAFS {worst.delta_afs:+.2f}"
    return Condition("cells", not lost, True, worst.delta_afs, -terms.losing, words)


def _path(measured: ScoreSet, terms: GateTerms) -> Condition:
    """Its critical path, p95, over cells, at the β where it is longest for what is allowed."""
    finalist, champion = ([side.curves[cell].points for cell in measured.baselines] for side in measured.sides)
    interval = np.mean([baseline.interval for baseline in measured.baselines.values()])
    paths, allowed = (np.array([[one.path for one in points] for points in side]) for side in (finalist, champion))
    mean, bound = paths.mean(axis=0), terms.slowdown * allowed.mean(axis=0) + interval
    at = int(np.argmax(mean - bound))
    words = f"{mean[at]:,.0f} tokens at β = {finalist[0][at].beta:g}, {bound[at]:,.0f} allowed"
    return Condition("path", bool(mean[at] <= bound[at]), True, float(mean[at]), float(bound[at]), words)


def _without_each_model(gains: Mapping[Cell, NDArray[np.float64]], measured: ScoreSet) -> Condition:
    """No model carries the gain alone. More questions may mend it, and it is no proof of harm."""
    left: dict[str, float] = {}
    for model in dict.fromkeys(cell.model for cell in gains):
        rest = {cell: gain for cell, gain in gains.items() if cell.model != model}
        if rest:
            left[model] = float(_pooled(rest, measured).mean())
    if not left:
        return Condition("models", True, False, None, 0.0, "one model: there is none to leave out")
    model = min(left, key=left.__getitem__)
    words = f"without {model}: ΔAFS {left[model]:+.2f}"
    return Condition("models", left[model] > 0, False, left[model], 0.0, words)


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
    return f"{percent} % in [{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else "of one question"


def _known(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None


def card_of(report: GateReport, lineage: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """The card that goes with a controller's file: what it is, on which data it showed what, and whom it comes from.

    `lineage` are digests, parents first; `more` is what else the caller knows, such as the run that found it.
    """
    told = report.as_json()
    judgement = ("verdict", "champion", "champion_digest", "alpha", "k", "p", "delta_afs", "interval", "created", "who")
    cells = [{key: cell[key] for key in ("model", "benchmark", "split", "questions")} for cell in told["cells"]]
    return {
        "name": report.name,
        "digest": report.digest,
        "lineage": list(lineage),
        "data": {"fingerprint": report.split, "questions": report.questions, "cells": cells},
        "curve": {f"{cell.model} {cell.benchmark}": cell.finalist for cell in report.cells},
        "gate": {key: told[key] for key in judgement},
        "headlines": told["headlines"],
        **more,
    }
