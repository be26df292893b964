"""Erasure and expiry: all rows and bytes of forgotten or old data are removed, and they do not come back."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from discovery.data.recordings import LabelSource, Origin, RecordedQuestion, question_id
from discovery.errors import RecordingsNotFound, StoreError
from discovery.store import (
    MAX_PROMPTS,
    Feedback,
    ForgottenCounts,
    Label,
    ServedEpisode,
    Store,
    StoreItem,
    StorePlace,
    prompt_name,
)
from discovery.store.databases.sqlite import SqliteConnection
from discovery.store.item_lines import encode_item
from discovery.store.schema import COLUMNS
from proxy.commands.forget import forget
from proxy.recording.spill_file import SpillFiles
from tests.discovery.audit.served import write
from tests.discovery.evaluation.test_evaluate import autotts
from tests.discovery.store.outside import run_sql
from tests.discovery.store.test_replay_store import some
from tests.discovery.store.usage.served import is_consistent

OLD, THEN = "2020-01-01T00:00:00.000000+00:00", "2021-01-01T00:00:00.000000+00:00"


@pytest.fixture(autouse=True)
def plain_sqlite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open connections without `secure_delete`, which some builds of SQLite enable by default."""
    connect = sqlite3.connect

    def plainly(*about: Any, **how: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*about, **how)
        connection.execute("PRAGMA secure_delete = OFF")
        return connection

    monkeypatch.setattr(sqlite3, "connect", plainly)


def episode(name: str, tenant: str = "t", question: str | None = None, **changes: Any) -> ServedEpisode:
    about = {"text": f"secret-{name}-text " * 9}
    made = ServedEpisode(name, name, "m", "cmc", "d", 0.5, 3, 4, {"winner": 5}, "answered", "7", question or f"q{name}")
    return replace(made, tenant=tenant, about=about, **changes)  # type: ignore[arg-type]


def feedback_on(name: str, **changes: Any) -> Feedback:
    return replace(Feedback(f"f{name}", name, "answer", f'"secret-{name}-feedback"', tenant="t"), **changes)


def recorded(name: str) -> RecordedQuestion:
    made = some(f"secret-{name}-asked", request=name, origin=Origin.LIVE)
    finished, ended = made.branches
    finished = finished._replace(confidences=[800] * 4, lowests=[700] * 4, probe_confidences=[900, None, 990])
    return replace(made, question=f"q{name}", reference=None, branches=[finished, ended])


def labelled(question: str, *sources: LabelSource) -> list[Label]:
    return [Label(question, source, f"secret-{question[1:]}-label", 0.9, 0.5) for source in sources]


async def put(store: Store, *names: str, **changes: Any) -> None:
    """Store requests with episode, feedback, recording and labels."""
    for name in names:
        heard = {key: value for key, value in changes.items() if key in ("tenant", "created")}
        await store.add_all([episode(name, **changes), feedback_on(name, **heard), recorded(name)])
        await store.set_labels(labelled(f"q{name}", *LabelSource))


async def counted(store: Store) -> dict[str, int]:
    counts = (await store.verify()).rows
    return {table: counts[table] for table in COLUMNS if counts[table] and table != "forgotten"}


def holding(folder: Path, word: str) -> list[str]:
    """Return the names of the files that contain `word`."""
    return [one.name for one in folder.iterdir() if word.encode() in one.read_bytes()]


def remains(place: StorePlace, word: str) -> bool:
    """Return whether a file of the store, or a row in PostgreSQL, contains `word`."""
    if isinstance(place, Path):
        return bool(holding(place.parent, word))
    tables = (*COLUMNS, "episode_facts", "usage_hours", "usage_days")
    return any(run_sql(place, f"SELECT 1 FROM {table} WHERE {table}::text LIKE '%{word}%'") for table in tables)


ONE = {
    **{"questions": 1, "recordings": 1, "branches": 2, "branch_signals": 1},
    **{"episodes": 1, "feedback": 1, "provenance": 1, "labels": 3},
}
ALL = ForgottenCounts(1, 1, 1, 3, 1)


@pytest.mark.parametrize("which", [{"request": "a"}, {"tenant": "A"}])
async def test_forgotten_data_and_its_bytes_are_removed_for_good(place: StorePlace, which: dict[str, str]) -> None:
    async with Store.open(place, create=True) as store:
        await put(store, "a", tenant="A")
        await put(store, "b", tenant="B")
        was = await store.episodes(), await store.feedback()
        assert remains(place, "secret-a-")
        assert await store.forget(**which) == ALL
        assert not remains(place, "secret-a-")  # while the store is open
        assert await counted(store) == ONE
        late = feedback_on("a", id="later", tenant="A")  # feedback that arrives after the erasure
        await store.add_all([*was[0], *was[1], recorded("a"), late])  # a spill file may still hold them
        assert await counted(store) == ONE
        assert [one.id for one in await store.episodes()] == ["b"]
        assert [one.id for one in await store.feedback()] == ["fb"]
        assert (await store.verify()).bad == []
    assert not remains(place, "secret-a-")
    assert remains(place, "secret-b-")


async def test_a_request_stands_for_its_prompts(place: StorePlace) -> None:
    """The proxy records each prompt of a request under a name of its own."""
    async with Store.open(place, create=True) as store:
        prompts = [prompt_name("a", index) for index in (0, 7, MAX_PROMPTS - 1)]
        others = ["a-", "a-x", "a-01", prompt_name("a", MAX_PROMPTS), "a-0-0", "b-0"]
        await put(store, *prompts, *others)
        was = await store.episodes()
        assert await store.forget(request="a") == ForgottenCounts(3, 3, 3, 9, 3)
        late = episode(prompt_name("a", 1))
        await store.add_all([*was, late, *map(recorded, prompts), feedback_on(late.id)])
        assert sorted(one.id for one in await store.episodes()) == sorted(others)
        assert await is_consistent(store)
        assert await store.forget(request="b-0") == ALL  # one prompt alone
        await store.add_all([episode("b-1")])
        assert await store.episode("b-1") is not None
    for name in (*prompts, late.id):
        assert not remains(place, f"secret-{name}-text")


async def test_an_earlier_episode_of_a_forgotten_tenant_is_not_added_later(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await store.forget(tenant="A")
        await store.add_all([episode("a", "A", created=OLD), feedback_on("a", tenant="A", created=OLD)])
        assert await counted(store) == {}
        await store.add_all([episode("b", "A")])  # new requests of the tenant are accepted
        assert await counted(store) == {"episodes": 1}


async def test_forgetting_leaves_other_tenants_data(place: StorePlace) -> None:
    """For questions that other tenants asked too, only derived labels are removed; a client's answer may be in them."""
    async with Store.open(place, create=True) as store:
        served = [episode("a", "A", "q"), episode("b", "B", "q"), episode("c", "B", "p"), episode("d", "B", "other")]
        heard = [feedback_on("a", tenant="A"), feedback_on("b", tenant="B"), feedback_on("c", id="of A", tenant="A")]
        await store.add_all([*served, *heard])
        sources = list(LabelSource)
        await store.set_labels([*labelled("q", *sources), *labelled("p", *sources), *labelled("other", *sources)])
        assert await store.forget(tenant="A") == ForgottenCounts(1, 2, 0, 4, 0)
        left = [(one.question, one.source) for one in await store.labels()]
        assert sorted(left) == sorted(
            [("q", LabelSource.REFERENCE), ("p", LabelSource.REFERENCE), *(("other", source) for source in sources)]
        )
        assert [one.id for one in await store.feedback()] == ["fb"]


async def test_expired_episodes_are_removed_with_their_recordings(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await put(store, "a", created=OLD)
        await put(store, "b")
        await store.add_all([feedback_on("a", id="later")])  # recent feedback on an old episode
        assert await store.expire(THEN) == ForgottenCounts(1, 2, 1, 3, 1)
        assert not remains(place, "secret-a-")
        assert await counted(store) == ONE
        assert await store.expire(THEN) == ForgottenCounts(0, 0, 0, 0, 0)


async def test_records_expire_in_several_transactions(place: StorePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discovery.store.replay_store.EXPIRED_AT_ONCE", 3)
    monkeypatch.setattr("discovery.store.databases.connection.CHUNK", 2)
    async with Store.open(place, create=True) as store:
        await put(store, *"abcdefg", created=OLD)
        await store.add_all([episode("shared", question="qa"), feedback_on("g", id="more", created=OLD)])
        await put(store, "new")
        await store.sum_usage()
        before = store.transactions
        assert await store.expire(THEN) == ForgottenCounts(
            7, 8, 7, 20, 6
        )  # a question is still used, with its reference
        assert store.transactions - before == 4  # the last one finds nothing
        assert sorted(one.id for one in await store.episodes()) == ["new", "shared"]
        assert (await store.verify()).bad == []
        assert await is_consistent(store)
        assert await store.expire(THEN) == ForgottenCounts(0, 0, 0, 0, 0)


async def test_old_records_are_found_by_an_index(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        for table in ("episodes", "feedback"):
            query = f"SELECT id FROM {table} WHERE created < '2030' ORDER BY created LIMIT 2000"
            if isinstance(place, Path):
                plan = str(await store._read(f"EXPLAIN QUERY PLAN {query}"))
            else:
                await store._read("SET enable_seqscan = off")  # a few rows are read faster without an index
                plan = str(await store._read(f"EXPLAIN {query}"))
            assert f"{table}_by_age" in plan


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """Yield a second connection, which reads one snapshot of the store after BEGIN."""
    connection = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
    yield connection
    connection.close()


async def test_bytes_kept_in_the_log_by_a_reader_are_reported(tmp_path: Path, reader: sqlite3.Connection) -> None:
    async with Store.open(tmp_path / "s.db", create=True, wait_ms=10) as store:
        await put(store, "a", created=OLD)
        await put(store, "b")
        for names in ("b", "a"):
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM episodes").fetchall()
            if names == "b":
                with pytest.raises(StoreError, match="rows were removed, but their bytes remain in the log because"):
                    await store.forget(request="b")
            else:
                assert (await store.expire(THEN)).episodes == 1  # expiry runs again periodically
            assert await store.episode(names) is None
            assert holding(tmp_path, f"secret-{names}-") != []
            reader.execute("COMMIT")
            await (store.forget(request="b") if names == "b" else store.expire(THEN))
            assert holding(tmp_path, f"secret-{names}-") == []


async def test_bytes_kept_in_the_file_by_a_writer_are_reported(tmp_path: Path, reader: sqlite3.Connection) -> None:
    async with Store.open(tmp_path / "s.db", create=True, wait_ms=0) as store:
        await put(store, "a")
        assert isinstance(store._writes.connection, SqliteConnection)
        opened = store._writes.connection.opened
        begin = opened.execute_fetchall

        def and_another(statement: str, *values: Any) -> Any:
            if statement == "VACUUM":
                reader.execute("BEGIN IMMEDIATE")
            return begin(statement, *values)

        opened.execute_fetchall = and_another  # type: ignore[method-assign]
        with pytest.raises(
            StoreError, match="rows were removed, but their bytes remain in the file: database is locked"
        ):
            await store.forget(request="a")
        assert await counted(store) == {}


async def test_pruning_a_corrupt_episode_removes_its_recordings(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await put(store, "a", "b")
    run_sql(place, "UPDATE episodes SET stop = 'x' WHERE id = 'a'")
    async with Store.open(place) as store:
        assert tuple(await store.prune(corrupt=True)) == (1, 1, 2)
        assert {one.request for cell in await store.summaries() for one in await store.load(cell.cell)} == {"b"}
    assert not remains(place, "secret-a-asked")


# Opening


async def test_opening_waits_while_another_process_creates_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="database is locked"):
        async with Store.open(path, create=True, wait_ms=0):
            pass
    refused = []
    sleep = asyncio.sleep

    async def and_commit(seconds: float) -> None:
        refused.append(seconds)
        if len(refused) == 2:
            other.execute("COMMIT")
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", and_commit)
    async with Store.open(path, create=True) as store:
        assert await store.add([some()]) == (1, 1, 2)
    assert len(refused) == 2
    other.close()


# The command


@pytest.mark.process
def test_the_forget_command_erases_one_request_tenant_or_anonymous_data(tmp_path: Path) -> None:
    path = tmp_path / "s.db"

    async def fill() -> None:
        async with Store.open(path, create=True) as store:
            await put(store, "a", "b", tenant="A")
            await put(store, "c", tenant="")
            await store.add_all([replace(episode("e", "E"), question=question_id("e"))])

    asyncio.run(fill())
    for arguments, code, message in (
        (["--request-id", "a"], 0, "erased 1 episodes, 1 feedback entries, 1 recordings, 3 labels, and 1 questions"),
        (["--request-id", "a"], 0, "s.db: forgotten before; nothing is left of a"),
        (["--tenant", "nobody"], 2, "s.db: nothing is recorded of nobody; it is now noted as forgotten"),
        (["--anonymous"], 0, "erased 1 episodes"),
        (["--anonymous"], 0, "s.db: forgotten before; nothing is left of requests without a key"),
        (["--tenant", "A"], 0, "erased 1 episodes"),
        ([], 2, "give exactly one of --request-id ID, --tenant HASH and --anonymous"),
        (["--anonymous", "--tenant", "E"], 2, "exactly one of"),
    ):
        done = autotts("store", "forget", "--store", "s.db", *arguments, folder=tmp_path)
        assert (done.returncode, message in " ".join((done.stdout + done.stderr).split())) == (code, True), done
    assert [holding(tmp_path, f"secret-{one}-") for one in "abc"] == [[], [], []]
    assert holding(tmp_path, "secret-e-") == ["s.db"]


def test_forgetting_covers_the_spill_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spill file of a stopped proxy is erased; that of a running proxy is reported."""
    monkeypatch.delenv("AUTOTTS_SPILL", raising=False)
    path = tmp_path / "s.db"
    write(path, [episode("c")])

    def spilled(*items: StoreItem) -> SpillFiles:
        spill = SpillFiles(tmp_path / "s.db.spill", 1 << 20)
        spill.append([encode_item(one) for one in items] + [b"[]"])
        return spill

    spilled(episode("a", "A"), feedback_on("a", tenant="A"), recorded("a"), episode("b", "B")).close()
    running = spilled(episode("d", "A"), replace(episode("e"), branches=2**70))  # a running proxy holds the spill file
    with pytest.raises(StoreError, match=r"s\.db\.spill: a running proxy uses this spill file"):
        forget(tenant="A", place=path)
    assert holding(tmp_path, "secret-a-") == ["s.db.spill"]
    running.close()
    forget(tenant="A", place=path)  # the store's rows were erased by the first attempt
    assert holding(tmp_path, "secret-a-") == holding(tmp_path, "secret-d-") == []
    assert (holding(tmp_path, "secret-b-"), holding(tmp_path, "spill")) == (["s.db"], [])
    assert [one.name for one in tmp_path.iterdir()] == ["s.db"]
    spilled(episode("f", "F")).close()
    forget(tenant="F", place=path)  # only the spill file held it
    with pytest.raises(RecordingsNotFound, match="nothing is recorded of G"):
        forget(tenant="G", place=path)
    assert holding(tmp_path, "secret-f-") == []
