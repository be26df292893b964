"""What β costs and brings on each model: tokens and accuracy, with how sure that is, and whether it pays at all.

On small models a controller may bring nothing that self-consistency, or one chain, does not bring for less. A
calibration says so, and how far β is worth turning up.
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
from discovery.evaluation.scores import Score
from discovery.evaluation.sources import RecordingSource

RIVAL: Final = Spec("self_consistency")
"""What a controller has to be cheaper than."""
BOTH_SIDES: Final = 2.5
"""Percent beyond each end of an interval."""

Beta = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class CalibrationPoint:
    """What one β costs and brings; 95 % intervals over questions, None where one question says nothing of others."""

    beta: Beta
    tokens: Number  # mean of a request
    tokens_low: float | None
    tokens_high: float | None
    accuracy: Number  # percent
    low: float | None
    high: float | None
    gain: float  # points above one chain
    gain_half: float | None  # half the width of the gain's interval, paired by question: much narrower

    @property
    def gains(self) -> bool:
        """Whether it is surely better than one chain."""
        return self.gain_half is not None and self.gain > self.gain_half


@dataclass(frozen=True)
class SingleChain:
    """What one chain costs and brings."""

    tokens: Number
    accuracy: Number


class Arm(StrEnum):
    """Who serves best where nothing else is asked for."""

    CONTROLLER = "controller"
    SINGLE = "single"


@dataclass(frozen=True)
class BetaMap:
    """How the dial is best used on a model: which arm, and β no higher than that."""

    arm: Arm
    cap: Beta


FULL_RANGE: Final = BetaMap(Arm.CONTROLLER, 1.0)
"""All of the dial: of a model nobody has measured."""


@dataclass(frozen=True)
class Calibration:
    """One controller on one model."""

    controller: str
    digest: str
    points: Annotated[tuple[CalibrationPoint, ...], MinLen(1)]  # by rising β
    single: SingleChain
    pays: bool  # its most accurate point is better than one chain, and self-consistency is as good for no less
    map: BetaMap
    answers: str = ""  # when two were the same; empty if unknown
    others: tuple[Calibration, ...] = ()  # of further controllers on the same model, which have none themselves

    @property
    def all(self) -> tuple[Calibration, ...]:
        """This one and those of further controllers."""
        return (self, *self.others)

    def of_digest(self, digest: str) -> Calibration | None:
        """The calibration of the controller with this digest, if there is one."""
        return next((one for one in self.all if one.digest == digest), None)

    def of_name(self, name: str) -> Calibration | None:
        """The calibration of the controller with this name, if there is one."""
        return next((one for one in self.all if one.controller == name), None)

    @property
    def advice(self) -> str:
        """How the dial is best used, in words."""
        if self.pays:
            return "yes: all of β"
        return f"yes: β up to {self.map.cap:g}" if self.map.arm is Arm.CONTROLLER else "no: one chain serves best"

    def beta_for(self, tokens: float) -> float:
        """The β that spends so many tokens on average; the nearest there is, where none does.

        Between points in straight lines. Where a larger β was seen to spend no more, the smaller one stands for both.
        """
        spent = np.maximum.accumulate([point.tokens for point in self.points])
        rises = np.concatenate([[True], np.diff(spent) > 0])
        betas = np.array([point.beta for point in self.points])
        return float(np.interp(tokens, spent[rises], betas[rises]))

    def as_json(self) -> dict[str, Any]:
        """What a file keeps of it, and what the proxy tells."""
        data: dict[str, Any] = TypeAdapter(Calibration).dump_python(self, mode="json")
        if data["others"]:
            data["others"] = [one.as_json() for one in self.others]
        else:
            del data["others"]
        return data


Calibrations = Mapping[str, Calibration]
"""By model."""
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
    """Play controllers, and self-consistency beside them, on some cells. Raises what `Evaluation.run` raises."""
    played = list({one.digest: one for one in (*specs, RIVAL)}.values())
    measured = score_controllers(
        Evaluation(source, cells, played, sorted(set(betas)), shuffles, answers, rules), engine
    )
    sides = {side.spec.digest: side for side in measured.sides}
    rival = sides[RIVAL.digest]
    found = {}
    for model in dict.fromkeys(cell.model for cell in measured.ground):
        mine = [cell for cell in measured.ground if cell.model == model]
        digests = dict.fromkeys(spec.digest for spec in specs)
        first, *others = (_of_model(measured, sides[digest], rival, mine) for digest in digests)
        found[model] = replace(first, others=tuple(others))
    return found


def _of_model(
    measured: ScoreSet, side: ControllerScores, rival: ControllerScores, cells: Sequence[Cell]
) -> Calibration:
    """All questions of a model's cells count equally."""
    grounds = [measured.ground[cell] for cell in cells]
    single = SingleChain(
        tokens=float(np.concatenate([one.tokens for one in grounds]).mean()),
        accuracy=100 * float(np.concatenate([one.right for one in grounds]).mean()),
    )
    points = _points(measured, side, cells)
    best = max(points, key=lambda point: (point.accuracy, -point.tokens))
    line = [] if rival is side else [(point.tokens, point.accuracy) for point in _points(measured, rival, cells)]
    pays = is_worth_its_tokens(best, line)
    return Calibration(
        side.spec.name, side.spec.digest, points, single, pays, recommend_map(points, line, pays), measured.answers
    )


def _points(measured: ScoreSet, side: ControllerScores, cells: Sequence[Cell]) -> tuple[CalibrationPoint, ...]:
    chain = np.concatenate([measured.ground[cell].right for cell in cells])
    by_beta: dict[float, list[Score]] = {}
    for cell in cells:
        for score in side.at(cell):
            by_beta.setdefault(score.beta, []).append(score)
    return tuple(_point(beta, scores, chain) for beta, scores in sorted(by_beta.items()))


def _point(beta: float, scores: Sequence[Score], chain: NDArray[np.float64]) -> CalibrationPoint:
    """One β's scores on a model's cells, against how often `chain`s end right: (questions,)."""
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
    """Whether it is surely better than one chain, and `rival`, (tokens, accuracy) by rising β, is no cheaper there."""
    same = cheapest_at_accuracy(rival, point.accuracy) if rival else None
    return point.gains and (same is None or same >= point.tokens)


def recommend_map(points: Sequence[CalibrationPoint], rival: Sequence[tuple[float, float]], pays: bool) -> BetaMap:
    """The whole dial where it pays; else β up to the largest that is worth what it costs; else one chain."""
    if pays:
        return BetaMap(Arm.CONTROLLER, points[-1].beta)
    worth = [point.beta for point in points if is_worth_its_tokens(point, rival)]
    return BetaMap(Arm.CONTROLLER, worth[-1]) if worth else BetaMap(Arm.SINGLE, points[0].beta)


def write_calibrations(found: Calibrations, path: Path) -> None:
    """Write calibrations as JSON. Raises FileWriteError."""
    told = {model: one.as_json() for model, one in found.items()}
    with atomic_write(path) as file:
        file.write((json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode())


def read_calibrations(path: Path) -> Calibrations:
    """The calibrations in a file. Raises DiscoveryError, naming the file and what is wrong with it."""
    try:
        return _FILE.validate_json(path.read_bytes())
    except OSError as error:
        raise DiscoveryError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DiscoveryError(f"{path}: no calibration: {where}: {first['msg']}") from None
