"""An HTTP relay in front of vLLM that spoils a share of the generation requests."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import aiohttp
from aiohttp import web

from tests.fakes import listening

HOP: Final = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "host"})
"""Headers that are not passed on."""
FAULTS: Final = ("unavailable", "broken", "dropped", "garbage", "cut")


class Relay:
    """Passes requests to `target`. While `share` is above 0, that share of the generation requests is spoilt."""

    def __init__(self, target: str, dice: random.Random) -> None:
        self.target = target
        self.share = 0.0
        self.faults: Counter[str] = Counter()
        self.checks = 0  # completions of one token, by which the proxy tests whether vLLM generates again
        self.url = ""
        self._dice = dice

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as self._http,
            listening(app) as self.url,
        ):
            yield

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        is_generation = request.method == "POST" and "/v1/" in request.path
        fault = self._dice.choice(FAULTS) if is_generation and self._dice.random() < self.share else ""
        if fault:
            self.faults[fault] += 1
        elif is_generation and _is_check(body):
            self.checks += 1
        match fault:
            case "unavailable" | "broken":
                return web.json_response({"error": {"message": fault}}, status=503 if fault == "unavailable" else 500)
            case "dropped":
                return _cut(request)
            case "garbage":
                return web.Response(text="<html>not JSON", content_type="application/json")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP}
        try:
            async with self._http.request(
                request.method, self.target + request.path_qs, data=body, headers=headers
            ) as answer:
                passed = {name: value for name, value in answer.headers.items() if name.lower() not in HOP}
                response = web.StreamResponse(status=answer.status, headers=passed)
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                    if fault == "cut":
                        return _cut(request)
                await response.write_eof()
                return response
        except aiohttp.ClientError:  # vLLM is being restarted
            return _cut(request)


def _is_check(body: bytes) -> bool:
    """Return whether a request is the proxy's own, whose one token is on nobody's bill."""
    with suppress(ValueError, AttributeError):
        asked = json.loads(body)
        return bool(asked.get("prompt") == "1" and asked.get("max_tokens") == 1)
    return False


def _cut(request: web.Request) -> web.Response:
    """Close the connection of a request without another byte."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
