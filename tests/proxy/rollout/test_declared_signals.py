"""Controllers get the signals that they declare, and the upstream is asked for no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from controllers import Action, Advanced, Fact, Limits, Probed, Round, State, advance, answer, branch, probe
from controllers.loading import Spec
from controllers.rollout_state import RolloutStage
from controllers.sandbox.proof import Proof
from controllers.signals import ALL_SIGNALS, NO_SIGNALS, Signal
from proxy.rollout.controller_manager import ControllerManager
from proxy.rollout.declared_signals import DeclaredSignals, hide_undeclared
from proxy.rollout.shadow import DecidedEpisode, compare_decisions
from proxy.rollout.stages import ModelAssignments, StageAssignment
from proxy.settings import load
from proxy.telemetry.metrics import Metrics
from proxy.types import ChosenController
from tests.fakes import MODEL

ADVANCED = Advanced(0, 1, 40, False, None, 900, 700)
PROBED = Probed(0, 0, 9, 800)
PLAIN_ADVANCED, PLAIN_PROBED = Advanced(0, 1, 40, False), Probed(0, 0, 9)
SOURCE = """
from controllers import answer

class Mine:
    signals = {names}

    def __init__(self, beta):
        pass

    def decide(self, state):
        return [answer(state.leader())]
"""


def spec(*names: str) -> Spec:
    return Spec("mine", SOURCE.format(names=names))


@pytest.mark.parametrize(
    ("declared", "visible"),
    [
        (NO_SIGNALS, [PLAIN_ADVANCED, PLAIN_PROBED]),
        ({Signal.INTERVALS}, [ADVANCED, PLAIN_PROBED]),
        ({Signal.PROBES}, [PLAIN_ADVANCED, PROBED]),
        (ALL_SIGNALS, [ADVANCED, PROBED]),
    ],
)
async def test_undeclared_signals_are_hidden(declared: set[Signal], visible: list[Fact]) -> None:
    class Measured:
        async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
            return [ADVANCED, PROBED]

    environment = DeclaredSignals(Measured(), frozenset(declared))
    assert await environment.execute([branch(), probe(0)]) == visible
    assert environment.measured == [ADVANCED, PROBED]
    assert hide_undeclared([PLAIN_ADVANCED, PLAIN_PROBED], frozenset(declared)) == [PLAIN_ADVANCED, PLAIN_PROBED]


@pytest.mark.parametrize("declared", [NO_SIGNALS, ALL_SIGNALS])
async def test_a_shadow_decides_on_the_signals_that_it_declares(declared: frozenset[Signal]) -> None:
    seen: list[int | None] = []

    class Shadow:
        async def decide_later(self, state: State) -> Sequence[Action]:
            seen.extend(known.confidence for known in state.branches)
            return next(decisions)

    decisions: Iterator[list[Action]] = iter([[branch()], [advance(0)], [answer(None)]])
    rounds = [Round([branch()], [ADVANCED]), Round([advance(0)], [Advanced(0, 1, 40, False, None, 900, 700)])]
    agreed: list[bool] = []
    await compare_decisions(Shadow(), declared, DecidedEpisode(1, Limits(40), rounds), agreed.append)
    assert agreed == [True, True]
    assert seen == [900 if declared else None]


class Sealed(Proof):
    """Proof of a machine that can seal controllers."""

    @property
    def sealed(self) -> bool:
        return True


def manager(champion: Spec, shadow: Spec | None = None, *, is_sealed: bool = True) -> ControllerManager:
    made = ControllerManager(load(upstream="http://127.0.0.1:9"), Metrics())
    made.stages.current = ModelAssignments(StageAssignment(champion, shadow=shadow))
    made.sandboxes._proof = Sealed() if is_sealed else Proof()
    return made


def test_an_episode_needs_the_signals_of_its_controller_and_of_its_shadow() -> None:
    plain, intervals, probes = spec(), spec("intervals"), spec("probes")
    champion = ChosenController(intervals, RolloutStage.CHAMPION)
    assert manager(intervals).signals_for(champion, MODEL) == {Signal.INTERVALS}
    assert manager(intervals, probes).signals_for(champion, MODEL) == ALL_SIGNALS
    assert manager(plain, probes).signals_for(ChosenController(plain, RolloutStage.CHAMPION), MODEL) == {Signal.PROBES}
    for stage in (RolloutStage.CANARY, None):  # a shadow is compared with the champion only
        assert manager(plain, probes).signals_for(ChosenController(plain, stage), MODEL) == NO_SIGNALS


def test_a_shadow_that_may_not_run_needs_no_signals() -> None:
    plain, probes = spec(), spec("probes")
    champion = ChosenController(plain, RolloutStage.CHAMPION)
    assert manager(plain, probes, is_sealed=False).signals_for(champion, MODEL) == NO_SIGNALS
    stopped = manager(plain, probes)
    stopped.quarantined.add(probes.digest)
    assert stopped.signals_for(champion, MODEL) == NO_SIGNALS
