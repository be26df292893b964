"""Controllers and models that serve no longer: their metrics and entries are removed, but not under a request."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from openai import AsyncOpenAI

from controllers.builtin import BUILT_IN
from controllers.loading import Spec
from controllers.rollout_state import RolloutStage
from discovery.promotion.registry import ChangeCause, Registry
from proxy.admission import api_keys
from proxy.api.service import Service
from proxy.server import Server, listen
from proxy.settings import load
from proxy.telemetry.label_sets import LabelSets
from tests.proxy.admission.test_api_keys import ALICE
from tests.proxy.conftest import SMALL, Proxy
from tests.proxy.rollout.conftest import HeldVLLM
from tests.proxy.rollout.test_promotion import FAILING
from tests.proxy.rollout.test_sealed_controllers import HONEST

pytestmark = pytest.mark.process

ME = ChangeCause("me", "a test", datetime(2026, 11, 24, tzinfo=UTC), forced=True)
DEFAULT = "self_consistency"
AT_ONCE = 1e-9
"""Seconds after which a key is retired: by the second look that finds it unused."""


class Inspected(NamedTuple):
    """A running proxy and the components of its process."""

    proxy: Proxy
    service: Service

    def look(self) -> None:
        """Look for retired entries, so often that all are removed."""
        for _ in range(2):
            for remove in self.service.retirement._removals:
                remove()

    @property
    def controllers(self) -> set[str]:
        """The controllers that label sets name, besides the built-in ones."""
        return LabelSets(self.service.metrics, "controller").values() - {"", *BUILT_IN}

    @property
    def series(self) -> int:
        """Number of the samples of `/metrics`."""
        return sum(not line.startswith(b"#") for line in self.service.metrics.exposition().splitlines())


Serve = Callable[..., AbstractAsyncContextManager[Inspected]]


@pytest.fixture
def backend(held_backend: HeldVLLM) -> HeldVLLM:
    return held_backend


@pytest.fixture
def serve(backend: HeldVLLM, registry: Registry) -> Serve:
    """Return a context that runs a proxy whose components can be inspected. It looks for nothing by itself."""

    @asynccontextmanager
    async def inspected(**settings: Any) -> AsyncIterator[Inspected]:
        given = {**SMALL, "controller": DEFAULT, "decision_s": 5.0, "sandbox_pool": 1, "registry": registry.place}
        given |= {"registry_poll_s": 0, "retired_metrics_s": AT_ONCE, **settings}
        with listen("127.0.0.1", 0) as listening:
            server = Server(load(upstream=backend.url, **given))
            task = asyncio.create_task(server.serve(sockets=[listening]))
            await server.up.wait()
            service = server._app.state.service
            await service.retirement.close()
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            try:
                async with (
                    aiohttp.ClientSession() as http,
                    AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as openai,
                ):
                    yield Inspected(Proxy(backend, url, http, openai), service)
            finally:
                server.should_exit = True
                await task

    return inspected


def install(registry: Registry, name: str, source: str, stage: RolloutStage = RolloutStage.CANARY) -> str:
    spec = Spec(name, source)
    registry.install(spec, {"headline": "a test's"}, stage, 1.0, ME)
    return spec.digest


async def ask(proxy: Proxy, **fields: Any) -> str:
    status, headers, reply = await proxy.ask("0.5", **fields)
    assert status == 200, reply
    return str(headers["x-tts-controller"])


async def quarantined(inspected: Inspected) -> dict[str, float]:
    """Return whether each controller is quarantined, as `/metrics` says."""
    await inspected.proxy.metric("autotts_registry_version")  # reads the registry
    samples = [sample for family in inspected.service.metrics.quarantined.collect() for sample in family.samples]
    return {sample.labels["controller"]: sample.value for sample in samples}


def holders(keys: set[str]) -> list[object]:
    """Return the dictionaries and sets of this process that have one of these keys or members."""
    gc.collect()
    # `isinstance` would ask proxies of other libraries for their class, and torch's warns
    found: list[Any] = [each for each in gc.get_objects() if issubclass(type(each), dict | set | frozenset)]
    return [each for each in found if each is not keys and not keys.isdisjoint(each)]


@pytest.mark.slow
async def test_two_hundred_short_lived_canaries_leave_nothing_behind(serve: Serve, registry: Registry) -> None:
    async with serve(allow_unsandboxed=True) as inspected:
        digests: set[str] = set()
        series: list[int] = []
        for number in range(200):
            name = f"brief{number}"
            digest = install(registry, name, f"{FAILING if number % 4 == 3 else HONEST}# {number}\n")
            assert await ask(inspected.proxy) == name
            assert name in inspected.controllers
            registry.drop_canary(digest, ME)
            await inspected.proxy.metric("autotts_registry_version")  # reads the registry
            digests.add(digest)
            inspected.look()
            assert not inspected.controllers
            series.append(inspected.series)
        assert max(series[10:]) == series[10]
        assert not holders(digests)
        assert not [name for name in sys.modules if name.removeprefix("controller_") in {each[:12] for each in digests}]
        assert await ask(inspected.proxy) == DEFAULT


async def test_pools_of_retired_controllers_end_with_their_threads(serve: Serve, registry: Registry) -> None:
    async with serve() as inspected:
        before = {thread.name for thread in threading.enumerate()}
        for number in range(4):
            digest = install(registry, f"sealed{number}", f"{HONEST}# {number}\n")
            assert await ask(inspected.proxy) == f"sealed{number}"
            registry.drop_canary(digest, ME)
            await inspected.proxy.metric("autotts_registry_version")
        assert len(inspected.service.controllers.sandboxes.digests) == 4
        makers = [thread for thread in threading.enumerate() if thread.name.startswith("sandbox-make")]
        assert makers
        inspected.look()
        assert not inspected.service.controllers.sandboxes.digests
        await asyncio.gather(*inspected.service.controllers.sandboxes._closing)
        for thread in makers:
            await asyncio.to_thread(thread.join)
        assert {thread.name for thread in threading.enumerate()} - before <= {"sandbox-end_0", "sandbox-end_1"} | {
            thread.name for thread in threading.enumerate() if thread.name.startswith("asyncio")
        }


async def test_a_request_in_flight_keeps_the_metrics_of_its_controller(
    serve: Serve, registry: Registry, backend: HeldVLLM
) -> None:
    digest = install(registry, "brief", HONEST)
    async with serve() as inspected:
        backend.may.clear()
        asking = asyncio.create_task(ask(inspected.proxy))
        await backend.waiting(1)
        registry.drop_canary(digest, ME)
        await inspected.proxy.metric("autotts_registry_version")
        inspected.look()
        kept, digests = inspected.controllers, inspected.service.controllers.sandboxes.digests
        decided = await inspected.proxy.metric("autotts_decision_seconds_count", controller="brief")
        backend.may.set()
        assert await asking == "brief"
        assert kept == {"brief"}
        assert digest in digests
        assert decided > 0
        assert await inspected.proxy.metric("autotts_requests_total", controller="brief", outcome="answered") == 1
        assert await inspected.proxy.metric("autotts_decision_seconds_count", controller="brief") > decided
        inspected.look()
        assert not inspected.controllers
        assert digest not in inspected.service.controllers.sandboxes.digests


async def test_metrics_of_controllers_that_serve_do_not_go_backwards(serve: Serve, registry: Registry) -> None:
    install(registry, "mine", HONEST, RolloutStage.CHAMPION)
    install(registry, "shade", f"{HONEST}# shadow\n", RolloutStage.SHADOW)
    async with serve() as inspected:
        assert await ask(inspected.proxy) == "mine"
        assert await ask(inspected.proxy, tts={"controller": "cmc"}) == "cmc"
        assert await ask(inspected.proxy, tts={"controller": "asc@5"}) == "asc@5"
        while not await inspected.proxy.metric("autotts_shadow_agreement_total", controller="shade", agreed="true"):
            pass
        before = inspected.series
        inspected.look()
        assert inspected.series == before
        assert inspected.controllers == {"mine", "shade"}
        for controller in ("mine", "cmc", "asc"):
            assert await inspected.proxy.metric("autotts_requests_total", controller=controller) == 1


async def test_another_controller_of_the_same_name_keeps_the_label_sets(serve: Serve, registry: Registry) -> None:
    digest = install(registry, "mine", HONEST)
    async with serve() as inspected:
        assert await ask(inspected.proxy) == "mine"
        later = install(registry, "mine", f"{HONEST}# later\n")
        assert await ask(inspected.proxy) == "mine"
        inspected.look()
        assert inspected.service.controllers.sandboxes.digests == {later} != {digest}
        assert await inspected.proxy.metric("autotts_requests_total", controller="mine") == 2


async def test_metrics_stay_for_the_whole_time(serve: Serve, registry: Registry) -> None:
    digest = install(registry, "brief", HONEST)
    async with serve(retired_metrics_s=600) as inspected:
        assert await ask(inspected.proxy) == "brief"
        registry.drop_canary(digest, ME)
        await inspected.proxy.metric("autotts_registry_version")
        inspected.look()
        assert await inspected.proxy.metric("autotts_requests_total", controller="brief") == 1


async def test_a_controller_that_serves_again_is_counted_anew(serve: Serve, registry: Registry) -> None:
    digest = install(registry, "brief", HONEST)
    async with serve() as inspected:
        assert await ask(inspected.proxy) == "brief"
        registry.drop_canary(digest, ME)
        await inspected.proxy.metric("autotts_registry_version")
        inspected.look()
        install(registry, "brief", HONEST)
        assert await ask(inspected.proxy) == "brief"
        inspected.look()
        assert await inspected.proxy.metric("autotts_requests_total", controller="brief") == 1


async def test_a_quarantine_in_the_registry_outlasts_the_metrics(serve: Serve, registry: Registry) -> None:
    digest = install(registry, "failing", FAILING)
    async with serve() as inspected:
        for _ in range(3):
            assert await ask(inspected.proxy) == "failing"
        assert await ask(inspected.proxy) == DEFAULT
        await asyncio.gather(*inspected.service.controllers._registry_tasks)
        inspected.look()
        assert digest in inspected.service.controllers.quarantined
        assert not inspected.service.controllers._failures.digests
        assert await quarantined(inspected) == {"failing": 1}
        inspected.service.metrics.overspending.labels("failing").set(1)
        registry.promote(digest, RolloutStage.CANARY, 0, ME)  # lifts it
        assert await quarantined(inspected) == {"failing": 0}
        assert await inspected.proxy.metric("autotts_controller_overspending", controller="failing") == 0
        registry.drop_canary(digest, ME)
        await inspected.proxy.metric("autotts_registry_version")
        inspected.look()
        assert not inspected.controllers


async def test_a_quarantine_is_reported_until_a_controller_of_that_name_replaces_it(
    serve: Serve, registry: Registry, backend: HeldVLLM
) -> None:
    backend.models = ["fake-model", "small"]
    registry.install(Spec("mine", HONEST), {"headline": ""}, RolloutStage.CHAMPION, 0, ME, "small")
    install(registry, "mine", FAILING)
    async with serve() as inspected:
        for _ in range(3):
            assert await ask(inspected.proxy) == "mine"
        assert await ask(inspected.proxy) == DEFAULT
        await asyncio.gather(*inspected.service.controllers._registry_tasks)
        inspected.look()
        assert await quarantined(inspected) == {"mine": 1}  # although that of the other model has not failed
        inspected.service.controllers._cost_test._warned.add(Spec("mine", HONEST).digest)
        inspected.service.metrics.overspending.labels("mine").set(1)
        later = install(registry, "mine", f"{HONEST}# later\n")
        assert await ask(inspected.proxy) == "mine"
        assert await quarantined(inspected) == {"mine": 0}
        assert await inspected.proxy.metric("autotts_controller_overspending", controller="mine") == 1
        registry.drop_canary(later, ME)
        registry.roll_back(ME, "small")
        await inspected.proxy.metric("autotts_registry_version")
        inspected.look()
        assert not inspected.controllers


async def test_models_that_the_upstream_serves_no_longer_are_forgotten(serve: Serve, backend: HeldVLLM) -> None:
    async with serve() as inspected:
        service, models = inspected.service, LabelSets(inspected.service.metrics, "model")
        assert await ask(inspected.proxy) == DEFAULT
        async with inspected.proxy.http.post(
            f"{inspected.proxy.url}/v1/chat/completions",
            json={"model": "fake-model", "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0.5}, "n": 2},
        ) as response:
            await response.read()
        inspected.look()
        assert models.values() == {"fake-model"}
        assert service.metrics.chain_lengths.models == ["fake-model"]
        service.served = []  # the upstream is away
        inspected.look()
        assert models.values() == {"fake-model"}
        service.served = ["another"]
        inspected.look()
        assert not models.values()
        assert not service.metrics.chain_lengths.models
        assert not service.unapplied.models


async def test_sums_and_metrics_of_keys_that_were_removed_are_forgotten(serve: Serve, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(api_keys.key_file_entry("alice", ALICE))
    keys.chmod(0o600)
    async with serve(keys=keys, key_metrics=True) as inspected:
        tally = inspected.service.request_slots.tally
        for name in ("alice", "gone"):
            tally.adder(name).add_passed(5, 3)
        inspected.look()
        assert list(tally._by_key) == ["alice"]
        assert LabelSets(inspected.service.metrics, "key").values() == {"alice"}
        assert tally.of("alice").passed_tokens == 5
        assert tally.total.passed_tokens == 10
        keys.write_text(api_keys.key_file_entry("alice", ALICE) + "\n" + api_keys.key_file_entry("new", f"{ALICE}2"))
        inspected.look()
        assert LabelSets(inspected.service.metrics, "key").values() == {"alice", "new"}
