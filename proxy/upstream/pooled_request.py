"""Send a request over a connection of aiohttp's pool, without the work of aiohttp's session.

The session builds, merges and checks far more than these requests need, which costs more than everything else that the
proxy does for a forwarded one. aiohttp still opens, pools and closes the connections, and its protocol parses the
response and applies its limits and timeouts. The errors are those of the session. This uses internals of aiohttp, so
the session sends the requests with an untested version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Final, NoReturn, Protocol

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

INFORMATIONAL: Final = range(100, 200)
SWITCHING_PROTOCOLS: Final = 101
_CLOSED: Final = aiohttp.ClientConnectionError("Connection closed")


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
    def content(self) -> aiohttp.StreamReader:
        """The body."""

    @property
    def content_length(self) -> int | None:
        """Announced length of the body in bytes, if there is one."""

    @property
    def content_type(self) -> str:
        """Media type without parameters, in lower case."""

    @property
    def connection(self) -> Connection | None:
        """The connection, until the body has been read."""

    def release(self) -> Any:
        """Give the connection back to the pool, or close it if the body has not been read to its end."""


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
        self._heads: dict[tuple[str, ...], str] = {}
        """Lines for those headers, by the method and the names of a request's own. Those names are few: the proxy's."""

    async def send(
        self, method: str, path: str, encode: Callable[[], bytes] | None, *, headers: Mapping[str, str]
    ) -> UpstreamResponse:
        """Send a GET or POST and return the response, with its body unread. Raises what aiohttp raises.

        `encode` builds the request's body.
        """
        connector = self._session.connector
        if connector is None:
            raise RuntimeError("Session is closed")
        template = self._template = self._template or self._create_template()
        serialised = self._serialise(template, method, path, headers, b"" if encode is None else encode())
        try:
            connection = await connector.connect(template, traces=[], timeout=self._timeout)
        except TimeoutError as error:
            raise aiohttp.ConnectionTimeoutError(f"Connection timeout to host {template.url}") from error
        except aiohttp.ClientError:
            raise
        except OSError as error:
            raise aiohttp.ClientOSError(*error.args) from error
        try:
            return await self._exchange(connection, serialised)
        except BaseException:
            connection.close()
            raise

    async def _exchange(self, connection: Connection, request: bytes) -> PooledResponse:
        protocol, transport = connection.protocol, connection.transport
        if protocol is None or transport is None:
            raise aiohttp.ServerDisconnectedError
        protocol.set_response_params(read_until_eof=True, auto_decompress=False, read_timeout=None, timer=None)
        transport.write(request)
        timer = asyncio.get_running_loop().call_later(self._timeout.sock_read or 0, _expire, protocol)
        try:
            while True:
                message, content = await protocol.read()
                if message.code not in INFORMATIONAL or message.code == SWITCHING_PROTOCOLS:
                    return PooledResponse(message.code, message.headers, content, connection)
        except aiohttp.http.HttpProcessingError as error:
            _raise_response_error(self._url, error)
        finally:
            timer.cancel()

    def _create_template(self) -> _Template:
        """Return a request with the session's headers."""
        loop, url, headers = asyncio.get_running_loop(), URL(self._url), CIMultiDict(self._session.headers)
        if url.user or url.password:
            headers["Authorization"] = aiohttp.encode_basic_auth(url.user or "", url.password or "")
        return _Template("GET", url.with_user(None), loop=loop, headers=headers, session=self._session)

    def _serialise(
        self, template: aiohttp.ClientRequest, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> bytes:
        """Return a request's head and body. Its own headers replace those of the template."""
        names = (method, *headers)
        common = self._heads.get(names)
        if common is None:
            fixed = CIMultiDict(template.headers)
            if method == "POST":
                fixed["Content-Type"] = "application/octet-stream"
            for name in headers:
                fixed.popall(name, None)
            common = self._heads[names] = _as_lines(fixed)
        length = f"Content-Length: {len(body)}\r\n" if method == "POST" else ""
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{common}{length}{_as_lines(headers)}\r\n"
        return head.encode() + body


class PooledResponse:
    """Response to a pooled request. Its connection returns to the pool when the body ends."""

    __slots__ = ("connection", "content", "headers", "status")

    def __init__(
        self, status: int, headers: CIMultiDictProxy[str], content: aiohttp.StreamReader, connection: Connection
    ) -> None:
        self.status = status
        self.headers = headers
        self.content = content
        self.connection: Connection | None = connection
        content.on_eof(self._give_back)

    @property
    def ok(self) -> bool:
        """Whether the status is below 400."""
        return self.status < 400

    @property
    def content_length(self) -> int | None:
        """Announced length of the body in bytes, if there is one. aiohttp's parser accepts digits only."""
        length = self.headers.get("content-length")
        return None if length is None else int(length)

    @property
    def content_type(self) -> str:
        """Media type without parameters, in lower case."""
        return self.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()

    def release(self) -> None:
        """Give the connection back to the pool, or close it if the body has not been read to its end."""
        if self.connection is not None:
            if self.content.exception() is None:
                self.content.set_exception(_CLOSED)
            self._give_back()

    def _give_back(self) -> None:
        connection, self.connection = self.connection, None
        if connection is None:
            return
        transport = connection.transport
        if transport is None or transport.get_write_buffer_size():  # it answered before it had read the request
            connection.close()
        else:
            connection.release()


def _expire(protocol: ResponseHandler) -> None:
    """End the wait for the head of a response, with the error that aiohttp uses for silence."""
    protocol.set_exception(aiohttp.SocketTimeoutError("Timeout on reading data from socket"))


def _as_lines(headers: Mapping[str, str]) -> str:
    """Return headers as lines of a head. Raises ValueError for a header that would end its line."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if not lines.count("\r") == lines.count("\n") == len(headers) or "\0" in lines:
        raise ValueError("a header contains a line end or a NUL character")
    return lines


def _raise_response_error(url: str, error: aiohttp.http.HttpProcessingError) -> NoReturn:
    """Raise aiohttp's error for a response that is not HTTP."""
    info = aiohttp.RequestInfo(URL(url), "", CIMultiDictProxy(CIMultiDict()), URL(url))
    raise aiohttp.ClientResponseError(
        info, (), status=error.code, message=error.message, headers=error.headers
    ) from error
