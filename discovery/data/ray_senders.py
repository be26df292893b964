"""Ray workers that send the requests of a collection. What they receive is written by the process that started them.

The admin key is an argument of the workers. It must not be in their runtime environment, which Ray writes to its logs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from discovery.data.collection_client import FailedRequest, ProxyReply, Send, open_client, send_request
from discovery.ray_cluster import check_code, code_digest, own_error, ray_connection

RESTARTS: Final = -1
"""A lost worker is always replaced. Its requests are repeated as failed ones are, within the token budget."""


class RequestSender:
    """Worker that sends any number of requests at the same time."""

    def __init__(self, url: str, key: str) -> None:
        self._client = open_client(url, key)

    async def check(self, digest: str) -> None:
        """Raise EngineError if the worker's code is not that of the process that started it."""
        check_code(digest)

    async def send(self, body: dict[str, Any], cap: int | None) -> ProxyReply | FailedRequest:
        """Send a request as `send_request` does. Raises CollectError."""
        return await send_request(self._client, body, cap)


@contextmanager
def ray_senders(address: str | None, workers: int, most: int, url: str, key: str) -> Iterator[Send]:
    """Start up to `most` workers on a Ray cluster, spread over its nodes, and yield a function that sends from them.

    The cluster is the one at `address`, or a local one of so many `workers`. Raises EngineError.
    """
    with ray_connection(address, workers) as processors:
        import ray
        from ray.exceptions import RayActorError, RayError

        make: Any = ray.remote(max_restarts=RESTARTS, scheduling_strategy="SPREAD")(RequestSender)
        senders = [make.remote(url, key) for _ in range(max(1, min(processors, most)))]
        try:
            ray.get([_check(sender) for sender in senders])
        except RayError as error:
            raise own_error(error) from None
        turns = itertools.cycle(senders)

        async def send(body: dict[str, Any], cap: int | None) -> ProxyReply | FailedRequest:
            sender = next(turns)
            try:
                reply: ProxyReply | FailedRequest = await sender.send.remote(body, cap)
            except RayActorError:
                try:
                    await _check(sender)  # waits until it is replaced
                except RayError as error:
                    raise own_error(error) from None
                return FailedRequest("the Ray worker that had sent the request was lost", tokens=cap or 0)
            except RayError as error:
                raise own_error(error) from None
            return reply

        yield send


def _check(sender: Any) -> Any:
    """Start the check of a worker, which is repeated if the worker is lost and replaced meanwhile."""
    return sender.check.options(max_task_retries=-1).remote(code_digest())
