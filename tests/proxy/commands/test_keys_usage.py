"""`autotts keys usage`: what the requests of each key spent, by name."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from discovery.store.records import stored_time
from proxy.admission import api_keys
from proxy.cli import app
from tests.discovery.store.usage.served import served, store_of

GONE = "f" * 24


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    file.write_text("\n".join(api_keys.key_file_entry(name, name) for name in ("alice", "idle")))
    return file


@pytest.fixture
def store(tmp_path: Path, keys: Path) -> Path:
    """A store with requests of a key, of one that was removed, of callers without a key, and of a month ago."""
    alice = api_keys.read_key_file(keys)[0].tenant
    now = datetime.now(UTC)
    ages = ((alice, 0), (alice, 1), (GONE, 1), ("", 2), (alice, 40))
    episodes = [
        replace(
            episode,
            tenant=tenant,
            created=stored_time(now - timedelta(days=days)),
            ledger={"winner": 100, "probe": 5},
            about={
                **episode.about,
                "usage": {"prompt_tokens": 10, "completion_tokens": 102, "total_tokens": 112},  # 3 tokens of suffixes
            },
        )
        for episode, (tenant, days) in zip(served(len(ages)), ages, strict=True)
    ]
    asyncio.run(store_of(tmp_path / "s.db", episodes))
    return tmp_path / "s.db"


def usage(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["keys", "usage", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_usage_is_listed_by_key_most_tokens_first(store: Path, keys: Path) -> None:
    shown = json.loads(usage(keys, "--store", store, "--json"))
    assert shown["since"] == (datetime.now(UTC) - timedelta(days=30)).date().isoformat()
    figures = [(row["key"], row["requests"], row["tokens"], row["prompt_tokens"]) for row in shown["keys"]]
    assert figures[0] == ("alice", 2, 210, 14)
    assert shown["keys"][0]["total_tokens"] == 224
    assert set(figures[1:3]) == {("no key", 1, 105, 7), (f"#{GONE[:8]}", 1, 105, 7)}
    assert figures[3:] == [("idle", 0, 0, 0)]
    assert [row for row in usage(keys, "--store", store).splitlines() if "alice" in row and "224" in row]


def test_usage_of_a_longer_period_and_without_names(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOTTS_KEYS", raising=False)
    rows = json.loads(usage("--store", store, "--days", 50, "--json"))["keys"]
    assert (rows[0]["key"], rows[0]["requests"]) == (f"#{rows[0]['tenant'][:8]}", 3)


def test_names_of_keys_in_the_environment_are_known(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(api_keys.KEYS_VARIABLE, f"alice={api_keys.hash_key('alice')}")
    assert json.loads(usage("--store", store, "--json"))["keys"][0]["key"] == "alice"


def test_names_of_keys_in_the_settings_file_are_known(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUTOTTS_KEYS", raising=False)
    Path("autotts.toml").write_text(f'client_keys = "alice={api_keys.hash_key("alice")}"\n')
    assert json.loads(usage("--store", store.absolute(), "--json"))["keys"][0]["key"] == "alice"


@pytest.mark.parametrize("source", ["variable", "file"])
def test_requests_with_the_admin_key_are_named(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tenant = api_keys.anonymous_tenant("of-admins")
    episodes = [replace(episode, tenant=tenant, created=stored_time(datetime.now(UTC))) for episode in served(1)]
    asyncio.run(store_of(tmp_path / "s.db", episodes))
    shown = json.loads(usage("--store", "s.db", "--json"))["keys"]
    assert [(row["key"], row["tenant"]) for row in shown] == [(f"#{tenant[:8]}", tenant)]
    if source == "variable":
        monkeypatch.setenv("AUTOTTS_ADMIN_KEY", "of-admins")
    else:
        Path("autotts.toml").write_text('admin_key = "of-admins"\n')
    shown = json.loads(usage("--store", "s.db", "--json"))["keys"]
    assert [(row["key"], row["tenant"]) for row in shown] == [("admin key", tenant)]


def test_a_store_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["keys", "usage", "--store", str(tmp_path / "none.db")])
    assert (done.exit_code, "none.db" in done.output) == (2, True)
