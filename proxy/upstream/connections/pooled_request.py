"""Send requests to one upstream over a pool of connections, without the work of aiohttp's session.

The session builds, merges and checks far more than these requests need, which costs more than everything else that the
proxy does for a forwarded one. aiohttp still opens and closes the connections, and `connection.py` parses the
responses. The errors are those of the session. This uses internals of aiohttp, so the session sends the requests with
an untested version.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Final, Protocol

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from proxy.upstream.connections.connection import UpstreamConnection
from proxy.upstream.connections.content import BodyContent

KEEP_ALIVE_S: Final = 30.0
"""Seconds for which a connection is kept without a request."""


class UpstreamResponse(Protocol):
    """Response of an upstream whose body is unread: aiohttp's own, or that of a PooledRequest."""

    @property
    def status(self) -> int:
        """HTTP status."""

    @property
    def ok(self) -> bool:
        """Whether the status is below 400."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers, whose names are case-insensitive."""

    @property
    def content(self) -> BodyContent:
        """The body."""

    @property
    def content_length(self) -> int | None:
        """Announced length of the body in bytes, if there is one."""

    @property
    def content_type(self) -> str:
        """Media type without parameters, in lower case."""

    def release(self) -> Any:
        """Give the connection back to the pool, or close it if the body has not arrived completely."""


class _Template(aiohttp.ClientRequest):
    """Request that stands for all requests to one upstream. It is never sent."""

    @cached_property
    def connection_key(self) -> Any:
        """The key of its connections in the pool, which aiohttp builds anew each time."""
        return super().connection_key


class PooledRequests:
    """Sends requests to one upstream over the connections of a session."""

    def __init__(self, url: str, session: aiohttp.ClientSession, timeout: aiohttp.ClientTimeout) -> None:
        """`url` has no path. The credentials in it, and the session's headers, are sent with each request.

        `timeout.sock_read` limits the time until the head of a response is complete. It does not limit its body.
        """
        self._url = url
        self._session = session
        self._timeout = timeout
        self._prefix = URL(url).raw_path.rstrip("/")  # of all paths
        self._template: _Template | None = None  # for the pool, and for headers of all requests
        self._free: deque[UpstreamConnection] = deque()  # open connections without a request, longest free first
        self._timer: asyncio.TimerHandle | None = None  # that closes them
        self._heads: dict[tuple[str, ...], str] = {}
        """Lines for those headers, by the method and the names of a request's own. Those names are few: the proxy's."""

    async def send(
        self, method: str, path: str, encode: Callable[[], bytes] | None, *, headers: Mapping[str, str]
    ) -> UpstreamResponse:
        """Send a GET or POST and return the response, with its body unread. Raises what aiohttp raises.

        `encode` builds the request's body, once there is a connection to send it over.
        """
        connector = self._session.connector
        if connector is None:
            raise RuntimeError("Session is closed")
        template = self._template = self._template or self._create_template()
        lines = self._head_lines(template, method, path, headers)
        connection = self._take() or await self._open(connector, template)
        try:
            body = b"" if encode is None else encode()
        except BaseException:
            connection.close()
            raise
        length = f"Content-Length: {len(body)}\r\n" if method == "POST" else ""
        head = connection.send(f"{lines}{length}\r\n".encode() + body)
        timer = asyncio.get_running_loop().call_later(self._timeout.sock_read or 0, connection.expire, head)
        try:
            return await head
        except BaseException:
            if head.cancelled() or head.exception() is not None:
                connection.close()
            else:  # the response came first, and the connection may serve another request already
                head.result().release()
            raise
        finally:
            timer.cancel()

    def _take(self) -> UpstreamConnection | None:
        """Return the connection that was freed last, if there is one that can be used.

        A server is least likely to be about to close that one, and connections that only a burst needed stay unused.
        """
        free, loop = self._free, asyncio.get_running_loop()
        while free:
            connection = free.pop()
            if connection.is_open and loop.time() - connection.free_since <= KEEP_ALIVE_S:
                return connection
            connection.close()
        return None

    async def _open(self, connector: aiohttp.BaseConnector, template: aiohttp.ClientRequest) -> UpstreamConnection:
        """Open a connection, or take one that aiohttp has kept. Raises what aiohttp raises."""
        try:
            opened = await connector.connect(template, traces=[], timeout=self._timeout)
        except TimeoutError as error:
            raise aiohttp.ConnectionTimeoutError(f"Connection timeout to host {template.url}") from error
        except aiohttp.ClientError:
            raise
        except OSError as error:
            raise aiohttp.ClientOSError(*error.args) from error
        try:
            return UpstreamConnection(opened, self._keep)
        except BaseException:
            opened.close()
            raise

    def _keep(self, connection: UpstreamConnection) -> None:
        """Keep a connection for another request."""
        connector = self._session.connector
        if connector is None or connector.limit:  # requests may wait until aiohttp has a connection
            connection.hand_back()
            return
        loop = asyncio.get_running_loop()
        connection.free_since = loop.time()
        self._free.append(connection)
        if self._timer is None:
            self._timer = loop.call_later(KEEP_ALIVE_S, self._close_unused)

    def _close_unused(self) -> None:
        """Close connections that have had no request for KEEP_ALIVE_S seconds, and check again when others will."""
        free, loop = self._free, asyncio.get_running_loop()
        while free and (not free[0].is_open or loop.time() - free[0].free_since >= KEEP_ALIVE_S):
            free.popleft().close()
        due = free[0].free_since + KEEP_ALIVE_S if free else None
        self._timer = None if due is None else loop.call_at(due, self._close_unused)

    def _create_template(self) -> _Template:
        """Return a request with the session's headers."""
        loop, url, headers = asyncio.get_running_loop(), URL(self._url), CIMultiDict(self._session.headers)
        if url.user or url.password:
            headers["Authorization"] = aiohttp.encode_basic_auth(url.user or "", url.password or "")
        return _Template("GET", url.with_user(None), loop=loop, headers=headers, session=self._session)

    def _head_lines(self, template: aiohttp.ClientRequest, method: str, path: str, headers: Mapping[str, str]) -> str:
        """Return a request's head without the length of its body. Its own headers replace those of the template."""
        names = (method, *headers)
        common = self._heads.get(names)
        if common is None:
            fixed = CIMultiDict(template.headers)
            if method == "POST":
                fixed["Content-Type"] = "application/octet-stream"
            for name in headers:
                fixed.popall(name, None)
            common = self._heads[names] = _as_lines(fixed)
        return f"{method} {self._prefix}{path} HTTP/1.1\r\n{common}{_as_lines(headers)}"


def _as_lines(headers: Mapping[str, str]) -> str:
    """Return headers as lines of a head. Raises ValueError for a header that would end its line."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if not lines.count("\r") == lines.count("\n") == len(headers) or "\0" in lines:
        raise ValueError("a header contains a line end or a NUL character")
    return lines
