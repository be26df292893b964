"""Controllers that cost more than their calibration are warned of or quarantined; others are not."""

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
    """Return a calibration that allows `chains[i]` chains at evenly spaced β from 0 to 1."""
    points = tuple(
        CalibrationPoint(at / (len(chains) - 1), count * single, None, None, 50, None, None, 0, None)
        for at, count in enumerate(chains)
    )
    return Calibration(spec.name, spec.digest, points, SingleChain(single, 50), True, BetaMap(Arm.CONTROLLER, 1.0))


def episode(*tokens: int, ended: bool = True) -> State:
    """Return a state with branches of the given lengths."""
    state = State(Limits(10))
    state.apply(
        [branch()] * len(tokens),
        [Advanced(at, 1, count, ended, 0 if ended else None) for at, count in enumerate(tokens)],
    )
    return state


def observed(cost_test: CostTest, chains: float, tenant: str = "t", beta: float = 0.0, chain: int = CHAIN) -> str:
    overspending = cost_test.observe(MINE, "m", tenant, beta, round(chains * chain), episode(chain))
    return "" if overspending is None else "proven" if overspending.is_proven else "warned"


def test_the_allowed_cost_is_interpolated_from_the_calibration() -> None:
    calibration = calibrated(MINE, 1, 4, 16)
    assert allowed_cost(calibration, 0) == 8  # half of the cost at β = 1
    assert allowed_cost(calibration, 0.5) == MARGIN * 4
    assert allowed_cost(calibration, 0.75) == MARGIN * 10
    assert allowed_cost(calibration, 1) == MARGIN * 16


def test_the_chain_length_is_the_mean_of_ended_branches_or_the_calibrated_one() -> None:
    calibration = calibrated(MINE, 1, 4)
    assert chain_length(calibration, episode(300, 500)) == 400
    assert chain_length(calibration, episode(300, ended=False)) == CHAIN
    assert chain_length(calibration, episode(3000, 50, ended=False)) == 3000
    assert chain_length(calibration, State(Limits(10))) == CHAIN


def test_a_controller_that_overspends_is_warned_of_once_and_then_proven() -> None:
    cost_test = CostTest({"m": calibrated(MINE, 1, 8, 32)})
    outcomes = [observed(cost_test, 64) for _ in range(20)]
    assert outcomes.count("warned") == 1
    assert outcomes.index("warned") < outcomes.index("proven") < 20
    cost_test.forget(MINE.digest)
    assert observed(cost_test, 64) == ""


def test_controllers_within_their_calibration_are_never_proven_to_overspend() -> None:
    """Their costs scatter widely, and longer replies to other prompts do not count against them."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        cost_test = CostTest({"m": calibrated(MINE, 2, 8, 32)})
        costs = rng.gamma(0.5, 4, 400)  # two chains on average
        lengths = rng.integers(100, 100 * CHAIN, 400)
        outcomes = {observed(cost_test, cost, chain=int(length)) for cost, length in zip(costs, lengths, strict=True)}
        assert "proven" not in outcomes


def test_short_replies_with_a_fixed_overhead_are_not_warned_of() -> None:
    cost_test = CostTest({"m": calibrated(MINE, 1, 2)})
    assert {observed(cost_test, 25, chain=10) for _ in range(100)} == {""}  # 250 tokens, probes and the final answer


def test_overspending_on_one_tenant_is_proven_only_with_a_second_tenant() -> None:
    cost_test = CostTest({"m": calibrated(MINE, 1, 8, 32)})
    observed(cost_test, 1, "other")
    assert "proven" not in {observed(cost_test, 64) for _ in range(50)}
    assert "proven" in {observed(cost_test, 64, "other") for _ in range(50)}


def test_a_controller_without_calibration_is_not_tested() -> None:
    cost_test = CostTest({"m": calibrated(Spec("mine", "another text"), 1, 2)})
    assert {observed(cost_test, 64) for _ in range(50)} == {""}
    assert CostTest({}).observe(MINE, "m", "t", 0, 10**9, episode(1)) is None


SPENDER = LOCKSTEP.format(later="").replace("2 + round(6 * beta)", "8")


def file_of(folder: Path, *calibrations: Calibration) -> Path:
    first, *others = calibrations
    path = folder / "calibration.json"
    write_calibrations({"fake-model": Calibration(**{**vars(first), "others": tuple(others)})}, path)
    return path


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the short chains of the fake count."""
    monkeypatch.setattr("proxy.rollout.cost_test.LEAST_TOKENS", 0)


@pytest.mark.process
@pytest.mark.usefixtures("short")
async def test_an_overspending_controller_file_is_quarantined(
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
async def test_an_overspending_built_in_controller_is_warned_of_but_not_quarantined(
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
