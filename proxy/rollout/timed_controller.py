"""Wrappers that measure the time of a controller's decisions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from prometheus_client import Histogram

from controllers import Action, Controller, State
from controllers.episode import RemoteController


def timed(controller: Controller | RemoteController, seconds: Histogram) -> Controller | RemoteController:
    """Return the controller, with the time of each decision observed in `seconds`."""
    later = getattr(controller, "decide_later", None)
    return _TimedController(controller, seconds) if later is None else _TimedRemote(later, seconds)  # type: ignore[arg-type]


class _TimedController:
    def __init__(self, controller: Controller, seconds: Histogram) -> None:
        self._controller = controller
        self._seconds = seconds

    def decide(self, state: State) -> Sequence[Action]:
        with self._seconds.time():
            return self._controller.decide(state)


class _TimedRemote:
    def __init__(self, later: Callable[[State], Awaitable[Sequence[Action]]], seconds: Histogram) -> None:
        self._later = later
        self._seconds = seconds

    async def decide_later(self, state: State) -> Sequence[Action]:
        with self._seconds.time():
            return await self._later(state)
