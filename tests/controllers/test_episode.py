"""The controller runner: rounds, illegal actions, failing controllers and environments, and the token cap."""

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
from controllers.voting import plurality
from tests.fakes import Scripted, ScriptedEnvironment, chain, episode

CHAINS = [chain("7", 50), chain("8", 60, mark="b")]


def test_each_round_is_reported_with_its_actions_and_facts() -> None:
    seen: list[Round] = []
    state = episode()
    script = Scripted([branch(), branch()], [probe(0), advance(1, 9)])
    run_sync(run_episode(script, ScriptedEnvironment(CHAINS, 10), state, lambda _, r: seen.append(r)))
    assert [len(r.actions) for r in seen] == [2, 2, 1]
    assert seen[-1] == Round([answer(0)], [])
    assert state.rounds == 3
    assert state.answer == 0  # label 0 is the first answer revealed: 8, of the finished branch


def test_an_illegal_action_raises_and_leaves_the_state_unchanged() -> None:
    state = episode()
    with pytest.raises(IllegalAction):
        run_sync(run_episode(Scripted([branch()], [advance(5)]), ScriptedEnvironment(CHAINS, 10), state))
    assert (state.rounds, state.width, state.stop) == (1, 1, None)


def test_an_exception_of_a_controller_becomes_a_controller_error() -> None:
    class Broken:
        def __init__(self, beta: float = 0) -> None: ...

        def decide(self, state: State) -> Sequence[Action]:
            raise KeyError("x")

    line = Broken.decide.__code__.co_firstlineno + 1
    with pytest.raises(ControllerError, match=rf"Broken raised KeyError: 'x' \(line {line}\)$"):
        run_sync(run_episode(Broken(), ScriptedEnvironment(CHAINS, 10), episode()))


def test_an_error_below_a_helper_names_the_line_of_the_controllers_file() -> None:
    class Broken:
        def __init__(self, beta: float = 0) -> None: ...

        def decide(self, state: State) -> Sequence[Action]:
            return [answer(plurality(None))]  # type: ignore[arg-type]

    line = Broken.decide.__code__.co_firstlineno + 1
    with pytest.raises(ControllerError, match=rf"Broken raised \w+: .* \(line {line}\)$"):
        run_sync(run_episode(Broken(), ScriptedEnvironment(CHAINS, 10), episode()))


def test_an_environment_that_omits_facts_is_refused() -> None:
    class Liar:
        async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
            return []

    with pytest.raises(BadFact):
        run_sync(run_episode(Scripted([branch()]), Liar(), episode()))


def test_when_no_action_fits_the_cap_the_leader_is_the_answer() -> None:
    state = episode(max_tokens=59, branch_tokens=60)
    run_sync(run_episode(Scripted([branch(9)], [branch()]), ScriptedEnvironment(CHAINS, 10), state))
    assert state.stop is Stop.MAX_TOKENS
    assert state.answer == 0
    assert state.spent == 50


def test_run_sync_refuses_a_coroutine_that_suspends() -> None:
    async def suspends() -> None:
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="event loop"):
        run_sync(suspends())
