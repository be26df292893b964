"""Judgements on public recordings: a frugal controller is not rejected for frugality, and a worse one is rejected.

Skipped where the public recordings are not beside the project.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from controllers.loading import Spec, parse_spec
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.evaluation.sources import open_source
from discovery.promotion.comparison import Comparison
from discovery.promotion.gate import run_gate
from discovery.promotion.verdict import GateReport, GateVerdict

FOLDER = Path(__file__).parents[4] / "shared" / "replay" / "autotts"
MODELS = ("Qwen3-1.7B", "Qwen3-8B")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.no_cover,
    pytest.mark.skipif(
        not FOLDER.is_dir(), reason="the public recordings are not beside the project (../shared/replay)"
    ),
]

RUNNER_UP = """
from controllers import TO_END, answer, branch


class RunnerUp:
    '''As many chains as short_m_at_k opens, each to its end, and the answer with the second most votes.'''

    def __init__(self, beta):
        self.chains = round(2 ** (3 + 3 * beta))

    def decide(self, state):
        if not state.width:
            return [branch(TO_END)] * min(self.chains, state.room)
        votes = sorted(state.votes, key=lambda label: (-state.votes[label], label))
        return [answer(votes[min(1, len(votes) - 1)] if votes else None)]
"""


def judged(finalist: Spec, ledger: Path, shuffles: int) -> GateReport:
    source = open_source(FOLDER)
    cells = [cell for cell in source.cells() if cell.model in MODELS and cell.benchmark == "aime24"]
    return run_gate(
        source,
        cells,
        Comparison(
            finalist,
            Spec("cmc"),
            make_engine(EngineName.LOCAL),
            ReplayRules(),
            (0.0, 0.25, 0.5, 0.75, 1.0),
            shuffles,
            "now",
            "me",
        ),
        ledger,
    )


def test_short_m_at_k_is_not_rejected_for_spending_less_than_cmc(tmp_path: Path) -> None:
    report = judged(parse_spec("short_m_at_k"), tmp_path / "ledger", 4)
    for cell in report.cells:
        own, other = (next(point for point in side if point["beta"] == 0.5) for side in (cell.finalist, cell.champion))
        assert own["tokens"] < 0.5 * other["tokens"]
        assert own["accuracy"] < other["accuracy"] - 2  # at equal β, as far as accuracy drops by spending less
    assert next(condition for condition in report.conditions if condition.name == "accuracy").held
    assert report.verdict is not GateVerdict.REJECT


@pytest.mark.process
def test_a_controller_that_is_just_worse_is_rejected_for_its_accuracy(tmp_path: Path) -> None:
    report = judged(Spec("runner_up", RUNNER_UP), tmp_path / "ledger", 1)
    assert report.verdict is GateVerdict.REJECT
    assert {"better", "accuracy"} <= {condition.name for condition in report.failed}
    assert next(condition for condition in report.failed if condition.name == "accuracy").final
