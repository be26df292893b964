"""Points and tokens that early stopping costs on ten strong models, whose short chains are not right more often.

Skipped where the public recordings are not beside the project.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import fmean

import pytest

from controllers.loading import parse_spec
from discovery.answers import Judge
from discovery.data.importers import read_jsonl
from discovery.data.recordings import Cell, Recording, Split
from discovery.evaluation.evaluate import regrade
from discovery.evaluation.replay_jobs import Job, ReplayRules, run_job
from discovery.evaluation.scores import Score, gather_scores

FOLDER = Path(__file__).parents[4] / "shared" / "replay" / "boinf"
SHUFFLES = 10
FILES = sorted(FOLDER.glob("aime202[45]_*.jsonl.xz"))

pytestmark = [
    pytest.mark.soak,
    pytest.mark.no_cover,
    pytest.mark.skipif(not FILES, reason="the public recordings are not beside the project (../shared/replay)"),
]


@cache
def recordings(path: Path) -> list[Recording]:
    with Judge() as judge:
        return [regrade(recorded, judge) for recorded in read_jsonl(path)]


@cache
def score(path: Path, controller: str) -> Score:
    benchmark, _, model = path.name.removesuffix(".jsonl.xz").partition("_")
    job = Job(parse_spec(controller), 1.0, Cell(model, benchmark, Split.SEARCH), range(SHUFFLES))
    (made,) = gather_scores([(job, run_job(job, recordings(path), ReplayRules()))])
    assert not made.failures
    return made


def losses(controller: str) -> dict[str, float]:
    """Return the points lost against self-consistency with 64 chains by model, mean of two benchmarks."""
    lost: dict[str, list[float]] = {}
    for path in FILES:
        difference = score(path, "sc@64").accuracy - score(path, controller).accuracy
        lost.setdefault(path.name.partition("_")[2], []).append(difference)
    return {model: fmean(differences) for model, differences in lost.items()}


def ratio(controller: str, figure: str) -> float:
    """Return a figure relative to self-consistency with 64 chains, mean over models and benchmarks."""
    return fmean(score(path, controller).mean(figure) / score(path, "sc@64").mean(figure) for path in FILES)


def test_adaptive_consistency_loses_at_most_a_tenth_of_a_point_at_30_percent_of_the_tokens() -> None:
    lost = losses("adaptive_consistency")
    assert fmean(lost.values()) <= 0.1
    assert max(lost.values()) <= 1.5
    assert ratio("adaptive_consistency", "tokens") <= 0.30
    assert ratio("adaptive_consistency", "critical_path") <= 1.7


def test_short_m_at_k_loses_over_three_points_on_some_model() -> None:
    assert max(losses("short_m_at_k").values()) > 3
