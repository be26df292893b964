"""Token budgets: spent plus reserved tokens never exceed a cap, and a key's limits bind its requests."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from contextlib import suppress
from datetime import timedelta
from itertools import repeat
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import settings as effort
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from prometheus_client.parser import text_string_to_metric_families

from controllers import Action, Limits, State, advance, answer, branch, probe, prune
from controllers.episode import run_episode, run_sync
from controllers.errors import ControllerError
from discovery.store.usage.periods import Bucket, Period
from discovery.store.usage.reader import UsageReader
from proxy.admission import api_keys
from proxy.admission.token_bound import TokenBound
from proxy.admission.token_budget import (
    GRAIN_S,
    LOOKED_AT,
    MINUTE_S,
    SHARE,
    BudgetExceeded,
    Caps,
    RateLimit,
    Reservation,
    TokenBudgets,
    TokenWindow,
    forget_idle,
    request_limit,
    retry_after,
)
from proxy.admission.usage_meter import UNSEEN_TOKENS, BoundedReplyMeter
from proxy.server import running
from proxy.settings import load
from tests.fakes import ASSISTANT, Chain, FakeVLLM, ScriptedEnvironment
from tests.proxy.admission.test_api_keys import ALICE, BOB, BOSS, ROOT, ask, bearer
from tests.proxy.conftest import SMALL

CAPS = {"alice": 1000, "bob": 300, "carol": None}
COMMON = 1200
BRANCH = 120


USAGES = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.floats() | st.lists(st.none(), max_size=2)
"""Values that a faulty upstream may report as its usage."""


class Spender:
    """Controller that returns the actions in `wishes`, legal or not, and answers only after the last."""

    def __init__(self, wishes: list[tuple[int, int]]) -> None:
        self.wishes = wishes

    def decide(self, state: State) -> list[Action]:
        if not self.wishes:
            return [answer(state.leader())]
        kind, index = self.wishes.pop()
        active = state.active or (0,)
        at = active[index % len(active)]
        return [[branch(1 + index % 9)] * (1 + index % 5), [advance(at, 1 + index % 50)], [probe(at)], [prune(at)]][
            kind
        ]


class Budgets(RuleBasedStateMachine):
    """Requests of three keys with any controller, under a cap for each key and one for all."""

    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.token_budgets = TokenBudgets(COMMON)
        self.spent: list[tuple[float, str, int]] = []  # (time, key, tokens)
        self.open: dict[int, tuple[str, Reservation]] = {}

    @rule(target=running, who=st.sampled_from(sorted(CAPS)), asked=st.none() | st.integers(1, 2000))
    def begin(self, who: str, asked: int | None) -> Any:
        caps = Caps(tokens_per_minute=CAPS[who]).within(Caps(tokens_per_minute=COMMON))
        cap = caps.cap(asked)
        assert cap is not None
        assert 0 < cap <= (CAPS[who] or COMMON)
        before = {name: window.reserved for name, window in self.token_budgets.windows.items()}
        try:
            reserve = self.token_budgets.reserve(who, CAPS[who], cap, self.now)
        except BudgetExceeded as refused:
            assert {
                name: window.reserved for name, window in self.token_budgets.windows.items() if window.reserved
            } == {name: reserved for name, reserved in before.items() if reserved}
            after_s = refused.after_s
            assert 0 <= after_s <= MINUTE_S + GRAIN_S
            return None
        self.open[id(reserve)] = who, reserve
        return reserve

    @rule(
        reserve=consumes(running),
        wishes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 99)), max_size=12),
        lengths=st.lists(st.integers(1, BRANCH - 1), min_size=1, max_size=6),
    )
    def run(self, reserve: Reservation | None, wishes: list[tuple[int, int]], lengths: list[int]) -> None:
        """Run an episode capped by its reservation, with a controller that may move illegally."""
        if reserve is None:
            return
        chains = [Chain("t" * length, ("7",)) for length in lengths]
        state = State(Limits(10, max_branches=8, branch_tokens=BRANCH, probe_tokens=3, max_tokens=reserve.tokens))
        with suppress(ControllerError):
            run_sync(run_episode(Spender(wishes), ScriptedEnvironment(chains * 8, 10, lambda _: 3), state))
        assert state.spent <= reserve.tokens
        self.settle(reserve, state.spent)

    @rule(
        reserve=consumes(running),
        texts=st.lists(st.text("aé", min_size=1, max_size=4), max_size=40),
        late=st.integers(0, UNSEEN_TOKENS),
        ends=st.sampled_from(["usage", "no usage", "cut", "wrong usage"]),
        lie=USAGES,
        bound=st.builds(TokenBound, *map(st.just, TokenBound()[:3]), *[st.booleans()] * 3),
        is_stream=st.booleans(),
        size=st.integers(1, 99),
    )
    def forward(
        self,
        reserve: Reservation | None,
        texts: list[str],
        late: int,
        ends: str,
        lie: Any,
        bound: TokenBound,
        is_stream: bool,
        size: int,
    ) -> None:
        """Forward a request bounded by its reservation, one token per text. Its upstream may report a wrong usage."""
        if reserve is None:
            return
        texts = texts[: reserve.tokens]
        generated = min(reserve.tokens, len(texts) + late) if ends == "cut" else len(texts)
        usage = {"usage": {"completion_tokens": lie if ends == "wrong usage" else generated}}
        chunks = [{"choices": [{"index": 0, "text": text}]} for text in texts]
        last: list[Any] = [] if ends in ("no usage", "cut") else [{"choices": [], **usage}]
        events = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in [*chunks, *last])
        plain = json.dumps({"choices": chunks, **(usage if last else {})}).encode()
        meter = BoundedReplyMeter(bound._replace(max_tokens=reserve.tokens), is_stream=is_stream)
        reply = events if is_stream else plain
        for at in range(0, len(reply) if is_stream or ends != "cut" else 1, size):
            meter.feed(reply[at : at + size])
        if ends != "cut":
            meter.finish()
        assert 0 <= meter.cost <= reserve.tokens
        assert meter.cost >= generated or ends == "wrong usage"
        self.settle(reserve, meter.cost)

    @rule(reserve=consumes(running), share=st.floats(0, 1))
    def fail(self, reserve: Reservation | None, share: float) -> None:
        """Settle a request that was cancelled or broke off at any cost. Later settlements change nothing."""
        if reserve is not None:
            self.settle(reserve, int(reserve.tokens * share))
            reserve.settle(0, self.now)
            reserve.settle(99, self.now)

    def settle(self, reserve: Reservation, cost: int) -> None:
        who, _ = self.open.pop(id(reserve))
        reserve.settle(cost, self.now)
        self.spent.append((self.now, who, cost))

    @rule(seconds=st.sampled_from([0.0, 0.3, 1.0, 7.0, 29.5, 60.0, 61.0]) | st.floats(0, 200))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def forget(self) -> None:
        self.token_budgets.forget(self.now)

    @invariant()
    def spent_plus_reserved_stays_within_each_cap(self) -> None:
        common = self.token_budgets.common
        assert common is not None
        for who, cap in (*CAPS.items(), (None, COMMON)):
            if cap is None:
                continue
            reserved = sum(reserve.tokens for owner, reserve in self.open.values() if who in (owner, None))
            spent = sum(n for at, owner, n in self.spent if who in (owner, None) and at > self.now - MINUTE_S)
            assert spent + reserved <= cap
            window = common if who is None else self.token_budgets.windows.get(who)
            if window is not None:
                assert window.reserved == reserved
                assert spent <= window.spent(self.now) <= cap - reserved
                assert window.room(self.now) >= 0

    def teardown(self) -> None:
        """Settle all open requests. Budgets keep no window afterwards."""
        for _, reserve in self.open.values():
            reserve.settle(0, self.now)
        for _ in CAPS:
            self.token_budgets.forget(self.now + MINUTE_S + GRAIN_S)
        assert not self.token_budgets.windows


TestBudgets = Budgets.TestCase
TestBudgets.settings = effort(max_examples=150, stateful_step_count=40, deadline=None)


def test_tokens_return_after_a_minute_and_the_wait_is_computed() -> None:
    window = TokenWindow(100)
    window.reserve(80)
    window.settle(80, 60, now=0.0)
    window.reserve(30)
    window.settle(30, 30, now=10.0)
    assert window.room(10.0) == 10
    assert window.after_s(10, 10.0) == 0
    assert window.after_s(50, 10.0) == pytest.approx(51)
    assert window.after_s(90, 10.0) == pytest.approx(61)
    assert (window.room(60.9), window.room(61.0), window.room(71.0)) == (10, 70, 100)


def test_tokens_settled_without_a_pause_still_expire() -> None:
    window = TokenWindow(10**9)
    for tenth in range(6000):
        window.settle(0, 1, now=tenth / 10)
    assert 600 <= window.spent(599.9) <= 610


def test_no_interval_as_long_as_the_window_has_more_tokens_than_the_cap() -> None:
    span_s = 3600.0
    window = TokenWindow(1000, span_s)
    spent: list[tuple[float, int]] = []
    for second in range(3 * int(span_s)):
        now = float(second)
        while window.fits(10, now):
            tokens = 7 if second % 2 else 10
            window.settle(0, tokens, now)
            spent.append((now, tokens))
    for begin, _ in spent:
        assert sum(tokens for at, tokens in spent if begin <= at < begin + span_s) <= 1000
    assert sum(tokens for _, tokens in spent) > 2900  # each hour gets nearly all of it


def test_a_cost_over_the_reservation_is_charged_in_full() -> None:
    token_budgets = TokenBudgets(100)
    token_budgets.reserve("alice", None, 50, 0.0).settle(500, 0.0)
    assert token_budgets.common is not None
    assert (token_budgets.common.spent(0.0), token_budgets.common.room(0.0)) == (500, 0)
    with pytest.raises(BudgetExceeded):
        token_budgets.reserve("alice", None, 1, 0.0)


def test_caps_give_a_default_to_a_request_without_its_own() -> None:
    assert Caps().cap(None) is None
    assert Caps(tokens=50).cap(None) == 50
    assert Caps(tokens=50).cap(9) == 9
    assert Caps(tokens_per_minute=100).cap(None) == 100 // SHARE
    assert Caps(tokens=500, tokens_per_minute=100).cap(None) == 100
    assert Caps(1, 2, 3, None).within(Caps(None, 1, 4, 7)) == Caps(1, 1, 3, 7)


def test_retry_after_is_whole_seconds_from_1_to_60() -> None:
    waits = (0.0, 0.2, 3.2, 30.0, 50.5, 1e9)
    assert [retry_after(s, lambda: 0.0) for s in waits] == ["1", "1", "4", "30", "51", "60"]
    assert [retry_after(s, lambda: 0.9999) for s in waits] == ["3", "3", "6", "45", "60", "60"]


def test_the_clients_of_a_burst_get_different_waits() -> None:
    assert {retry_after(8.0) for _ in range(500)} == {str(wait) for wait in range(8, 13)}


# Over HTTP


def test_the_source_of_a_limit_names_the_workers_it_is_divided_among() -> None:
    own = Caps(tokens_per_minute=500)
    quarter = request_limit(None, "alice", own, Caps(), 8)
    assert quarter.tokens == 125
    assert quarter.source.startswith(
        "a quarter of the limit `tokens_per_minute` of key alice in each of 8 workers (500)"
    )
    limit = request_limit(3000, "alice", own, Caps(), 8)
    assert limit == (500, "the limit `tokens_per_minute` of key alice in each of 8 workers")


def keyed(path: Path, **limits: int) -> Path:
    members = "".join(f", {name} = {value}" for name, value in limits.items())
    lines = [api_keys.key_file_entry("alice", ALICE).replace(" }", members + " }"), api_keys.key_file_entry("bob", BOB)]
    path.write_text("\n".join([*lines, api_keys.key_file_entry("root", ROOT, admin=True)]))
    return path


async def test_the_limits_of_a_key_bind_its_requests_and_no_others(backend: FakeVLLM, tmp_path: Path) -> None:
    file = keyed(tmp_path / "keys.toml", branches=3, tokens=700)
    async with running(load(upstream=backend.url, keys=file, **SMALL)) as url, aiohttp.ClientSession() as http:
        for fields in ({}, {"tts": {"max_total_tokens": 100_000}}):
            _, headers, reply = await ask(http, url, ALICE, "1", **fields)
            assert int(headers["x-tts-branches"]) <= 3
            assert reply["tts"]["tokens"]["total"] <= 700
        _, headers, reply = await ask(http, url, BOB, "1")
        assert int(headers["x-tts-branches"]) > 3
        assert reply["tts"]["tokens"]["total"] > 700


@pytest.mark.parametrize(
    ("limits", "settings", "asked", "expected_text", "param"),
    [
        ({"tokens": 50}, {}, None, "the limit `tokens` of key alice is 50 tokens; this request needs", None),
        ({"tokens": 50}, {}, 500, "the limit `tokens` of key alice is 50 tokens; this request needs", None),
        (
            {"tokens_per_minute": 90},
            {},
            500,
            "the limit `tokens_per_minute` of key alice is 90 tokens; this request needs",
            None,
        ),
        (
            {"tokens_per_minute": 200},
            {},
            None,
            "a quarter of the limit `tokens_per_minute` of key alice (200), for a request that sets no "
            "tts.max_total_tokens, is 50 tokens; this request needs",
            None,
        ),
        (
            {},
            {"max_total_tokens": 50},
            None,
            "the server's limit AUTOTTS_MAX_TOTAL_TOKENS is 50 tokens; this request needs",
            None,
        ),
        (
            {},
            {"tokens_per_minute": 90},
            500,
            "the server's limit AUTOTTS_TOKENS_PER_MINUTE is 90 tokens; this request needs",
            None,
        ),
        ({"tokens": 500}, {}, 50, "tts.max_total_tokens is 50 tokens; this request needs", "tts.max_total_tokens"),
    ],
)
async def test_a_cap_too_small_for_one_interval_is_refused_and_its_setting_is_named(
    backend: FakeVLLM,
    tmp_path: Path,
    limits: dict[str, int],
    settings: dict[str, int],
    asked: int | None,
    expected_text: str,
    param: str | None,
) -> None:
    file = keyed(tmp_path / "keys.toml", **limits)
    tts = {} if asked is None else {"tts": {"max_total_tokens": asked}}
    async with (
        running(load(upstream=backend.url, keys=file, **settings, **SMALL)) as url,
        aiohttp.ClientSession() as http,
    ):
        status, _, reply = await ask(http, url, ALICE, "1", **tts)
    error = reply["error"]
    assert (status, error["code"], error["param"]) == (400, "cap_too_small", param)
    assert error["message"].startswith(expected_text)
    assert error["message"].endswith("; set tts.max_total_tokens") == ("quarter" in expected_text)


async def test_a_key_over_its_tokens_per_minute_gets_429_with_retry_after(backend: FakeVLLM, tmp_path: Path) -> None:
    file = keyed(tmp_path / "keys.toml", tokens_per_minute=1500)
    async with (
        running(load(upstream=backend.url, keys=file, admin_key=BOSS, **SMALL)) as url,
        aiohttp.ClientSession() as http,
    ):
        spent = 0
        for _ in range(20):
            status, headers, reply = await ask(http, url, ALICE, "1", tts={"max_total_tokens": 900})
            if status != 200:
                break
            spent += reply["tts"]["tokens"]["total"]
        assert (status, reply["error"]["type"], reply["error"]["code"]) == (
            429,
            "rate_limit_error",
            "rate_limit_exceeded",
        )
        assert reply["error"]["message"] == (
            f"key alice has spent {spent} of its 1500 tokens of this minute, and its running requests have reserved 0; "
            "this request would reserve 900 (tts.max_total_tokens); retry later, or set tts.max_total_tokens or the "
            "key's limit `tokens`"
        )
        assert 1 <= int(headers["retry-after"]) <= 60
        assert 600 < spent <= 1500
        assert (await ask(http, url, BOB, "1"))[0] == 200
        async with http.get(f"{url}/v1/tts/keys", headers=bearer(BOSS)) as response:
            budget = (await response.json())["keys"]["alice"]
        assert (budget["spent"], budget["reserved"], budget["episodes"]) == (spent, 0, 0)
        assert budget["limits"]["tokens_per_minute"] == 1500
        assert (budget["admin"], budget["priority"], budget["beta"]) == (False, False, None)


async def test_a_refusal_names_the_quarter_that_a_request_without_a_cap_would_reserve(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    file = keyed(tmp_path / "keys.toml", tokens_per_minute=4000)
    async with (
        running(load(upstream=backend.url, keys=file, tokens_per_minute=6000, **SMALL)) as url,
        aiohttp.ClientSession() as http,
    ):
        for _ in range(20):
            status, _, reply = await ask(http, url, ALICE, "1")
            if status != 200:
                break
        assert status == 429
        assert (
            "this request would reserve 1000 (a quarter of the limit `tokens_per_minute` of key alice (4000), for a "
            "request that sets no tts.max_total_tokens); retry later, or set tts.max_total_tokens or"
        ) in reply["error"]["message"]
        for _ in range(20):
            status, _, reply = await ask(http, url, BOB, "1")
            if status != 200:
                break
        assert status == 429
        assert reply["error"]["message"] == (
            "the requests of all clients leave too little of the server's limit AUTOTTS_TOKENS_PER_MINUTE; "
            "this request would reserve 1500 (a quarter of the server's limit AUTOTTS_TOKENS_PER_MINUTE (6000), "
            "for a request that sets no tts.max_total_tokens); retry later, or set tts.max_total_tokens or the key's "
            "limit `tokens`"
        )


async def test_the_first_request_of_a_key_that_a_quarter_of_its_minute_cuts_is_logged(
    backend: FakeVLLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = keyed(tmp_path / "keys.toml", tokens_per_minute=4000)
    async with running(load(upstream=backend.url, keys=file, **SMALL)) as url, aiohttp.ClientSession() as http:
        for fields in ({"tts": {"max_total_tokens": 700}}, {}, {}):
            _, _, reply = await ask(http, url, ALICE, "1", **fields)
            assert reply["tts"]["stop"] == "max_tokens"
    expected = (
        "a request ended early, at its cap of 1000 tokens: a quarter of the limit `tokens_per_minute` of key alice "
        "(4000), for a request that sets no tts.max_total_tokens; set the key's limit `tokens`, or "
        "tts.max_total_tokens in requests, to choose the cap"
    )
    assert [line.getMessage() for line in caplog.records if "ended early" in line.getMessage()] == [expected]


async def test_a_disconnect_charges_the_generated_tokens_and_releases_the_reservation(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    file = keyed(tmp_path / "keys.toml", tokens_per_minute=4000)
    backend.fault, backend.fault_after = "hang", 3
    async with (
        running(load(upstream=backend.url, keys=file, admin_key=BOSS, **SMALL)) as url,
        aiohttp.ClientSession() as http,
    ):
        for stream in (False, True):
            backend.hanging.clear()
            task = asyncio.create_task(
                ask(http, url, ALICE, "1", tts={"max_total_tokens": 1900, "answer": "number"}, stream=stream)
            )
            await backend.hanging.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            async with asyncio.timeout(10):
                await backend.idle.wait()
            backend.fault_after = len(backend.requests) + 3
        for _ in range(200):
            async with http.get(f"{url}/v1/tts/keys", headers=bearer(BOSS)) as response:
                budget = (await response.json())["keys"]["alice"]
            if not budget["reserved"]:
                break
        assert budget["reserved"] == budget["episodes"] == 0
        assert 0 < budget["spent"] < 1900


async def test_forwarded_requests_are_charged_by_reported_usage(backend: FakeVLLM, tmp_path: Path) -> None:
    backend.chains = [Chain("t" * 300)]
    file = keyed(tmp_path / "keys.toml", tokens_per_minute=1000)
    async with (
        running(load(upstream=backend.url, keys=file, admin_key=BOSS, **SMALL)) as url,
        aiohttp.ClientSession() as http,
    ):
        body = {"model": "fake-model", "prompt": [[ord("t")]], "max_tokens": 400}
        statuses = []
        for _ in range(4):
            async with http.post(f"{url}/v1/completions", json=body, headers=bearer(ALICE)) as response:
                statuses.append(response.status)
                await response.read()
        async with http.get(f"{url}/v1/tts/keys", headers=bearer(BOSS)) as response:
            budget = (await response.json())["keys"]["alice"]
        assert statuses == [200, 200, 200, 429] or statuses == [200, 200, 429, 429]
        assert budget["reserved"] == budget["passed"] == 0
        assert budget["spent"] == backend.generated


async def test_what_a_key_without_limits_spent_is_known_since_the_start_and_from_the_store(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    file = keyed(tmp_path / "keys.toml")
    settings = load(upstream=backend.url, keys=file, admin_key=BOSS, store=tmp_path / "s.db", **SMALL)
    async with running(settings) as url, aiohttp.ClientSession() as http:

        async def usage() -> Any:
            async with http.get(f"{url}/v1/tts/keys", headers=bearer(BOSS)) as response:
                return await response.json()

        replies = [(await ask(http, url, ALICE, "0.5"))[2] for _ in range(2)]
        tokens = sum(reply["tts"]["tokens"]["total"] for reply in replies)
        prompts = sum(reply["usage"]["total_tokens"] for reply in replies) - tokens
        assert 0 < prompts < sum(reply["usage"]["prompt_tokens"] for reply in replies), "suffixes of probes"
        _, _, refused = await ask(http, url, ALICE, "0.5", max_tokens=-1)
        assert "error" in refused
        passed = -backend.generated
        body = {"model": "fake-model", "prompt": [[ord("t")]], "max_tokens": 4}
        async with http.post(f"{url}/v1/completions", json=body, headers=bearer(ALICE)) as response:
            await response.read()
        passed += backend.generated
        used = await usage()
        for holder in (used["all"], used["keys"]["alice"]):
            assert holder["since_start"] == {
                "served": {"requests": 2, "tokens": tokens, "prompt_tokens": prompts},
                "passed_through": {"requests": 1, "tokens": passed},
            }
        assert used["keys"]["alice"]["spent"] is None
        assert used["keys"]["bob"]["since_start"]["served"]["requests"] == 0
        async with asyncio.timeout(10):
            for _ in repeat(None):
                used = await usage()
                if (used["keys"]["alice"]["last_day"] or {}).get("requests") == 2:  # null until the store exists
                    break
        assert used["all"]["last_day"] == used["keys"]["alice"]["last_day"] == {"requests": 2, "tokens": tokens}
        assert used["keys"]["bob"]["last_day"] == {"requests": 0, "tokens": 0}


SAYING_HI = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", SAYING_HI),
        ("chat/completions", {**SAYING_HI, "stream": True, "stream_options": {"include_usage": True}}),
        ("completions", {"prompt": f"hi{ASSISTANT}", "max_tokens": 400}),
        ("completions", {"prompt": [f"hi{ASSISTANT}", f"ho{ASSISTANT}"], "max_tokens": 400}),
        ("responses", {"input": "hi"}),
    ],
    ids=["chat", "stream", "text", "prompts", "responses"],
)
async def test_tokens_and_prompts_of_a_key_are_the_total_of_its_usage(
    backend: FakeVLLM, tmp_path: Path, path: str, fields: dict[str, Any]
) -> None:
    file = keyed(tmp_path / "keys.toml")
    settings = load(upstream=backend.url, keys=file, admin_key=BOSS, store=tmp_path / "s.db", **SMALL)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        body = {"model": "fake-model", "tts": {"beta": 0.5, "controller": "parallel_probe"}, **fields}
        async with http.post(f"{url}/v1/{path}", json=body, headers=bearer(ALICE)) as response:
            lines = (await response.text()).splitlines()
        replies = [json.loads(line.removeprefix("data: ")) for line in lines if line.endswith("}")]
        usage = next(reply["usage"] for reply in reversed(replies) if reply.get("usage"))
        async with http.get(f"{url}/v1/tts/keys", headers=bearer(BOSS)) as response:
            spent = (await response.json())["keys"]["alice"]["since_start"]["served"]
    assert spent["tokens"] + spent["prompt_tokens"] == usage["total_tokens"]
    assert 0 < spent["prompt_tokens"] < usage.get("prompt_tokens", usage.get("input_tokens")), "suffixes of probes"
    async with UsageReader(tmp_path / "s.db") as reader:
        today = Period.until_now(timedelta(days=1), Bucket.DAY)
        (stored,) = await reader.by_tenant(today)
        assert await reader.prompt_tokens(today) == {stored.name: spent["prompt_tokens"]}
    assert (stored.requests, stored.tokens) == (spent["requests"], spent["tokens"])


def test_a_rate_limit_counts_the_last_minute_per_holder() -> None:
    rate = RateLimit(3)
    for now in (0.0, 10.0, 20.0):
        rate.take("a", now)
    rate.take("b", 20.0)
    with pytest.raises(BudgetExceeded) as caught:
        rate.take("a", 30.0)
    assert caught.value.holder == "a"
    assert 30 < caught.value.after_s <= 31 + GRAIN_S  # the first is forgotten then
    rate.take("a", 30.0 + caught.value.after_s)
    with pytest.raises(BudgetExceeded):
        rate.take("a", 30.5 + caught.value.after_s)


def test_refused_attempts_do_not_raise_a_rate_limit() -> None:
    rate, taken = RateLimit(100), 0
    for at in range(17_772):  # in 15 seconds
        with suppress(BudgetExceeded):
            rate.take("a", 15 * at / 17_772)
            taken += 1
    assert taken == 100


def test_a_call_looks_at_few_windows_and_the_calls_together_at_all() -> None:
    """A call must take the same time however many keys are in use."""
    looked_at: list[str] = []

    class Watched(TokenWindow):
        def __init__(self, name: str) -> None:
            super().__init__(10)
            self.name = name

        def spent(self, now: float) -> int:
            looked_at.append(self.name)
            return super().spent(now)

    names = [f"key {number}" for number in range(10 * LOOKED_AT)]
    windows: OrderedDict[str, TokenWindow] = OrderedDict((name, Watched(name)) for name in names)
    for name in names[::2]:
        windows[name].reserve(1)
    for _ in range(10):
        forget_idle(windows, 0.0)
    assert looked_at == names
    assert list(windows) == names[::2]


def test_holders_that_have_not_used_a_rate_limit_for_a_minute_are_forgotten() -> None:
    rate, holders = RateLimit(3), 1_000
    for number in range(holders):
        rate.take(f"key {number}", now=0.0)
    assert rate.holders == holders
    for number in range(holders):
        rate.take(f"another {number % 10}", now=100.0 * (1 + number))
    assert rate.holders <= LOOKED_AT


async def test_metrics_count_the_tokens_of_each_key_if_the_operator_wants_it(backend: FakeVLLM, tmp_path: Path) -> None:
    file = keyed(tmp_path / "keys.toml")
    body = {"model": "fake-model", "prompt": [ord("t")], "max_tokens": 4}
    pages, replies = {}, []
    for wanted in (True, False):
        settings = load(upstream=backend.url, keys=file, admin_key=BOSS, key_metrics=wanted, **SMALL)
        async with running(settings) as url, aiohttp.ClientSession() as http:
            replies.append((await ask(http, url, ALICE, "0.5"))[2])
            for more in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
                async with http.post(f"{url}/v1/completions", json=body | more, headers=bearer(BOB)) as response:
                    await response.read()
            async with http.get(f"{url}/metrics", headers=bearer(BOSS)) as response:
                pages[wanted] = await response.text()
    counted = {
        (sample.labels["key"], sample.labels["kind"]): sample.value
        for family in text_string_to_metric_families(pages[True])
        for sample in family.samples
        if sample.name == "autotts_key_tokens_total" and sample.value
    }
    bill, usage = replies[0]["tts"]["tokens"]["total"], replies[0]["usage"]["total_tokens"]
    assert counted == {
        ("alice", "generated"): bill,
        ("alice", "prompt"): usage - bill,
        ("bob", "passed_through"): 8,
        ("bob", "passed_through_prompt"): 2,
    }
    assert "alice" not in pages[False]


async def test_metrics_show_every_key_from_0_on(backend: FakeVLLM, tmp_path: Path) -> None:
    """Prometheus' `increase` never counts the first value of a series, so it must not hold a request."""
    settings = load(upstream=backend.url, keys=keyed(tmp_path / "keys.toml"), admin_key=BOSS, key_metrics=True, **SMALL)
    async with (
        running(settings) as url,
        aiohttp.ClientSession() as http,
        http.get(f"{url}/metrics", headers=bearer(BOSS)) as response,
    ):
        page = await response.text()
    for key in ("alice", "bob"):
        for kind in ("generated", "prompt", "passed_through", "passed_through_prompt"):
            assert f'autotts_key_tokens_total{{key="{key}",kind="{kind}"}} 0.0' in page


async def test_metrics_count_the_prompts_of_capped_keys_too(backend: FakeVLLM, tmp_path: Path) -> None:
    settings = load(
        upstream=backend.url,
        keys=keyed(tmp_path / "keys.toml", tokens=700),
        admin_key=BOSS,
        key_metrics=True,
        **SMALL,
    )
    body = {"model": "fake-model", "prompt": [ord("t")], "max_tokens": 4}
    async with running(settings) as url, aiohttp.ClientSession() as http:
        for stream in (False, True):
            sent = {**body, "stream": stream}
            async with http.post(f"{url}/v1/completions", json=sent, headers=bearer(ALICE)) as response:
                await response.read()
        async with http.get(f"{url}/metrics", headers=bearer(BOSS)) as response:
            page = await response.text()
    assert 'autotts_key_tokens_total{key="alice",kind="passed_through_prompt"} 2.0' in page
