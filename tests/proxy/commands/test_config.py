"""Settings from flags, variables, a file and defaults, in this order. Errors name the setting and show no secret."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from inspect import signature
from pathlib import Path
from zlib import crc32

import pytest
from typer.testing import CliRunner

from discovery.store.databases.places import parse_place
from proxy.cli import app
from proxy.commands.config import check, gather
from proxy.errors import SettingsError
from proxy.settings import SERVED, configure, find_file, is_secret, load
from tests.fakes import FakeVLLM
from tests.proxy.test_cli import autotts

UP = {"upstream": "http://127.0.0.1:1"}


def toml(folder: Path, text: str) -> Path:
    path = folder / "autotts.toml"
    path.write_text(text)
    return path


def test_flags_win_over_variables_over_the_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = toml(tmp_path, "interval = 1\nport = 1\nprobe_tokens = 1")
    monkeypatch.setenv("AUTOTTS_INTERVAL", "2")
    monkeypatch.setenv("AUTOTTS_PORT", "2")
    settings, sources = configure(file, {"interval": 3, "beta": None})
    assert (settings.interval, settings.port, settings.probe_tokens, settings.host) == (3, 2, 1, "127.0.0.1")
    assert [sources[name] for name in ("interval", "port", "probe_tokens", "host", "finalise_tokens")] == [
        "flag",
        "environment",
        f"file {file}",
        "default",
        "embedded default",
    ]


def test_a_blank_variable_leaves_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTTS_STORE", "")
    settings, sources = configure(None, UP, SERVED)
    assert (settings.store, sources["store"]) == (Path("autotts.db"), "default")


def test_the_config_file_is_found_by_name_variable_or_flag_and_ignored_by_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_file() is None
    toml(tmp_path, "interval = 77")
    assert find_file() == Path("autotts.toml")
    assert load(**UP).interval == 512
    monkeypatch.setenv("AUTOTTS_CONFIG", "other.toml")
    assert find_file() == Path("other.toml")
    assert find_file(Path("third.toml")) == Path("third.toml")


@pytest.mark.parametrize(
    ("text", "expected_text"),
    [
        ("intervall = 3", "there is no setting 'intervall'; did you mean interval?"),
        ("[store]\npath = 'x'", "store: a store is named by a path or postgresql://"),
        ("interval = 0", "interval: it must be greater than or equal to 1, not 0"),
        ("interval = x", "Invalid value (at line 1, column 12); lines are NAME = VALUE, with texts in quotes"),
        ("AUTOTTS_BETA = 0.5", "there is no setting 'AUTOTTS_BETA'; did you mean beta?"),
        ("record = 'maybe'", "record: write true or false, not 'maybe'"),
        ("[keys]\nalice = 1", "keys: write the path of the key file, in quotes; the keys themselves belong in"),
        ("spill = 3", "spill: write a path, in quotes, not 3"),
        ("interval = 'many'", "interval: write a whole number, not 'many'"),
        ("store_text = 'all'", "store_text: it must be 'none', 'hash' or 'full', not 'all'"),
        (
            "upstream = '127.0.0.1:8000'",
            "it is no URL, relative URL without a base; write http://HOST:PORT or https://",
        ),
    ],
)
def test_an_error_in_the_config_file_names_the_file_and_the_setting(
    tmp_path: Path, text: str, expected_text: str
) -> None:
    file = toml(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        configure(file, {})
    assert str(caught.value).startswith(f"{file}: ")
    assert expected_text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "expected_text"),
    [
        ("CONTROLLER", "foo", "controller (AUTOTTS_CONTROLLER): there is no controller 'foo'"),
        (
            "UPSTREAM",
            "nowhere.toml",
            "upstream (AUTOTTS_UPSTREAM): nowhere.toml: No such file or directory; name",
        ),
    ],
)
def test_an_error_in_a_variable_names_it_and_the_value_once(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected_text: str
) -> None:
    monkeypatch.setenv(f"AUTOTTS_{name}", value)
    with pytest.raises(SettingsError) as caught:
        configure(None, {})
    assert str(caught.value).startswith(expected_text)
    assert str(caught.value).count(value) == 1


@pytest.mark.process
def test_other_commands_read_the_places_in_the_settings_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(autotts("keys", "new", "ada").stdout)
    registry = tmp_path / "installed"
    file = toml(tmp_path, f"store = 'mine.db'\nregistry = {str(registry)!r}\nkeys = {str(keys)!r}\nbeta = 0.5")
    done = autotts("promote", "cmc", "--as", "champion", AUTOTTS_CONFIG=str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert registry.is_dir()
    assert "mine.db: there is no store" in autotts("store", "info", AUTOTTS_CONFIG=str(file)).stderr
    assert "other.db" in autotts("store", "info", AUTOTTS_CONFIG=str(file), AUTOTTS_STORE="other.db").stderr
    assert "flag.db" in autotts("store", "info", "--store", "flag.db", AUTOTTS_CONFIG=str(file)).stderr
    assert "ada" in autotts("keys", "list", AUTOTTS_CONFIG=str(file)).stdout
    done = autotts("store", "info", AUTOTTS_CONFIG=str(toml(tmp_path, "store = 3")))
    assert (done.returncode, "store: write it in quotes" in done.stderr) == (2, True)


def test_a_missing_config_file_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml: No such file"):
        configure(Path("nowhere.toml"), {})


def test_an_invalid_secret_is_not_shown_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        configure(toml(tmp_path, "admin_key = 31337"), {})
    assert "admin_key" in str(caught.value)
    assert "31337" not in str(caught.value)
    assert is_secret("admin_key")
    assert not is_secret("interval")


def test_record_false_disables_the_store(tmp_path: Path) -> None:
    assert configure(toml(tmp_path, "store = 'x.db'"), {"record": False}).settings.store is None


@pytest.mark.parametrize("spill", ["s.db", "./s.db", "s.db-wal", "s.db-shm", "s", "notes", "folder", "link"])
def test_a_spill_path_that_is_used_otherwise_is_refused_and_left_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spill: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("line one\nline two")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("notes")
    store = "s.1" if spill == "s" else "s.db"  # the spill files of several proxies are numbered
    monkeypatch.setenv("AUTOTTS_SPILL", spill)
    with pytest.raises(SettingsError, match=rf"^spill \(AUTOTTS_SPILL\): {spill.removeprefix('./')} (is|exists)"):
        load(**UP, store=store)
    assert (tmp_path / "notes").read_text() == "line one\nline two"


def test_a_store_without_a_folder_is_refused_unless_the_spill_file_has_one(tmp_path: Path) -> None:
    store = tmp_path / "away" / "s.db"
    for spill in (None, tmp_path / "gone" / "spill"):
        with pytest.raises(SettingsError, match=rf"store: {store}: there is no folder .*; create it, or set"):
            load(**UP, store=store, spill=spill)
    assert load(**UP, store=store, spill=tmp_path / "spill").store == store  # its folder may be mounted later


@pytest.mark.parametrize("name", ["admin_key", "upstream_api_key"])
def test_a_bearer_token_has_no_white_space_at_its_ends(name: str) -> None:
    token = getattr(load(**UP, **{name: " a-b_c=\n"}), name)
    assert token.get_secret_value() == "a-b_c="
    assert getattr(load(**UP, **{name: "pass phrase\r\n"}), name).get_secret_value() == "pass phrase"
    for inside in ("secret\nword", "secret\x00word"):
        with pytest.raises(SettingsError, match=f"{name}: it has a line end or another control character") as caught:
            load(**UP, **{name: inside})
        assert "secret" not in str(caught.value)


def test_folders_that_cannot_be_looked_at_are_named_with_their_setting(tmp_path: Path) -> None:
    away = tmp_path / ("x" * 300)  # like a folder without permission, it raises OSError
    with pytest.raises(SettingsError, match=rf"store: {away}.*: File name too long; name a file in a folder you can"):
        load(**UP, store=away / "s.db")
    (tmp_path / "s.db").touch()
    assert load(**UP, store=tmp_path / "s.db", keys=away / "keys.toml").keys == away / "keys.toml"


def test_clients_of_other_servers_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.settings.checks.find_spec", lambda name: None)
    with pytest.raises(
        SettingsError, match=r"store: the package asyncpg is not installed; pip install '\.\[postgres\]'"
    ):
        load(**UP, store=parse_place("postgresql://me@host/db"))
    with pytest.raises(SettingsError, match="registry: the package asyncpg is not installed"):
        load(**UP, store=parse_place("postgresql://me@host/db"), record=False)
    with pytest.raises(SettingsError, match=r"limits: the package redis is not installed; pip install '\.\[redis\]'"):
        load(**UP, limits="redis://host")


def test_settings_without_an_upstream_need_a_machine_that_can_serve_the_embedded_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deploy.embedded.server.problem", lambda: "vLLM is not installed")
    with pytest.raises(SettingsError, match="upstream: none is set, and the embedded model cannot start: vLLM is not"):
        check(**dict.fromkeys(signature(check).parameters))


def test_an_existing_spill_file_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "spill"
    for content in (b"", b"%08x {}\n" % crc32(b"{}")):
        path.write_bytes(content)
        assert load(**UP, store=tmp_path / "s.db", spill=path).spill == path


@pytest.mark.parametrize("days", [0, 36501, 1e12])
def test_retain_days_outside_its_range_is_refused(days: float) -> None:
    with pytest.raises(SettingsError, match="retain_days"):
        load(**UP, retain_days=days)


@pytest.mark.process
def test_config_show_masks_secrets_and_names_each_source(tmp_path: Path) -> None:
    file = toml(tmp_path, "upstream = 'http://me:hidden@127.0.0.1:1'\nadmin_key = 'hidden'")
    done = autotts("config", "show", "--json", "--config", str(file), "--set", "port=9", AUTOTTS_BETA="0.25")
    settings = json.loads(done.stdout)
    assert "hidden" not in done.stdout
    assert settings["upstream"]["value"] == "http://********@127.0.0.1:1/"
    assert settings["admin_key"] == {**settings["admin_key"], "value": "********", "source": f"file {file}"}
    assert (settings["port"]["value"], settings["port"]["source"]) == (9, "flag")
    assert (settings["beta"]["value"], settings["beta"]["source"]) == (0.25, "environment")
    assert settings["store"]["value"] == "autotts.db"
    assert "hidden" not in autotts("config", "show", AUTOTTS_CONFIG=str(file)).stdout


@pytest.mark.process
def test_config_show_and_check_accept_the_flags_of_serve() -> None:
    flags = ["--port", "9", "--beta", "0.5", "--no-record", "--upstream", "http://127.0.0.1:1"]
    settings = json.loads(autotts("config", "show", "--json", *flags, AUTOTTS_PORT="8").stdout)
    assert {name for name, setting in settings.items() if setting["source"] == "flag"} == {
        "port",
        "beta",
        "record",
        "upstream",
    }
    assert (settings["port"]["value"], settings["beta"]["value"], settings["store"]["value"]) == (9, 0.5, None)
    done = autotts("config", "check", *flags, "--host", "0.0.0.0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no API keys are configured" in done.stderr
    done = autotts("config", "check", "--beta", "much")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--beta must be" in done.stderr
    shown, served = ((autotts(*verb, "--help").stdout) for verb in (("config", "show"), ("serve",)))
    assert set(re.findall(r"--[a-z-]+", served)) <= set(re.findall(r"--[a-z-]+", shown))


@pytest.mark.parametrize("name", ["beta", "AUTOTTS_BETA", "autotts_beta", "autotts-beta", " Beta "])
def test_a_setting_may_be_given_by_any_spelling_of_its_name(name: str) -> None:
    settings, sources = gather(None, [f"{name}=0.5"], {})
    assert (settings.beta, sources["beta"]) == (0.5, "flag")


@pytest.mark.process
@pytest.mark.parametrize(
    ("sets", "status", "expected_text"),
    [
        (["interval=64"], 0, "the settings are valid: 2 of"),
        (["interval=none"], 2, "interval: write a whole number"),
        (["interval"], 2, "write NAME=VALUE"),
        (["calibration=/nowhere.json"], 2, "/nowhere.json"),
        (["intervals=3"], 2, "there is no setting 'intervals'; did you mean interval?"),
        (["allowed_origins=app.example.org/"], 2, "allowed_origins: it must be: origins of web pages that may call"),
        (["load_waiting=4"], 2, "load_waiting: it must be: numbers of requests waiting at the upstream"),
    ],
)
def test_config_check_reports_valid_settings_or_the_error(
    tmp_path: Path, sets: list[str], status: int, expected_text: str
) -> None:
    file = toml(tmp_path, "port = 0")
    flags = [part for assignment in sets for part in ("--set", assignment)]
    done = autotts("config", "check", "--config", str(file), *flags, AUTOTTS_INTERVALL="4")
    assert done.returncode == status, done.stderr
    assert expected_text in (done.stderr if status else done.stdout)
    warning = "AUTOTTS_INTERVALL is not a setting and has no effect; did you mean AUTOTTS_INTERVAL?"
    assert (warning in done.stdout) is not bool(status)


def test_config_check_shows_every_problem_with_a_way_out(tmp_path: Path) -> None:
    file = toml(tmp_path, "intervall = 3\ninterval = 'many'\nbeta = 2\nrecord = 'maybe'\nfoo = 1")
    done = CliRunner().invoke(app, ["config", "check", "--config", str(file), "--set", "prot=1"])
    assert done.exit_code == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("autotts: ")]
    assert lines == [
        "autotts: there is no setting 'prot'; did you mean port?",
        f"autotts: {file}: there is no setting 'intervall'; did you mean interval?",
        f"autotts: {file}: there is no setting 'foo'; `autotts config show` lists the settings",
        f"autotts: {file}: beta: it must be less than or equal to 1, not 2",
        f"autotts: {file}: record: write true or false, not 'maybe'",
        f"autotts: {file}: interval: write a whole number, not 'many'",
    ]


def test_config_check_warns_of_limits_that_are_too_small_in_each_worker(tmp_path: Path) -> None:
    file = toml(tmp_path, "upstream = 'http://127.0.0.1:1'\ntokens_per_minute = 4000\nworkers = 8")
    done = CliRunner().invoke(app, ["config", "check", "--config", str(file)])
    assert done.exit_code == 0
    warning = "the server's limit tokens_per_minute = 500 in each of 8 workers is less than"
    assert warning in " ".join(done.stdout.split())


def test_config_check_runs_all_checks_of_valid_values(tmp_path: Path) -> None:
    file = toml(tmp_path, "upstream = 'http://127.0.0.1:1'\ncontroller = 'foo'\nstore = 'none/s.db'\nfoo = 1")
    flags = ["--set", "calibration=/nowhere.json", "--set", "keys=/nowhere.toml"]
    done = CliRunner().invoke(app, ["config", "check", "--config", str(file), *flags])
    assert done.exit_code == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("autotts: ")]
    expected = [
        f"{file}: there is no setting 'foo'",
        f"{file}: controller: there is no controller 'foo'",
        f"{file}: store: none/s.db: there is no folder",
        "/nowhere.json",
        "keys: /nowhere.toml: No such file or directory",
    ]
    assert len(lines) == len(expected), done.stderr
    for line, part in zip(lines, expected, strict=True):
        assert part in line


@pytest.mark.parametrize(
    ("text", "expected_text"),
    [
        ("--max-model-len '512", "embedded_args: the flags cannot be read: No closing quotation"),
        ("--port 9", "embedded_args: the proxy itself sets --port; remove it"),
        ("--host=0.0.0.0", "the proxy itself sets --host; remove it"),
    ],
)
def test_invalid_or_reserved_embedded_args_are_refused(text: str, expected_text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(embedded_args=text)
    assert expected_text in str(caught.value)


def test_embedded_args_are_split_into_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().embedded_flags == ()
    monkeypatch.setenv("AUTOTTS_EMBEDDED_ARGS", "--max-model-len 512 --override-generation-config '{\"top_k\": 3}'")
    assert load().embedded_flags == ("--max-model-len", "512", "--override-generation-config", '{"top_k": 3}')


@pytest.mark.process
async def test_serve_uses_the_config_file_and_its_log_format(tmp_path: Path) -> None:
    async with FakeVLLM().serve() as backend:
        toml(tmp_path, f"upstream = '{backend.url}'\nport = 0\nlog = 'json'\nrecord = false")
        serving = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy.cli", "serve", "--config", str(tmp_path / "autotts.toml")),
            stderr=asyncio.subprocess.PIPE,
        )
        assert serving.stderr is not None
        try:
            message = ""
            while not message.startswith("listening on http://127.0.0.1:"):
                message = json.loads(await serving.stderr.readline())["message"]
        finally:
            serving.terminate()
            _, rest = await serving.communicate()
    assert all(json.loads(line)["level"] == "info" for line in rest.splitlines())
    assert serving.returncode == 0
