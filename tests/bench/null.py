"""Backend that does no work, and a minimal FastAPI proxy to it: the references for forwarding.

python -m tests.bench.null backend PORT
python -m tests.bench.null bare PORT BACKEND
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import uvicorn
import uvloop
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

EVENTS, APART_S = 40, 0.005
MODELS = {"object": "list", "data": [{"id": "null", "object": "model", "max_model_len": 4096}]}
MESSAGE = {"role": "assistant", "content": "nothing"}
REPLY = {
    "id": "chatcmpl-null",
    "object": "chat.completion",
    "created": 0,
    "model": "null",
    "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}
CHUNK = {"id": "chatcmpl-null", "object": "chat.completion.chunk", "created": 0, "model": "null"}


def _json(value: object) -> bytes:
    data = json.dumps(value).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)


def _event(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return _chunk(b"data: " + json.dumps({**CHUNK, "choices": [choice]}).encode() + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
FIRST = HEAD + _event({"role": "assistant", "content": "x"})
NEXT = _event({"content": "x"})
LAST = _event({}, "stop") + _chunk(b"data: [DONE]\n\n") + _chunk(b"")
WHOLE, LISTED = _json(REPLY), _json(MODELS)


class Backend(asyncio.Protocol):
    """Server with a constant reply or a stream of forty events 5 ms apart. It parses HTTP itself to save time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._received = b""
        self._began = 0.0
        self._sent = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport of the new connection."""
        self._transport = transport  # type: ignore[assignment]  # TCP transports are of the subtype

    def data_received(self, data: bytes) -> None:
        """Reply once a request is complete. A request without Content-Length has no body."""
        self._received += data
        head, gap, body = self._received.partition(b"\r\n\r\n")
        _, _, length = head.lower().partition(b"\r\ncontent-length:")
        if not gap or len(body) < int(length.partition(b"\r\n")[0] or 0):
            return
        self._received = b""
        if head.startswith(b"GET /v1/models"):
            self._transport.write(LISTED)
        elif b'"stream":true' in body or b'"stream": true' in body:
            self._began, self._sent = self._loop.time(), 0
            self._tick()
        else:
            self._transport.write(WHOLE)

    def _tick(self) -> None:
        """Send the next event. Times are fixed in advance, so a late event does not delay the following ones."""
        if self._transport.is_closing():
            return
        self._sent += 1
        self._transport.write(FIRST if self._sent == 1 else NEXT if self._sent < EVENTS else LAST)
        if self._sent < EVENTS:
            self._loop.call_at(self._began + self._sent * APART_S, self._tick)


async def backend(port: int) -> None:
    """Serve until killed."""
    server = await asyncio.get_running_loop().create_server(Backend, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def bare(upstream: str) -> FastAPI:
    """Return a proxy of FastAPI and aiohttp without further features."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            app.state.session = session
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.body()
        session: aiohttp.ClientSession = request.app.state.session
        reply = await session.post(
            f"{upstream}/v1/chat/completions", data=body, headers={"content-type": "application/json"}
        )
        if json.loads(body).get("stream"):
            return StreamingResponse(reply.content.iter_any(), media_type="text/event-stream")
        return Response(await reply.read(), reply.status, media_type="application/json")

    return app


if __name__ == "__main__":
    kind, port = sys.argv[1], int(sys.argv[2])
    if kind == "backend":
        uvloop.run(backend(port))
    else:
        uvicorn.run(
            bare(sys.argv[3]), port=port, http="httptools", loop="uvloop", access_log=False, log_level="warning"
        )
