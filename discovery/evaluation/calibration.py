"""Calibration: what β costs and gains on each model, with intervals, and whether it pays at all.

On small models a controller may be no better than self-consistency, or one chain, at lower cost. A calibration shows
this, and up to which β additional tokens pay off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from annotated_types import MinLen
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from controllers.loading import Spec
from controllers.voting import lead_probability
from discovery.data.atomic_files import atomic_write, json_mapping
from discovery.data.recordings import Cell
from discovery.errors import DiscoveryError, problem_text
from discovery.evaluation.engines import Engine
from discovery.evaluation.evaluate import AnswerComparison, Evaluation
from discovery.evaluation.paired_statistics import bootstrap_bounds, wilson_interval
from discovery.evaluation.replay_jobs import VOTE_COLUMNS, ReplayRules
from discovery.evaluation.score_set import ControllerScores, ScoreSet, cheapest_at_accuracy, score_controllers
from discovery.evaluation.scores import BOTH_SIDES, Score
from discovery.evaluation.sources import RecordingSource

RIVAL: Final = Spec("self_consistency")
"""The controller that others must beat on cost."""
BINS: Final = 10
"""Bins of a reliability table."""

Beta = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class CalibrationPoint:
    """Cost and accuracy at one β. Intervals are 95 %, over questions; None with a single question."""

    beta: Beta
    tokens: Number  # mean per request
    tokens_low: float | None
    tokens_high: float | None
    accuracy: Number  # percent
    low: float | None
    high: float | None
    gain: float  # points of accuracy above one chain
    gain_half: float | None  # half the width of the gain's interval, which is paired by question and so narrower

    @property
    def gains(self) -> bool:
        """Whether it is significantly better than one chain."""
        return self.gain_half is not None and self.gain > self.gain_half


@dataclass(frozen=True)
class SingleChain:
    """Cost and accuracy of one chain."""

    tokens: Number
    accuracy: Number


class Arm(StrEnum):
    """Which way of answering serves best by default."""

    CONTROLLER = "controller"
    SINGLE = "single"


@dataclass(frozen=True)
class BetaMap:
    """The recommended use of β on a model: which arm, and the largest β."""

    arm: Arm
    cap: Beta


FULL_RANGE: Final = BetaMap(Arm.CONTROLLER, 1.0)
"""The full range of β, for a model that has not been calibrated."""


@dataclass(frozen=True)
class ChosenCalibration:
    """The controller that `autotts calibrate` chose for a model, and the evidence in points of AFS."""

    controller: str
    digest: str
    default: str  # the controller that it was compared with
    advantage: float  # of the choice over the default, cross-validated over questions
    error: float | None  # its standard error; None with a single question
    shrunk: float  # advantage, shrunk towards 0 by its spread over models
    bound: float  # lower bound of `shrunk` at `confidence`; the default is chosen unless it is above 0
    confidence: float
    questions: int


@dataclass(frozen=True)
class ReliabilityBin:
    """Episodes with similar predictions, and how many of their answers are right. All shares are in percent."""

    start: Number  # least prediction
    end: Number  # greatest prediction, which belongs to the next bin
    predicted: Number  # mean prediction
    accuracy: Number
    low: float  # 95 % interval, see `reliability`
    high: float
    episodes: int
    questions: int


@dataclass(frozen=True)
class Reliability:
    """How a predicted share of right answers compares with the observed one."""

    error: Number  # expected calibration error: mean distance of accuracy and prediction over episodes, in points
    bins: tuple[ReliabilityBin, ...]  # by rising prediction, without empty ones


@dataclass(frozen=True)
class VoteReliability:
    """Reliability of agreement and confidence in episodes with at least two votes, over all calibrated β."""

    agreement: Reliability
    confidence: Reliability
    episodes: int
    single_votes: int  # episodes with one vote, which are left out: it always agrees with itself


@dataclass(frozen=True)
class Calibration:
    """The calibration of one controller on one model."""

    controller: str
    digest: str
    points: Annotated[tuple[CalibrationPoint, ...], MinLen(1)]  # by rising β
    single: SingleChain
    pays: bool  # its most accurate point beats one chain, and self-consistency is no cheaper at that accuracy
    map: BetaMap
    answers: str = ""  # how answers were compared; empty if unknown
    others: tuple[Calibration, ...] = ()  # of further controllers on the same model; they have no others themselves
    choice: ChosenCalibration | None = None  # among several controllers; only in the first calibration of a model
    reliability: VoteReliability | None = None  # None if unknown, or if no episode had two votes
    judged_wrong: int = 0  # questions that clients judged wrong without a right answer; if any, only references count
    probe_tokens: int | None = None  # tokens charged per probe; None: as recorded

    @property
    def all(self) -> tuple[Calibration, ...]:
        """This calibration and those of further controllers."""
        return (self, *self.others)

    def of_digest(self, digest: str) -> Calibration | None:
        """Return the calibration of the controller with this digest, or None."""
        return next((calibration for calibration in self.all if calibration.digest == digest), None)

    def of_name(self, name: str) -> Calibration | None:
        """Return the calibration of the controller with this name, or None."""
        return next((calibration for calibration in self.all if calibration.controller == name), None)

    @property
    def advice(self) -> str:
        """The recommended use of β, as text."""
        if self.pays:
            return "yes: all of β"
        return f"yes: β up to {self.map.cap:g}" if self.map.arm is Arm.CONTROLLER else "no: one chain serves best"

    def beta_for(self, tokens: float) -> float:
        """Return the β that spends `tokens` on average, or the nearest calibrated β.

        Interpolates linearly between points. If a larger β spent no more, the smaller one stands for both.
        """
        spent = np.maximum.accumulate([point.tokens for point in self.points])
        rises = np.concatenate([[True], np.diff(spent) > 0])
        betas = np.array([point.beta for point in self.points])
        return float(np.interp(tokens, spent[rises], betas[rises]))

    def as_json(self) -> dict[str, Any]:
        """Return the calibration as JSON, as files and the proxy have it."""
        data: dict[str, Any] = TypeAdapter(Calibration).dump_python(self, mode="json")
        if data["others"]:
            data["others"] = [calibration.as_json() for calibration in self.others]
        else:
            del data["others"]
        for name in ("choice", "reliability", "probe_tokens"):
            if data[name] is None:
                del data[name]
        if not self.judged_wrong:
            del data["judged_wrong"]
        return data


Calibrations = Mapping[str, Calibration]
"""Calibrations by model."""
CALIBRATION_FILE: Final = json_mapping("a calibration", "controller", "points", "single")
_FILE: Final = TypeAdapter(dict[str, Calibration])


def score_with_rival(
    source: RecordingSource,
    cells: Sequence[Cell],
    specs: Sequence[Spec],
    engine: Engine,
    rules: ReplayRules,
    betas: Sequence[float],
    shuffles: int,
    answers: AnswerComparison = AnswerComparison.AUTO,
) -> ScoreSet:
    """Return the scores of controllers and self-consistency on some cells. Raises the errors of `Evaluation.run`."""
    played = list({spec.digest: spec for spec in (*specs, RIVAL)}.values())
    return score_controllers(Evaluation(source, cells, played, sorted(set(betas)), shuffles, answers, rules), engine)


def calibrate_scores(measured: ScoreSet, specs: Sequence[Spec], probe_tokens: int | None = None) -> Calibrations:
    """Return the calibrations of controllers from the scores of `score_with_rival`.

    `probe_tokens` is what its rules charged per probe.
    """
    sides = {side.spec.digest: side for side in measured.sides}
    rival = sides[RIVAL.digest]
    calibrations = {}
    for model in dict.fromkeys(cell.model for cell in measured.baselines):
        own_cells = [cell for cell in measured.baselines if cell.model == model]
        digests = dict.fromkeys(spec.digest for spec in specs)
        first, *others = (
            replace(_of_model(measured, sides[digest], rival, own_cells), probe_tokens=probe_tokens)
            for digest in digests
        )
        calibrations[model] = replace(first, others=tuple(others))
    return calibrations


def _of_model(
    measured: ScoreSet, side: ControllerScores, rival: ControllerScores, cells: Sequence[Cell]
) -> Calibration:
    """Return the calibration of one controller on one model; the questions of all its cells count equally."""
    baselines = [measured.baselines[cell] for cell in cells]
    single = SingleChain(
        tokens=float(np.concatenate([baseline.tokens for baseline in baselines]).mean()),
        accuracy=100 * float(np.concatenate([baseline.right for baseline in baselines]).mean()),
    )
    points = _points(measured, side, cells)
    best = max(points, key=lambda point: (point.accuracy, -point.tokens))
    line = [] if rival is side else [(point.tokens, point.accuracy) for point in _points(measured, rival, cells)]
    pays = is_worth_its_tokens(best, line)
    graded = [side.at(cell)[0] for cell in cells]
    return Calibration(
        side.spec.name,
        side.spec.digest,
        points,
        single,
        pays,
        recommend_map(points, line, pays),
        measured.answers,
        reliability=vote_reliability([side.at(cell) for cell in cells]),
        judged_wrong=sum(first.grading.selected.judged_wrong for first in graded if first.grading is not None),
    )


def _points(measured: ScoreSet, side: ControllerScores, cells: Sequence[Cell]) -> tuple[CalibrationPoint, ...]:
    chain = np.concatenate([measured.baselines[cell].right for cell in cells])
    by_beta: dict[float, list[Score]] = {}
    for cell in cells:
        for score in side.at(cell):
            by_beta.setdefault(score.beta, []).append(score)
    return tuple(_point(beta, scores, chain) for beta, scores in sorted(by_beta.items()))


def _point(beta: float, scores: Sequence[Score], chain: NDArray[np.float64]) -> CalibrationPoint:
    """Return the point of one β from its scores on a model's cells; `chain` is how often single chains are right:
    (questions,).
    """
    tokens, right = (np.concatenate([score.per_question(column) for score in scores]) for column in ("tokens", "right"))
    low, high = _interval(100 * (right - chain))
    return CalibrationPoint(
        beta,
        float(tokens.mean()),
        *_interval(tokens),
        100 * float(right.mean()),
        *_interval(100 * right),
        gain=100 * float((right - chain).mean()),
        gain_half=None if low is None or high is None else (high - low) / 2,
    )


def _interval(values: NDArray[np.float64]) -> tuple[float | None, float | None]:
    low, high = bootstrap_bounds(values, BOTH_SIDES)
    return (low, high) if math.isfinite(low) else (None, None)


def vote_reliability(by_cell: Sequence[Sequence[Score]]) -> VoteReliability | None:
    """Return how reliable the votes of a controller are; None if no episode has two votes.

    `by_cell` has its scores at each β. Failed episodes are left out, because live the baseline takes over.
    """
    tables = []  # (figures, episodes): the question's number, and the columns
    questions = 0
    for scores in by_cell:
        for score in scores:
            figures = [score.column(name) for name in ("failed", "right", *VOTE_COLUMNS)]
            numbers = np.broadcast_to(questions + np.arange(score.outcomes.shape[2]), figures[0].shape)
            tables.append(np.stack([numbers, *figures]).reshape(1 + len(figures), -1))
        questions += scores[0].outcomes.shape[2]
    table = np.concatenate(tables, axis=1)
    number, failed, right, votes, *_ = table
    is_single, is_several = (failed == 0) & (votes == 1), (failed == 0) & (votes > 1)
    if not is_several.any():
        return None
    number, right, votes = number[is_several], right[is_several], votes[is_several]
    pairs, places = np.unique(table[4:, is_several], axis=1, return_inverse=True)
    leads = [lead_probability({0: own, 1: other}, 0) for own, other in pairs.T.tolist()]
    return VoteReliability(
        agreement=reliability(pairs[0][places] / votes, right, number),
        confidence=reliability(np.array(leads, np.float64)[places], right, number),
        episodes=votes.size,
        single_votes=int(is_single.sum()),
    )


def reliability(predicted: NDArray[np.float64], right: NDArray[np.int64], questions: NDArray[np.int64]) -> Reliability:
    """Compare predictions in [0, 1] with what was right, in `BINS` bins of equal width (Guo et al., arXiv 1706.04599).

    All arguments have one value per episode; `questions` are the numbers of their questions. The intervals are
    Wilson's. Episodes of one question are not independent: n episodes count as many as n² / Σ nᵢ² questions with nᵢ
    episodes each (Kish's effective sample size).
    """
    places = np.minimum((predicted * BINS + 1e-9).astype(int), BINS - 1)
    bins, error = [], 0.0
    for place in np.unique(places):
        members = places == place
        counts = np.unique(questions[members], return_counts=True)[1]
        count, mean, share = int(counts.sum()), float(predicted[members].mean()), float(right[members].mean())
        low, high = wilson_interval(share, count**2 / float((counts**2).sum()))
        edges = 100 * int(place) / BINS, 100 * int(place + 1) / BINS
        bins.append(ReliabilityBin(*edges, 100 * mean, 100 * share, low, high, count, len(counts)))
        error += count / predicted.size * abs(share - mean)
    return Reliability(100 * error, tuple(bins))


def is_worth_its_tokens(point: CalibrationPoint, rival: Sequence[tuple[float, float]]) -> bool:
    """Return whether a point is significantly better than one chain, and the rival is no cheaper at its accuracy.

    `rival` has (tokens, accuracy) points by rising β.
    """
    same = cheapest_at_accuracy(rival, point.accuracy) if rival else None
    return point.gains and (same is None or same >= point.tokens)


def recommend_map(points: Sequence[CalibrationPoint], rival: Sequence[tuple[float, float]], pays: bool) -> BetaMap:
    """Return the full range of β if it pays; else β up to the largest worth its tokens; else one chain."""
    if pays:
        return BetaMap(Arm.CONTROLLER, points[-1].beta)
    worth = [point.beta for point in points if is_worth_its_tokens(point, rival)]
    return BetaMap(Arm.CONTROLLER, worth[-1]) if worth else BetaMap(Arm.SINGLE, points[0].beta)


def write_calibrations(calibrations: Calibrations, path: Path) -> None:
    """Write calibrations as JSON. Raises FileWriteError."""
    data = {model: calibration.as_json() for model, calibration in calibrations.items()}
    with atomic_write(path) as file:
        file.write((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def read_calibrations(path: Path) -> Calibrations:
    """Read the calibrations in a file. Raises DiscoveryError, naming the file and what is wrong with it."""
    try:
        return _FILE.validate_json(path.read_bytes())
    except OSError as error:
        raise DiscoveryError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DiscoveryError(f"{path}: not a calibration: {where}: {problem_text(first)}") from None
