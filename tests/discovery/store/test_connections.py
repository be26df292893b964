"""Store files: locks survive other work on the path, and no file of a store in use is removed or replaced."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import aiohttp
import aiosqlite
import pytest

from discovery.data.atomic_files import atomic_write, check_writable_path, is_database_file
from discovery.data.recordings import RecordedBranch, RecordedQuestion, question_id
from discovery.errors import CorruptRow, FileWriteError, StoreError
from discovery.evaluation.sources import open_source
from discovery.store import ServedEpisode, Store
from proxy.errors import SettingsError
from proxy.recording.spill_file import SpillFiles
from proxy.recording.store_writer import StoreWriter
from proxy.recording.template_drift import TemplateDrift
from proxy.settings import load
from proxy.spill_paths import is_foreign
from proxy.telemetry.metrics import Metrics
from proxy.upstream.client import UpstreamClient


def episode(name: str) -> ServedEpisode:
    return ServedEpisode(name, name, "m", "cmc", "d", 0.5, 3, 4, {}, "answered")


def locks(path: Path) -> set[str]:
    """Return the byte ranges of a file on which this process holds POSIX locks.

    The kernel returns /proc/locks in pages and may omit lines while other locks change, so it is read three times.
    """
    status = path.stat()
    name = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    held = set()
    for line in [line for _ in range(3) for line in Path("/proc/locks").read_text().splitlines()]:
        _, kind, _, mode, pid, place, begin, end = [part for part in line.split() if part != "->"]
        if (kind, pid, place) == ("POSIX", str(os.getpid()), name):
            held.add(f"{mode} {begin}-{end}")
    return held


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def stored(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {name for (name,) in connection.execute("SELECT id FROM episodes")}


async def open_again(path: Path) -> None:
    async with Store.open(path) as store:
        await store.summaries()


async def compare(path: Path) -> None:
    settings = load(upstream="http://127.0.0.1:1", store=path)
    async with aiohttp.ClientSession() as session:
        await TemplateDrift(UpstreamClient(str(settings.upstream), session), settings, Metrics())._compare()


async def read_cells(path: Path) -> None:
    source = open_source(path)
    for cell in await asyncio.to_thread(source.cells):
        await asyncio.to_thread(source.load, cell)


async def record(path: Path) -> None:
    recorder = StoreWriter(load(upstream="http://127.0.0.1:1", store=path), Metrics())
    await recorder.open()
    assert await recorder.put("r", lambda: episode("r"))
    await recorder.close()


def blocking(work: Callable[[Path], object]) -> Callable[[Path], object]:
    async def run(path: Path) -> None:
        with suppress(OSError, FileWriteError, StoreError, SettingsError):
            work(path)

    return run


def overwrite(path: Path) -> None:
    with atomic_write(path) as file:
        file.write(b"{}")


def spill(path: Path) -> None:
    waiting = SpillFiles(path, 1 << 20)
    try:
        waiting.adopt()
        waiting.append([b"{}"])
    finally:
        waiting.close()


OTHERS = {
    "open": open_again,
    "drift": compare,
    "cells": read_cells,
    "recorder": record,
    "place": blocking(lambda path: check_writable_path(path, "--out")),
    "write": blocking(overwrite),
    "spill": blocking(spill),
    "foreign": blocking(is_foreign),
    "settings": blocking(lambda path: load(store=path, spill=path)),
    "sniff": blocking(is_database_file),
}


@pytest.mark.parametrize("by", ["name", "symbolic link", "hard link"])
@pytest.mark.parametrize("work", OTHERS)
async def test_no_operation_on_the_path_of_an_open_store_drops_its_locks(tmp_path: Path, work: str, by: str) -> None:
    path = named = tmp_path / "s.db"
    async with Store.open(path, create=True) as store:
        await store.add([RecordedQuestion(question_id("q"), "m", "b", 500, [RecordedBranch(["7"], 900, "7")], "7")])
        await store.add_all([episode("e")])
        if by != "name":
            named = tmp_path / "other.db"
            (named.symlink_to if by == "symbolic link" else named.hardlink_to)(path)
        files = [path, tmp_path / "s.db-shm"]
        before = list(map(locks, files))
        assert all(before)
        if by == "hard link" and work in ("open", "drift", "cells"):
            with pytest.raises(StoreError, match=r"the file has 2 names \(hard links\)"):
                await OTHERS[work](named)  # type: ignore[misc]
        else:
            await OTHERS[work](named)  # type: ignore[misc]
        assert list(map(locks, files)) == before
        await store.add_all([episode("after")])
        if named != path:
            named.unlink()
    assert stored(path) >= {"e", "after"}


def test_a_database_file_is_recognised_without_being_changed(tmp_path: Path) -> None:
    names = ("s.db", "s.db-wal", "s.db-shm", "s.db-journal")
    for name in ("text", "empty", "x-wal"):
        (tmp_path / name).write_text("" if name == "empty" else "line one\n" * 200)
        assert not is_database_file(tmp_path / name)
    with closing(sqlite3.connect(tmp_path / "s.db")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (x)")
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert all(is_database_file(tmp_path / name) for name in names)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not is_database_file(tmp_path / "none.db-wal")


@pytest.mark.parametrize("name", ["s.db", "s.db-wal", "s.db-shm", "link", "other"])
async def test_no_output_file_may_replace_a_store(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to("s.db")
    async with Store.open(tmp_path / "s.db", create=True) as store:
        if name == "other":
            (tmp_path / "other").hardlink_to(tmp_path / "s.db")
        await store.add_all([episode("e")])
        for refused in (overwrite, lambda path: check_writable_path(path, "--out")):
            with pytest.raises(FileWriteError, match="is a database, which is never overwritten; name another file"):
                refused(tmp_path / name)
        await store.add_all([episode("f")])
    assert stored(tmp_path / "s.db") == {"e", "f"}


# Files that are not stores, and new stores


async def test_a_database_of_another_program_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE mine (x)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="a database, but not a store of this program"):
        async with Store.open(path, create=True):
            pass
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["other.db"]


async def test_special_files_are_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="not a regular file"):
        async with Store.open(tmp_path / "pipe", create=True):
            pass
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StoreError, match="Too many levels of symbolic links"):
        async with Store.open(tmp_path / "loop", create=True):
            pass


async def test_an_empty_file_becomes_a_store_only_with_create(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    path.touch()
    with pytest.raises(StoreError, match="not a store"):
        async with Store.open(path):
            pass
    assert path.stat().st_size == 0
    async with Store.open(path, create=True) as store:
        await store.add_all([episode("e")])


@pytest.mark.parametrize("name", ["a b?c#d%41&mode=memory.db", "ü.db"])
async def test_file_names_with_characters_special_to_sqlite_work(tmp_path: Path, name: str) -> None:
    async with Store.open(tmp_path / name, create=True) as store:
        await store.add_all([episode("e")])
    assert os.listdir(tmp_path) == [name]
    assert stored(tmp_path / name) == {"e"}


async def test_a_new_store_and_its_log_have_mode_600(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with Store.open(path, create=True) as store:
        await store.add_all([episode("e")])
        file_modes = modes(tmp_path)
    assert file_modes == {"s.db": 0o600, "s.db-wal": 0o600, "s.db-shm": 0o600}


async def test_an_existing_store_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    for mode in (0o640, 0o600):
        async with Store.open(path, create=True):
            pass
        path.chmod(mode)
        async with Store.open(path, create=True) as store:
            await store.add_all([episode("e")])
            file_modes = modes(tmp_path)
        assert file_modes == {"s.db": mode, "s.db-wal": mode, "s.db-shm": mode}


async def test_a_store_can_be_read_while_another_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with Store.open(path, create=True) as store:
        await store.add_all([episode("e")])
    with closing(sqlite3.connect(path, isolation_level=None)) as writing:
        writing.execute("BEGIN IMMEDIATE")
        async with Store.open(path, wait_ms=0) as store:
            assert [one.id for one in await store.episodes()] == ["e"]
        writing.execute("ROLLBACK")


@pytest.mark.parametrize("statement", ["UPDATE autotts_store SET version = 'x'", "DELETE FROM autotts_store"])
async def test_a_store_without_a_valid_version_is_refused(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "s.db"
    async with Store.open(path, create=True):
        pass
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)
    with pytest.raises(CorruptRow, match="does not hold the store's version"):
        async with Store.open(path):
            pass


# Moved stores


async def test_a_moved_store_keeps_the_records_of_its_log(tmp_path: Path) -> None:
    path, aside = tmp_path / "s.db", tmp_path / "aside.db"
    async with Store.open(path, create=True) as store:
        await store.add_all([episode("e")])
        assert not store.is_moved
        path.rename(aside)
        assert store.is_moved
    async with Store.open(path, create=True) as store:
        await store.add_all([episode("new")])
    assert (stored(aside), stored(path)) == ({"e"}, {"new"})


async def test_replacing_an_open_store_by_a_backup_corrupts_neither(tmp_path: Path) -> None:
    path, backup = tmp_path / "s.db", tmp_path / "backup.db"
    async with Store.open(backup, create=True) as store:
        await store.add_all([episode(f"old {number}") for number in range(500)])
    async with Store.open(path, create=True) as store:
        await store.add_all([episode(f"gone {number}") for number in range(300)])
        backup.rename(path)
    async with Store.open(path) as store:
        await store.add_all([episode("new")])
        assert (await store.verify()).bad == []
    assert stored(path) == {f"old {number}" for number in range(500)} | {"new"}


async def test_copying_a_backup_over_an_open_store_damages_no_copy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, backup = tmp_path / "s.db", tmp_path / "backup.db"
    async with Store.open(backup, create=True) as store:
        await store.add_all([episode(f"old {number}") for number in range(500)])
    async with Store.open(path, create=True) as store:
        await store.add_all([episode(f"gone {number}") for number in range(300)])
        path.write_bytes(backup.read_bytes())  # like `cp`: the file stays the same
        assert not store.is_moved
        for end in ("-wal", "-shm"):
            (tmp_path / f"s.db{end}").unlink()
        assert store.is_moved
        await store.add_all([episode("lost")])
    assert "s.db: the store was overwritten while it was in use" in caplog.text
    async with Store.open(path) as store:
        await store.add_all([episode("new")])
        assert (await store.verify()).bad == []
    assert stored(path) == {f"old {number}" for number in range(500)} | {"new"}
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_no_store_is_created_beside_the_log_of_a_moved_one(tmp_path: Path) -> None:
    path, aside = tmp_path / "s.db", tmp_path / "aside.db"
    async with Store.open(path, create=True) as store:
        await store.add_all([episode("e")])
        log = (tmp_path / "s.db-wal").read_bytes()
    path.rename(aside)
    (tmp_path / "s.db-wal").write_bytes(log)  # the state after a kill
    with pytest.raises(StoreError, match=r"the store is gone, but its log s\.db-wal remains and holds records"):
        async with Store.open(path, create=True):
            pass
    assert (tmp_path / "s.db-wal").read_bytes() == log
    assert not path.exists()
    aside.rename(path)
    async with Store.open(path, create=True):
        pass
    assert stored(path) == {"e"}


async def test_a_moved_store_in_use_shares_no_records_with_a_new_one(tmp_path: Path) -> None:
    path, aside = tmp_path / "s.db", tmp_path / "aside.db"
    async with Store.open(path, create=True) as slow:
        await slow.add_all([episode("a")])
        async with Store.open(path) as quick:
            path.rename(aside)
            assert quick.is_moved
        async with Store.open(path, create=True) as fresh:
            await slow.add_all([episode("late")])
            await fresh.add_all([episode("new")])
            await slow.add_all([episode("later")])
            await fresh.add_all([episode("newer")])
    assert stored(aside) == {"a", "late", "later"}
    assert stored(path) == {"new", "newer"}


async def test_a_cancelled_connection_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, released, connect = threading.Event(), threading.Event(), sqlite3.connect

    def waiting(*arguments: Any, **options: Any) -> sqlite3.Connection:
        started.set()
        assert released.wait(10)
        connection: sqlite3.Connection = connect(*arguments, **options)
        return connection

    async def opening() -> None:
        async with Store.open(tmp_path / "s.db"):
            pass

    async with Store.open(tmp_path / "s.db", create=True):
        pass
    monkeypatch.setattr("aiosqlite.core.sqlite3.connect", waiting)
    before = set(threading.enumerate())
    task = asyncio.create_task(opening())
    assert await asyncio.to_thread(started.wait, 10)
    task.cancel()
    asyncio.get_running_loop().call_later(0.01, released.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    left = [thread for thread in set(threading.enumerate()) - before if "connection_worker" in thread.name]
    assert left == []


async def test_a_cancelled_migration_ends_as_cancelled_even_if_it_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed, execute = asyncio.Event(), aiosqlite.Connection.execute

    async def lingering(connection: aiosqlite.Connection, statement: str, *arguments: Any) -> aiosqlite.Cursor:
        cursor = await execute(connection, statement, *arguments)
        if statement == "COMMIT":
            committed.set()
            await asyncio.sleep(60)
        return cursor

    monkeypatch.setattr(aiosqlite.Connection, "execute", lingering)
    task = asyncio.create_task(_created(tmp_path / "s.db"))
    async with asyncio.timeout(10):
        await committed.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def _created(path: Path) -> None:
    async with Store.open(path, create=True):
        pass
