"""Observer of requests to the upstream, which counts and traces them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from controllers import Action
from proxy.types import Call


class ObservedRequest(NamedTuple):
    """A request to the upstream that an observer follows to its end."""

    on_end: Callable[[int | None, BaseException | None], object]
    """Called once with the response's status, if there is one, and the error, if there is one."""
    headers: Mapping[str, str]  # to send with the request


class UpstreamObserver:
    """Receives events about requests to the upstream. This base class ignores them all."""

    def request(self, method: str, path: str) -> ObservedRequest | None:
        """Observe a request that is neither a generation nor a health check. Return None to ignore its end."""
        return None

    def generation(self, model: str, call: Call) -> AbstractContextManager[object]:
        """Return a context to run one generation in."""
        return nullcontext()

    def passed_through(self, model: str, status: int | None, error: BaseException | None) -> None:
        """Observe the end of a generation that was passed through: its status, if any, and its error, if any."""

    def round(self, actions: Sequence[Action]) -> AbstractContextManager[object]:
        """Return a context to run one round of actions in."""
        return nullcontext()

    def headers(self) -> Mapping[str, str]:
        """Return headers to send with a generation. Called inside the context of `generation`."""
        return {}
