"""Stages of models: which controller serves which model, and which requests a canary is compared with."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime

import pytest

from controllers import ControllerError, UnknownController
from controllers.loading import Spec
from controllers.rollout_state import RolloutStage, lot
from discovery.promotion.registry import ChangeCause, Registry
from proxy.rollout import canary_test, cost_test
from proxy.rollout.canary_test import EpisodeOutcome
from proxy.rollout.controller_manager import ControllerManager
from proxy.settings import load
from proxy.telemetry.metrics import Metrics
from proxy.types import CanaryMetric
from proxy.workers.shares import of_worker
from tests.discovery.promotion.outside import write_card

ME = ChangeCause("me", "a test", datetime(2026, 11, 29, tzinfo=UTC))
DEFAULT, CHAMPION, CANARY = Spec("self_consistency"), Spec("asc"), Spec("esc")
FINE = EpisodeOutcome(1000, failed=False, answered=True)
BAD = EpisodeOutcome(9000, failed=True, answered=False)


@pytest.fixture
async def manager(registry: Registry) -> ControllerManager:
    """Return a manager that reads the registry before every choice. It starts no process."""
    settings = load(upstream="http://127.0.0.1:1", controller=DEFAULT.name, registry=registry.place, registry_poll_s=0)
    return ControllerManager(settings, Metrics())


def install(registry: Registry, spec: Spec, stage: RolloutStage, model: str | None = None, share: float = 0.5) -> None:
    registry.install(spec, {"headline": ""}, stage, share, ME, model)


async def champion(manager: ControllerManager, model: str) -> Spec:
    """Return the controller of a request that no canary serves."""
    request = next(f"r{number}" for number in range(1000) if lot(f"r{number}") >= 0.5)
    return (await manager.choose(None, request, model)).spec


async def serve(manager: ControllerManager, outcomes: dict[str, EpisodeOutcome], models: list[str], most: int) -> None:
    """Serve requests on each model in turn; an outcome depends on the controller."""
    for number in range(most):
        for model in models:
            choice = await manager.choose(None, f"r{number}", model)
            manager.record_episode(choice, model, outcomes.get(choice.spec.name, FINE))
    await asyncio.gather(*manager._registry_tasks)


async def test_a_model_is_served_by_its_own_champion_and_others_by_the_default(
    registry: Registry, manager: ControllerManager
) -> None:
    assert await champion(manager, "small") == DEFAULT
    install(registry, CHAMPION, RolloutStage.CHAMPION, "small")
    assert [await champion(manager, model) for model in ("small", "large")] == [CHAMPION, DEFAULT]
    assert (manager.champion("small"), manager.champion("large")) == (CHAMPION, DEFAULT)
    install(registry, CANARY, RolloutStage.CHAMPION)
    assert [await champion(manager, model) for model in ("small", "large")] == [CHAMPION, CANARY]
    registry.roll_back(ME, "small")
    assert await champion(manager, "small") == CANARY


async def test_requests_that_begin_together_after_a_promotion_all_get_the_new_champion(
    registry: Registry, manager: ControllerManager
) -> None:
    install(registry, CHAMPION, RolloutStage.CHAMPION)
    assert await asyncio.gather(*(champion(manager, "small") for _ in range(4))) == [CHAMPION] * 4
    registry.roll_back(ME)
    named = manager.choose("cmc", "r", "small")  # begins the read
    _, *unnamed = await asyncio.gather(named, champion(manager, "small"), champion(manager, "large"))
    assert unnamed == [DEFAULT, DEFAULT]


async def test_a_request_that_is_cancelled_while_the_registry_is_read_loses_no_promotion(
    registry: Registry, manager: ControllerManager
) -> None:
    install(registry, CHAMPION, RolloutStage.CHAMPION)
    install(registry, CANARY, RolloutStage.CANARY)
    cancelled = asyncio.create_task(champion(manager, "small"))
    await asyncio.sleep(0)  # the read has begun
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    assert await champion(manager, "small") == CHAMPION
    await serve(manager, {CANARY.name: BAD}, ["small"], 300)
    assert registry.read().default.canary is None  # its test has begun


async def test_an_unreadable_canary_stops_no_other_change_of_the_registry(
    registry: Registry, manager: ControllerManager
) -> None:
    install(registry, CHAMPION, RolloutStage.CHAMPION)
    install(registry, CANARY, RolloutStage.CANARY, "small", share=1.0)
    assert (await manager.choose(None, "r", "small")).spec == CANARY
    write_card(registry, CANARY.digest, b"{")
    install(registry, Spec("cmc"), RolloutStage.CHAMPION)
    choices = [await manager.choose(None, "r", model) for model in ("small", "large")]
    assert [choice.spec for choice in choices] == [Spec("cmc")] * 2
    assert [choice.stage for choice in choices] == [RolloutStage.CHAMPION] * 2
    assert CANARY.digest[:12] in manager.stages.problem
    write_card(registry, Spec("cmc").digest, b"{")  # a champion's
    install(registry, Spec("mars"), RolloutStage.SHADOW)
    assert await champion(manager, "small") == Spec("cmc")
    assert Spec("cmc").digest in manager.stages.problem
    install(registry, CHAMPION, RolloutStage.CHAMPION)
    install(registry, CANARY, RolloutStage.CANARY, "small", share=1.0)  # writes its card again
    assert (await manager.choose(None, "r", "small")).spec == CANARY
    assert not manager.stages.problem


async def test_processes_that_share_a_port_share_the_levels_of_their_tests(registry: Registry) -> None:
    install(registry, CANARY, RolloutStage.CANARY)
    settings = load(upstream="http://127.0.0.1:1", controller=DEFAULT.name, registry=registry.place, workers=4)
    manager = ControllerManager(of_worker(settings), Metrics())
    await manager.refresh()
    (test,) = manager._canary_tests.values()
    assert test.limit == pytest.approx(4 * len(CanaryMetric) / canary_test.ALPHA)
    assert manager._cost_test._limit == pytest.approx(4 / cost_test.ALPHA)


async def test_a_choice_says_which_model_its_stage_is_set_for(registry: Registry, manager: ControllerManager) -> None:
    install(registry, CHAMPION, RolloutStage.CHAMPION, "small")
    small, large = [await manager.choose(None, "r", model) for model in ("small", "large")]
    assert (small.stage, small.stage_model) == (RolloutStage.CHAMPION, "small")
    assert (large.stage, large.stage_model) == (RolloutStage.CHAMPION, None)
    assert await manager.choose("cmc", "r", "small") == (Spec("cmc"), None, None)


async def test_a_canary_of_a_model_is_compared_with_that_models_champion_only(
    registry: Registry, manager: ControllerManager, caplog: pytest.LogCaptureFixture
) -> None:
    install(registry, CHAMPION, RolloutStage.CHAMPION)
    install(registry, CANARY, RolloutStage.CANARY, "small")
    other = {CANARY.name: BAD}
    await serve(manager, other, ["large"], 300)  # no canary there
    assert registry.read().own("small").canary == CANARY.digest
    await serve(manager, {CANARY.name: FINE, CHAMPION.name: FINE}, ["small"], 300)
    assert registry.read().own("small").canary == CANARY.digest
    with caplog.at_level(logging.ERROR):
        await serve(manager, other, ["small"], 300)
    assert registry.read().own("small").canary is None
    assert "asc serves all requests for model small" in caplog.text
    line = registry.audit()[-1]
    assert (line["who"], line["action"], line["model"]) == ("watcher", "drop canary", "small")


async def test_bad_champions_of_other_models_do_not_hide_a_bad_canary(
    registry: Registry, manager: ControllerManager
) -> None:
    """Check the comparison: the canary of a model is as bad as another model's champion, but worse than its own."""
    install(registry, CHAMPION, RolloutStage.CHAMPION, "small")
    install(registry, CANARY, RolloutStage.CANARY, "small")
    outcomes = {CANARY.name: BAD, CHAMPION.name: FINE, DEFAULT.name: BAD}
    await serve(manager, outcomes, ["large", "small", "large"], 300)
    assert registry.read().own("small").canary is None


async def test_a_canary_of_the_default_is_rolled_back_for_every_model_it_serves(
    registry: Registry, manager: ControllerManager
) -> None:
    install(registry, CHAMPION, RolloutStage.CHAMPION, "small")
    install(registry, CANARY, RolloutStage.CANARY)
    assert [(await manager.choose(None, "r1", model)).stage_model for model in ("small", "large")] == ["small", None]
    await serve(manager, {CANARY.name: BAD}, ["small", "large", "larger"], 300)
    assert registry.read().default.canary is None
    assert registry.read().own("small").champion == CHAMPION.digest


async def test_a_change_of_one_model_does_not_restart_the_canary_test_of_another(
    registry: Registry, manager: ControllerManager
) -> None:
    install(registry, CANARY, RolloutStage.CANARY, "small")
    await serve(manager, {}, ["small"], 20)
    before = dict(manager._canary_tests)
    install(registry, CHAMPION, RolloutStage.CANARY, "large")
    await serve(manager, {}, ["small"], 1)
    assert manager._canary_tests["small"] is before["small"]
    install(registry, CHAMPION, RolloutStage.CHAMPION)  # the champion that the canary is compared with
    await serve(manager, {}, ["small"], 1)
    assert manager._canary_tests["small"] is not before["small"]


async def test_feedback_counts_for_the_canary_of_its_model_only(registry: Registry, manager: ControllerManager) -> None:
    install(registry, CANARY, RolloutStage.CANARY, "small")
    await serve(manager, {}, ["small", "large"], 1)
    for _ in range(300):
        manager.record_feedback(RolloutStage.CHAMPION, DEFAULT.digest, "large", True)
        manager.record_feedback(RolloutStage.CANARY, CANARY.digest, "small", False)
        manager.record_feedback(RolloutStage.CANARY, CANARY.digest, "large", False)
    assert manager.stages.current.of("small").canary == CANARY
    for _ in range(300):
        manager.record_feedback(RolloutStage.CHAMPION, DEFAULT.digest, "small", True)
        manager.record_feedback(RolloutStage.CANARY, CANARY.digest, "small", False)
    assert manager.stages.current.of("small").canary is None
    await manager.close()
    assert registry.read().own("small").canary is None


async def test_a_failing_controller_leaves_every_model_at_once(registry: Registry, manager: ControllerManager) -> None:
    install(registry, CHAMPION, RolloutStage.CHAMPION, "small")
    install(registry, CHAMPION, RolloutStage.CANARY, "large")
    assert await champion(manager, "small") == CHAMPION
    for _ in range(3):
        manager.record_failure(CHAMPION, ControllerError("it raised"))
    assert [manager.champion(model) for model in ("small", "large")] == [DEFAULT, DEFAULT]
    assert manager.stages.current.of("large").canary is None
    await manager.close()
    assert registry.read().staged == frozenset()
    assert registry.read().quarantined == {CHAMPION.digest}


async def test_a_named_controller_is_the_models_own_if_several_have_the_name(
    registry: Registry, manager: ControllerManager
) -> None:
    first, second = Spec("mine", "# 1\n"), Spec("mine", "# 2\n")
    install(registry, first, RolloutStage.CHAMPION, "small")
    install(registry, second, RolloutStage.CHAMPION)
    await manager.stages.refresh()
    assert [manager.find("mine", model) for model in ("small", "large")] == [first, second]
    with pytest.raises(UnknownController, match="mine"):
        manager.find("yours", "small")


async def test_the_configured_controller_is_not_compared_with_itself(
    registry: Registry, manager: ControllerManager
) -> None:
    install(registry, DEFAULT, RolloutStage.CANARY, "small", share=1.0)
    assert (await manager.choose(None, "r", "small")).stage is RolloutStage.CHAMPION
