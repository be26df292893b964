"""Points of frontiers, from files: what a loop published, and what `autotts evaluate --json` wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

from discovery.data.safe_json import parse_json
from discovery.evaluation.paired_statistics import NORMAL_95, detectable_mean

PUBLISHED: Final = "published"
"""Name of the frontier that this program carries."""
PATTERN: Final = "*frontier*.json"
"""Files of frontiers in the folder of runs."""
MOST_BYTES: Final = 16 * 2**20
LEVEL, POWER = 0.05, 0.8
_PUBLISHED_FILE: Final = Path(str(files("deploy.embedded"))) / "champion" / "frontier.json"


class FrontierPoint(NamedTuple):
    """A controller at one β on the questions of one cell."""

    controller: str
    digest: str
    beta: float
    tokens: float  # mean per question
    accuracy: float  # percent
    low: float  # ends of its 95 % interval
    high: float
    path: float  # 95th percentile of the critical path, tokens
    model: str
    benchmark: str
    split: str
    questions: int


class FrontierData(NamedTuple):
    """The points of one file."""

    name: str
    points: Sequence[FrontierPoint]
    problem: str = ""  # why there are none


def frontier_files(folder: Path | None) -> dict[str, Path]:
    """Return the files of frontiers by name: the published one, and those in a folder."""
    own = [] if folder is None else sorted(path for path in folder.glob(PATTERN) if path.is_file())
    return {PUBLISHED: _PUBLISHED_FILE} | {path.name: path for path in own}


def read_frontier(name: str, path: Path) -> FrontierData:
    """Return the points of a file, or why it cannot be used."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return FrontierData(name, (), f"{path.name}: larger than {MOST_BYTES} bytes; not a frontier")
        content = parse_json(path.read_bytes(), finite=True)
        points = _published(content) if isinstance(content, dict) else [_evaluated(point) for point in content]
    except OSError as error:
        return FrontierData(name, (), f"{path.name}: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        return FrontierData(name, (), f"{path.name}: not written by `autotts evaluate --json`; write it again")
    return FrontierData(name, sorted(points, key=lambda point: (point.controller, point.beta)))


def _published(content: Mapping[str, Any]) -> list[FrontierPoint]:
    cell = (str(content.get("model", "autotts-tiny")), str(content.get("benchmark", "chains")), "held-out")
    figures = ("beta", "tokens", "accuracy", "low", "high", "path_p95")
    return [
        FrontierPoint._make(
            (
                *(str(point["controller"]), str(point["digest"])),
                *(float(point[name]) for name in figures),
                *cell,
                int(content["questions"]),
            )
        )
        for point in content["points"]
    ]


def _evaluated(score: Mapping[str, Any]) -> FrontierPoint:
    accuracy, half = float(score["accuracy"]), NORMAL_95 * float(score["error"])
    return FrontierPoint(
        controller=str(score["controller"]),
        digest=str(score["digest"]),
        beta=float(score["beta"]),
        tokens=float(score["tokens"]),
        accuracy=accuracy,
        low=max(0.0, accuracy - half),
        high=min(100.0, accuracy + half),
        path=float(score["critical_path_p95"]),
        model=str(score["model"]),
        benchmark=str(score["benchmark"]),
        split=str(score["split"]),
        questions=int(score["questions"]),
    )


def detectable_points(points: Sequence[FrontierPoint]) -> float | None:
    """Return the smallest difference of accuracy, in points, that a test between two of the points likely shows.

    It is for independent samples with the widest interval of the points. Pairing by question shows smaller ones.
    """
    questions = min((point.questions for point in points), default=0)
    if questions < 2:
        return None
    spread = max((point.high - point.low) / 2 / NORMAL_95 * math.sqrt(point.questions) for point in points)
    return detectable_mean(math.sqrt(2) * spread, questions, LEVEL / 2, POWER)
