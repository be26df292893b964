"""Session header: an id that all generations of a request share, for routers in front of replicas."""

from __future__ import annotations

import aiohttp
import pytest

from proxy.errors import SettingsError
from proxy.settings import load
from proxy.types import Call
from proxy.upstream.client import UpstreamClient
from tests.fakes import ASSISTANT, MODEL, FakeVLLM
from tests.proxy.upstream.fleet.conftest import MakeProxy

HEADER = "X-Session-Id"


def sessions(replicas: list[FakeVLLM]) -> list[str | None]:
    """Return the session of each generation; checks of health have none, and are left out."""
    pairs = [pair for replica in replicas for pair in zip(replica.requests, replica.headers, strict=True)]
    return [headers.get(HEADER) for body, headers in pairs if not isinstance(body.get("prompt"), str)]


@pytest.mark.parametrize("is_single", [True, False])
async def test_all_generations_of_an_episode_carry_its_id(
    replicas: list[FakeVLLM], fleet_proxy: MakeProxy, is_single: bool
) -> None:
    upstream = {"upstream": replicas[0].url} if is_single else {}
    async with fleet_proxy(session_header=HEADER, **upstream) as proxy:
        ids = [(await proxy.ask())[2]["id"] for _ in range(2)]
    assert len(sessions(replicas)) > 4
    assert set(sessions(replicas)) == set(ids)


async def test_forwarded_requests_carry_their_id_and_clients_cannot_choose_it(
    replicas: list[FakeVLLM], fleet_proxy: MakeProxy
) -> None:
    async with fleet_proxy(session_header=HEADER) as proxy:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body, headers={HEADER: "mine"}) as response:
            assert response.status == 200
            assert sessions(replicas) == [response.headers["x-request-id"]]


async def test_without_the_setting_there_is_no_header(replicas: list[FakeVLLM], fleet_proxy: MakeProxy) -> None:
    async with fleet_proxy() as proxy:
        await proxy.ask()
        await proxy.ask(beta=None)
    assert set(sessions(replicas)) == {None}


async def test_requests_share_what_is_known_about_the_server(backend: FakeVLLM) -> None:
    backend.fault = "no_logprobs"
    async with aiohttp.ClientSession() as session:
        client = UpstreamClient(backend.url, session, session_header=HEADER)
        for name in ("a", "b"):
            call = Call([[ord(char) for char in ASSISTANT]], 20, {}, needs_log_probabilities=True)
            await client.route(MODEL, bytes, name).generate(MODEL, call)
    assert ["logprobs" in request for request in backend.requests] == [True, False, False]
    assert sessions([backend]) == ["a", "a", "b"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a b", "it is no name of a header; use letters, digits and hyphens, as in x-session-id, not 'a b'"),
        ("x-session-id:", "it is no name of a header"),
        ("x" * 101, "it is no name of a header"),
        ("Authorization", "HTTP or the proxy sets this header itself; name another one, such as x-session-id"),
        ("content-length", "HTTP or the proxy sets this header itself"),
    ],
)
def test_a_wrong_name_is_refused(name: str, problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(upstream="http://a", session_header=name)
    assert str(caught.value).startswith("session_header: ")
    assert problem in str(caught.value)
