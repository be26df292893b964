"""The soak itself: it notices wrong ends, wrong bills and repeated ids, and its relay spoils what it should."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import aiohttp
import pytest
from prometheus_client.samples import Sample

from tests.fakes import MODEL, FakeVLLM
from tests.faults.processes import until
from tests.soak.measurements import CounterTotals, HealthProbe, IdleResources, from_files, p99_ms
from tests.soak.relay import FAULTS, Relay
from tests.soak.run import SoakReport, tracebacks
from tests.soak.server import MAKER
from tests.soak.traffic import BAD, CHAT, Client, Kind, Tally, last_event

ASKED = Kind("chat", CHAT, {})


def stream(*events: dict[str, Any], ends: int = 1) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ends * "data: [DONE]\n\n"


def test_the_usage_of_a_stream_is_found() -> None:
    first, last = {"id": "r", "usage": None}, {"id": "r", "usage": {"completion_tokens": 3}}
    assert last_event(stream(first, last)) == {"id": "r", "usage": {"completion_tokens": 3}}
    completed = {"type": "response.completed", "response": {"id": "r"}}
    assert last_event(stream({"type": "response.created"}, completed, ends=0)) == {"id": "r"}
    assert last_event(stream(first, {"error": {"message": "the upstream failed"}})) is None


@pytest.mark.parametrize("ends", [0, 2])
def test_a_stream_must_end_once(ends: int) -> None:
    with pytest.raises(ValueError, match=f"{ends} ends"):
        last_event(stream({"id": "r"}, ends=ends))


def judged(status: int, reply: dict[str, Any], kind: Kind = ASKED, tally: Tally | None = None) -> Tally:
    """Return what a client notes of one response."""
    tally = Tally() if tally is None else tally
    client = Client("", None, random.Random(1), tally)  # type: ignore[arg-type]
    tally.outcomes[client._judge(kind, status, "true", json.dumps(reply))] += 1
    return tally


def reply(total: int, key: str = "a") -> dict[str, Any]:
    return {"id": key, "usage": {"completion_tokens": 3}, "tts": {"tokens": {"total": total, "winner": 3}}}


async def test_a_forwarded_request_without_a_whole_reply_counts_its_bound() -> None:
    async with FakeVLLM().serve() as backend, aiohttp.ClientSession() as http:
        relay, tally = Relay(backend.url, random.Random(1)), Tally()
        async with relay.serve():
            client = Client(relay.url, http, random.Random(1), tally)
            await client.ask(Kind("passed through", CHAT, {"max_tokens": 80}))
            assert tally.bounds == 0
            await client.ask(Kind("passed through", CHAT, {"max_tokens": 80}), leave_after=0.0)
            await client.ask(Kind("chat", CHAT, {"max_tokens": 60, "tts": {}}), leave_after=0.0)
    assert tally.outcomes == {"answered": 1, "left": 2}
    assert tally.bounds == 80


def test_a_client_notices_wrong_bills_repeated_ids_and_errors_without_a_message() -> None:
    assert judged(200, reply(3)).bills == {"a": (3, 3)}
    assert "does not add up" in judged(200, reply(4)).faults[0]
    assert "answered twice" in judged(200, reply(3), tally=judged(200, reply(3))).faults[0]
    assert judged(503, {"error": {"message": "the upstream failed"}}).faults == []
    assert "without a message" in judged(503, {}).faults[0]
    assert "a bad request got 200" in judged(200, reply(3), ASKED._replace(bad=True)).faults[0]


def test_what_a_broken_upstream_sends_for_a_forwarded_request_is_no_fault_of_the_proxy() -> None:
    kinds = {kind.name: kind for kind in BAD}
    assert judged(200, {"x": "<html>"}, kinds["no messages"]).faults == []  # forwarded, because it has no β
    assert "a bad request got 200" in judged(200, {"x": "<html>"}, kinds["beta of 7"]).faults[0]
    assert "a bad request got 200" in judged(200, {"x": "<html>"}, kinds["not JSON"]).faults[0]
    assert "a bad request got 200" in judged(200, {"x": "empty"}, kinds["no messages"]).faults[0]


def test_the_report_notices_requests_that_did_not_end() -> None:
    report = SoakReport()
    report.add(Tally(sent=Counter({"chat": 2}), outcomes=Counter({"answered": 1})))
    assert report.faults == ["2 requests were sent and 1 ended"]
    report.add(judged(200, reply(3)))
    report.add(judged(200, reply(3)))
    assert "the id a was answered twice" in report.faults
    assert "WRONG: 2 requests" in report.text()


def test_the_report_shows_the_error_of_a_traceback() -> None:
    frames = '  File "a.py", line 1, in f\n    g()\n'
    log = f"INFO ready\nERROR failed\nTraceback (most recent call last):\n{frames}ValueError: 7\nINFO later\n"
    assert tracebacks(log) == [f"Traceback (most recent call last):\n{frames}ValueError: 7"]
    assert tracebacks("INFO ready\n") == []


def sample(name: str, value: float, **labels: str) -> Sample:
    return Sample(name, labels, value)


def test_totals_keep_the_last_value_of_a_series_that_is_removed_or_begins_anew() -> None:
    totals = CounterTotals()
    assert totals.add([sample("tokens", 5, controller="a"), sample("tokens", 7, controller="b")]) == {"tokens": 12}
    assert totals.add([sample("tokens", 8, controller="b")]) == {"tokens": 13}
    assert totals.add([sample("tokens", 2, controller="a"), sample("tokens", 8, controller="b")]) == {"tokens": 15}
    assert totals.add([sample("tokens", 3, controller="a")]) == {"tokens": 16}


IDLE = IdleResources(31, ("HealthMonitor._repeat",), 4, 120.0, 0, 700, 1)


def test_growth_is_noticed() -> None:
    assert IDLE.growth(IDLE) == []
    usual = (*IDLE.tasks, MAKER, MAKER)
    assert IDLE._replace(descriptors=33, tasks=usual, controllers=2, series=900).growth(IDLE) == []
    assert IDLE._replace(controllers=3).growth(IDLE) == ["metrics name 3 controllers from files, above 2"]
    assert IDLE._replace(tasks=(*usual, MAKER)).growth(IDLE) == [f"more tasks: {{'{MAKER}': 1}}"]
    assert IDLE._replace(processes=5).growth(IDLE) == ["4 -> 5 processes"]


def test_controllers_from_files_are_those_that_are_not_built_in() -> None:
    names = ("brief1", "asc", "", "brief1", "hostile2")
    assert from_files(sample("tokens", 1, controller=name) for name in names) == {"brief1", "hostile2"}


async def test_the_relay_passes_requests_on_and_spoils_its_share() -> None:
    async with FakeVLLM().serve() as backend, aiohttp.ClientSession() as http:
        relay = Relay(backend.url, random.Random(1))
        async with relay.serve():
            body = {"model": MODEL, "messages": []}

            async def status() -> int:
                try:
                    async with http.post(f"{relay.url}{CHAT}", json=body) as response:
                        await response.read()
                        return response.status
                except aiohttp.ClientError:
                    return 0

            assert [await status() for _ in range(5)] == [200] * 5
            relay.share = 1.0
            assert {await status() for _ in range(40)} == {0, 200, 500, 503}  # 200: what is not JSON
            assert set(relay.faults) == set(FAULTS)
            async with http.get(f"{relay.url}/v1/models") as response:  # these are never spoilt
                assert response.status == 200


@pytest.mark.process
async def test_the_health_of_a_server_is_asked_beside_that_of_an_idle_one() -> None:
    async with FakeVLLM().serve() as backend:
        with HealthProbe(backend.url) as health:
            await until(lambda: len(health.control_seconds) >= 2)
            backend.is_well = False
            await until(lambda: bool(health.failures))
    assert health.failures[0] == "status 503"
    assert p99_ms(health.seconds) > 0
    assert p99_ms([0.001] * 99 + [9.0]) == 1.0
