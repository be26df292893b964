"""The runner: what it does with a controller, and with what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from controllers import (
    Action,
    BadFact,
    ControllerError,
    Fact,
    IllegalAction,
    Round,
    State,
    Stop,
    advance,
    answer,
    branch,
    probe,
    run_episode,
    run_sync,
)
from tests.fakes import Scripted, ScriptedEnvironment, chain, episode

CHAINS = [chain("7", 50), chain("8", 60, mark="b")]


def test_rounds_are_reported_as_carried_out() -> None:
    seen: list[Round] = []
    state = episode()
    script = Scripted([branch(), branch()], [probe(0), advance(1, 9)])
    run_sync(run_episode(script, ScriptedEnvironment(CHAINS, 10), state, lambda _, r: seen.append(r)))
    assert [len(r.actions) for r in seen] == [2, 2, 1]
    assert seen[-1] == Round([answer(0)], [])
    assert state.rounds == 3
    assert state.answer == 0  # the label first revealed: the 8 of the finished branch


def test_an_illegal_move_leaves_the_state_as_it_was() -> None:
    state = episode()
    with pytest.raises(IllegalAction):
        run_sync(run_episode(Scripted([branch()], [advance(5)]), ScriptedEnvironment(CHAINS, 10), state))
    assert (state.rounds, state.width, state.stop) == (1, 1, None)


def test_whatever_a_controller_raises_is_its_failure() -> None:
    class Broken:
        def __init__(self, beta: float = 0) -> None: ...

        def decide(self, state: State) -> Sequence[Action]:
            raise KeyError("x")

    with pytest.raises(ControllerError, match="Broken raised KeyError: 'x'"):
        run_sync(run_episode(Broken(), ScriptedEnvironment(CHAINS, 10), episode()))


def test_a_lying_environment_is_found_out() -> None:
    class Liar:
        async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
            return []

    with pytest.raises(BadFact):
        run_sync(run_episode(Scripted([branch()]), Liar(), episode()))


def test_when_nothing_fits_the_cap_the_best_so_far_stands() -> None:
    state = episode(max_tokens=59, branch_tokens=60)
    run_sync(run_episode(Scripted([branch(9)], [branch()]), ScriptedEnvironment(CHAINS, 10), state))
    assert state.stop is Stop.MAX_TOKENS
    assert state.answer == 0
    assert state.spent == 50


def test_run_sync_refuses_what_suspends() -> None:
    async def suspends() -> None:
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="event loop"):
        run_sync(suspends())
