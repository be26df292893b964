"""Which registry the commands of promotion use: the one that is named, or that of a store in PostgreSQL."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from controllers.loading import Spec
from discovery.commands.promote import default_ledger
from discovery.errors import RegistryAway, StoreError
from discovery.promotion.registry import Registry
from discovery.store import DatabaseUrl, child_environment, parse_place
from proxy.cli import app
from tests.postgres_server import QUOTED_PASSWORD, PostgresServer
from tests.readability import ROOT

PROMOTE = ("promote", "asc", "--as", "champion")
URL = DatabaseUrl("postgresql://me@host/db")


def autotts(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize("command", [PROMOTE, ("rollback",), ("controllers",)])
def test_a_command_without_a_registry_says_how_to_name_one(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for store in ("", str(tmp_path / "autotts.db")):  # a file has no registry
        monkeypatch.setenv("AUTOTTS_STORE", store)
        status, output = autotts(*command)
        assert status == 2
        assert "--registry is needed: a folder, or a postgresql:// URL" in output


def test_the_audit_names_the_user_as_the_ledger_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    registry = str(tmp_path / "registry")
    assert autotts(*PROMOTE, "--registry", registry)[0] == 0
    assert autotts("rollback", "--registry", registry, "--who", "me")[0] == 0
    assert [line["who"] for line in Registry(Path(registry)).audit()] == [getpass.getuser(), "me"]


def test_a_change_stands_if_the_registry_goes_away_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> Spec:
        raise RegistryAway("the database does not answer")

    registry = str(tmp_path / "registry")
    assert autotts(*PROMOTE, "--registry", registry)[0] == 0
    monkeypatch.setattr(Registry, "spec", away)
    assert autotts("rollback", "--registry", registry)[0] == 0


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run as a user without a name")
def test_a_user_without_a_name_is_unknown() -> None:
    code = (
        "import os; from discovery.commands.options import user_name; os.setuid(54321); "
        "[os.environ.pop(name, None) for name in ('LOGNAME', 'USER', 'LNAME', 'USERNAME')]; "
        "raise SystemExit(user_name() != 'unknown')"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_a_url_of_another_database_is_refused() -> None:
    status, output = autotts("controllers", "--registry", "mysql://me:s3cret@host/db")
    assert status == 2
    assert "a registry cannot be opened by a URL that begins with mysql:" in output
    assert "s3cret" not in output


@pytest.mark.process
def test_the_registry_of_a_store_in_postgresql_is_used_unless_another_is_named(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = postgres.create_database()
    monkeypatch.setenv("AUTOTTS_STORE", place.text.replace("@", f":{QUOTED_PASSWORD}@"))
    status, output = autotts(*PROMOTE)
    assert (status, f"{place}: asc (" in output) == (0, True)
    assert Registry(place).read().default.champion == Spec("asc").digest
    status, output = autotts("controllers")
    assert (status, f"{place}, version 1" in output) == (0, True)
    monkeypatch.setenv("AUTOTTS_REGISTRY", str(tmp_path / "folder"))
    assert autotts("promote", "esc", "--as", "champion")[0] == 0
    assert Registry(tmp_path / "folder").read().default.champion == Spec("esc").digest
    monkeypatch.delenv("AUTOTTS_REGISTRY")
    status, output = autotts("rollback")
    assert (status, f"{place}: the configured controller is the champion" in output) == (0, True)
    assert QUOTED_PASSWORD not in output


def test_a_rollback_takes_the_shadow_of_a_misspelt_model_away_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = ("--registry", "installed")
    opened = Registry(Path("installed"))
    autotts("promote", "cmc", "--as", "champion", *place)
    autotts("promote", "asc", "--as", "shadow", "--model", "smal", *place)
    before = opened.read()
    assert autotts("rollback", "--shadow", *place) == (
        2,
        "autotts: installed: there is no shadow; there is one of --model smal",
    )
    assert autotts("rollback", "--shadow", "--canary", "--model", "smal", *place)[0] == 2
    assert opened.read() == before
    status, output = autotts("rollback", "--shadow", "--model", "smal", *place)
    assert (status, output) == (
        0,
        "installed: the default's champion is the champion of model smal; there is no shadow",
    )
    after = opened.read()
    assert (after.default, after.models) == (before.default, {})
    assert [line["action"] for line in opened.audit()][-1] == "drop shadow"


def test_a_damaged_card_is_named_beside_the_controllers_that_can_be_read(tmp_path: Path) -> None:
    place = ("--registry", str(tmp_path))
    for name, stage in (("cmc", "champion"), ("asc", "canary"), ("esc", "shadow")):
        assert autotts("promote", name, "--as", stage, *place)[0] == 0
    damaged, missing = Spec("asc").digest, Spec("cmc").digest
    (tmp_path / f"{damaged}.json").write_text("{")
    (tmp_path / f"{missing}.json").unlink()
    status, output = autotts("controllers", *place)
    assert status == 1
    assert f"shadow │ esc │ {Spec('esc').digest[:12]}" in output
    assert f"canary (10%) │ damaged card │ {damaged[:12]}" in output
    assert f"champion │ damaged card │ {missing[:12]}" in output
    assert f"the card of {damaged[:12]} cannot be used: {tmp_path}/{damaged}.json: " in output
    assert "latest changes" in output
    done = CliRunner().invoke(app, ["controllers", *place, "--json"])
    figures = json.loads(done.stdout)
    assert (done.exit_code, list(figures["cards"])) == (1, [Spec("esc").digest])
    assert figures["damaged"].keys() == {damaged, missing}
    assert "promote the controller's file again" in figures["damaged"][damaged]


def test_a_rollback_with_a_damaged_card_of_the_champion_says_that_it_is_made(tmp_path: Path) -> None:
    place = ("--registry", str(tmp_path))
    for name, stage in (("cmc", "champion"), ("asc", "canary")):
        assert autotts("promote", name, "--as", stage, *place)[0] == 0
    champion = Spec("cmc").digest
    (tmp_path / f"{champion}.json").write_text("{")
    status, output = autotts("rollback", "--canary", *place)
    assert status == 0
    assert f"{champion[:12]} is the champion; there is no canary" in output


def test_reasons_and_headlines_are_listed_as_they_are_written(tmp_path: Path) -> None:
    place, hostile = ("--registry", str(tmp_path)), "[/red] as [b]planned"
    assert autotts(*PROMOTE, *place, "--why", hostile, "--who", hostile)[0] == 0
    card = tmp_path / f"{Spec('asc').digest}.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "headline": hostile}))
    status, output = autotts("controllers", *place)
    assert (status, output.count(hostile)) == (0, 3)


@pytest.mark.process
def test_a_database_that_cannot_be_reached_is_reported_in_one_line(postgres: PostgresServer) -> None:
    away = DatabaseUrl(postgres.url("none").text.replace(str(postgres.port), "1"))
    status, output = autotts("controllers", "--registry", str(away))
    assert (status, output) == (
        2,
        f"autotts: {away}: cannot reach the server: Connect call failed ('127.0.0.1', 1); check that it runs",
    )


def test_a_registry_has_its_ledger_beside_it() -> None:
    assert default_ledger(Path("registry")) == Path("registry/ledger.jsonl")
    assert default_ledger(URL) == URL


def test_urls_with_different_passwords_cannot_both_be_passed_on() -> None:
    mine, other = parse_place("postgresql://me:a@host/db"), parse_place("postgresql://me:b@other/db")
    assert child_environment(mine, URL, Path("x"), None, environment={}) == {"PGPASSWORD": "a"}
    with pytest.raises(StoreError, match=r"me@host/db and .*me@other/db have different passwords; .*pgpass"):
        child_environment(mine, other, environment={})
