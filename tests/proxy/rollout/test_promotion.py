"""Promotion with a running proxy: stage changes without restart, the share of a canary, shadows without cost."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI
from typer.testing import CliRunner

from controllers import builtin
from controllers.loading import Spec
from controllers.rollout_state import RolloutStage, lot
from discovery.promotion.registry import ChangeCause, Registry
from proxy.cli import app
from proxy.rollout import failure_counter
from proxy.server import running
from proxy.settings import load
from tests.discovery.promotion.examples import HELD_OUT_CELLS
from tests.discovery.promotion.outside import folder_of, write_source
from tests.postgres_server import PostgresServer
from tests.proxy.conftest import SMALL, Proxy
from tests.proxy.rollout.conftest import HeldVLLM
from tests.proxy.rollout.test_sealed_controllers import FAULTS, HONEST, LOCKSTEP

pytestmark = pytest.mark.process

ME = ChangeCause("me", "a test", datetime(2026, 11, 24, tzinfo=UTC), forced=True)
DEFAULT = "self_consistency"
FAILING = LOCKSTEP.format(later=FAULTS["raised"])
EXPENSIVE = HONEST.replace("2 + round(6 * beta)", "4 + round(12 * beta)")
DISAGREEING = LOCKSTEP.format(later="if state.rounds == 2: return [advance(0)]")

Serve = Callable[..., AbstractAsyncContextManager[Proxy]]


@pytest.fixture
def backend(held_backend: HeldVLLM) -> HeldVLLM:
    return held_backend


@pytest.fixture
def serve(backend: HeldVLLM, registry: Registry) -> Serve:
    """Return a context that runs a proxy which reads the registry before every request."""

    @asynccontextmanager
    async def with_registry(**settings: Any) -> AsyncIterator[Proxy]:
        given = {**SMALL, "controller": DEFAULT, "decision_s": 5.0, "sandbox_pool": 1, "registry": registry.place}
        async with (
            running(load(upstream=backend.url, registry_poll_s=0, **given | settings)) as url,
            aiohttp.ClientSession() as http,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as openai,
        ):
            yield Proxy(backend, url, http, openai)

    return with_registry


def install(registry: Registry, name: str, source: str, stage: RolloutStage, share: float = 0.5) -> str:
    spec = Spec(name, source)
    registry.install(spec, {"headline": "a test's"}, stage, share, ME)
    return spec.digest


async def decider(proxy: Proxy, **fields: Any) -> tuple[str, str | None]:
    """Send a request and return (its controller, its stage)."""
    status, headers, reply = await proxy.ask("0.5", **fields)
    assert status == 200, reply
    assert headers["x-tts-controller"] == reply["tts"]["controller"]
    return reply["tts"]["controller"], reply["tts"]["stage"]


async def until(proxy: Proxy, name: str, least: float, **labels: str) -> None:
    """Wait until a metric is at least `least`."""
    while await proxy.metric(name, **labels) < least:
        pass


async def test_with_an_empty_registry_the_configured_controller_decides(serve: Serve) -> None:
    async with serve() as proxy:
        assert await decider(proxy) == (DEFAULT, "champion")
        assert await proxy.metric("autotts_stage_requests_total", stage="champion", controller=DEFAULT) == 1


async def test_the_champion_decides_for_requests_that_name_no_controller(serve: Serve, registry: Registry) -> None:
    digest = install(registry, "mine", HONEST, RolloutStage.CHAMPION)
    async with serve() as proxy:
        status, headers, reply = await proxy.ask("0.5")
        assert (status, headers["x-tts-controller"], headers["x-tts-branches"]) == (200, "mine", "5")
        assert "x-tts-fallback" not in headers
        assert (reply["tts"]["stage"], reply["tts"]["controller_digest"]) == ("champion", digest[:12])
        assert await decider(proxy, tts={"controller": "cmc"}) == ("cmc", None)
        assert await decider(proxy, tts={"controller": "mine"}) == ("mine", None)
        assert await decider(proxy, tts={"controller": DEFAULT}) == (DEFAULT, None)
        assert await proxy.metric("autotts_stage_requests_total") == 1
        status, _, reply = await proxy.ask("0.5", tts={"controller": "other"})
        assert (status, reply["error"]["message"][-6:]) == (400, ", mine")


@pytest.mark.process
async def test_a_controller_from_a_database_decides_without_a_folder(serve: Serve, postgres: PostgresServer) -> None:
    registry = Registry(postgres.create_database())
    digest = install(registry, "mine", HONEST, RolloutStage.CHAMPION)
    async with serve(registry=registry.place) as proxy:
        _, _, reply = await proxy.ask("0.5")
        assert (reply["tts"]["controller"], reply["tts"]["controller_digest"]) == ("mine", digest[:12])
        await asyncio.to_thread(registry.roll_back, ME)
        while await decider(proxy) != (DEFAULT, "champion"):
            pass


async def test_requests_are_assigned_to_the_canary_by_id_according_to_its_share(
    serve: Serve, registry: Registry
) -> None:
    install(registry, "mine", HONEST, RolloutStage.CANARY, share=0.4)
    async with serve() as proxy:
        replies = [reply for _, _, reply in await asyncio.gather(*(proxy.ask("0") for _ in range(40)))]
        expected = ["canary" if lot(reply["id"]) < 0.4 else "champion" for reply in replies]
        assert [reply["tts"]["stage"] for reply in replies] == expected
        assert set(expected) == {"canary", "champion"}
        names = [reply["tts"]["controller"] for reply in replies]
        assert names == ["mine" if stage == "canary" else DEFAULT for stage in expected]
        counted = await proxy.metric("autotts_stage_requests_total", stage="canary", controller="mine")
        assert counted == expected.count("canary")


async def test_a_running_proxy_follows_promotions_and_rollbacks(serve: Serve, registry: Registry) -> None:
    async with serve() as proxy:
        assert await decider(proxy) == (DEFAULT, "champion")
        digest = install(registry, "one", HONEST, RolloutStage.CANARY, share=1.0)
        assert await decider(proxy) == ("one", "canary")
        registry.promote(digest, RolloutStage.CHAMPION, 0, ME)
        assert await decider(proxy) == ("one", "champion")
        install(registry, "two", EXPENSIVE, RolloutStage.CHAMPION)
        assert await decider(proxy) == ("two", "champion")
        registry.roll_back(ME)
        assert await decider(proxy) == ("one", "champion")
        registry.roll_back(ME)
        assert await decider(proxy) == (DEFAULT, "champion")
        assert await proxy.metric("autotts_fallbacks_total") == 0


async def test_running_episodes_finish_with_the_controller_they_began_with(
    serve: Serve, backend: HeldVLLM, registry: Registry
) -> None:
    first_digest = install(registry, "one", HONEST, RolloutStage.CHAMPION)
    async with serve() as proxy:
        backend.may.clear()
        first = asyncio.create_task(proxy.ask("0.5"))
        await backend.waiting(1)
        second_digest = install(registry, "two", EXPENSIVE, RolloutStage.CHAMPION)
        second = asyncio.create_task(proxy.ask("0.5"))
        await backend.waiting(2)
        backend.may.set()
        replies = [(await first)[2]["tts"], (await second)[2]["tts"]]
        assert [(tts["controller_digest"], tts["branches"]) for tts in replies] == [
            (first_digest[:12], 5),
            (second_digest[:12], 10),
        ]
        assert [tts["fallback"] for tts in replies] == [None, None]
        assert [tts["stop"] for tts in replies] == ["answered", "answered"]


async def test_readiness_and_metrics_follow_the_registry_without_requests(serve: Serve, registry: Registry) -> None:
    async with serve() as proxy:
        install(registry, "one", HONEST, RolloutStage.CHAMPION)
        async with proxy.http.get(f"{proxy.url}/ready") as response:
            (stages,) = (await response.json())["controllers"].values()
        assert stages["champion"]["controller"] == "one"
        registry.roll_back(ME)
        assert await proxy.metric("autotts_registry_version") == 2


async def test_an_unreadable_registry_keeps_the_previous_champion_and_is_logged_once(
    serve: Serve, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    first_digest = install(registry, "one", HONEST, RolloutStage.CHAMPION)
    async with serve() as proxy:
        assert await decider(proxy) == ("one", "champion")
        sound = folder_of(registry).file.read_bytes()
        folder_of(registry).file.write_text("{")
        assert [await decider(proxy) for _ in range(3)] == [("one", "champion")] * 3
        assert caplog.text.count("registry.json: ") == 1
        assert "keeping champion one" in caplog.text
        assert await proxy.metric("autotts_registry_unreadable") == 1
        folder_of(registry).file.write_bytes(sound)
        assert await decider(proxy) == ("one", "champion")
        assert await proxy.metric("autotts_registry_unreadable") == 0
        assert await proxy.metric("autotts_registry_version") == 1
        second_digest = install(registry, "two", EXPENSIVE, RolloutStage.CHAMPION)
        write_source(registry, second_digest, b"# another\n")
        assert await decider(proxy) == ("one", "champion")
        assert f"{second_digest}.py: the content does not match the hash in its name" in caplog.text
        registry.roll_back(ME)
        assert await decider(proxy) == ("one", "champion")
        assert registry.read().default.champion == first_digest


async def test_an_unreadable_shadow_does_not_keep_proxies_from_following_a_rollback(
    serve: Serve, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    install(registry, "one", HONEST, RolloutStage.CHAMPION)
    install(registry, "two", EXPENSIVE, RolloutStage.CHAMPION)
    shadow = install(registry, "three", DISAGREEING, RolloutStage.SHADOW)
    async with serve() as proxy:
        assert await decider(proxy) == ("two", "champion")
        write_source(registry, shadow, b"# another\n")
        registry.roll_back(ME)
        assert [await decider(proxy) for _ in range(2)] == [("one", "champion")] * 2
        assert await proxy.metric("autotts_registry_unreadable") == 1
        assert await proxy.metric("autotts_registry_version") == 4
        assert caplog.text.count(f"canary or shadow {shadow[:12]} cannot be loaded: ") == 1
    async with serve() as later:
        assert await decider(later) == ("one", "champion")
        registry.drop_shadow(shadow, ME)
        assert await decider(later) == ("one", "champion")
        assert await later.metric("autotts_registry_unreadable") == 0


async def until_refused(url: str) -> None:
    """Wait until the proxy no longer listens."""
    async with aiohttp.ClientSession() as http:
        with suppress(aiohttp.ClientError):
            while (await http.get(f"{url}/health")).status:
                pass


async def test_each_model_is_served_by_its_own_champion(serve: Serve, backend: HeldVLLM, registry: Registry) -> None:
    backend.models = ["fake-model", "small", "large"]
    digest = install(registry, "mine", HONEST, RolloutStage.CHAMPION)
    registry.install(Spec("asc"), {"headline": ""}, RolloutStage.CHAMPION, 0, ME, "small")
    registry.install(Spec("mine", EXPENSIVE), {"headline": ""}, RolloutStage.CANARY, 1.0, ME, "large")
    async with serve() as proxy:
        served = {model: (await proxy.ask("0.5", model=model))[2]["tts"] for model in backend.models}
        assert {model: (tts["controller"], tts["stage"], tts["stage_model"]) for model, tts in served.items()} == {
            "fake-model": ("mine", "champion", None),
            "small": ("asc", "champion", "small"),
            "large": ("mine", "canary", "large"),
        }
        assert served["fake-model"]["controller_digest"] == digest[:12] != served["large"]["controller_digest"]
        for model, stage, controller in (("small", "champion", "asc"), ("large", "canary", "mine")):
            labels = {"model": model, "stage": stage, "controller": controller}
            assert await proxy.metric("autotts_stage_requests_total", **labels) == 1
        async with proxy.http.get(f"{proxy.url}/ready") as response:
            status = (await response.json())["controllers"]
        assert status["small"] == {
            "champion": {"controller": "asc", "digest": Spec("asc").digest[:12], "set_for": "small"}
        }
        assert {stage: about["set_for"] for stage, about in status["large"].items()} == {
            "champion": "default",
            "canary": "large",
        }
        registry.roll_back(ME, "small")
        assert await decider(proxy, model="small") == ("mine", "champion")


# The canary test


async def ask_until_rolled_back(proxy: Proxy, most: int, beta: str = "0") -> int:
    """Send requests until a rollback and return their number."""
    for number in range(1, most + 1):
        await proxy.ask(beta)
        if await proxy.metric("autotts_rollbacks_total"):
            return number
    raise AssertionError(f"{most} requests, and no rollback")


async def test_a_failing_canary_is_rolled_back_and_audited(
    serve: Serve, registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(failure_counter, "WINDOW_S", -1.0)  # no controller is ever quarantined
    digest = install(registry, "mine", FAILING, RolloutStage.CANARY)
    async with serve() as proxy:
        assert await ask_until_rolled_back(proxy, 200) > 10
        assert await proxy.metric("autotts_rollbacks_total", reason="failures") == 1
        assert [await decider(proxy) for _ in range(10)] == [(DEFAULT, "champion")] * 10
    assert registry.read().default.canary is None  # the proxy ends only once the registry is written
    line = registry.audit()[-1]
    assert (line["who"], line["action"], line["before"]) == ("watcher", "drop canary", {"canary": digest})
    assert line["why"].startswith("failures: e-value ")
    messages = [record for record in caplog.records if "is rolled back: failures" in record.getMessage()]
    assert [record.levelno for record in messages] == [logging.ERROR]


async def test_a_canary_promoted_again_is_tested_from_the_start(
    serve: Serve, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_counter, "WINDOW_S", -1.0)
    digest = install(registry, "mine", FAILING, RolloutStage.CANARY)
    async with serve() as proxy:
        while (before := await proxy.metric("autotts_stage_requests_total", stage="canary")) < 11:
            await proxy.ask("0")
        registry.drop_canary(digest, ME)
        assert await decider(proxy) == (DEFAULT, "champion")
        registry.promote(digest, RolloutStage.CANARY, 0.5, ME)
        await ask_until_rolled_back(proxy, 200)
        assert await proxy.metric("autotts_stage_requests_total", stage="canary") - before >= 12


@pytest.fixture
def lock(registry: Registry) -> Iterator[int]:
    """Yield a descriptor that tests lock to block changes of the registry."""
    folder = folder_of(registry).folder
    folder.mkdir()
    held = os.open(folder, os.O_RDONLY)
    yield held
    os.close(held)


async def test_shutdown_waits_until_a_quarantine_is_written_to_the_registry(
    serve: Serve, registry: Registry, lock: int
) -> None:
    digest = install(registry, "mine", FAILING, RolloutStage.CANARY, share=1.0)
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(serve())
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _ in range(3):
            await proxy.ask("0")
        ending = asyncio.create_task(stack.aclose())
        await until_refused(proxy.url)
        ended, _ = await asyncio.wait({ending}, timeout=0.5)
        assert registry.read().default.canary == digest
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert not ended
        await ending
    assert registry.read().default.canary is None


async def test_a_canary_that_spends_more_tokens_than_the_champion_is_rolled_back(
    serve: Serve, registry: Registry
) -> None:
    install(registry, "one", HONEST, RolloutStage.CHAMPION)
    install(registry, "two", EXPENSIVE, RolloutStage.CANARY)
    async with serve() as proxy:
        await ask_until_rolled_back(proxy, 400)
        assert await proxy.metric("autotts_rollbacks_total", reason="tokens") == 1
    assert registry.read().default.canary is None
    assert registry.read().default.champion == Spec("one", HONEST).digest


async def test_a_canary_equal_to_the_champion_is_not_rolled_back(serve: Serve, registry: Registry) -> None:
    install(registry, "one", HONEST, RolloutStage.CHAMPION)
    canary = install(registry, "two", HONEST + "# 2\n", RolloutStage.CANARY)
    async with serve() as proxy:
        for _ in range(60):
            await proxy.ask("0")
        assert await proxy.metric("autotts_rollbacks_total") == 0
    assert registry.read().default.canary == canary


async def test_three_failures_quarantine_a_canary_in_the_registry(serve: Serve, registry: Registry) -> None:
    digest = install(registry, "mine", FAILING, RolloutStage.CANARY, share=1.0)
    async with serve() as proxy:
        assert [(await proxy.ask("0"))[1]["x-tts-fallback"] for _ in range(3)] == ["raised"] * 3
        assert await decider(proxy) == (DEFAULT, "champion")
        assert await proxy.metric("autotts_rollbacks_total", reason="quarantined") == 1
        assert await proxy.metric("autotts_controller_quarantined", controller="mine") == 1
    installed = registry.read()
    assert (installed.default.canary, set(installed.quarantined)) == (None, {digest})
    assert [line["action"] for line in registry.audit()] == ["install as canary", "quarantine"]


async def test_a_quarantine_in_the_registry_holds_until_the_controller_is_promoted_again(
    serve: Serve, registry: Registry
) -> None:
    digest = install(registry, "mine", HONEST, RolloutStage.CHAMPION)
    registry.quarantine(digest, ME)
    async with serve() as proxy:
        assert (await proxy.ask("0"))[1]["x-tts-fallback"] == "quarantined"
        assert await proxy.metric("autotts_controller_quarantined", controller="mine") == 1
        registry.roll_back(ME)
        registry.promote(digest, RolloutStage.CHAMPION, 0, ME)
        assert "x-tts-fallback" not in (await proxy.ask("0"))[1]
        assert await proxy.metric("autotts_controller_quarantined", controller="mine") == 0


async def test_a_failing_canary_is_dropped_even_if_the_registry_cannot_be_written(
    serve: Serve, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    install(registry, "mine", FAILING, RolloutStage.CANARY, share=1.0)
    async with serve() as proxy:
        await proxy.ask("0")
        folder_of(registry).file.write_text("{")
        for _ in range(2):
            await proxy.ask("0")
        assert [await decider(proxy) for _ in range(3)] == [(DEFAULT, "champion")] * 3
    assert "cannot write the registry" in caplog.text


# Shadow controllers


async def test_an_agreeing_shadow_is_counted_every_round_and_costs_no_tokens(serve: Serve, registry: Registry) -> None:
    install(registry, "one", HONEST, RolloutStage.CHAMPION)
    install(registry, "two", HONEST + "# 2\n", RolloutStage.SHADOW)
    async with serve() as proxy:
        _, _, reply = await proxy.ask("1")
        await until(proxy, "autotts_shadow_agreement_total", reply["tts"]["rounds"], controller="two", agreed="true")
        assert await proxy.metric("autotts_shadow_agreement_total") == reply["tts"]["rounds"] > 3
        assert reply["usage"]["completion_tokens"] == proxy.backend.generated
        assert await proxy.metric("autotts_stage_requests_total") == 1


async def test_a_shadow_is_asked_until_its_first_disagreement(serve: Serve, registry: Registry) -> None:
    install(registry, "one", HONEST, RolloutStage.CHAMPION)
    install(registry, "two", DISAGREEING, RolloutStage.SHADOW)
    async with serve() as proxy:
        _, _, reply = await proxy.ask("1")
        await until(proxy, "autotts_shadow_agreement_total", 1, controller="two", agreed="false")
        assert await proxy.metric("autotts_shadow_agreement_total", agreed="true") == 2
        assert await proxy.metric("autotts_shadow_agreement_total") == 3
        assert reply["usage"]["completion_tokens"] == proxy.backend.generated


async def test_a_shadow_is_compared_with_a_built_in_champion(serve: Serve, registry: Registry) -> None:
    install(registry, "two", HONEST, RolloutStage.SHADOW)
    async with serve() as proxy:
        await proxy.ask("0", tts={"controller": "cmc"})
        await proxy.ask("1")
        await until(proxy, "autotts_shadow_agreement_total", 1)
        assert await proxy.metric("autotts_shadow_agreement_total", controller="two", agreed="false") == 1


async def test_a_failing_shadow_is_quarantined_without_effect_on_replies(serve: Serve, registry: Registry) -> None:
    install(registry, "one", HONEST, RolloutStage.CHAMPION)
    digest = install(registry, "two", FAILING, RolloutStage.SHADOW)
    async with serve() as proxy:
        for number in range(1, 4):
            assert "x-tts-fallback" not in (await proxy.ask("0"))[1]
            await until(proxy, "autotts_shadow_agreement_total", number, controller="two", agreed="failed")
        assert await proxy.metric("autotts_controller_quarantined", controller="two") == 1
        await proxy.ask("0")
    assert registry.read().default.shadow is None
    assert registry.read().quarantined == {digest}


async def test_an_endless_shadow_does_not_keep_the_proxy_from_shutting_down(serve: Serve, registry: Registry) -> None:
    install(registry, "one", HONEST, RolloutStage.CHAMPION)
    install(registry, "two", LOCKSTEP.format(later="while True: pass"), RolloutStage.SHADOW)
    async with serve(decision_s=60.0) as proxy:
        for _ in range(3):
            await proxy.ask("0")
        assert await proxy.metric("autotts_shadow_agreement_total", controller="two", agreed="skipped") == 1


# Commands


def autotts(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, " ".join(done.stdout.split()), " ".join(done.stderr.split())


def test_commands_promote_a_file_to_champion_list_it_and_roll_it_back(tmp_path: Path) -> None:
    folder, file, report = str(tmp_path / "installed"), tmp_path / "mine.py", tmp_path / "report.json"
    file.write_text(HONEST)
    digest = Spec("mine", HONEST).digest
    status, _, stderr = autotts("promote", str(file), "--registry", folder, "--as", "shadow")
    assert (status, stderr) == (2, "autotts: mine: needs a passed gate; give --report FILE, or use --force")
    passed = {"digest": digest, "verdict": "promote", "headline": "2 points better", "cells": HELD_OUT_CELLS}
    report.write_text(json.dumps(passed))
    status, stdout, stderr = autotts(
        "promote", str(file), "--registry", folder, "--as", "shadow", "--report", str(report), "--who", "ada"
    )
    assert (status, stderr) == (0, "")
    assert f"mine ({digest[:12]}) is shadow" in stdout
    status, _, stderr = autotts("promote", str(file), "--registry", folder, "--as", "canary")
    assert (status, f"promote it by its digest, {digest[:12]}, or give --report" in stderr) == (2, True)
    status, stdout, _ = autotts("promote", digest[:8], "--registry", folder, "--as", "canary", "--share", "0.2")
    assert (status, "is canary for 20% of the requests" in stdout) == (0, True)
    assert autotts("promote", digest[:8], "--registry", folder, "--as", "champion", "--why", "it is good")[0] == 0
    status, stdout, _ = autotts("controllers", "--registry", folder, "--json")
    figures = json.loads(stdout)
    assert (figures["champion"], figures["cards"][digest]["headline"]) == (digest, "2 points better")
    assert figures["audit"][0]["who"] == "ada"
    assert figures["audit"][-1]["why"] == "it is good"
    assert autotts("promote", "cmc", "--registry", folder, "--as", "canary")[0] == 0
    status, stdout, _ = autotts("rollback", "--registry", folder, "--canary")
    assert (status, f"mine ({digest[:12]}) is the champion; there is no canary" in stdout) == (0, True)
    status, _, stderr = autotts("rollback", "--registry", folder, "--canary")
    assert (status, "there is no canary" in stderr) == (2, True)
    status, stdout, _ = autotts("rollback", "--registry", folder)
    assert "the configured controller is the champion" in stdout
    status, stdout, _ = autotts("controllers", "--registry", folder)
    assert all(text in stdout for text in ("2 points better", "version 6", "rollback", "it is good"))
    status, _, stderr = autotts("rollback", "--registry", folder)
    assert (status, "neither a canary nor a champion" in stderr) == (2, True)


def test_a_rollback_warns_of_controllers_that_proxies_cannot_load(tmp_path: Path) -> None:
    folder, registry = str(tmp_path / "installed"), Registry(tmp_path / "installed")
    install(registry, "one", HONEST, RolloutStage.CHAMPION)
    install(registry, "two", EXPENSIVE, RolloutStage.CHAMPION)
    shadow = install(registry, "three", DISAGREEING, RolloutStage.SHADOW)
    champion = Spec("four", FAILING).digest
    registry.install(Spec("four", FAILING), {"headline": ""}, RolloutStage.CHAMPION, 0, ME, "small")
    for digest in (shadow, champion):
        write_source(registry, digest, None)
    status, stdout, stderr = autotts("rollback", "--registry", folder)
    assert (status, "is the champion; there is no canary" in stdout) == (0, True)
    assert f"proxies serve without it: {shadow[:12]} (shadow) cannot be loaded: " in stderr
    assert f"proxies cannot follow this change: {champion[:12]} (champion of model small) cannot be loaded: " in stderr
    autotts("rollback", "--registry", folder, "--model", "small")
    status, _, stderr = autotts("rollback", "--registry", folder, "--shadow")
    assert (status, stderr) == (0, "")


def test_commands_promote_a_built_in_controller_for_one_model_and_roll_it_back(tmp_path: Path) -> None:
    folder = str(tmp_path / "installed")
    status, stdout, stderr = autotts("promote", "cmc", "--registry", folder, "--as", "champion", "--model", "small")
    assert (status, stderr) == (0, "")
    assert f"cmc ({Spec('cmc').digest[:12]}) is champion of model small" in stdout
    assert "small is new in this registry; it is served only if GET /v1/models lists that name" in stdout
    status, stdout, _ = autotts(
        *("promote", "esc", "--registry", folder, "--as", "canary", "--model", "small", "--share", "0.3")
    )
    assert (status, "is new in this registry" in stdout) == (0, False)
    assert autotts("promote", "asc", "--registry", folder, "--as", "champion")[0] == 0
    status, stdout, _ = autotts("controllers", "--registry", folder, "--json")
    figures = json.loads(stdout)
    assert figures["champion"] == Spec("asc").digest
    assert figures["models"]["small"]["champion"] == Spec("cmc").digest
    assert figures["serving"]["small"]["canary"] == {"digest": Spec("esc").digest, "set_for": "small"}
    status, stdout, _ = autotts("controllers", "--registry", folder)
    for row in ("default │ champion │ asc", "small │ champion │ cmc", "small │ canary (30%) │ esc"):
        assert row in stdout
    status, stdout, _ = autotts("rollback", "--registry", folder, "--model", "small")
    assert "the default's champion is the champion of model small; there is no canary" in stdout
    status, _, stderr = autotts("rollback", "--registry", folder, "--model", "small")
    assert (status, "model small has neither a canary nor a champion" in stderr) == (2, True)
    assert Registry(Path(folder)).read().default.champion == Spec("asc").digest


def test_a_forced_promotion_prints_a_warning_and_is_audited(tmp_path: Path) -> None:
    folder, file = str(tmp_path / "installed"), tmp_path / "mine.py"
    file.write_text(HONEST)
    status, _, stderr = autotts("promote", str(file), "--registry", folder, "--as", "champion", "--force")
    assert status == 0
    assert stderr.startswith("FORCED: ")
    refused = tmp_path / "cmc.py"  # a built-in controller has this name
    refused.write_text(HONEST)
    status, _, stderr = autotts("promote", str(refused), "--registry", folder, "--as", "champion", "--force")
    assert (status, "FORCED" in stderr) == (2, False)
    registry = Registry(Path(folder))
    assert registry.audit()[-1]["forced"] is True
    assert registry.card(Spec("mine", HONEST).digest)["forced"] is True


def test_a_canary_that_is_the_configured_controller_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, default = str(tmp_path / "installed"), builtin.DEFAULT
    monkeypatch.delenv("AUTOTTS_CONTROLLER", raising=False)
    for configured, what, is_warned in ((None, default, True), ("cmc", default, False), ("cmc", "cmc", True)):
        if configured is not None:
            monkeypatch.setenv("AUTOTTS_CONTROLLER", configured)
        status, _, stderr = autotts("promote", what, "--registry", folder, "--as", "canary")
        assert (status, "as canary it is compared with itself" in stderr) == (0, is_warned)
    assert autotts("promote", "esc", "--registry", folder, "--as", "champion")[0] == 0
    assert autotts("promote", "cmc", "--registry", folder, "--as", "shadow")[2] == ""


def test_a_registry_that_does_not_exist_is_listed_as_such(tmp_path: Path) -> None:
    folder = str(tmp_path / "none")
    status, stdout, _ = autotts("controllers", "--registry", folder)
    assert (status, "none does not exist yet; the first promotion makes it" in stdout.replace("\n", " ")) == (0, True)
    autotts("promote", "cmc", "--registry", folder, "--as", "champion")
    assert "does not exist" not in autotts("controllers", "--registry", folder)[1]


def test_promoting_a_digest_with_a_report_is_refused(tmp_path: Path) -> None:
    status, _, stderr = autotts(
        "promote", "abcd", "--registry", str(tmp_path), "--as", "shadow", "--report", str(tmp_path / "report.json")
    )
    assert (status, "--report is only for files" in stderr) == (2, True)
