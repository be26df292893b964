"""The load: a process that asks one server over many connections and says in a line of JSON how it was served.

python -m tests.bench.generator URL --seconds 2 --alone 400 --each 8 --warm 1

It reads no more of HTTP than it takes to see that an answer is 200 and whole. A client library would be slower than
what it is to measure.
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
"""One is drawn before each request; when there is none left, nothing is asked any more."""


class Figures(NamedTuple):
    """Of one server."""

    rate: float  # requests a second, over fifty connections
    alone_ms: float  # a request, one at a time, p50
    streams: float  # streams a second, two hundred at once
    first_ms: float  # a stream's first byte, p50
    events: float  # a stream, p50


class Answer(NamedTuple):
    """One that came whole; seconds count from when its request was written."""

    first: float  # seconds to the first byte of its body
    whole: float  # seconds to its last
    events: int


class Framing(NamedTuple):
    """How an answer's end is known."""

    length: float  # bytes of the body; infinite where chunks or the server's closing tell
    chunked: bool
    kept: bool  # the connection, for another request


class BrokenAnswer(Exception):
    """It is not 200, or not whole."""


@lru_cache(64)
def framing(head: bytes) -> Framing:
    """Of the answer with this head. Raises BrokenAnswer."""
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
    """One answer, as its bytes arrive."""

    def __init__(self) -> None:
        self.framing: Framing | None = None
        self.body = bytearray()
        self._rest = b""  # what is not understood yet, of the head or of a chunk

    def feed(self, data: bytes) -> bool:
        """Whether the answer is whole. Raises BrokenAnswer."""
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
    """Asks again as soon as it is answered."""

    def __init__(self, request: bytes, answers: list[Answer]) -> None:
        self._request, self._answers = request, answers
        self._streams = b'"stream": true' in request
        self._transport: asyncio.Transport
        self._turns: Turns
        self._over: asyncio.Future[bool]
        self._reader: Reader | None = None  # of the answer that is waited for
        self._began = self._first = 0.0

    async def run(self, turns: Turns) -> bool:
        """Ask at every turn; true if the server closes before they are used up. Raises BrokenAnswer."""
        self._turns, self._over = turns, asyncio.get_running_loop().create_future()
        self._ask()
        return await self._over

    def close(self) -> None:
        """Nothing is asked any more."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = transport  # type: ignore[assignment]  # of a stream, as always

    def data_received(self, data: bytes) -> None:
        """A piece of an answer."""
        if self._reader is None:
            return
        try:
            whole = self._reader.feed(data)
        except (BrokenAnswer, ValueError) as error:
            self._fail(str(error))
            return
        if not self._first and self._reader.body:
            self._first = time.perf_counter() - self._began
        if whole:
            self._answered(self._reader)

    def connection_lost(self, exc: Exception | None) -> None:
        """The server closed, which may be how an answer ends."""
        reader = self._reader
        if reader is None:
            return
        if exc is None and reader.framing and not reader.framing.chunked and reader.framing.length == float("inf"):
            self._answered(reader)
        else:
            self._fail("cut")

    def _ask(self) -> None:
        if self._transport.is_closing():
            self._over.set_result(True)
        elif next(self._turns, False):
            self._reader, self._first, self._began = Reader(), 0.0, time.perf_counter()
            self._transport.write(self._request)
        else:
            self._over.set_result(False)

    def _answered(self, reader: Reader) -> None:
        whole = time.perf_counter() - self._began
        self._reader = None
        if self._streams and not reader.body.endswith(b"data: [DONE]\n\n"):
            self._fail("a stream without its end")
            return
        events = reader.body.count(b"data: {") if self._streams else 0
        self._answers.append(Answer(self._first, whole, events))
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
    """Every answer, and the seconds from the first request to the last answer; each connection has its own `turns`."""
    place = urlsplit(url)
    where = place.hostname or "", place.port or 80
    request, answers = _request(place.netloc, body), list[Answer]()
    loop = asyncio.get_running_loop()

    async def opened() -> Connection:
        return (await loop.create_connection(lambda: Connection(request, answers), *where))[1]

    async def ask(number: int, turns: Turns) -> None:
        while await running[number].run(turns):
            running[number] = await opened()

    running = list(await asyncio.gather(*(opened() for _ in range(connections))))
    try:
        await asyncio.gather(*(ask(number, repeat(True, warm)) for number in range(connections)))
        answers.clear()
        began = time.perf_counter()
        await asyncio.gather(*(ask(number, turns()) for number in range(connections)))
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
    """Requests one at a time, then over fifty connections; then two hundred streams at once, `each` times over."""
    one, _ = await load(url, BODY, 1, warm, lambda: repeat(True, alone))
    many, took = await load(url, BODY, CONNECTIONS, warm, lambda: _until(time.perf_counter() + seconds))
    rate = len(many) / took
    streams, took = await load(url, BODY | {"stream": True}, STREAMS, warm, lambda: repeat(True, each))
    return Figures(
        rate,
        1000 * statistics.median(answer.whole for answer in one),
        len(streams) / took,
        1000 * statistics.median(answer.first for answer in streams),
        statistics.median(answer.events for answer in streams),
    )


def main() -> None:
    """One line of JSON; or what is wrong, and a status of 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.generator")
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--alone", type=int, default=400)
    parser.add_argument("--each", type=int, default=8)
    parser.add_argument("--warm", type=int, default=1)
    asked = parser.parse_args()
    try:
        figures = uvloop.run(measure(asked.url, asked.seconds, asked.alone, asked.each, asked.warm))
    except (BrokenAnswer, OSError) as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(1)
    sys.stdout.write(json.dumps(figures._asdict()) + "\n")


if __name__ == "__main__":
    main()
