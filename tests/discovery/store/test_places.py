"""Places of stores: URLs are parsed without showing their password, and every failure to connect names a way out."""

from __future__ import annotations

import asyncio
import builtins
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from discovery.errors import StoreError, UnstorableValue
from discovery.promotion.gate import GateJob
from discovery.store import DatabaseUrl, Feedback, ServedEpisode, Store, child_environment, parse_place
from discovery.store.databases.connection import DatabaseConnection
from discovery.store.schema import MIGRATIONS
from proxy.errors import SettingsError
from proxy.settings import load
from tests.discovery.store.outside import run_sql
from tests.discovery.store.test_replay_store import CELL, some
from tests.postgres_server import PASSWORD, QUOTED_PASSWORD, PostgresServer

SECRET = "s3cret"


@pytest.mark.parametrize(
    ("text", "shown", "password"),
    [
        ("postgresql://me@host/db", "postgresql://me@host/db", None),
        ("postgres://me:s3cret@host:5433/db", "postgresql://me@host:5433/db", SECRET),
        ("postgresql://me:s%403cret%2F@host/db?sslmode=require", "postgresql://me@host/db?sslmode=require", "s@3cret/"),
        ("postgresql://me@/db?host=/run/pg&password=s3cret", "postgresql://me@/db?host=/run/pg", SECRET),
        ("postgresql:///db", "postgresql:///db", None),
        ("postgresql://me:s3cret@[::1]:5433/db", "postgresql://me@[::1]:5433/db", SECRET),
        ("postgresql://me:s3cret@a:5432,b:5433/db", "postgresql://me@a:5432,b:5433/db", SECRET),
    ],
)
def test_a_url_is_kept_apart_from_its_password(text: str, shown: str, password: str | None) -> None:
    place = parse_place(text)
    assert isinstance(place, DatabaseUrl)
    assert (str(place), place.password, place.database) == (shown, password, "db")
    assert parse_place(place) is place
    assert pickle.loads(pickle.dumps(place)) == place  # as for workers
    assert SECRET not in repr(place) + str(TypeAdapter(DatabaseUrl).dump_json(place))
    assert child_environment(place, environment={}) == ({} if password is None else {"PGPASSWORD": password})


@pytest.mark.parametrize(
    "text",
    [
        "mysql://me:s3cret@host/db",
        "postgresql:/me:s3cret@host/db",
        "postgresql://me:s3cret@host",
        "postgresql://me:s3cret@host/",
        "postgresql://me:s3cret@host:port/db",
        "postgresql://me:s3cret/more@host/db",
        "postgresql://me:12/s3cret@host/db",
        "postgresql://me:12#s3cret@host/db",
        "postgresql://me:12?s3cret@host/db",
        "postgresql://me:s3cret@[host/db",
        "postgresql://me@host/db?sslpassword=s3cret",
    ],
)
def test_a_bad_url_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(StoreError, match="postgresql://USER@HOST:PORT/DATABASE") as caught:
        parse_place(text)
    assert SECRET not in str(caught.value)
    with pytest.raises(SettingsError, match=r"^store: ") as refused:
        load(store=text)
    assert SECRET not in str(refused.value)


def test_paths_stay_paths() -> None:
    for text in ("autotts.db", "/var/lib/a.db", "a:b.db", Path("x/y.db")):
        assert parse_place(text) == Path(text)


def test_the_gates_options_do_not_hold_the_password() -> None:
    about: dict[str, Any] = dict.fromkeys(("finalist", "champion", "ledger", "report", "created", "who"), "x")
    job = GateJob(recordings=parse_place("postgresql://me:s3cret@host/db"), **about)
    assert "--recordings=postgresql://me@host/db" in job.options
    assert SECRET not in " ".join(job.options)


def refusal(place: DatabaseUrl, create: bool = True) -> str:
    async def go() -> None:
        async with Store.open(place, create=create):
            pass

    with pytest.raises(StoreError) as caught:
        asyncio.run(go())
    assert str(caught.value).startswith(f"{place}: ")
    return str(caught.value)


def test_without_the_driver_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_driver(name: str, *arguments: Any) -> Any:
        if name == "asyncpg":
            raise ModuleNotFoundError(name)
        return imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_driver)
    assert "pip install '.[postgres]' in a checkout" in refusal(DatabaseUrl("postgresql://me@host/db"))


@pytest.mark.process
def test_every_failure_to_connect_names_a_way_out(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    place = postgres.create_database()
    assert "a proxy makes it when it records, and so does `autotts import`" in refusal(place, create=False)
    message = refusal(postgres.url(place.database, "wr0ng"))
    assert "password authentication failed" in message
    assert "set the right one in the URL of AUTOTTS_STORE, in PGPASSWORD" in message
    assert "wr0ng" not in message
    assert "create it with `createdb`" in refusal(postgres.url("nowhere"))
    assert "cannot reach the server" in refusal(DatabaseUrl(f"postgresql://me@127.0.0.1:1/{place.database}"))
    assert "cannot reach the server" in refusal(DatabaseUrl("postgresql://me@host.invalid/db"))
    assert "create it with ENCODING 'UTF8'" in refusal(
        postgres.create_database("-E", "SQL_ASCII", "--locale=C", "-T", "template0")
    )
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    run_sql(place, "CREATE TABLE runs (mine text)")
    assert 'relation "runs" already exists' in refusal(DatabaseUrl(str(place)))
    assert run_sql(place, "SELECT to_regclass('questions') IS NULL") == [(True,)]  # nothing was left behind


@pytest.mark.process
async def test_two_openers_at_once_migrate_once(postgres: PostgresServer) -> None:
    place = postgres.create_database()

    async def add(text: str) -> None:
        async with Store.open(place, create=True) as store:
            await store.add([some(text)])

    await asyncio.gather(*(add(str(number)) for number in range(6)))
    assert run_sql(place, "SELECT version FROM autotts_store") == [(len(MIGRATIONS),)]
    async with Store.open(place) as store:
        assert len(await store.load(CELL)) == 6
        assert (await store.verify()).bad == []


@pytest.mark.process
async def test_a_value_that_does_not_fit_is_refused_without_showing_it(
    postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    asked = ServedEpisode("e", "r", "m", "c", "d", 0.5, 1, 1, {}, "answered", answer=f"{SECRET} \0 \x1a0")
    async with Store.open(postgres.create_database(), create=True) as store:
        await store.add_all([asked])
        assert await store.episodes() == [asked]
        for bad in (f"{SECRET} \ud800", 7):

            async def change(connection: DatabaseConnection, value: object = bad) -> None:
                await connection.execute("UPDATE episodes SET answer = ?", (value,))

            with pytest.raises(UnstorableValue) as caught:
                await store.write(change)
            assert SECRET not in str(caught.value)
        too_long = os.urandom(20_000).hex()  # for an index
        for name, rounds in (("f", 2**70), (too_long, 1)):
            with pytest.raises(UnstorableValue):
                await store.add_all([ServedEpisode(name, name, "m", "c", "d", 0.5, rounds, 1, {}, "answered")])
        await store.add_all([Feedback("f", "r", "correct", "1")])
        assert await store.episodes() == [asked]
    assert SECRET not in caplog.text
    assert PASSWORD not in caplog.text


@pytest.mark.process
def test_commands_take_a_url_and_show_no_password(postgres: PostgresServer, tmp_path: Path) -> None:
    place = postgres.create_database()
    lines = {"model": "m", "benchmark": "b", "split": "search", "question": "q", "interval": 500, "reference": "7"}
    branches = [{"tokens": 1000, "probes": ["7", "7"], "final": "7"}]
    (tmp_path / "q.jsonl").write_text(json.dumps({**lines, "branches": branches}) + "\n")
    url = str(place).replace("postgres@", f"postgres:{QUOTED_PASSWORD}@")
    environment = {**os.environ, "AUTOTTS_STORE": url}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "proxy.cli", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            check=False,
        )
        output = " ".join((done.stdout + done.stderr).split())
        assert done.returncode == 0, output
        assert PASSWORD not in output
        assert QUOTED_PASSWORD not in output
        return output

    assert "1 recordings of 1 new questions" in run("import", "jsonl", "q.jsonl")
    assert str(place) in run("store", "info")
    assert "0 corrupt rows" in run("store", "verify")
    assert "1 recordings" in run("store", "export", "out.jsonl")
    assert str(place).partition("@")[2] in run("config", "show", "--json")
    environment["PGPASSWORD"] = PASSWORD
    assert "m" in run("evaluate", "--recordings", str(place), "--controllers", "sc", "--betas", "0.5")
