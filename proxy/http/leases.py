"""Callbacks that run when a request ends, such as those that release its slot."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class Leases(ExitStack):
    """An ExitStack of callbacks without arguments only. It is several times faster, and every request has one."""

    def __init__(self) -> None:
        self._releases: list[Callable[[], Any]] = []

    def callback(self, callback: Callable[[], Any], /) -> Callable[[], Any]:  # type: ignore[override]
        """Run `callback` at the end, before all that were added earlier."""
        self._releases.append(callback)
        return callback

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        self.close()
        return False

    def close(self) -> None:
        """Run the callbacks, each once. All of them run, and then the first error is raised."""
        while self._releases:
            try:
                self._releases.pop()()
            except BaseException:
                self.close()
                raise


class LeaseResponse(Response):
    """Response that releases the leases of its request once it is sent or has failed."""

    def __init__(self, response: Response, leases: Leases) -> None:
        self.response = response
        self.leases = leases

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.leases:
            await self.response(scope, receive, send)


async def with_leases(request: Request, endpoint: Callable[[Request], Awaitable[Response]]) -> LeaseResponse:
    """Call an endpoint. The leases of its request are released once the response is sent, or if there is none."""
    leases = request.state.leases = Leases()
    try:
        response = await endpoint(request)
    except BaseException:
        leases.close()
        raise
    return LeaseResponse(response, leases)
