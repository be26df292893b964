"""A scripted upstream that misbehaves on demand, and clients that attack the proxy in front of it.

`tests.faults.noisy_neighbour` starts them as processes and does the measuring.

    python -m tests.faults.attackers upstream
    python -m tests.faults.attackers ATTACK TARGET
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any, Final, NamedTuple

import aiohttp
from aiohttp import web

from tests.fakes import ASSISTANT, MODEL, Chain, FakeVLLM, chain

INTERVAL: Final = 40
MAX_LENGTH: Final = 200_000  # tokens of the scripted model's context
BREAK: Final = "make the upstream answer 500"
LONG: Final = "write a very long reply"
ENDLESS: Final = "write an answer that algebra cannot decide"
DOUBTFUL: Final = "write an answer that takes algebra to compare"
FOREVER: Final = "stream without end"
STALL_S: Final = 0.3  # longer than a live decision may take
EMPTY: Final = "end every completion without a token"


# The scripted upstream


class Upstream(FakeVLLM):
    """A scripted vLLM whose faults are chosen by the text of the prompt."""

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "max_model_len": MAX_LENGTH}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        text = (await request.read()).decode()
        if BREAK in text:
            return web.json_response({"error": {"message": "engine error", "code": 500}}, status=500)
        if FOREVER in text:
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            event = b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": "x" * 4096}}]}).encode()
            while True:
                await response.write(event + b"\n\n")
        message = {"role": "assistant", "content": "It is 7"}
        usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response({"id": "c", "object": "chat.completion", "choices": [choice], "usage": usage})

    async def _generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if isinstance(body["prompt"], str):
            body["prompt"] = [*map(ord, body["prompt"])]
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        text = "".join(map(chr, prompts[0][:2000]))
        self.requests.clear()
        self.headers.clear()
        if BREAK in text:
            return web.json_response({"error": {"message": "engine error", "code": 500}}, status=500)
        if EMPTY in text:
            return await self._end_without_tokens(request, len(prompts) * body.get("n", 1), sum(map(len, prompts)))
        return await super()._generate(request, body)

    async def _end_without_tokens(self, request: web.Request, outputs: int, prompt_tokens: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        ended: dict[str, Any] = {"text": "", "token_ids": [], "finish_reason": "length", "stop_reason": None}
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 0}
        for data in ({"choices": [{"index": i, **ended} for i in range(outputs)]}, {"choices": [], "usage": usage}):
            await response.write(b"data: " + json.dumps(data).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    def _write(self, prompt: list[int], body: dict[str, Any]) -> tuple[list[int], str]:
        text = "".join(map(chr, prompt[:2000]))
        if LONG in text:
            written = "x" * 60_000
        elif ENDLESS in text:
            base = 2 + len(prompt) % 7 + self.opened  # each branch another expression
            self.opened += 1
            written = f"It is \\boxed{{{base}^{{9^{{9^9}}}}}}"
        elif DOUBTFUL in text:
            self.opened += 1
            written = "It is \\boxed{\\log_2 8}" if self.opened % 2 else "It is \\boxed{\\frac{\\log 8}{\\log 2}}"
        elif ASSISTANT not in text:  # not a chat but the proxy's own health check
            written = "1"
        else:
            return super()._write(prompt, body)
        ids = [*map(ord, written), 0][: body["max_tokens"]]
        return ids, "stop" if ids[-1] == 0 else "length"

    def _find(self, text: str) -> Chain:
        return next((each for each in self.chains if each.text.startswith(text)), self.chains[0])


def chains() -> list[Chain]:
    """Return chains of several lengths that mostly answer 7."""
    return [chain("7" if i % 4 else "9", 100 + 17 * (i % 7), ["", "7"], mark=chr(97 + i % 26)) for i in range(64)]


async def run_upstream() -> None:
    """Serve the scripted upstream until killed; its address is the first line of the output."""
    async with Upstream(chains(), INTERVAL).serve() as upstream:
        sys.stdout.write(upstream.url + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


# The attacks


class Target(NamedTuple):
    """The knowledge of an attacker."""

    host: str
    port: int
    token: str  # the attacker's own key
    proxy_pid: int

    @property
    def url(self) -> str:
        """The address of the proxy."""
        return f"http://{self.host}:{self.port}"


Attack = Callable[[Target], Awaitable[None]]


async def _post_all(
    target: Target, bodies: Iterator[bytes], at_once: int, path: str = "/v1/chat/completions", **headers: str
) -> None:
    """Post `bodies`, `at_once` at a time, until cancelled, and print the counts of statuses."""
    sent = {"authorization": f"Bearer {target.token}", "content-type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    statuses: Counter[int | str] = Counter()

    async def post() -> None:
        async with aiohttp.ClientSession() as http:
            for body in bodies:
                try:
                    async with http.post(target.url + path, data=body, headers=sent) as response:
                        await response.read()
                        statuses[response.status] += 1
                except (aiohttp.ClientError, OSError) as error:
                    statuses[type(error).__name__] += 1
                    await asyncio.sleep(0.05)

    try:
        await asyncio.gather(*(post() for _ in range(at_once)))
    finally:
        sys.stdout.write(json.dumps({str(status): count for status, count in statuses.items()}) + "\n")
        sys.stdout.flush()


def _forever(*bodies: bytes) -> Iterator[bytes]:
    while True:
        yield from bodies


def chat(content: str = "hi", **fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}).encode()


async def break_upstream(target: Target) -> None:
    """Make the upstream answer 500, with and without β."""
    await _post_all(target, _forever(chat(BREAK), chat(BREAK, tts={"beta": 0.5})), 8)


async def unknown_fields(target: Target) -> None:
    """Send 40,000 unknown fields."""
    many: dict[str, Any] = {f"u{i}": 0 for i in range(40_000)}
    await _post_all(target, _forever(chat(**many)), 2)


async def invalid_lists(target: Target) -> None:
    """Send lists and maps with millions of wrong or empty elements."""
    zeros = b'{"model":"m","messages":[' + b"0," * 4_000_000 + b"0]}"
    empty = b'{"model":"m","messages":[' + b"{}," * 2_600_000 + b"{}]}"
    bias = chat(logit_bias={str(i): 1 for i in range(300_000)}, tts={"beta": 0.5})
    await _post_all(target, _forever(zeros, empty, bias), 3)


async def stalled_loop(target: Target) -> None:
    """Repeatedly stop the whole proxy for longer than a decision may take, while sealed decisions run."""

    async def stall() -> None:
        while True:
            os.kill(target.proxy_pid, signal.SIGSTOP)
            await asyncio.sleep(STALL_S)
            os.kill(target.proxy_pid, signal.SIGCONT)
            await asyncio.sleep(4 * STALL_S)

    asking = asyncio.create_task(_post_all(target, _forever(chat(tts={"beta": 0.7})), 4))
    stalling = asyncio.create_task(stall())
    try:
        await asyncio.gather(asking, stalling)
    finally:
        with suppress(ProcessLookupError):
            os.kill(target.proxy_pid, signal.SIGCONT)


async def regex_answers(target: Target) -> None:
    """Ask for a regular expression whose search over a long reply is quadratic."""
    body = chat(LONG, max_tokens=70_000, tts={"beta": 0.1, "controller": "sc@2", "answer": "regex:x.*y|x"})
    await _post_all(target, _forever(body), 4)


async def slow_bodies(target: Target) -> None:
    """Open 1,500 connections without a key and send a byte now and then."""
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 9999\r\n"
    )
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    async def dribble(index: int) -> None:
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(target.host, target.port)
                writer.write(head + (b"\r\n{" if index % 2 else b"x-a: "))
                while not reader.at_eof():
                    await asyncio.sleep(2 + index % 7 / 10)
                    writer.write(b" ")
                    await writer.drain()
            await asyncio.sleep(0.5)

    await asyncio.gather(*(dribble(index) for index in range(1500)))


async def unread_streams(target: Target) -> None:
    """Ask for streams and never read them."""
    body = chat(FOREVER, stream=True)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {target.host}:{target.port}\r\n"
        f"authorization: Bearer {target.token}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode()

    async def hold() -> None:
        loop = asyncio.get_running_loop()
        held = []
        while True:
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            try:
                await loop.sock_connect(connection, (target.host, target.port))
                await loop.sock_sendall(connection, head + body)
                held.append(connection)
            except OSError:
                connection.close()
            await asyncio.sleep(1)

    await asyncio.gather(*(hold() for _ in range(12)))


async def amplification(target: Target) -> None:
    """Send fields that are copied into every request to the upstream."""
    stops = chat(stop=["y" * 1_900_000] * 4, tts={"beta": 1})
    bias = chat(logit_bias={str(i): 1 for i in range(200_000)}, tts={"beta": 1})
    await _post_all(target, _forever(stops, bias), 3)


async def endless_algebra(target: Target) -> None:
    """Give answers over which the judge of equal answers must be killed."""
    bodies = (chat(f"{ENDLESS} {i}", tts={"beta": 0.3, "controller": "sc@6"}) for i in range(10**9))
    await _post_all(target, bodies, 10)


async def empty_completions(target: Target) -> None:
    """Let the upstream end every completion by its length, without a token."""
    await _post_all(target, _forever(chat(EMPTY, tts={"beta": 1})), 4)


async def spinning_children(target: Target) -> None:
    """Let sealed controllers compute after they have answered; the proxy serves `SPINNER`."""
    await _post_all(target, _forever(chat(tts={"beta": 0.5})), 8)


async def feedback_flood(target: Target) -> None:
    """Send feedback as fast as it is accepted."""
    body = json.dumps({"request_id": "tts-0", "correct": True}).encode()
    await _post_all(target, _forever(body), 8, "/v1/tts/feedback")


async def refused_keys(target: Target) -> None:
    """Ask with wrong keys and large bodies."""
    wrong = target._replace(token="sk-wrong")
    await _post_all(wrong, _forever(chat("x" * 4_000_000)), 8)


async def crafted_questions(target: Target) -> None:
    """Ask questions full of labels of an option A, which have no option B."""
    bodies = _forever(chat(("A." + "\n" * 10) * 1700, tts={"beta": 0.1}), chat("(A" * 10_000, tts={"beta": 0.1}))
    await _post_all(target, bodies, 4)


async def tiny_chunks(target: Target) -> None:
    """Send bodies in chunks of one byte each."""
    body = chat("x" * 300_000)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {target.host}:{target.port}\r\n"
        f"authorization: Bearer {target.token}\r\ncontent-type: application/json\r\n"
        "transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    ).encode()

    async def send() -> None:
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(target.host, target.port)
                writer.write(head + chunks)
                await reader.read()
                writer.close()
            await asyncio.sleep(0.05)

    await asyncio.gather(*(send() for _ in range(2)))


ATTACKS: Final[dict[str, Attack]] = {
    each.__name__: each
    for each in (
        break_upstream,
        unknown_fields,
        invalid_lists,
        stalled_loop,
        regex_answers,
        slow_bodies,
        unread_streams,
        amplification,
        endless_algebra,
        empty_completions,
        spinning_children,
        feedback_flood,
        refused_keys,
        crafted_questions,
        tiny_chunks,
    )
}

SPINNER: Final = '''
"""Asks for two chains, and computes for ever once that answer has been written."""
import statistics

os, struct = statistics.sys.modules["os"], statistics.sys.modules["struct"]


class Spinner:
    def __init__(self, beta):
        self.beta = beta

    def decide(self, state):
        os.write(3, struct.pack("=Iqqqqqq", 48, 2, 2, 0, 1, 0, 1))
        while True:
            pass
'''


async def run_attack(name: str, target: Target) -> None:
    """Run one attack until killed."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    attack = asyncio.ensure_future(ATTACKS[name](target))
    waiting = asyncio.ensure_future(stopped.wait())
    await asyncio.wait((attack, waiting), return_when=asyncio.FIRST_COMPLETED)
    attack.cancel()
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await attack


if __name__ == "__main__":
    if sys.argv[1] == "upstream":
        asyncio.run(run_upstream())
    else:
        asyncio.run(run_attack(sys.argv[1], Target(*json.loads(sys.argv[2]))))
