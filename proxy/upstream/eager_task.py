"""Start work at once instead of at the next turn of the event loop, which under load is milliseconds later."""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine, Generator
from types import coroutine
from typing import Any

import aiohttp

from proxy.tested_versions import has_tested_internals


def start_eagerly(work: Awaitable[None]) -> Awaitable[None] | None:
    """Run `work` until it first waits. Return the rest as an awaitable, or None if `work` is done."""
    steps = work.__await__()
    try:
        awaited = next(steps)
    except StopIteration:
        return None
    return _rest(awaited, steps)


@coroutine
def _rest(awaited: Any, steps: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
    try:
        while True:
            try:
                yield awaited
            except GeneratorExit:
                steps.close()
                raise
            except BaseException as error:
                awaited = steps.throw(error)
            else:
                awaited = next(steps)
    except StopIteration:
        return


class EagerPayload(aiohttp.BytesPayload):
    """Body of a request whose time to first byte matters, as it does for streams."""


class EagerClientRequest(aiohttp.ClientRequest):
    """Request whose body, if it is an EagerPayload, is sent together with its head.

    aiohttp writes the body in a task, which before Python 3.12 starts only at the next turn of the event loop. For
    other bodies that is preferable: the upstream then receives several requests at once.
    """

    def write_bytes(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, None]:
        work = super().write_bytes(*args, **kwargs)
        return _finish(start_eagerly(work)) if isinstance(self.body, EagerPayload) else work


def client_request_class() -> type[aiohttp.ClientRequest]:
    """Return EagerClientRequest, or aiohttp's own class if the installed aiohttp was not tested."""
    return EagerClientRequest if has_tested_internals("aiohttp") else aiohttp.ClientRequest


async def _finish(unfinished: Awaitable[None] | None) -> None:
    if unfinished is not None:
        await unfinished
