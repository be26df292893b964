"""Send requests to one upstream, with timeouts, retries, the circuit breaker and health checks.

Errors of aiohttp are mapped here: callers see kinds of UpstreamError only. `retry.py` holds the retry policy, and
`circuit_breaker.py` decides when requests are refused.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from copy import copy
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from proxy.errors import (
    UpstreamCircuitOpen,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
    detail,
)
from proxy.telemetry.logs import log_fault
from proxy.tested_versions import has_tested_internals
from proxy.upstream import retry
from proxy.upstream.circuit_breaker import BackgroundBreaker, Breaker
from proxy.upstream.connections.pooled_request import PooledRequests, UpstreamResponse
from proxy.upstream.health_check import HealthCheck, is_failure
from proxy.upstream.relayed_body import RelayedBody
from proxy.upstream.response_body import MAX_PAGE_BYTES, parse_object, read_body
from proxy.upstream_observer import ObservedRequest, UpstreamObserver

logger = logging.getLogger(__name__)

CHECK_S: Final = 5.0
"""Timeout in seconds of a check, and of a request that waits for a running health check."""
OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
"""Connection errors caused by this machine, which has no resources for another connection."""

_Send = Callable[[], Awaitable[UpstreamResponse]]


class UpstreamTransport:
    """HTTP transport to one upstream. Every method raises a kind of UpstreamError and nothing else."""

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        *,
        read_timeout_s: float,
        breaker: Breaker,
        observer: UpstreamObserver,
        on_event: Callable[[str], object],
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")  # a password in it is sent as basic authentication
        self.display_url = _without_user(self._url)  # without credentials, for logs and clients
        self._session = session
        self.read_timeout_s = read_timeout_s  # seconds without a byte after which a response times out
        connect = session.timeout.sock_connect
        self._head_s = read_timeout_s + CHECK_S  # limits a name server, and a head that arrives slowly
        self._timeout = aiohttp.ClientTimeout(connect=self._head_s, sock_connect=connect, sock_read=read_timeout_s)
        self._check_timeout = aiohttp.ClientTimeout(total=CHECK_S, sock_connect=connect, sock_read=read_timeout_s)
        self.breaker = breaker
        self.observer = observer
        self._on_event = on_event  # called with "retried" and "ejected"
        self._retry_budget = retry.RetryBudget()
        self._health_check = HealthCheck(self._url, session)
        self._pooled = PooledRequests(self._url, session, self._timeout) if has_tested_internals("aiohttp") else None
        self._checking: asyncio.Task[None] | None = None

    def for_background(self) -> UpstreamTransport:
        """Return a transport to the same upstream whose failures and retries do not affect other requests."""
        other = copy(self)
        other.breaker, other._retry_budget = BackgroundBreaker(), retry.RetryBudget()
        return other

    async def close(self) -> None:
        """Cancel a health check that is under way."""
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)

    def reset(self) -> None:
        """Forget all failures: the upstream has been restarted."""
        if self._checking is not None:
            self._checking.cancel()
        self.breaker.reset()

    # Health checks

    async def check(self, seconds: float | None = None) -> None:
        """Run a health check, or join the one under way. Returns after `seconds` at the latest."""
        await asyncio.wait([self._begin_check()], timeout=seconds)

    async def try_to_close(self) -> None:
        """If the circuit breaker is open and the upstream seems to be back, let a health check close it."""
        if not self.breaker.is_closed:
            has_answered = await self._health_check.answers()
            if self.breaker.note_answer(has_answered=has_answered):
                await self.check(CHECK_S)

    def _begin_check(self) -> asyncio.Task[None]:
        if self._checking is None or self._checking.done():
            self.breaker.begin_check()
            self._checking = asyncio.create_task(self._check())
        return self._checking

    async def _check(self) -> None:
        try:
            is_up = await self._health_check.is_up()
        except Exception as error:  # otherwise the breaker would stay half open
            log_fault(logger, error)
            is_up = False
        was_closed = self.breaker.is_closed
        if self.breaker.end_check(is_up=is_up):
            self._report_open()
        elif is_up and was_closed:
            logger.warning("upstream %s failed several requests in a row but passes the health check", self.display_url)
        elif is_up:
            logger.warning("upstream %s generates again; the circuit breaker has closed", self.display_url)

    def _report_open(self) -> None:
        self._on_event("ejected")
        logger.error(
            "upstream %s is down; the circuit breaker stays open for %.0f s, or until it answers again",
            self.display_url,
            self.breaker.wait_s,
        )

    # Requests

    def request(
        self,
        method: str,
        path: str,
        *,
        is_check: bool = False,
        is_generation: bool = False,
        is_observed: bool = True,
        encode: Callable[[], bytes] | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
        generated_by: str = "",
        relayed: RelayedBody | None = None,
    ) -> _Exchange:
        """Return a context manager around the upstream's response. Leaving it closes an unread response.

        A check is not retried, does not count for the circuit breaker and is not observed. `is_generation` says that a
        success proves to the breaker that the upstream generates, and so does `generated_by`: the model of a generation
        that is passed through, which the observer counts by its outcome. `encode` builds the body. It is called for
        each attempt, so that a large body is not kept until the response ends. `relayed` is a body that is passed
        through: it builds itself, and learns of each attempt that fails.
        """
        encode = encode if relayed is None else relayed.encode
        if is_check or self._pooled is None:
            timeouts = self._check_timeout if is_check else self._timeout
            send = partial(self._send_request, method, path, encode, headers=headers, timeouts=timeouts)
        else:
            send = partial(self._pooled.send, method, path, encode, headers=headers)
        observed_path = path if is_observed and not is_check else ""
        is_generation = is_generation or bool(generated_by)
        return _Exchange(self, send, is_check, is_generation, method, observed_path, generated_by, relayed)

    async def _send_request(
        self,
        method: str,
        path: str,
        encode: Callable[[], bytes] | None,
        *,
        headers: Mapping[str, str],
        timeouts: aiohttp.ClientTimeout,
    ) -> UpstreamResponse:
        """Send a request through aiohttp's session."""
        body = None if encode is None else encode()
        url = self._url + path
        async with asyncio.timeout(self._head_s):
            return await self._session.request(
                method, url, data=body or None, headers=headers, timeout=timeouts, allow_redirects=False
            )

    async def request_json(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        is_check: bool = False,
        is_observed: bool = True,
        max_bytes: int,
    ) -> dict[str, Any]:
        """Send the JSON `body` and return the JSON object of the response, of at most `max_bytes`."""
        encode = None if body is None else lambda: body
        headers = {} if body is None else {"content-type": "application/json"}
        async with self.request(
            method, path, is_check=is_check, is_observed=is_observed, encode=encode, headers=headers
        ) as response:
            await self.raise_for_status(response)
            reply = self.parse(await read_body(response, max_bytes, self.read_timeout_s))
            if reply.get("error"):
                raise self.refusal(response.status, reply)
        return reply

    async def send(self, send: _Send, *, is_check: bool, relayed: RelayedBody | None) -> UpstreamResponse:
        """Send a request and return the response, with its body unread. Retries as `retry.py` says.

        Raises UpstreamCircuitOpen, or what aiohttp raises.
        """
        await self._wait_for_breaker()
        self._retry_budget.earn()
        for pause in (*(() if is_check else retry.RETRY_PAUSES_S), None):
            failure: Exception | None = None
            try:
                response = await send()
            except retry.NO_RESPONSE_ERRORS as error:
                failure = error
            if failure is None and not is_failure(response.status):
                break
            if not is_check:
                self.record_failure(failure)
            is_unprocessed = failure is None and response.status in retry.UNPROCESSED_STATUSES
            if relayed is not None:
                relayed.note_failure(is_unprocessed=is_unprocessed or isinstance(failure, retry.UNSENT_ERRORS))
            if failure is None and not is_unprocessed:
                break
            if pause is None or not self.breaker.is_closed or not self._retry_budget.spend():
                break
            if failure is None:
                response.release()
            self._on_event("retried")
            await asyncio.sleep(pause)
            await self._wait_for_breaker()
        if failure is not None:
            raise failure
        return response

    async def _wait_for_breaker(self) -> None:
        """Run a health check if one is due. Raises UpstreamCircuitOpen unless requests may then go out."""
        if self.breaker.is_due:
            await self.check(CHECK_S)
        if not self.breaker.is_closed:
            message = f"upstream {self.display_url} failed repeatedly and its circuit breaker is open; retry later"
            raise UpstreamCircuitOpen(message, after=self.breaker.retry_s)

    def record_failure(self, error: BaseException | None = None) -> None:
        """Count a request that failed with `error` or with an error status. This may start a health check."""
        if isinstance(error, aiohttp.ClientConnectorError) and error.errno in OUT_OF_RESOURCES:
            return
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            if self.breaker.fail_to_connect():
                self._report_open()
        elif self.breaker.suspect():
            self._begin_check()

    # Errors

    def check_head(self, response: UpstreamResponse) -> None:
        """Raise UpstreamProtocolError for a response that can neither be read nor forwarded."""
        encoding = response.headers.get("content-encoding", "identity").lower()
        if encoding != "identity":
            raise self.protocol_error(f"sent content-encoding {encoding[:40]!r}, which was not requested")
        if not 200 <= response.status < 600:
            raise self.protocol_error(f"returned the invalid status {response.status}")

    def protocol_error(self, problem: str) -> UpstreamProtocolError:
        """Return the error "upstream URL `problem`"."""
        return UpstreamProtocolError(f"upstream {self.display_url} {problem}")

    def map_error(self, error: Exception) -> UpstreamError:
        """Return the UpstreamError that stands for an error of aiohttp or asyncio."""
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return UpstreamUnreachable(f"upstream {self.display_url} did not accept the connection in time")
        if isinstance(error, TimeoutError):
            return UpstreamTimeout(f"upstream {self.display_url} sent no data in time")
        if isinstance(error, aiohttp.ClientConnectorError):
            return UpstreamUnreachable(f"cannot connect to upstream {self.display_url}: {error.strerror}")
        is_broken = isinstance(
            error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError | asyncio.IncompleteReadError
        )
        kind = UpstreamDisconnected if is_broken else UpstreamProtocolError
        return kind(f"upstream {self.display_url} broke the connection: {type(error).__name__}")

    async def raise_for_status(self, response: UpstreamResponse) -> None:
        """Raise UpstreamRefused or UpstreamProtocolError for a response with an error status."""
        if response.status >= HTTPStatus.BAD_REQUEST:
            body = await read_body(response, MAX_PAGE_BYTES, self.read_timeout_s)
            raise self.refusal(response.status, self.parse(body))

    def parse(self, payload: bytes) -> dict[str, Any]:
        """Parse a JSON object. Raises an UpstreamProtocolError that names the upstream."""
        try:
            return parse_object(payload)
        except UpstreamProtocolError as error:
            raise UpstreamProtocolError(f"{self.display_url}: {error}") from None

    def refusal(self, status: int, reply: Mapping[str, Any]) -> UpstreamError:
        """Return the error that the upstream's JSON `reply` reports."""
        if "detail" in reply and "error" not in reply:  # FastAPI's error format
            if status == HTTPStatus.NOT_FOUND:
                return self.protocol_error("returned 404 for a path that vLLM serves; check that it is vLLM")
            return UpstreamRefused(status, detail(reply["detail"]))
        error = reply.get("error", reply)
        message = error.get("message") if isinstance(error, Mapping) else None
        if not isinstance(message, str):
            hint = "; set AUTOTTS_UPSTREAM_API_KEY to its key" if status in (401, 403) else ""
            return self.protocol_error(f"returned status {status} without an error message{hint}")
        if status < HTTPStatus.BAD_REQUEST and isinstance(error.get("code"), int):
            status = error["code"]
        param = error.get("param")
        return UpstreamRefused(status, message, param=param if isinstance(param, str) else None)


@dataclass(eq=False)
class _Exchange(AbstractAsyncContextManager[UpstreamResponse]):
    """One request and its response. Its outcome is reported to the circuit breaker and the observer."""

    _transport: UpstreamTransport
    _send: partial[Any]
    _is_check: bool
    _is_generation: bool
    _method: str
    _observed_path: str  # empty if the request is not observed
    _generated_by: str  # empty if the request is not counted
    _relayed: RelayedBody | None
    _observed: ObservedRequest | None = None
    _response: UpstreamResponse | None = None

    async def __aenter__(self) -> UpstreamResponse:
        if self._observed_path:
            observed = self._transport.observer.request(self._method, self._observed_path)
            if observed is not None:
                self._observed = observed
                self._send = partial(self._send, headers={**self._send.keywords["headers"], **observed.headers})
        try:
            self._response = await self._transport.send(self._send, is_check=self._is_check, relayed=self._relayed)
        except BaseException as error:
            self._fail(error, is_counted=isinstance(error, retry.NO_RESPONSE_ERRORS))
            raise
        try:
            self._transport.check_head(self._response)
        except UpstreamProtocolError as error:
            await self.__aexit__(None, error, None)
            raise
        return self._response

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        response = self._response
        if response is None:
            return
        response.release()  # closes the connection if the body has not been read to its end
        if error is not None:
            self._fail(error, is_counted=is_failure(response.status))
            return
        if not self._is_check and not is_failure(response.status):
            self._transport.breaker.succeed(is_generation=self._is_generation and response.ok)
        if self._generated_by:
            self._transport.observer.passed_through(self._generated_by, response.status, None)
        if self._observed is not None:
            self._observed.on_end(response.status, None)

    def _fail(self, error: BaseException, *, is_counted: bool) -> None:
        """Report a failure, which may be counted already. Raise errors of aiohttp as a kind of UpstreamError."""
        transport, response = self._transport, self._response
        is_foreign = isinstance(error, aiohttp.ClientError | TimeoutError | asyncio.IncompleteReadError)
        is_mappable = is_foreign or isinstance(error, ValueError)
        mapped = transport.map_error(error) if is_mappable and isinstance(error, Exception) else error
        if isinstance(mapped, UpstreamDisconnected):
            mapped.is_unanswered = response is None and isinstance(error, retry.NO_RESPONSE_ERRORS)
        status = None if response is None else response.status
        if self._generated_by:
            transport.observer.passed_through(self._generated_by, status, mapped)
        if self._observed is not None:
            self._observed.on_end(status, mapped)
        is_failed = is_foreign or (response is not None and response.ok and _is_upstream_fault(error))
        if is_failed and not is_counted and not self._is_check:
            transport.record_failure(error)
        if mapped is not error:
            raise mapped from None


def _is_upstream_fault(error: BaseException) -> bool:
    """Return whether an error within a successful response is the upstream's fault."""
    if isinstance(error, UpstreamRefused):
        return is_failure(error.upstream_status)
    return isinstance(error, UpstreamProtocolError)


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
