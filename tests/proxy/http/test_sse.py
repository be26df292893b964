"""A streamed response sends only what middleware has to see as messages."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import pytest
from starlette.types import Message

from proxy.http import sse
from proxy.http.response_cycle import SEND_PIECE
from proxy.http.sse import StreamedResponse
from proxy.upstream.body_tap import BodySink

T = TypeVar("T")


@pytest.mark.parametrize("has_extension", [True, False])
async def test_middleware_sees_the_head_and_the_first_and_last_piece(*, has_extension: bool) -> None:
    messages: list[Message] = []
    pieces: list[bytes] = []
    extensions = {SEND_PIECE: partial(_keep, pieces)} if has_extension else {}

    async def source(sink: BodySink) -> None:
        for piece in (b"a", b"b", b"c"):
            await sink(piece, False)
        await sink(b"d", True)

    response = StreamedResponse(source, nullcontext())
    await response({"type": "http", "extensions": extensions}, _never, partial(_keep, messages))
    assert messages.pop(0)["type"] == "http.response.start"
    sent = [(message["body"], message["more_body"]) for message in messages]
    assert pieces == ([b"b", b"c"] if has_extension else [])
    assert sent == [(b"a", True), *([] if has_extension else [(b"b", True), (b"c", True)]), (b"d", False)]


async def _keep(kept: list[T], sent: T) -> None:
    kept.append(sent)


async def _never() -> Any:
    await asyncio.get_running_loop().create_future()


async def test_a_disconnect_in_the_turn_in_which_the_work_ends_cancels_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sse, "WATCH_AFTER_S", 0.0)
    loop = asyncio.get_running_loop()
    end, watching = loop.create_future(), asyncio.Event()

    async def receive() -> Message:
        watching.set()
        await end
        return {"type": "http.disconnect"}

    async def work() -> str:
        await watching.wait()
        loop.call_soon(end.set_result, None)  # wakes the watcher first
        await end
        return "done"

    assert await sse.cancel_on_disconnect(receive, work()) == "done"
    await asyncio.sleep(0)  # raises CancelledError if this task has been cancelled
