"""A proxy in front of several upstreams: served and forwarded requests, models, readiness and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.errors import SettingsError
from proxy.settings import load
from tests.fakes import MODEL, FakeVLLM, RawUpstream
from tests.proxy.conftest import SMALL, Proxy
from tests.proxy.upstream.fleet.conftest import MakeProxy, question_for


def generations(replica: FakeVLLM) -> int:
    return sum(not isinstance(request.get("prompt"), str) for request in replica.requests)


async def ask(proxy: Proxy, text: str, beta: str | None = "0.5", **fields: Any) -> tuple[int, Any, Any]:
    return await proxy.ask(beta, messages=[{"role": "user", "content": text}], **fields)


async def get(proxy: Proxy, path: str) -> tuple[int, Any]:
    async with proxy.http.get(f"{proxy.url}{path}") as response:
        return response.status, await response.json()


async def test_all_calls_of_an_episode_go_to_one_replica_and_episodes_spread(
    replicas: list[FakeVLLM], fleet_proxy: MakeProxy
) -> None:
    async with fleet_proxy() as proxy:
        urls = [replica.url for replica in replicas]
        for own in replicas:
            before = {replica.url: generations(replica) for replica in replicas}
            status, _, body = await ask(proxy, question_for(own.url, urls))
            assert (status, body["choices"][0]["finish_reason"]) == (200, "stop")
            grown = {replica.url: generations(replica) - before[replica.url] for replica in replicas}
            assert grown.pop(own.url) > 1  # several rounds
            assert set(grown.values()) == {0}


async def test_turns_of_a_conversation_go_to_one_replica_with_and_without_a_controller(
    replicas: list[FakeVLLM], fleet_proxy: MakeProxy
) -> None:
    async with fleet_proxy() as proxy:
        turns = [{"role": "user", "content": "2 + 2?"}]
        for beta in ("0.5", None, "0"):
            status, _, _ = await proxy.ask(beta, messages=turns)
            assert status == 200
            turns += [{"role": "assistant", "content": "4"}, {"role": "user", "content": "and 3 + 3?"}]
    assert sum(map(bool, map(generations, replicas))) == 1


async def test_the_proxy_is_ready_while_any_replica_serves(replicas: list[FakeVLLM], fleet_proxy: MakeProxy) -> None:
    replicas[0].is_well = replicas[1].is_well = False
    async with fleet_proxy() as proxy:
        status, body = await get(proxy, "/ready")
        assert (status, body["ready"], body["models"]) == (200, True, [MODEL])
        assert body["upstream"] == ", ".join(replica.url for replica in replicas)
        states = {state["url"]: state for state in body["replicas"]}
        assert states[replicas[2].url] == {
            "url": replicas[2].url,
            "is_up": True,
            "circuit_breaker": "closed",
            "branches": 0,
        }
        assert not states[replicas[0].url]["is_up"]
        for replica in replicas:
            assert (await ask(proxy, question_for(replica.url, [each.url for each in replicas])))[0] == 200
        assert [generations(replica) > 0 for replica in replicas] == [False, False, True]
        assert await proxy.metric("autotts_replica_up", replica=replicas[2].url) == 1
        assert await proxy.metric("autotts_replica_up") == 1
        assert await proxy.metric("autotts_upstream_up") == 1
    replicas[2].is_well = False
    async with fleet_proxy() as proxy:
        assert (await get(proxy, "/ready"))[0] == 503


async def test_metrics_of_replicas_have_a_label_for_each_and_no_more(
    replicas: list[FakeVLLM], fleet_proxy: MakeProxy
) -> None:
    async with fleet_proxy() as proxy:
        await ask(proxy, "hi")
        async with proxy.http.get(f"{proxy.url}/metrics") as response:
            page = await response.text()
    lines = [line for line in page.splitlines() if line.startswith("autotts_replica_") and "_created" not in line]
    assert len(lines) == 5 * len(replicas)
    assert all(any(f'replica="{replica.url}"' in line for replica in replicas) for line in lines)


async def test_one_upstream_has_no_replicas(replicas: list[FakeVLLM], fleet_proxy: MakeProxy) -> None:
    async with fleet_proxy(upstream=replicas[0].url) as proxy:
        await ask(proxy, "hi")
        assert "replicas" not in (await get(proxy, "/ready"))[1]
        assert await proxy.metric("autotts_replica_up") == 0
        async with proxy.http.get(f"{proxy.url}/metrics") as response:
            assert 'replica="' not in await response.text()


async def test_a_file_serves_different_models_on_different_upstreams(
    replicas: list[FakeVLLM], fleet_proxy: MakeProxy, tmp_path: Path
) -> None:
    file = tmp_path / "models.toml"
    urls = [replica.url for replica in replicas]
    file.write_text(f'small = "{urls[0]}"\nbig = ["{urls[1]}", "{urls[2]}"]\n')
    replicas[0].models, replicas[1].models, replicas[2].models = ["small", "hidden"], ["big"], ["big"]
    async with fleet_proxy(upstream=str(file)) as proxy:
        listed = [card["id"] for card in (await get(proxy, "/v1/models"))[1]["data"]]
        assert [name for name in listed if "@" not in name] == ["small", "big"]
        for url in urls[1:]:
            assert (await ask(proxy, question_for(url, urls[1:]), model="big"))[0] == 200
            assert (await ask(proxy, question_for(url, urls[1:]), model="small@0.5", beta=None))[0] == 200
        status, _, body = await ask(proxy, "hi", model="hidden")
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        assert "the upstream serves small, big" in body["error"]["message"]
    assert {request["model"] for request in replicas[0].requests} == {"small"}
    assert {request["model"] for replica in replicas[1:] for request in replica.requests} == {"big"}
    assert all(map(generations, replicas))


async def test_models_are_listed_without_aliases_from_all_upstreams(
    replicas: list[FakeVLLM], fleet_proxy: MakeProxy
) -> None:
    replicas[1].models = ["other"]
    async with fleet_proxy(model_aliases=False) as proxy:
        assert {card["id"] for card in (await get(proxy, "/v1/models"))[1]["data"]} == {MODEL, "other"}


async def test_the_dashboard_shows_each_replica(replicas: list[FakeVLLM], fleet_proxy: MakeProxy) -> None:
    replicas[1].is_well = False
    async with fleet_proxy(upstream=",".join(replica.url for replica in replicas[:2])) as proxy:
        assert (await get(proxy, "/ready"))[0] == 200
        rows = await replica_rows(proxy)
        assert [replica.url in row for replica, row in zip(replicas, rows, strict=False)] == [True, True]
        assert [">up<" in row for row in rows] == [True, False]
        assert [">closed<" in row for row in rows] == [True, True]
    async with fleet_proxy(upstream=replicas[0].url) as proxy:
        assert await replica_rows(proxy) == []


async def replica_rows(proxy: Proxy) -> list[str]:
    """Return the rows of the dashboard's table of replicas."""
    async with proxy.http.get(f"{proxy.url}/ui") as response:
        assert response.status == 200
        page = await response.text()
    table = page.partition('aria-label="Replicas"')[2].partition("</tbody>")[0].partition("<tbody>")[2]
    return table.split("</tr>")[:-1]


# Forwarded requests


def healthy(pieces: Sequence[bytes] = (), status: int = 200) -> RawUpstream:
    upstream = RawUpstream(pieces, status)
    upstream.is_well = True
    return upstream


async def forward(proxy: Proxy, first: str, *others: str) -> int:
    """Return the status of a forwarded request that goes to the upstream at `first` first."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": question_for(first, [first, *others])}]}
    async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body) as response:
        return response.status


async def test_a_forwarded_request_goes_elsewhere_if_no_response_had_begun(
    replicas: list[FakeVLLM], fleet_proxy: MakeProxy
) -> None:
    async with healthy().serve() as gone, fleet_proxy(upstream=f"{gone.url},{replicas[1].url}") as proxy:
        await get(proxy, "/ready")
        await gone.close()
        assert await forward(proxy, gone.url, replicas[1].url) == 200
        assert await proxy.metric("autotts_replica_moves_total", replica=gone.url, reason="failed") == 1


@pytest.mark.parametrize("status", [502, 503])
async def test_a_forwarded_request_goes_elsewhere_after_a_gateway_error(
    replicas: list[FakeVLLM], fleet_proxy: MakeProxy, status: int
) -> None:
    async with (
        healthy([b"not now"], status).serve() as unavailable,
        fleet_proxy(upstream=f"{unavailable.url},{replicas[1].url}") as proxy,
    ):
        assert await forward(proxy, unavailable.url, replicas[1].url) == 200
        assert unavailable.seen


@pytest.mark.parametrize("status", [500, 504, 400, 429])
async def test_a_forwarded_request_that_was_answered_is_not_sent_again(
    replicas: list[FakeVLLM], fleet_proxy: MakeProxy, status: int
) -> None:
    async with (
        healthy([b"this went wrong"], status).serve() as failing,
        fleet_proxy(upstream=f"{failing.url},{replicas[1].url}") as proxy,
    ):
        assert await forward(proxy, failing.url, replicas[1].url) == status
        assert (len(failing.seen), replicas[1].requests) == (1, [])


async def test_a_stream_that_breaks_after_its_first_byte_is_not_sent_again(
    replicas: list[FakeVLLM], fleet_proxy: MakeProxy
) -> None:
    async with RawUpstream([b"data: {}\n\n"], content_type="text/event-stream").serve() as breaking:
        breaking.go.clear()
        async with fleet_proxy(upstream=f"{breaking.url},{breaking.url.replace('127.0.0.1', 'localhost')}") as proxy:
            body = {"model": MODEL, "messages": [], "stream": True}
            async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body) as response:
                assert await response.content.readany() == b"data: {}\n\n"
                await breaking.close()
                with pytest.raises(aiohttp.ClientError):
                    await response.content.readexactly(1)
        assert len(breaking.seen) == 1


async def test_other_endpoints_are_forwarded_to_an_upstream_of_the_model(
    replicas: list[FakeVLLM], fleet_proxy: MakeProxy, tmp_path: Path
) -> None:
    file = tmp_path / "models.toml"
    replicas[0].models = ["small", "hidden"]
    file.write_text(f'small = "{replicas[0].url}"\n"{MODEL}" = "{replicas[1].url}"\n')
    async with fleet_proxy(upstream=str(file)) as proxy:
        for name in ("small", MODEL, "small@0.5"):
            async with proxy.http.post(f"{proxy.url}/detokenize", json={"model": name, "tokens": [55]}) as response:
                assert (response.status, await response.json()) == (200, {"prompt": "7"})
        assert (replicas[0].decoded, replicas[1].decoded) == (2, 1)
        async with proxy.http.post(f"{proxy.url}/detokenize", json={"model": "hidden", "tokens": [55]}) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (404, "model_not_found")


def test_a_wrong_spill_load_is_refused() -> None:
    with pytest.raises(SettingsError, match="spill_load: it must be greater than 0, not 0"):
        load(upstream="http://a,http://b", spill_load=0, **SMALL)
