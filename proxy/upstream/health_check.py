"""Health check that tells an upstream that is down from one that failed a single client's request.

The check generates one token, because a server can report that it is healthy while it generates nothing. If that times
out, the server's own counters show whether it is stuck or busy with other requests.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final

import aiohttp

from proxy.errors import UpstreamProtocolError
from proxy.upstream.response_body import MAX_PAGE_BYTES, parse_object, read_body

logger = logging.getLogger(__name__)

ANSWER_S: Final = 5.0
"""Timeout in seconds of each request of a check."""
ATTEMPTS: Final = 2
"""Maximum number of attempts if a check times out."""
COUNTERS: Final = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")
"""Counters of vLLM that grow while it processes tokens."""
_ERROR: Final = int(HTTPStatus.INTERNAL_SERVER_ERROR)
_NOT_IMPLEMENTED: Final = int(HTTPStatus.NOT_IMPLEMENTED)


def is_failure(status: int) -> bool:
    """Return whether a status means that the upstream failed. 501 does not: it reports a missing feature."""
    return status >= _ERROR and status != _NOT_IMPLEMENTED


def log_change(addresses: Sequence[str], was_up: bool | None, is_up: bool, consequence: str) -> None:
    """Log that an upstream went down, and what follows from it, or that it is up again. `was_up` is None at first.

    There may be several `addresses`: they are up if one of them is.
    """
    several, name = len(addresses) > 1, ", ".join(addresses)
    if was_up is not False and not is_up:
        logger.warning("%s %s is down; %s", "every upstream of" if several else "upstream", name, consequence)
    elif was_up is False and is_up:
        logger.warning("%s %s is up again", "at least one upstream of" if several else "upstream", name)


class HealthCheck:
    """Health check of one upstream. Its requests bypass the circuit breaker."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=ANSWER_S, sock_connect=session.timeout.sock_connect)

    async def is_up(self) -> bool:
        """Return whether the upstream generates. A timeout is retried once: other requests may keep it busy."""
        for _ in range(ATTEMPTS):
            try:
                return await self._generates()
            except TimeoutError:
                continue
            except (aiohttp.ClientError, UpstreamProtocolError):
                return False
        return False

    async def answers(self) -> bool:
        """Return whether `/health` answers, which does not show that the upstream generates."""
        try:
            return not is_failure((await self._ask("GET", "/health"))[0])
        except (aiohttp.ClientError, TimeoutError, UpstreamProtocolError):
            return False

    async def _generates(self) -> bool:
        """Return whether the upstream generates. Raises TimeoutError, ClientError or UpstreamProtocolError."""
        if is_failure((await self._ask("GET", "/health"))[0]):
            return False
        status, body = await self._ask("GET", "/v1/models")
        if is_failure(status):
            return False
        name = _first_model(status, body)
        if name is None:
            return True  # there is no model to generate with
        before = await self._token_count()
        request = {"model": name, "prompt": "1", "max_tokens": 1, "temperature": 0, "stream": True}
        try:
            status, body = await self._ask("POST", "/v1/completions", json=request)
        except TimeoutError:
            if await self._token_count() > before:
                return True
            raise
        return not is_failure(status) if status != HTTPStatus.OK else _is_complete(body)

    async def _ask(self, method: str, path: str, **content: Any) -> tuple[int, bytes]:
        request = self._session.request(
            method, self._url + path, timeout=self._timeout, allow_redirects=False, **content
        )
        async with request as response:
            return response.status, await read_body(response, MAX_PAGE_BYTES)

    async def _token_count(self) -> float:
        """Return the tokens that the upstream has read and generated; 0 if it does not report them."""
        try:
            status, page = await self._ask("GET", "/metrics")
        except (aiohttp.ClientError, TimeoutError, UpstreamProtocolError):
            return 0.0
        lines = page.decode("utf-8", "replace").splitlines() if status == HTTPStatus.OK else []
        values = [_number(line) for line in lines if line.startswith(COUNTERS)]
        return sum(value for value in values if math.isfinite(value))


def _is_complete(stream: bytes) -> bool:
    """Return whether a stream of events is complete and contains no error. Raises UpstreamProtocolError."""
    payloads = [line[5:].strip() for line in stream.splitlines() if line.startswith(b"data:")]
    if not payloads or payloads.pop() != b"[DONE]":
        return False
    return all("error" not in parse_object(payload) for payload in payloads)


def _number(line: str) -> float:
    """Return the value in a line of the Prometheus text format; NaN if there is none."""
    try:
        return float(line.rpartition(" ")[2])
    except ValueError:
        return math.nan


def _first_model(status: int, body: bytes) -> str | None:
    """Return the first model of a list of models, or None if the body is no such list."""
    cards = parse_object(body).get("data") if status == HTTPStatus.OK else None
    card = cards[0] if isinstance(cards, list) and cards else None
    name = card.get("id") if isinstance(card, dict) else None
    return name if isinstance(name, str) else None
