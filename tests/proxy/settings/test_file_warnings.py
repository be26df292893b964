"""Files that settings name: warnings about those that others can read, and stores that are none."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from proxy.cli import app
from proxy.errors import SettingsError
from proxy.settings import configure, load
from proxy.settings.file_warnings import secret_warnings, store_warnings

UP = {"upstream": "http://127.0.0.1:1"}


@pytest.fixture
def private() -> Iterator[None]:
    """Let files that a test makes be readable by their owner alone."""
    before = os.umask(0o077)
    yield
    os.umask(before)


def warnings_about(folder: Path, mode: int, settings: str) -> list[str]:
    """Return the warnings about a settings file, a key file and a store of one mode."""
    file, keys, store = (folder / name for name in ("autotts.toml", "keys.toml", "s.db"))
    file.write_text(settings)
    keys.write_text(f'a = {{ sha256 = "{"0" * 64}" }}\n')
    with closing(sqlite3.connect(store)) as database:
        database.execute("CREATE TABLE IF NOT EXISTS t(x)")
    for path in (file, keys, store):
        path.chmod(mode)
    configured = configure(file, {**UP, "keys": keys, "store": store})
    return [*secret_warnings(configured, file), *store_warnings(configured.settings)]


def test_files_with_secrets_or_texts_that_others_can_read_are_warned_of(tmp_path: Path) -> None:
    assert warnings_about(tmp_path, 0o644, "admin_key = 'k'\nstore_text = 'full'\n") == [
        f"{tmp_path}/keys.toml: other users can read this file, which holds keys; run `chmod 600`",
        f"{tmp_path}/autotts.toml: other users can read this file, which holds secrets; run `chmod 600`",
        f"{tmp_path}/s.db: other users can read this file, which holds request texts; run `chmod 600`",
    ]
    assert warnings_about(tmp_path, 0o600, "admin_key = 'k'\nstore_text = 'full'\n") == []
    assert len(warnings_about(tmp_path, 0o640, "store_text = 'none'\n")) == 1


def test_keys_of_another_user_are_not_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert warnings_about(tmp_path, 0o644, "admin_key = 'k'\nstore_text = 'none'\n") == []


def test_a_store_that_cannot_be_written_to_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(**UP, store=tmp_path / "s.db")
    assert list(store_warnings(settings)) == []
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)  # root may write anywhere
    assert list(store_warnings(settings)) == [
        f"store: {tmp_path} cannot be written to; records would wait in the spill file, if that can be written to"
    ]


def test_a_file_of_another_kind_is_refused_as_a_store(tmp_path: Path) -> None:
    text = tmp_path / "text.db"
    for content in ("my diary", "a line of my diary\n" * 100):
        text.write_text(content)
        with pytest.raises(SettingsError, match=r"^store: .*text\.db exists and is not a store; name a store, or"):
            load(**UP, store=text)
        assert text.read_text() == content
    with pytest.raises(SettingsError, match="is not a store"):
        load(**UP, store=tmp_path)
    text.write_text("")
    assert load(**UP, store=text).store == text


@pytest.mark.usefixtures("private")
def test_config_check_fails_for_a_warning_only_with_strict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys.toml").write_text(f'a = {{ sha256 = "{"0" * 64}" }}\n')
    command = ["config", "check", "--upstream", UP["upstream"], "--set", "keys=keys.toml"]
    assert CliRunner().invoke(app, [*command, "--strict"]).exit_code == 0
    (tmp_path / "keys.toml").chmod(0o644)
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0
    assert "keys.toml: other users can read this file, which holds keys; run `chmod 600`" in shown.output
    assert CliRunner().invoke(app, [*command, "--strict"]).exit_code == 1
    (tmp_path / "keys.toml").chmod(0o600)
    (tmp_path / "keys.toml").write_text(f'a = {{ sha256 = "{"0" * 64}", tokens = 10 }}\n')
    small = CliRunner().invoke(app, [*command, "--strict"])
    assert (small.exit_code, "a: tokens = 10 is less than" in small.output) == (1, True)
    (tmp_path / "keys.toml").write_text(f'a = {{ sha256 = "{"0" * 64}" }}\n')
    misspelt = CliRunner().invoke(app, [*command, "--strict"], env={"AUTOTTS_MAX_EPISODE": "3"})
    assert (misspelt.exit_code, "did you mean AUTOTTS_MAX_EPISODES?" in misspelt.output) == (1, True)
