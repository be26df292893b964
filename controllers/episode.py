"""The one runner, live and in replay."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from controllers.actions import Action, Fact
from controllers.environment import Environment
from controllers.errors import ControllerError
from controllers.state import State, Stop

T = TypeVar("T")


class Controller(Protocol):
    """A policy with one dial. One object serves one episode."""

    def __init__(self, beta: float) -> None:
        """`beta` in [0, 1]; a larger one spends more. Raises BetaError."""

    def decide(self, state: State) -> Sequence[Action]:
        """The next round: a legal, non-empty list. It must be a function of this episode's states alone."""
        ...


Factory = Callable[[float], Controller]
"""Makes a fresh controller for one episode from its β. Raises BetaError."""


class Round(NamedTuple):
    """One round as it was carried out: what a trace is made of."""

    actions: Sequence[Action]
    facts: Sequence[Fact]


async def run_episode(
    controller: Controller,
    environment: Environment,
    state: State,
    on_round: Callable[[State, Round], None] | None = None,
) -> State:
    """Run `controller` until `state` stops, and return it.

    Raises IllegalAction on a forbidden move, ControllerError if `decide` raises, and whatever `execute` raises;
    `state` is then as the last whole round left it, and the caller may `end` it.
    """
    while state.stop is None:
        actions = _decide(controller, state)
        state.check(actions)
        actions = state.affordable(actions)
        if not actions:
            state.end(Stop.MAX_TOKENS)
            break
        facts = await environment.execute(actions)
        state.apply(actions, facts)
        if on_round is not None:
            on_round(state, Round(actions, facts))
    return state


def _decide(controller: Controller, state: State) -> Sequence[Action]:
    try:
        return controller.decide(state)
    except (
        Exception,
        SystemExit,
    ) as error:  # a controller is foreign code: whatever it raises is its failure, not ours
        raise ControllerError(f"{type(controller).__name__} raised {type(error).__name__}: {error}") from error


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """Finish a coroutine that never suspends, without an event loop: replay needs no second runner."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise RuntimeError("the environment suspended; run the episode in an event loop")
