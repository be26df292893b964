"""The default controller: what it loses and saves against 64 chains on strong models. Needs the public recordings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Final, NamedTuple

from controllers.builtin import DEFAULT
from controllers.loading import parse_spec
from discovery.answers import Judge
from discovery.data.importers import read_jsonl
from discovery.data.recordings import Cell, Recording, Split
from discovery.evaluation.evaluate import regrade
from discovery.evaluation.replay_jobs import Job, ReplayRules, run_job
from discovery.evaluation.scores import Score, gather_scores
from tests.bench.rows import Row, Size

FOLDER: Final = Path(__file__).parents[3] / "shared" / "replay" / "boinf"
FILES: Final = sorted(FOLDER.glob("aime202[45]_*.jsonl.xz"))
REFERENCE: Final = "sc@64"
SHUFFLES: Final = 10
"""Orders of the branches. The noise of three orders is as large as the aim for the accuracy."""


class Comparison(NamedTuple):
    """A controller at β = 1 against self-consistency with 64 chains."""

    points: Mapping[str, float]  # difference in accuracy by model, mean of its benchmarks
    tokens: float  # relative, mean of models and benchmarks
    critical_path: float  # relative, mean of models and benchmarks

    @property
    def accuracy(self) -> float:
        """Difference in accuracy in points, mean of the models."""
        return fmean(self.points.values())

    @property
    def worst_model(self) -> str:
        """The model that loses most."""
        return min(self.points, key=self.points.__getitem__)


AIMS: Final = Comparison({"mean": -0.1, "worst model": -1.5}, 0.30, 1.7)
"""Least differences in accuracy, and most tokens and critical path, of the default."""


def rows(size: Size) -> Iterator[Row]:
    """Yield the figures of the default; none if the public recordings are missing."""
    if not FILES:
        return
    files, shuffles = FILES[:: size.pick(1, len(FILES) // 2)], size.pick(SHUFFLES, 1)
    compared = compare(DEFAULT, files, shuffles)
    where = f"default ({DEFAULT}) against {REFERENCE}, β = 1, {len(compared.points)} models, {shuffles} shuffles"
    mean, worst = AIMS.points.values()
    yield Row(f"{where}: accuracy", f"{compared.accuracy:+.2f} points", f"aim ≥ {mean:+.1f}", "")
    yield Row(
        f"{where}: accuracy of the worst model, {compared.worst_model}",
        f"{compared.points[compared.worst_model]:+.2f} points",
        f"aim ≥ {worst:+.1f}",
        "",
    )
    yield Row(f"{where}: tokens", "", f"aim ≤ {AIMS.tokens:.2f}", f"{compared.tokens:.2f}")
    yield Row(f"{where}: critical path", "", f"aim ≤ {AIMS.critical_path:.1f}", f"{compared.critical_path:.2f}")


def compare(controller: str, files: Sequence[Path], shuffles: int) -> Comparison:
    """Replay a controller at β = 1 and self-consistency with 64 chains on files of recordings."""
    points: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {"tokens": [], "critical_path": []}
    for path in files:
        own, reference = _score(path, controller, shuffles), _score(path, REFERENCE, shuffles)
        points.setdefault(own.cell.model, []).append(own.accuracy - reference.accuracy)
        for figure, values in ratios.items():
            values.append(own.mean(figure) / reference.mean(figure))
    return Comparison({model: fmean(values) for model, values in points.items()}, *map(fmean, ratios.values()))


@cache
def _recordings(path: Path) -> list[Recording]:
    with Judge() as judge:
        return [regrade(recorded, judge) for recorded in read_jsonl(path)]


@cache
def _score(path: Path, controller: str, shuffles: int) -> Score:
    benchmark, _, model = path.name.removesuffix(".jsonl.xz").partition("_")
    job = Job(parse_spec(controller), 1.0, Cell(model, benchmark, Split.SEARCH), range(shuffles))
    (score,) = gather_scores([(job, run_job(job, _recordings(path), ReplayRules()))])
    if score.failures:
        raise RuntimeError(f"{controller} failed on {path.name}: {score.failures[0].message}")
    return score
