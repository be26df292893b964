"""Load generator: requests one server over many connections and prints the measured figures as one line of JSON.

python -m tests.bench.generator URL --seconds 2 --alone 400 --each 8 --warm 1

It parses only as much HTTP as is needed to see that a response has status 200 and is complete. A client library would
be slower than the servers it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import repeat
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import uvloop

CONNECTIONS: Final = 50
STREAMS: Final = 200
BODY: Final[dict[str, Any]] = {"model": "null", "messages": [{"role": "user", "content": "hi"}]}

Turns = Iterator[bool]
"""Iterator that allows one request per item; the connection stops when it is exhausted."""


class Figures(NamedTuple):
    """Figures of one server."""

    rate: float  # requests per second over fifty connections
    alone_ms: float  # duration of a request, one at a time, p50
    streams: float  # streams per second, two hundred at once
    first_ms: float  # time to the first byte of a stream, p50
    events: float  # events per stream, p50


class Answer(NamedTuple):
    """A complete response; times are measured from when its request was written."""

    first: float  # seconds to the first byte of the body
    whole: float  # seconds to the last byte
    events: int


class Framing(NamedTuple):
    """How the end of a response is detected."""

    length: float  # bytes of the body; infinite if chunks or the closed connection mark the end
    chunked: bool
    kept: bool  # the connection stays open for another request


class BrokenAnswer(Exception):
    """A response has another status than 200, or is incomplete."""


@lru_cache(64)
def framing(head: bytes) -> Framing:
    """Parse the head of a response. Raises BrokenAnswer."""
    first, *lines = head.lower().split(b"\r\n")
    version, _, status = first.partition(b" ")
    if not status.startswith(b"200"):
        raise BrokenAnswer(first.decode("latin-1"))
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    return Framing(
        float(fields.get(b"content-length", b"inf")),
        fields.get(b"transfer-encoding") == b"chunked",
        fields.get(b"connection", b"keep-alive" if version == b"http/1.1" else b"close") == b"keep-alive",
    )


class Reader:
    """Incremental parser of one response."""

    def __init__(self) -> None:
        self.framing: Framing | None = None
        self.body = bytearray()
        self._rest = b""  # incomplete head or chunk

    def feed(self, data: bytes) -> bool:
        """Parse more bytes; return whether the response is complete. Raises BrokenAnswer."""
        if self._rest:
            data = self._rest + data
        if self.framing is None:
            head, gap, data = data.partition(b"\r\n\r\n")
            if not gap:
                self._rest = head
                return False
            self._rest = b""
            self.framing = framing(head)
        if self.framing.chunked:
            return self._chunks(data)
        self.body += data
        return len(self.body) >= self.framing.length

    def _chunks(self, data: bytes) -> bool:
        begin = 0
        while (line := data.find(b"\r\n", begin)) >= 0:
            size = int(data[begin:line], 16)
            end = line + 2 + size
            if len(data) < end + 2:
                break
            if not size:
                return True
            self.body += data[line + 2 : end]
            begin = end + 2
        self._rest = data[begin:]
        return False


class Connection(asyncio.Protocol):
    """Connection that sends the next request as soon as a response is complete."""

    def __init__(self, request: bytes, answers: list[Answer]) -> None:
        self._request, self._answers = request, answers
        self._streams = b'"stream": true' in request
        self._transport: asyncio.Transport
        self._turns: Turns
        self._over: asyncio.Future[bool]
        self._reader: Reader | None = None  # of the response in progress
        self._began = self._first = 0.0

    async def run(self, turns: Turns) -> bool:
        """Send a request for each turn; return True if the server closes the connection before. Raises BrokenAnswer."""
        self._turns, self._over = turns, asyncio.get_running_loop().create_future()
        self._ask()
        return await self._over

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport of the open connection."""
        self._transport = transport  # type: ignore[assignment]  # TCP transports are of the subtype

    def data_received(self, data: bytes) -> None:
        """Parse received bytes."""
        if self._reader is None:
            return
        try:
            is_complete = self._reader.feed(data)
        except (BrokenAnswer, ValueError) as error:
            self._fail(str(error))
            return
        if not self._first and self._reader.body:
            self._first = time.perf_counter() - self._began
        if is_complete:
            self._answered(self._reader)

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the closed connection, which may mark the end of a response."""
        reader = self._reader
        if reader is None:
            return
        if exc is None and reader.framing and not reader.framing.chunked and reader.framing.length == float("inf"):
            self._answered(reader)
        else:
            self._fail("the connection closed before the response was complete")

    def _ask(self) -> None:
        if self._transport.is_closing():
            self._over.set_result(True)
        elif next(self._turns, False):
            self._reader, self._first, self._began = Reader(), 0.0, time.perf_counter()
            self._transport.write(self._request)
        else:
            self._over.set_result(False)

    def _answered(self, reader: Reader) -> None:
        duration = time.perf_counter() - self._began
        self._reader = None
        if self._streams and not reader.body.endswith(b"data: [DONE]\n\n"):
            self._fail("the stream did not end with [DONE]")
            return
        events = reader.body.count(b"data: {") if self._streams else 0
        self._answers.append(Answer(self._first, duration, events))
        if reader.framing and not reader.framing.kept:
            self._transport.close()
        self._ask()

    def _fail(self, why: str) -> None:
        self._reader = None
        self._transport.abort()
        self._over.set_exception(BrokenAnswer(why))


async def load(
    url: str, body: dict[str, Any], connections: int, warm: int, turns: Callable[[], Turns]
) -> tuple[list[Answer], float]:
    """Return every response, and the seconds from first request to last response. Connections have their own turns."""
    parts = urlsplit(url)
    address = parts.hostname or "", parts.port or 80
    request, answers = _request(parts.netloc, body), list[Answer]()
    loop = asyncio.get_running_loop()

    async def connect() -> Connection:
        return (await loop.create_connection(lambda: Connection(request, answers), *address))[1]

    async def send(number: int, turns: Turns) -> None:
        while await running[number].run(turns):
            running[number] = await connect()

    running = list(await asyncio.gather(*(connect() for _ in range(connections))))
    try:
        await asyncio.gather(*(send(number, repeat(True, warm)) for number in range(connections)))
        answers.clear()
        began = time.perf_counter()
        await asyncio.gather(*(send(number, turns()) for number in range(connections)))
        return answers, time.perf_counter() - began
    finally:
        for connection in running:
            connection.close()


def _request(host: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json"
    return f"{head}\r\ncontent-length: {len(data)}\r\n\r\n{data}".encode()


def _until(end: float) -> Turns:
    while time.perf_counter() < end:
        yield True


async def measure(url: str, seconds: float, alone: int, each: int, warm: int) -> Figures:
    """Measure single requests, then fifty connections for `seconds`, then two hundred streams at once, `each` times."""
    single, _ = await load(url, BODY, 1, warm, lambda: repeat(True, alone))
    many, took = await load(url, BODY, CONNECTIONS, warm, lambda: _until(time.perf_counter() + seconds))
    rate = len(many) / took
    streams, took = await load(url, BODY | {"stream": True}, STREAMS, warm, lambda: repeat(True, each))
    return Figures(
        rate,
        1000 * statistics.median(answer.whole for answer in single),
        len(streams) / took,
        1000 * statistics.median(answer.first for answer in streams),
        statistics.median(answer.events for answer in streams),
    )


def main() -> None:
    """Print the figures as one line of JSON, or the error with exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.generator")
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--alone", type=int, default=400)
    parser.add_argument("--each", type=int, default=8)
    parser.add_argument("--warm", type=int, default=1)
    options = parser.parse_args()
    try:
        figures = uvloop.run(measure(options.url, options.seconds, options.alone, options.each, options.warm))
    except (BrokenAnswer, OSError) as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(1)
    sys.stdout.write(json.dumps(figures._asdict()) + "\n")


if __name__ == "__main__":
    main()
