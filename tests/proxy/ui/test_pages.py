"""Overview and requests: figures of the store, filters, one request in full, and nobody sees another's."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html import unescape
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from discovery.errors import StoreError
from discovery.store import Store
from discovery.store.records import stored_time
from discovery.store.usage.reader import UsageReader
from proxy.server import running
from proxy.settings import load
from proxy.ui.rendering import render
from tests.discovery.store.usage.served import served, store_of
from tests.fakes import FakeVLLM
from tests.proxy.conftest import SMALL
from tests.proxy.ui.conftest import ALICE, BOB, ROOT, Browser
from tests.proxy.ui.test_rendering import HOSTILE, Tags


async def asked(url: str, key: str | None = None, **fields: Any) -> str:
    """Send a request to the API and return its id."""
    body = {"model": "fake-model", "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0.5}, **fields}
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response,
    ):
        assert response.status == 200, await response.text()
        return str((await response.json())["id"])


async def until_shown(browser: Browser, path: str, text: str) -> str:
    """Return a page once it has `text`: records are written in groups."""
    for _ in range(300):
        reply = await browser.get(path)
        if text in reply.text:
            return reply.text
        await asyncio.sleep(0.02)
    raise AssertionError(f"{path} never had {text!r}: {reply.status} {reply.text[-2000:]}")


def links(page: str) -> list[str]:
    """Return the ids of the requests that a list has, the latest first."""
    return re.findall(r'<a href="/ui/requests/([^"?/]+)">', page)


# Overview


async def test_the_overview_adds_up_the_requests_of_the_period(local: Browser) -> None:
    await until_shown(local, "/ui", "No request in this period. Ask something in the playground")
    for beta in (0.0, 0.5):
        await asked(local.url, tts={"beta": beta, "controller": "parallel_probe"})
    page = await until_shown(local, "/ui", "<dt>Requests</dt><dd>2</dd>")
    texts = [at["data-chart"] or "" for _, at in Tags(page).tags if "data-chart" in at]
    charts = {chart["name"]: chart for chart in map(json.loads, texts)}
    assert set(charts) == {"tokens", "stops", "betas", "latencies"}
    spent = sum(y for series in charts["tokens"]["series"] for _, y in series["points"])
    assert f"<dt>Tokens</dt><dd>{spent:,}</dd>" in page
    assert {series["name"] for series in charts["stops"]["series"]} == {"answered"}
    (betas,) = charts["betas"]["series"]
    assert {x for x, y in betas["points"] if y} == {"0", "0.5"}
    assert "Estimated saving" in page
    assert "self-consistency with 64 chains" in page
    panels = (await local.get("/ui/overview/panels?range=hour")).text
    assert "<html" not in panels
    assert "<dt>Requests</dt><dd>2</dd>" in panels


async def test_the_figures_are_what_counting_the_stored_rows_gives(backend: FakeVLLM, tmp_path: Path) -> None:
    more = [{"judge": n % 3, "unheard": n % 2} for n in range(300)]
    made = [replace(each, ledger={**each.ledger, **kinds}) for each, kinds in zip(served(300), more, strict=True)]
    shift = datetime.now(UTC) - timedelta(minutes=1) - datetime.fromisoformat(made[-1].created)
    made = [replace(each, created=stored_time(datetime.fromisoformat(each.created) + shift)) for each in made]
    await store_of(tmp_path / "s.db", made, stored_time(datetime.now(UTC) - timedelta(days=2))[: len("2026-01-01T00")])
    first = stored_time(datetime.now(UTC) - timedelta(days=7))[: len("2026-01-01")]
    rows = [each for each in made if each.created >= first]
    spent = sum(sum(each.ledger.values()) for each in rows)
    stops = Counter(each.stop for each in rows)
    async with running(load(upstream=backend.url, store=tmp_path / "s.db", record_fraction=0.0, **SMALL)) as url:
        client = Browser(url)
        page = (await client.get("/ui?range=week")).text
        listed = (await client.get("/ui/requests?stop=deadline&beta_min=0.5")).text
        await client.close()
    texts = [at["data-chart"] or "" for _, at in Tags(page).tags if "data-chart" in at]
    charts = {chart["name"]: chart["series"] for chart in map(json.loads, texts)}
    sums = {name: {series["name"]: sum(y for _, y in series["points"]) for series in charts[name]} for name in charts}
    assert f"<dt>Tokens</dt><dd>{spent:,}</dd>" in page
    assert f"<dt>Requests</dt><dd>{len(rows):,}</dd>" in page
    assert f"<dt>Tokens per request</dt><dd>{spent / len(rows):,.0f}</dd>" in page
    assert sums["stops"] == dict(stops)
    kinds = Counter({kind: sum(each.ledger[kind] for each in rows) for kind in rows[0].ledger})
    assert sums["tokens"] == {("other" if kind == "unheard" else kind): n for kind, n in kinds.items() if n}
    assert sum(sums["tokens"].values()) == spent
    row = f'<th scope="row">judge</th><td>the model comparing replies</td><td class="number">{kinds["judge"]:,}</td>'
    assert row in page
    assert sums["latencies"] == sums["betas"] == {"requests": len(rows)}
    by_beta = Counter(f"{each.beta:g}" for each in rows)
    assert {x: y for x, y in charts["betas"][0]["points"] if y} == by_beta
    failed = sum(stops[name] for name in ("disconnected", "draining", "failed"))
    assert stops["deadline"] > 0
    assert f"{failed:,} without a full answer, {stops['deadline']:,} at their deadline" in page
    expected = sum(each.stop == "deadline" and each.beta >= 0.5 for each in made)
    assert f"{expected} request" in listed


async def test_yesterday_is_the_last_whole_day(backend: FakeVLLM, tmp_path: Path) -> None:
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    ages = [timedelta(microseconds=-1), timedelta(microseconds=1), timedelta(days=1), timedelta(days=1, microseconds=1)]
    pairs = zip(served(4), ages, strict=True)
    made = [replace(each, created=stored_time(midnight - age), ledger={"winner": 7}) for each, age in pairs]
    await store_of(tmp_path / "s.db", made)
    async with running(load(upstream=backend.url, store=tmp_path / "s.db", record_fraction=0.0, **SMALL)) as url:
        client = Browser(url)
        page = (await client.get("/ui?range=yesterday")).text
        await client.close()
    assert "<dt>Tokens</dt><dd>14</dd>" in page
    assert "<dt>Requests</dt><dd>2</dd>" in page


async def test_the_address_with_a_slash_leads_to_the_overview(local: Browser) -> None:
    reply = await local.get("/ui/")
    assert (reply.status, reply.headers["location"]) == (303, "/ui")
    assert (await local.get("/ui/requests/")).status == 400


async def test_an_unknown_period_is_refused_with_the_known_ones(local: Browser) -> None:
    reply = await local.get("/ui?range=year")
    assert reply.status == 400
    assert "hour, day, yesterday, week" in reply.text


async def test_a_client_sees_its_own_figures_and_budget_only(browser: Browser, keyed_url: str) -> None:
    for key in (ALICE, ALICE, BOB):
        await asked(keyed_url, key)
    await browser.sign_in(ROOT)
    page = await until_shown(browser, "/ui", "<dt>Requests</dt><dd>3</dd>")
    assert re.search(r'<th scope="row">bob</th>', page)
    await browser.post("/ui/sign-out")
    await browser.sign_in(ALICE)
    page = await until_shown(browser, "/ui", "<dt>Requests</dt><dd>2</dd>")
    assert not re.search(r'<th scope="row">bob</th>', page)
    assert "Estimated saving" not in page, "that figure is of all clients"
    assert "Your requests" in page


async def test_a_store_that_cannot_be_read_is_said_and_the_rest_is_shown(
    local: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(*_: Any, **__: Any) -> Any:
        raise StoreError(f"s.db: {HOSTILE}")

    monkeypatch.setattr(UsageReader, "series", failing)
    monkeypatch.setattr(UsageReader, "requests", failing)
    page = (await local.get("/ui")).text
    assert "The store cannot be read now" in page
    assert "controllers from files" in page
    assert not [tag for tag, at in Tags(page).tags if "onerror" in at]
    refused = await local.get("/ui/requests")
    assert (refused.status, HOSTILE in refused.text) == (503, False)


async def test_clients_are_not_told_where_the_store_is(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing(*_: Any, **__: Any) -> Any:
        raise StoreError("/srv/s.db: disk I/O error")

    monkeypatch.setattr(UsageReader, "series", failing)
    for key, is_told in ((ALICE, False), (ROOT, True)):
        await browser.sign_in(key)
        page = (await browser.get("/ui")).text
        assert "The store cannot be read now" in page
        assert ("/srv/s.db" in page) == is_told


# List of requests


async def test_requests_are_listed_latest_first_and_filtered(local: Browser) -> None:
    single = await asked(local.url, tts={"beta": 0, "controller": "single"})
    wide = await asked(local.url, tts={"beta": 1, "controller": "parallel_probe"})
    page = await until_shown(local, "/ui/requests", "2 requests")
    assert links(page) == [wide, single]
    for query, expected in (
        ("controller=single", [single]),
        ("beta_min=0.5", [wide]),
        ("beta_max=0.5", [single]),
        ("tokens_min=1000", [wide]),
        ("stop=deadline", []),
        ("fallback=yes", []),
        ("model=fake-model", [wide, single]),
        ("until=1000", []),
        ("since=1000", [wide, single]),
        ("key=none", [wide, single]),
    ):
        filtered = (await local.get(f"/ui/requests?{query}")).text
        assert links(filtered) == expected, query
        assert expected or "No request matches" in filtered


@pytest.mark.parametrize(
    "query", ["beta_min=2", "tokens_max=x", "since=nan", "until=1e30", "page=zz", "page=%00", "beta_max=%3Cscript%3E"]
)
async def test_a_wrong_filter_is_refused_with_its_name(local: Browser, query: str) -> None:
    reply = await local.get(f"/ui/requests?{query}")
    assert reply.status == 400
    assert query.partition("=")[0] in reply.text
    assert "<script>" not in reply.text.partition("<main")[2]


async def test_long_lists_have_pages_that_keep_the_filter(local: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.ui.pages.requests.PER_PAGE", 2)
    ids = [await asked(local.url, tts={"beta": 0, "controller": "single"}) for _ in range(5)]
    page = await until_shown(local, "/ui/requests?controller=single", "5 requests")
    seen = links(page)
    while following := re.search(r'<a class="button" href="([^"]+)">Next</a>', page):
        target = unescape(following[1])
        assert "controller=single" in target
        page = (await local.get(target)).text
        seen += links(page)
    assert seen == ids[::-1]
    assert '<a class="button" href="/ui/requests?controller=single">First</a>' in page


async def test_a_client_lists_and_opens_its_own_requests_only(browser: Browser, keyed_url: str) -> None:
    own, other = await asked(keyed_url, ALICE), await asked(keyed_url, BOB)
    await browser.sign_in(ROOT)
    assert links(await until_shown(browser, "/ui/requests", "2 requests")) == [other, own]
    await browser.post("/ui/sign-out")
    await browser.sign_in(ALICE)
    assert links((await browser.get("/ui/requests")).text) == [own]
    tenant = await tenant_of(keyed_url, other)
    for query in (f"key={tenant}", "key=none", "key="):
        assert other not in (await browser.get(f"/ui/requests?{query}")).text
    assert (await browser.get(f"/ui/requests/{own}")).status == 200
    for path in (f"/ui/requests/{other}", f"/ui/requests/{other}/what-if?controller=single"):
        assert (await browser.get(path)).status == 404
    assert (await browser.post(f"/ui/requests/{other}/feedback", {"correct": "true"})).status == 404


async def tenant_of(url: str, request_id: str) -> str:
    headers = {"authorization": f"Bearer {ROOT}"}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.get(f"{url}/v1/tts/requests/{request_id}") as response,
    ):
        return str((await response.json())["tenant"])


# One request


async def test_a_request_is_shown_with_its_picture_bill_and_reason(local: Browser) -> None:
    request_id = await asked(local.url, tts={"beta": 0.5, "controller": "parallel_probe"})
    page = await until_shown(local, f"/ui/requests/{request_id}", "Why it stopped")
    assert "The controller answered 7" in page
    assert re.search(r"The answer had agreement \d\.\d\d and confidence \d\.\d\d\.", page)
    assert page.count('class="segment') > 4
    assert 'class="votes-line' in page
    assert "the branch that became the reply" in page
    assert "were not recorded to their ends" in page
    assert "style=" not in page


@pytest.mark.parametrize("store_text", ["none", "hash"])
async def test_a_request_says_that_its_answers_are_hashes_if_they_are(
    backend: FakeVLLM, tmp_path: Path, store_text: str
) -> None:
    settings = load(upstream=backend.url, store=tmp_path / "s.db", store_text=store_text, **SMALL)
    async with running(settings) as url:
        client = Browser(url)
        request_id = await asked(url, tts={"beta": 0.5, "answer": "boxed"})
        page = await until_shown(client, f"/ui/requests/{request_id}", "Why it stopped")
        await client.close()
    assert ("AUTOTTS_STORE_TEXT=hash" in page) == (store_text == "none")
    assert ("The controller answered 7" in page) == (store_text == "hash")


async def test_a_request_that_was_cut_in_its_first_round_says_so(backend: FakeVLLM, local: Browser) -> None:
    backend.fault = "hang"
    tts = {"beta": 1, "controller": "self_consistency", "answer": "boxed"}
    asking = asyncio.create_task(asked(local.url, tts=tts))
    await backend.hanging.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    [request_id] = links(await until_shown(local, "/ui/requests", "1 request"))
    page = (await local.get(f"/ui/requests/{request_id}")).text
    assert "The client disconnected; round 1 was not finished." in page
    assert "The first round was not finished, so there is nothing to draw." in page
    assert "No branch was opened" not in page


async def test_a_store_that_fails_during_a_page_is_a_page_that_says_so(
    local: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(*_: Any, **__: Any) -> Any:
        raise StoreError("/srv/s.db: disk I/O error")

    request_id = await asked(local.url)
    await until_shown(local, "/ui/requests", request_id)  # it is written, so the store is open
    monkeypatch.setattr(Store, "recording_of", failing)
    for path in (f"/ui/requests/{request_id}", f"/ui/requests/{request_id}/what-if?controller=single"):
        reply = await local.get(path)
        assert reply.status == 503
        assert "retry later" in reply.text
        assert "/srv/s.db" not in reply.text


async def test_a_page_of_a_request_is_written_beside_the_event_loop(
    local: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_id = await asked(local.url)
    await until_shown(local, f"/ui/requests/{request_id}", "Why it stopped")
    threads = []

    def watching(*given: Any, **values: Any) -> str:
        threads.append(threading.current_thread())
        return render(*given, **values)

    monkeypatch.setattr("proxy.ui.rendering.render", watching)
    assert (await local.get(f"/ui/requests/{request_id}")).status == 200
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


async def test_hostile_questions_and_answers_are_shown_as_text(backend: FakeVLLM, local: Browser) -> None:
    answer = "<img src=x onerror=alert(1)>"
    for index, each in enumerate(backend.chains):
        backend.chains[index] = each.__class__(each.text.replace("boxed{7}", f"boxed{{{answer}}}"), each.probe_answers)
    tts = {"beta": 0.5, "controller": "self_consistency", "answer": "boxed"}
    request_id = await asked(local.url, messages=[{"role": "user", "content": HOSTILE}], tts=tts)
    page = await until_shown(local, f"/ui/requests/{request_id}", "Why it stopped")
    tags = Tags(page)
    assert [at["src"] for tag, at in tags.tags if tag == "img" and not str(at["src"]).startswith("/ui/static/")] == []
    assert not [tag for tag, at in tags.tags if any(name.startswith("on") for name in at)]
    assert all(str(at.get("src")).startswith("/ui/static/") for at in tags.executed)
    assert "&lt;img src=x" in page
    assert "&lt;/script&gt;" in page


async def test_a_request_without_a_controller_says_that_it_was_passed_through(local: Browser) -> None:
    request_id = await asked(local.url, tts={})
    page = (await local.get(f"/ui/requests/{request_id}")).text
    if "Passed through" not in page:  # it may have an id of the upstream
        page = await until_shown(local, f"/ui/requests/{request_id}", "Passed through")
    assert "no_beta" in page


async def test_a_request_is_opened_by_its_id(local: Browser) -> None:
    reply = await local.get("/ui/requests?id=+chatcmpl-1+")
    assert (reply.status, reply.headers["location"]) == (303, "/ui/requests/chatcmpl-1")
    assert (await local.get("/ui/requests?id=../x")).status == 404


async def test_an_unknown_request_is_a_page_that_says_so(local: Browser) -> None:
    reply = await local.get("/ui/requests/chatcmpl-unknown")
    assert reply.status == 404
    assert "chatcmpl-unknown" in reply.text


async def test_feedback_is_recorded_and_thanked_for(local: Browser) -> None:
    request_id = await asked(local.url)
    await until_shown(local, f"/ui/requests/{request_id}", "Was the answer right?")
    wrong = await local.post(f"/ui/requests/{request_id}/feedback", {"correct": "maybe"})
    assert wrong.status == 400
    reply = await local.post(f"/ui/requests/{request_id}/feedback", {"correct": "true"})
    assert reply.headers["location"] == f"/ui/requests/{request_id}?thanks=true"
    assert "Thank you" in (await local.get(reply.headers["location"])).text


# Without a store


async def test_without_a_store_the_pages_say_how_to_get_one(backend: FakeVLLM) -> None:
    async with running(load(upstream=backend.url, record=False, **SMALL)) as url:
        client = Browser(url)
        try:
            for path in ("/ui", "/ui/requests"):
                reply = await client.get(path)
                assert reply.status == 200
                assert "AUTOTTS_STORE=autotts.db" in reply.text
        finally:
            await client.close()
