"""Readers of usage give the sums that plain counting gives, and lists page through exactly the selected requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from discovery.errors import StoreError
from discovery.store import ServedEpisode, Store, StorePlace
from discovery.store.records import stored_time
from discovery.store.schema import MIGRATIONS
from discovery.store.usage.facts import FAILED_STOPS, prompt_tokens_of
from discovery.store.usage.periods import (
    Bucket,
    Period,
    Scope,
    UsageTotal,
    beta_bins,
    latency_bins,
    latency_quantile,
)
from discovery.store.usage.reader import UsageReader
from discovery.store.usage.requests import MAX_COUNTED, PageEnd, RequestFilter, RequestPage
from discovery.store.usage.sums import Measure
from tests.discovery.store.usage.served import END, counted, served, store_of

TENANT, MODEL = "0000000000000003", "embedded"
MONTH = Period(END - timedelta(days=31), END)


SUMMED = {"nothing": None, "half": "2026-02-20T07", "all": "2026-03-10T12"}


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.process)])
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, StorePlace]:
    """Return the places of stores of the same episodes, of which a part is summed."""
    folder = tmp_path_factory.mktemp("stores")
    made: dict[str, StorePlace] = {}
    for name, until in SUMMED.items():
        is_file = request.param == "sqlite"
        made[name] = folder / name if is_file else request.getfixturevalue("postgres").create_database()
        asyncio.run(store_of(made[name], served(), until))
    return made


@pytest.fixture
def filled(places: dict[str, StorePlace]) -> StorePlace:
    """Return the place of a store of which half is summed."""
    return places["half"]


@pytest.mark.parametrize("bucket", list(Bucket))
@pytest.mark.parametrize("summed", SUMMED)
async def test_series_are_what_plain_counting_gives(places: dict[str, StorePlace], summed: str, bucket: Bucket) -> None:
    async with UsageReader(places[summed]) as reader:
        for scope in (Scope(), Scope(TENANT), Scope(None, MODEL), Scope(TENANT, MODEL)):
            for measure in Measure:
                await check_series(reader, measure, bucket, scope)


async def check_series(reader: UsageReader, measure: Measure, bucket: Bucket, scope: Scope) -> None:
    """Compare a series and its totals with plain counting."""
    start, end = datetime(2026, 2, 15, 10, 20, tzinfo=UTC), datetime(2026, 3, 2, 23, 59, tzinfo=UTC)
    prefix = bucket.prefix
    inside = [
        episode
        for episode in served()
        if start.isoformat()[:prefix] <= episode.created[:prefix] <= end.isoformat()[:prefix]
        and scope.tenant in (None, episode.tenant)
        and scope.model in (None, episode.model)
    ]
    points = await reader.series(measure, Period(start, end, bucket), scope)
    totals = await reader.totals(measure, Period(start, end, bucket), scope)
    of_points = {
        (point.start.isoformat()[:prefix], point.name): (point.requests, point.tokens, round(point.seconds, 6))
        for point in points
    }
    assert of_points == counted(measure, inside, lambda created: created[:prefix])
    assert [(point.start, point.name) for point in points] == sorted((point.start, point.name) for point in points)
    of_totals = {("", total.name): (*total[1:3], round(total.seconds, 6)) for total in totals}
    assert of_totals == counted(measure, inside, lambda created: "")


@pytest.mark.parametrize("summed", SUMMED)
async def test_shares_of_tenants_are_sorted_by_tokens(places: dict[str, StorePlace], summed: str) -> None:
    async with UsageReader(places[summed]) as reader:
        tenants = await reader.by_tenant(MONTH)
        mine = await reader.by_tenant(MONTH, Scope(TENANT))
    tokens = {
        name: sum(sum(episode.ledger.values()) for episode in served() if episode.tenant == name)
        for name in {episode.tenant for episode in served()}
    }
    assert [(total.name, total.tokens) for total in tenants] == sorted(tokens.items(), key=lambda item: -item[1])
    assert [(total.name, total.requests) for total in mine] == [
        (TENANT, sum(episode.tenant == TENANT for episode in served()))
    ]


def test_histograms_have_every_step_of_beta_and_quantiles_of_latency() -> None:
    bins = beta_bins([UsageTotal("10", 3, 30, 1.0)])
    assert len(bins) == 21
    assert [(step.beta, step.requests) for step in bins if step.requests] == [(0.5, 3)]
    durations = latency_bins([UsageTotal("4", 1, 0, 0.0), UsageTotal("0", 8, 0, 0.0), UsageTotal("-4", 1, 0, 0.0)])
    assert [step.shortest_s for step in durations] == [0.5, 1.0, 2.0]
    median, longest = latency_quantile(durations, 0.5), latency_quantile(durations, 1.0)
    assert 1.0 < (median or 0) < 1.2 < 2.0 < (longest or 0) < 2.4
    assert latency_quantile([], 0.5) is None


def test_a_period_has_a_bucket_for_every_hour() -> None:
    period = Period(datetime(2026, 3, 1, 22, 30, tzinfo=UTC), datetime(2026, 3, 2, 1, 0, tzinfo=UTC))
    assert [start.hour for start in period.buckets()] == [22, 23, 0, 1]


async def test_prompt_tokens_are_summed_by_tenant(place: StorePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discovery.store.usage.reader.BATCH", 7)
    prompts = [number if number % 3 else 0 for number in range(60)]
    all_served = [
        replace(episode, about={**episode.about, "usage": usage_of(episode, prompt) if prompt else {}})
        for episode, prompt in zip(served(60), prompts, strict=True)
    ]
    await store_of(place, all_served)
    period = Period(END - timedelta(days=10), END, Bucket.DAY)
    async with UsageReader(place) as reader:
        sums = await reader.prompt_tokens(period)
    first = period.bounds[0]
    for tenant in {episode.tenant for episode in all_served}:
        assert sums[tenant] == sum(
            prompt
            for episode, prompt in zip(all_served, prompts, strict=True)
            if episode.tenant == tenant and episode.created >= first
        )


def usage_of(episode: ServedEpisode, prompt: int) -> dict[str, int]:
    """Return the usage of a reply, whose prompt tokens include three of suffixes that are in the bill."""
    total = prompt + sum(episode.ledger.values())
    return {"prompt_tokens": prompt + 3, "completion_tokens": total - prompt - 3, "total_tokens": total}


@pytest.mark.parametrize(
    ("about", "ledger", "prompt"),
    [
        ('{"usage": {"prompt_tokens": 10, "total_tokens": 112}}', '{"winner": 100, "probe": 5}', 7),
        ('{"usage": {}}', '{"aborted": 5}', 0),
        ("{}", '{"aborted": 5}', 0),
        ('{"usage": {"total_tokens": 4}}', '{"winner": 5}', 0),
        ('{"usage": {"total_tokens": 9.5}}', '{"winner": 5}', 0),
        ('{"usage": {"total_tokens": "9"}}', '{"winner": 5}', 0),
        ('{"usage": {"total_tokens": 9}}', '{"winner": null}', 0),
        ('{"usage": {"total_tokens": 9}}', "[5]", 0),
        ('{"usage": []}', "{}", 0),
        ("[]", "{}", 0),
        ("{", "{}", 0),
        (None, None, 0),
    ],
)
def test_the_prompt_is_what_a_usage_has_beside_the_bill(about: object, ledger: object, prompt: int) -> None:
    assert prompt_tokens_of(about, ledger) == prompt


async def test_costs_are_means_of_the_requests_on_one_model(filled: StorePlace) -> None:
    async with UsageReader(filled) as reader:
        costs = await reader.costs(MODEL, END - timedelta(days=40))
        mine = await reader.costs(MODEL, END - timedelta(days=40), TENANT)
    answered = [episode for episode in served() if episode.stop not in FAILED_STOPS]
    assert len(answered) < len(served())
    of_cmc = [e for e in answered if (e.model, e.controller, e.beta) == (MODEL, "cmc", 0.5)]
    (cost,) = [cost for cost in costs if (cost.controller, cost.beta) == ("cmc", 0.5)]
    assert cost.requests == len(of_cmc) > 1
    assert cost.tokens == pytest.approx(sum(sum(e.ledger.values()) for e in of_cmc) / len(of_cmc))
    assert sum(cost.requests for cost in mine) == sum((e.model, e.tenant) == (MODEL, TENANT) for e in answered)


async def test_costs_leave_out_requests_whose_deadline_passed_before_their_first_token(tmp_path: Path) -> None:
    (answered,) = served(1, model=MODEL, controller="cmc", beta=0.5, stop="answered", ledger={"winner": 3000})
    late = replace(answered, id="late", request_id="late", stop="deadline", ledger={"winner": 1000})
    queued = replace(late, id="queued", request_id="queued", ledger={"aborted": 0})
    await store_of(tmp_path / "s.db", [answered, late, queued])
    async with UsageReader(tmp_path / "s.db") as reader:
        (cost,) = await reader.costs(MODEL, END - timedelta(days=40))
    assert (cost.requests, cost.tokens) == (2, 2000)


FILTERS: dict[str, tuple[RequestFilter, Callable[[ServedEpisode], bool]]] = {
    "none": (RequestFilter(), lambda episode: True),
    "time": (
        RequestFilter(since=datetime(2026, 2, 20, tzinfo=UTC), until=datetime(2026, 3, 1, tzinfo=UTC)),
        lambda episode: "2026-02-20" <= episode.created < "2026-03-01",
    ),
    "tenant": (RequestFilter(tenant=TENANT), lambda episode: episode.tenant == TENANT),
    "anonymous": (RequestFilter(tenant=""), lambda episode: episode.tenant == ""),
    "model": (RequestFilter(model=MODEL), lambda episode: episode.model == MODEL),
    "controller": (RequestFilter(controller="cmc"), lambda episode: episode.controller == "cmc"),
    "stop": (RequestFilter(stop="deadline"), lambda episode: episode.stop == "deadline"),
    "beta": (RequestFilter(beta_min=0.25, beta_max=0.5), lambda episode: 0.25 <= episode.beta <= 0.5),
    "tokens": (
        RequestFilter(tokens_min=500, tokens_max=1500),
        lambda episode: 500 <= sum(episode.ledger.values()) <= 1500,
    ),
    "fallback": (RequestFilter(is_fallback=True), lambda episode: "fallback" in episode.about),
    "no fallback": (RequestFilter(is_fallback=False), lambda episode: "fallback" not in episode.about),
    "several": (
        RequestFilter(model=MODEL, stop="answered", beta_max=0.5),
        lambda episode: (episode.model, episode.stop) == (MODEL, "answered") and episode.beta <= 0.5,
    ),
}


@pytest.mark.parametrize("name", FILTERS)
async def test_pages_hold_exactly_the_selected_requests_latest_first(filled: StorePlace, name: str) -> None:
    which, is_selected = FILTERS[name]
    expected = [episode.request_id for episode in reversed(served()) if is_selected(episode)]
    pages: list[RequestPage] = []
    async with UsageReader(filled) as reader:
        end: PageEnd | None = None
        while not pages or end is not None:
            pages.append(await reader.requests(which, end, limit=7))
            end = None if pages[-1].end is None else PageEnd.decode(pages[-1].end.encode())
        assert await reader.count(which) == len(expected)
    assert [row.request for page in pages for row in page.requests] == expected
    assert {len(page.requests) for page in pages[:-1]} <= {7}


async def test_requests_of_one_moment_are_each_listed_once(place: StorePlace) -> None:
    await store_of(place, served(20, created=stored_time(END)))
    async with UsageReader(place) as reader:
        first = await reader.requests(RequestFilter(), limit=13)
        second = await reader.requests(RequestFilter(), first.end, limit=13)
    assert second.end is None
    assert len({row.request for row in (*first.requests, *second.requests)}) == 20


async def test_a_listed_request_says_what_its_episode_says(filled: StorePlace) -> None:
    async with UsageReader(filled) as reader:
        page = await reader.requests(RequestFilter(), limit=1)
    (row,), episode = page.requests, served()[-1]
    assert row[1:7] == (
        *(episode.created, episode.tenant, episode.model),
        episode.controller,
        episode.beta,
        episode.stop,
    )
    assert (row.tokens, row.rounds, row.branches) == (sum(episode.ledger.values()), episode.rounds, episode.branches)
    assert (row.seconds, row.is_fallback) == (episode.about["seconds"], False)


async def test_more_requests_than_can_be_counted_are_reported_as_one_more(
    filled: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("discovery.store.usage.reader.MAX_COUNTED", 10)
    async with UsageReader(filled) as reader:
        assert await reader.count(RequestFilter()) == 11
    assert MAX_COUNTED == 10_000


async def test_choices_are_bounded(filled: StorePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    async with UsageReader(filled) as reader:
        everything = await reader.choices()
        assert len(everything.tenants) > 3
        monkeypatch.setattr("discovery.store.usage.reader.MOST_CHOICES", 3)
        assert (await reader.choices()).tenants == everything.tenants[:3]


@pytest.mark.parametrize("summed", SUMMED)
async def test_choices_are_the_values_that_occur(places: dict[str, StorePlace], summed: str) -> None:
    async with UsageReader(places[summed]) as reader:
        everything = await reader.choices()
        mine = await reader.choices(TENANT)
    assert everything.models == sorted({episode.model for episode in served()})
    assert everything.controllers == sorted({episode.controller for episode in served()})
    assert everything.stops == sorted({episode.stop for episode in served()})
    assert everything.tenants == sorted({episode.tenant for episode in served()})
    assert mine.tenants == [TENANT]


@pytest.mark.parametrize("text", ["x", "é", "bm90IGEgdGltZQ", "_" * 300])
def test_an_invalid_page_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="start from the first page"):
        PageEnd.decode(text)


@pytest.mark.parametrize("limit", [0, 201])
async def test_a_page_has_a_limited_size(filled: StorePlace, limit: int) -> None:
    async with UsageReader(filled) as reader:
        with pytest.raises(ValueError, match="from 1 to 200"):
            await reader.requests(RequestFilter(), limit=limit)


async def test_a_reader_opens_a_store_that_appears_later_or_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with UsageReader(path) as reader:
        with pytest.raises(StoreError, match="there is no store"):
            await reader.count(RequestFilter())
        await store_of(path, served(3))
        assert await reader.count(RequestFilter()) == 3
        await store_of(tmp_path / "other.db", served(5))
        (tmp_path / "other.db").replace(path)
        assert await reader.count(RequestFilter()) == 5


async def test_a_store_of_an_older_version_is_refused(place: StorePlace) -> None:
    async with Store.open(place, create=True, migrations=MIGRATIONS[:-1]):
        pass
    async with UsageReader(place) as reader:
        with pytest.raises(StoreError, match="`autotts store info`"):
            await reader.choices()


async def test_readers_cannot_write(filled: StorePlace) -> None:
    async with UsageReader(filled) as reader:
        with pytest.raises(StoreError, match=r"read-?only"):
            await reader.read("DELETE FROM episodes")
        assert await reader.count(RequestFilter()) == 200


async def test_hostile_values_are_only_values(place: StorePlace) -> None:
    hostile = "'; DROP TABLE episode_facts; --"
    await store_of(place, [replace(episode, model=hostile) for episode in served(4)])
    async with UsageReader(place) as reader:
        assert await reader.count(RequestFilter(model=hostile)) == 4
        assert (await reader.choices()).models == [hostile]
        assert len(await reader.costs(hostile, END - timedelta(days=60))) > 0
