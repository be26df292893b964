"""The choice of a controller for each model on the public recordings of ten strong models, cross-validated by question.

Skipped where the public recordings are not beside the project.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from controllers.loading import Spec
from discovery.data.importers import read_jsonl
from discovery.evaluation.calibration import score_with_rival
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.evaluate import AnswerComparison
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.promotion.controller_choice import choose, compare_choices, gains_over
from tests.discovery.evaluation.test_evaluate import Given

FOLDER = Path(__file__).parents[4] / "shared" / "replay" / "boinf"
FILES = sorted(FOLDER.glob("aime202[45]_*.jsonl.xz"))
CONTROLLERS = [Spec("adaptive_consistency"), Spec("short_m_at_k")]

pytestmark = [
    pytest.mark.soak,
    pytest.mark.no_cover,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not FILES, reason="the public recordings are not beside the project (../shared/replay)"),
]


def test_a_controller_for_each_model_does_no_harm_on_ten_strong_models() -> None:
    source = Given(*(recorded for file in FILES for recorded in read_jsonl(file)))
    engine, betas = make_engine(EngineName.PROCESS), [0.0, 0.25, 0.5, 0.75, 1.0]
    measured = score_with_rival(
        source, source.cells(), CONTROLLERS, engine, ReplayRules(), betas, 3, AnswerComparison.CANONICAL
    )
    sides = {side.spec.digest: side for side in measured.sides}
    default, candidate = (sides[spec.digest] for spec in CONTROLLERS)
    by_model = gains_over(default, [candidate], measured)
    assert len(by_model) == 10
    assert by_model["gpt-oss-20b"].gains.mean() < -2  # short chains are wrong more often there
    assert choose(by_model)["gpt-oss-20b"].candidate is None
    comparison = compare_choices(by_model)
    assert comparison.over_default.mean > -0.3
    assert min(over_default.mean for over_default, _ in comparison.models.values()) > -1.5
