"""A client of OpenAI's SDK with a timeout and a deadline: the one that is shorter decides what comes back."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.fakes import MODEL
from tests.proxy.conftest import Proxy

LONG, SHORT = 60.0, 1.0


async def ask(proxy: Proxy, timeout_s: float, deadline_s: float) -> Any:
    tts = {"beta": 0.5, "controller": "parallel_probe", "answer": "boxed", "deadline_s": deadline_s}
    client = proxy.openai.with_options(timeout=timeout_s, max_retries=2)
    return await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], extra_body={"tts": tts}
    )


async def test_a_deadline_before_the_timeout_gives_the_best_answer_so_far(proxy: Proxy) -> None:
    proxy.backend.fault, proxy.backend.fault_after = "hang", 2
    request = asyncio.create_task(ask(proxy, LONG, SHORT))
    await proxy.backend.hanging.wait()
    proxy.backend.fault = ""
    reply = await request
    assert reply.model_extra["tts"]["stop"] == "deadline"
    assert "\\boxed{7}" in reply.choices[0].message.content


async def test_a_deadline_before_the_first_token_raises_without_another_attempt(proxy: Proxy) -> None:
    proxy.backend.gate.clear()
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(proxy, LONG, SHORT)
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_passed")
    assert await proxy.metric("autotts_stops_total", reason="deadline") == 1


async def test_a_timeout_before_the_deadline_raises_and_aborts_every_attempt(proxy: Proxy) -> None:
    proxy.backend.fault, proxy.backend.fault_after = "hang", 2
    with pytest.raises(openai.APITimeoutError):
        await ask(proxy, SHORT, LONG)
    async with asyncio.timeout(LONG):
        await proxy.backend.idle.wait()
        while await proxy.metric("autotts_requests_total", outcome="disconnected") < 3:
            pass  # asking is what gives way to the server
