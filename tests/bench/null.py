"""A backend that does nothing, and the barest pass-through to it: what the proxy's own pass-through is held against.

python -m tests.bench.null backend PORT
python -m tests.bench.null bare PORT BACKEND
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import uvicorn
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
EVENT = b"data: " + json.dumps({**CHUNK, "choices": [{"index": 0, "delta": {"content": "x"}}]}).encode() + b"\n\n"


async def backend(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app: the same reply to everything, or forty events five milliseconds apart."""
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    stream = b'"stream":true' in body or b'"stream": true' in body
    kind = b"text/event-stream" if stream else b"application/json"
    headers = [(b"content-type", kind)]
    if not stream:
        data = json.dumps(MODELS if scope["path"] == "/v1/models" else REPLY).encode()
        headers.append((b"content-length", str(len(data)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data})
        return
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(EVENTS):
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        await asyncio.sleep(APART_S)
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def bare(upstream: str) -> FastAPI:
    """FastAPI and aiohttp, and nothing else."""

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
    made: Any = backend if sys.argv[1] == "backend" else bare(sys.argv[3])
    uvicorn.run(made, port=int(sys.argv[2]), http="httptools", loop="uvloop", access_log=False, log_level="warning")
