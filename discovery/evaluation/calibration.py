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
from discovery.data.atomic_files import atomic_write
from discovery.data.recordings import Cell
from discovery.errors import DiscoveryError
from discovery.evaluation.engines import Engine
from discovery.evaluation.evaluate import AnswerComparison, Evaluation
from discovery.evaluation.paired_statistics import bootstrap_bounds
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.evaluation.score_set import ControllerScores, ScoreSet, cheapest_at_accuracy, score_controllers
from discovery.evaluation.scores import BOTH_SIDES, Score
from discovery.evaluation.sources import RecordingSource

RIVAL: Final = Spec("self_consistency")
"""The controller that others must beat on cost."""

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
        return data


Calibrations = Mapping[str, Calibration]
"""Calibrations by model."""
_FILE: Final = TypeAdapter(dict[str, Calibration])


def calibrate(
    source: RecordingSource,
    cells: Sequence[Cell],
    specs: Sequence[Spec],
    engine: Engine,
    rules: ReplayRules,
    betas: Sequence[float],
    shuffles: int,
    answers: AnswerComparison = AnswerComparison.AUTO,
) -> Calibrations:
    """Evaluate controllers and self-consistency on some cells. Raises the errors of `Evaluation.run`."""
    played = list({spec.digest: spec for spec in (*specs, RIVAL)}.values())
    measured = score_controllers(
        Evaluation(source, cells, played, sorted(set(betas)), shuffles, answers, rules), engine
    )
    sides = {side.spec.digest: side for side in measured.sides}
    rival = sides[RIVAL.digest]
    calibrations = {}
    for model in dict.fromkeys(cell.model for cell in measured.baselines):
        own_cells = [cell for cell in measured.baselines if cell.model == model]
        digests = dict.fromkeys(spec.digest for spec in specs)
        first, *others = (_of_model(measured, sides[digest], rival, own_cells) for digest in digests)
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
    return Calibration(
        side.spec.name, side.spec.digest, points, single, pays, recommend_map(points, line, pays), measured.answers
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
        raise DiscoveryError(f"{path}: not a calibration: {where}: {first['msg']}") from None
