"""The episode runner, used live and in replay."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from traceback import walk_tb
from typing import Any, Protocol, TypeVar

from controllers.actions import Action, Fact
from controllers.environment import Environment
from controllers.errors import ControllerError
from controllers.state import Round, State, Stop

T = TypeVar("T")


class Controller(Protocol):
    """A policy with one parameter, β. One object serves one episode."""

    def __init__(self, beta: float) -> None:
        """Create a controller for `beta` in [0, 1]; a larger β spends more. Raises BetaError."""

    def decide(self, state: State) -> Sequence[Action]:
        """Return the next round, a legal and non-empty list. It must depend on this episode's states only."""
        ...


class RemoteController(Protocol):
    """A controller in another process. Other episodes continue while it decides."""

    def decide_later(self, state: State) -> Awaitable[Sequence[Action]]:
        """Decide like `Controller.decide`. Raises ControllerError."""
        ...


Factory = Callable[[float], Controller]
"""Creates a controller for one episode from its β. Raises BetaError."""


async def run_episode(
    controller: Controller | RemoteController,
    environment: Environment,
    state: State,
    on_round: Callable[[State, Round], None] | None = None,
) -> State:
    """Run `controller` until `state` stops, and return it.

    Raises IllegalAction for an illegal action, ControllerError if `decide` raises, and the exceptions of `execute`. The
    state is then as after the last complete round. The caller may `end` it, or let another controller continue.
    """
    later: Callable[[State], Awaitable[Sequence[Action]]] | None = getattr(controller, "decide_later", None)
    carry_out: Callable[[Sequence[Action]], Sequence[Fact]] | None = getattr(environment, "carry_out", None)
    while state.stop is None:
        actions = _decide(controller, state) if later is None else await later(state)
        state.check(actions)
        actions = state.affordable(actions)
        if not actions:
            state.end(Stop.MAX_TOKENS)
            break
        facts = await environment.execute(actions) if carry_out is None else carry_out(actions)
        state.apply(actions, facts)
        if on_round is not None and state.last is not None:
            on_round(state, state.last)
    return state


def _decide(controller: Any, state: State) -> Sequence[Action]:
    try:
        return controller.decide(state)  # type: ignore[no-any-return]
    except ControllerError:
        raise
    except (
        Exception,
        SystemExit,
    ) as error:  # a controller is foreign code, and any error is its own
        raise ControllerError(complaint(controller, error)) from error


def complaint(controller: object, error: BaseException) -> str:
    """Return the message for an error that a controller raised; that of an IllegalAction is used as it is."""
    if isinstance(error, ControllerError):
        return str(error)
    line = _line_in_file(controller, error)
    place = "" if line is None else f" (line {line})"
    return f"{type(controller).__name__} raised {type(error).__name__}: {error}{place}"


def _line_in_file(controller: object, error: BaseException) -> int | None:
    """Return the innermost line of the controller's own file that the error passed through; None if there is none."""
    lines = [
        number
        for frame, number in walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == type(controller).__module__
    ]
    return lines[-1] if lines else None


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends, without an event loop. Replay uses the same runner this way."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise RuntimeError("the environment suspended; run the episode in an event loop")
