"""Server that answers with the bytes of a test, whatever they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Final

import aiohttp

from proxy.upstream.connections.pooled_request import PooledRequests, UpstreamResponse

OK: Final = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=5)


class ScriptedServer:
    """Server that answers the requests of each connection with the next of `answers`. It keeps heads and bodies."""

    def __init__(self, answers: Sequence[bytes], *, closes: bool = False) -> None:
        self.connections = 0
        self.requests: list[bytes] = []
        self.url = ""
        self._answers = list(answers)
        self._closes = closes  # close the connection after each answer
        self._writers: list[asyncio.StreamWriter] = []

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[ScriptedServer]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for writer in self._writers:
                writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        while self._answers:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                return
            _, _, length = head.lower().partition(b"content-length: ")
            body = await reader.readexactly(int(length.split(b"\r\n")[0] or 0))
            self.requests.append(head + body)
            writer.write(self._answers.pop(0))
            if self._closes:
                writer.close()


async def post(
    requests: PooledRequests,
    headers: Mapping[str, str] = MappingProxyType({}),
    body: bytes = b"{}",
    path: str = "/v1/embeddings",
) -> UpstreamResponse:
    return await requests.send("POST", path, lambda: body, headers=headers)
