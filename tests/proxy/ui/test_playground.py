"""The playground: its requests are those of the viewer, and go through the public endpoint."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import aiohttp
import pytest

from tests.fakes import FakeVLLM
from tests.proxy.ui.conftest import ALICE, BOB, ROOT, Browser, PageReply

BODY: dict[str, Any] = {
    "model": "fake-model",
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "tts": {"beta": 0.5, "progress": "rounds"},
}


async def ask(browser: Browser, **fields: Any) -> PageReply:
    headers = {"x-csrf-token": browser.csrf}
    return await browser._send("POST", "/ui/data/playground", json={**BODY, **fields}, headers=headers)


def chunks(reply: PageReply) -> list[Any]:
    lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


async def test_a_question_is_answered_round_by_round_with_the_bill_at_the_end(local: Browser) -> None:
    assert (await local.get("/ui/playground")).status == 200
    reply = await ask(local)
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    got = chunks(reply)
    rounds = [chunk["tts"]["progress"] for chunk in got if "progress" in chunk.get("tts", {})]
    assert len(rounds) == got[-1]["tts"]["rounds"]
    assert got[-1]["tts"]["answer"] == "7"


async def test_requests_of_a_session_belong_to_its_key(browser: Browser, keyed_url: str) -> None:
    await browser.sign_in(ALICE)
    await browser.get("/ui/playground")
    request_id = chunks(await ask(browser))[0]["id"]
    statuses = {}
    async with aiohttp.ClientSession() as http:
        for key in (ALICE, BOB, ROOT):
            for _ in range(200):  # until it is recorded
                headers = {"authorization": f"Bearer {key}"}
                async with http.get(f"{keyed_url}/v1/tts/requests/{request_id}", headers=headers) as response:
                    statuses[key] = response.status
                if statuses[key] == 200 or key == BOB:
                    break
    assert statuses == {ALICE: 200, BOB: 404, ROOT: 200}


async def test_a_client_gets_no_more_rights_through_the_playground(browser: Browser) -> None:
    await browser.sign_in(ALICE)
    await browser.get("/ui/playground")
    refused = await ask(browser, tts={"controller": "everything"})
    assert refused.status == 403
    assert json.loads(refused.text)["error"]["code"] == "admin_only"


async def test_the_upstream_gets_neither_cookie_nor_token(local: Browser, backend: FakeVLLM) -> None:
    await local.get("/ui/playground")
    backend.requests.clear()
    assert (await ask(local, tts={})).status == 200
    sent = json.dumps([str(request) for request in backend.requests])
    assert backend.requests
    assert local.cookie not in sent
    assert local.csrf not in sent


@pytest.mark.parametrize(
    ("fields", "status", "expected_text"),
    [
        ({"tts": {"beta": 2}}, 400, "beta"),
        ({"tts": {"beta": 0.5, "controller": "<script>alert(1)</script>"}}, 400, "controller"),
        ({"model": "nobody's"}, 404, "nobody's"),
    ],
)
async def test_errors_are_those_of_the_public_endpoint(
    local: Browser, fields: dict[str, Any], status: int, expected_text: str
) -> None:
    await local.get("/ui/playground")
    reply = await ask(local, **fields)
    assert reply.status == status
    assert reply.headers["content-type"] == "application/json"
    assert expected_text in json.loads(reply.text)["error"]["message"]


async def test_a_form_is_refused_at_once_as_the_public_endpoint_does(local: Browser) -> None:
    await local.get("/ui/playground")
    async with asyncio.timeout(5):
        refused = await local.post("/ui/data/playground", {"model": "fake-model"})
    assert refused.status == 415
    assert "application/json" in json.loads(refused.text)["error"]["message"]


async def test_without_a_session_nothing_is_asked(browser: Browser, backend: FakeVLLM) -> None:
    await browser.get("/ui/sign-in")
    backend.requests.clear()
    assert (await ask(browser)).status == 401
    assert backend.requests == []


async def test_the_page_lists_what_clients_may_name_and_hides_the_admins_controller(local: Browser) -> None:
    text = (await local.get("/ui/playground")).text
    assert '<option value="fake-model">' in text
    assert '<option value="parallel_probe">' in text
    assert '<option value="everything">' not in text
    assert "the champion (cmc)" in text


ENDED: dict[str, Any] = {
    "controller": "cmc",
    "beta": 0.5,
    "rounds": 9,
    "branches": 64,
    "finished": 30,
    "stop": "answered",
    "answer": "9",
    "votes": {"11": 14, "9": 14, "2": 1},
    "agreement": 14 / 29,
    "confidence": 0.5,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            "cmc at β 0.5 stopped after 9 rounds. The controller answered 9 (14 of 30 finished branches; a tie with "
            "11); all 64 branches that it could open were used. The answer had agreement 0.48 and confidence 0.50.",
        ),
        (
            {"votes": {"9": 5, "2": 2}, "finished": 7, "branches": 7, "rounds": 1},
            "cmc at β 0.5 stopped after 1 round. The controller answered 9 (5 of 7 finished branches; next 2 with 2). "
            "The answer had agreement 0.48 and confidence 0.50.",
        ),
        (
            {"votes": {"9": 2, "2": 5}, "branches": 8, "stop": "deadline", "fallback": "late", "agreement": None},
            "cmc at β 0.5 stopped after 9 rounds because the deadline passed; the best answer so far was 9 (2 of 30 "
            "finished branches; 2 had more, 5). The baseline took over (late).",
        ),
        (
            {"answer": None, "votes": {}, "branches": 4, "agreement": None, "selected_by": "judge"},
            "cmc at β 0.5 stopped after 9 rounds. The controller ended it without an answer. The model compared the "
            "replies and decided which was sent.",
        ),
    ],
)
async def test_the_end_of_an_episode_is_said_with_its_rivals_agreement_and_confidence(
    local: Browser, changes: dict[str, Any], expected: str
) -> None:
    await local.get("/ui/playground")
    reply = await local.post("/ui/data/playground/end", {"episode": json.dumps(ENDED | changes)})
    assert json.loads(reply.text) == {"why": expected}


async def test_an_ended_episode_that_cannot_be_read_is_refused(local: Browser) -> None:
    await local.get("/ui/playground")
    for text in ("", "[]", json.dumps(ENDED | {"rounds": -1})):
        assert (await local.post("/ui/data/playground/end", {"episode": text})).status == 400


async def test_kinds_of_answers_are_named_as_the_api_names_them(local: Browser) -> None:
    text = (await local.get("/ui/playground")).text
    for kind in ("auto", "boxed", "number", "choice", "text:words", "code:lines", "select", "synthesise"):
        assert re.search(rf'<option value="{kind}">{kind}(:|<)', text)
