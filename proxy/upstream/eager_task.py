"""Work begun at once, not the next time around the event loop: under load that is a few milliseconds later."""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine, Generator
from types import coroutine
from typing import Any

import aiohttp


def start_eagerly(work: Awaitable[None]) -> Awaitable[None] | None:
    """Do of `work` what can be done without waiting. What is left of it, if it has to wait. Raises what it raises."""
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
    """The body of a request whose answer is waited for from its first byte on, as a stream's is."""


class EagerClientRequest(aiohttp.ClientRequest):
    """One whose body, if it is urgent, is on its way as soon as its head is.

    aiohttp has a task write it, which before Python 3.12 does not begin until the next time around. Where nothing is
    urgent that is as well: the upstream is sent several at once.
    """

    def write_bytes(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, None]:
        work = super().write_bytes(*args, **kwargs)
        return _finish(start_eagerly(work)) if isinstance(self.body, EagerPayload) else work


async def _finish(left: Awaitable[None] | None) -> None:
    if left is not None:
        await left
