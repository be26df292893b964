"""Controllers that cost more than they were calibrated to: who is warned of, who is quarantined, and who is not."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from controllers import Advanced, Limits, State, branch
from controllers.loading import Spec
from discovery.evaluation.calibration import (
    Arm,
    BetaMap,
    Calibration,
    CalibrationPoint,
    SingleChain,
    write_calibrations,
)
from proxy.rollout.cost_test import MARGIN, CostTest, allowed_cost, chain_length
from tests.proxy.rollout.test_sealed_controllers import LOCKSTEP, Serve, serve

__all__ = ["serve"]

MINE = Spec("mine", "a controller's text")
CHAIN = 1000


def calibrated(spec: Spec, *chains: float, single: float = CHAIN) -> Calibration:
    """At β of 0 to 1, equally far apart, so many chains."""
    points = tuple(
        CalibrationPoint(at / (len(chains) - 1), count * single, None, None, 50, None, None, 0, None)
        for at, count in enumerate(chains)
    )
    return Calibration(spec.name, spec.digest, points, SingleChain(single, 50), True, BetaMap(Arm.CONTROLLER, 1.0))


def episode(*tokens: int, ended: bool = True) -> State:
    """Branches of such lengths."""
    state = State(Limits(10))
    state.apply(
        [branch()] * len(tokens),
        [Advanced(at, 1, count, ended, 0 if ended else None) for at, count in enumerate(tokens)],
    )
    return state


def observed(spending: CostTest, chains: float, tenant: str = "t", beta: float = 0.0, chain: int = CHAIN) -> str:
    found = spending.observe(MINE, "m", tenant, beta, round(chains * chain), episode(chain))
    return "" if found is None else "proven" if found.is_proven else "warned"


def test_what_is_allowed_follows_the_calibration() -> None:
    calibration = calibrated(MINE, 1, 4, 16)
    assert allowed_cost(calibration, 0) == 8  # half of what all of β costs
    assert allowed_cost(calibration, 0.5) == MARGIN * 4
    assert allowed_cost(calibration, 0.75) == MARGIN * 10
    assert allowed_cost(calibration, 1) == MARGIN * 16


def test_a_chain_is_as_long_as_those_that_ended() -> None:
    calibration = calibrated(MINE, 1, 4)
    assert chain_length(calibration, episode(300, 500)) == 400
    assert chain_length(calibration, episode(300, ended=False)) == CHAIN
    assert chain_length(calibration, episode(3000, 50, ended=False)) == 3000
    assert chain_length(calibration, State(Limits(10))) == CHAIN


def test_one_that_spends_all_is_warned_of_and_then_proven() -> None:
    spending = CostTest({"m": calibrated(MINE, 1, 8, 32)})
    found = [observed(spending, 64) for _ in range(20)]
    assert found.count("warned") == 1
    assert found.index("warned") < found.index("proven") < 20
    spending.forget(MINE.digest)
    assert observed(spending, 64) == ""


def test_honest_ones_are_left_alone() -> None:
    """Their costs scatter widely; and the longer replies of other prompts are not their fault."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        spending = CostTest({"m": calibrated(MINE, 2, 8, 32)})
        costs = rng.gamma(0.5, 4, 400)  # two chains on average
        lengths = rng.integers(100, 100 * CHAIN, 400)
        found = {observed(spending, cost, chain=int(length)) for cost, length in zip(costs, lengths, strict=True)}
        assert "proven" not in found


def test_short_replies_cost_more_than_their_chains() -> None:
    spending = CostTest({"m": calibrated(MINE, 1, 2)})
    assert {observed(spending, 25, chain=10) for _ in range(100)} == {""}  # 250 tokens, probes and the closing


def test_one_tenant_alone_quarantines_nothing_where_there_are_several() -> None:
    spending = CostTest({"m": calibrated(MINE, 1, 8, 32)})
    observed(spending, 1, "other")
    assert "proven" not in {observed(spending, 64) for _ in range(50)}
    assert "proven" in {observed(spending, 64, "other") for _ in range(50)}


def test_what_was_not_calibrated_is_not_judged() -> None:
    spending = CostTest({"m": calibrated(Spec("mine", "another text"), 1, 2)})
    assert {observed(spending, 64) for _ in range(50)} == {""}
    assert CostTest({}).observe(MINE, "m", "t", 0, 10**9, episode(1)) is None


SPENDER = LOCKSTEP.format(later="").replace("2 + round(6 * beta)", "8")


def file_of(folder: Path, *found: Calibration) -> Path:
    first, *others = found
    path = folder / "calibration.json"
    write_calibrations({"fake-model": Calibration(**{**vars(first), "others": tuple(others)})}, path)
    return path


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of the fake are short, and count all the same."""
    monkeypatch.setattr("proxy.rollout.cost_test.LEAST_TOKENS", 0)


@pytest.mark.process
@pytest.mark.usefixtures("short")
async def test_a_file_that_spends_all_is_quarantined(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = file_of(tmp_path, calibrated(Spec("mine", SPENDER), 0.25, 0.5, 1))
    async with serve(SPENDER, calibration=path) as proxy:
        reasons = [(await proxy.ask("0"))[1].get("x-tts-fallback") for _ in range(30)]
        assert reasons[:5] == [None] * 5
        assert reasons[-1] == "quarantined"
        assert await proxy.metric("autotts_controller_overspending", controller="mine") == 1
        assert await proxy.metric("autotts_controller_quarantined", controller="mine") == 1
    levels = [
        record.levelno for record in caplog.records if "it costs more than its calibration allows" in record.message
    ]
    assert levels == [logging.WARNING, logging.ERROR]


@pytest.mark.process
@pytest.mark.usefixtures("short")
async def test_one_that_came_with_the_program_is_warned_of(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = file_of(tmp_path, calibrated(Spec("self_consistency"), 0.1, 0.1))
    async with serve(SPENDER, calibration=path) as proxy:
        asked = {"controller": "self_consistency"}
        reasons = {(await proxy.ask("0.5", tts=asked))[1].get("x-tts-fallback") for _ in range(30)}
        assert reasons == {None}
        assert await proxy.metric("autotts_controller_overspending", controller="self_consistency") == 1
    assert "it costs more than its calibration allows" in caplog.text
    assert "quarantined" not in caplog.text
