"""PostgreSQL and Redis in deploy/compose.yaml: they and the proxies agree on names, ports and passwords."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pytest
import yaml
from redis import AuthenticationError
from redis.asyncio import Redis

from discovery.store import DatabaseUrl
from proxy.settings import load
from proxy.upstream.embedded import free_port
from tests.deploy.dockerfile import image
from tests.deploy.test_compose import FILE
from tests.redis_server import LIBRARIES, MISSING, PATIENCE_S, PROGRAM

SCRIPTS: Final = FILE.parent / "compose"
PASSWORDS: Final = {"postgres_password": "of-postgres_1", "redis_password": "of-redis-2"}
PROXIES: Final = ("proxy-cpu", "proxy-gpu", "proxy-remote")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return content


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A folder of secrets as all users of a container may read them."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    for name, password in PASSWORDS.items():
        (folder / name).write_text(f"{password}\n")
    return folder


def variables(secrets: Path, compose: Mapping[str, Any], programs: Path) -> dict[str, str]:
    """Return the variables of a proxy's container, with folders of the test."""
    service = compose["services"]["proxy-cpu"]
    given = {**image("proxy").env, **service["environment"], "PGPASSFILE": str(secrets / "pgpass")}
    return given | {"SECRETS": str(secrets), "PATH": f"{programs}:{os.environ['PATH']}"}


def run_entry_point(secrets: Path, compose: Mapping[str, Any], **more: str) -> subprocess.CompletedProcess[str]:
    """Run the entry point of the proxies with a program `autotts` that shows its arguments and variables."""
    programs = secrets.parent / "programs"
    programs.mkdir()
    (programs / "autotts").write_text('#!/bin/sh\necho "arguments=$*"\nenv\n')
    (programs / "autotts").chmod(0o755)
    service = compose["services"]["proxy-cpu"]
    shell, script = service["entrypoint"]
    assert script.startswith("/compose/")
    command = [shell, str(SCRIPTS / Path(script).name), *service["command"]]
    given = variables(secrets, compose, programs) | more
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.process
def test_the_proxies_get_both_passwords_from_the_secrets(
    compose: dict[str, Any], secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_entry_point(secrets, compose)
    assert (done.returncode, done.stderr) == (0, "")
    shown = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert shown["arguments"] == "serve"
    passwords = Path(shown["PGPASSFILE"])
    assert passwords.stat().st_mode & 0o777 == 0o600  # otherwise clients of PostgreSQL ignore it
    store = urlsplit(shown["AUTOTTS_STORE"])
    place = (store.hostname, str(store.port), store.path[1:], store.username)
    assert passwords.read_text() == ":".join([*map(str, place), PASSWORDS["postgres_password"]]) + "\n"
    monkeypatch.setenv("AUTOTTS_LIMITS", shown["AUTOTTS_LIMITS"])
    limits = load().limits
    assert limits is not None
    assert limits.get_secret_value() == f"redis://:{PASSWORDS['redis_password']}@redis:6379/0"


@pytest.mark.process
def test_the_proxies_refuse_an_upstream_that_is_empty(compose: dict[str, Any], secrets: Path) -> None:
    assert compose["services"]["proxy-remote"]["environment"]["AUTOTTS_UPSTREAM"] == "${UPSTREAM:-}"
    done = run_entry_point(secrets, compose, AUTOTTS_UPSTREAM="")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "set UPSTREAM to the URL of vLLM\n")


@pytest.mark.process
@pytest.mark.parametrize("secret", sorted(PASSWORDS))
@pytest.mark.parametrize("password", ["", "with space", "p@ss", "a:b", "two\nlines"])
def test_the_proxies_refuse_to_start_without_passwords_that_need_no_quotes(
    compose: dict[str, Any], secrets: Path, secret: str, password: str
) -> None:
    (secrets / secret).write_text(password)
    done = run_entry_point(secrets, compose)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{secrets / secret}: it needs a password of letters, digits")
    assert not password or password not in done.stdout + done.stderr


def test_the_store_is_the_database_that_postgresql_makes(compose: dict[str, Any]) -> None:
    server = compose["services"]["postgres"]
    for name in PROXIES:
        proxy = compose["services"][name]
        url = DatabaseUrl(proxy["environment"]["AUTOTTS_STORE"])
        store = urlsplit(str(url))
        assert store.hostname == "postgres"
        assert store.port == 5432  # the image's own; nothing publishes another
        assert store.username == server["environment"]["POSTGRES_USER"]
        assert url.database == server["environment"]["POSTGRES_DB"]
        assert store.password is None
        assert proxy["environment"]["PGPASSFILE"].startswith("/tmp/")  # written by the proxy's user
        assert "storage" in proxy["networks"]
    arguments = server["healthcheck"]["test"]
    assert f"--username={server['environment']['POSTGRES_USER']}" in arguments
    assert f"--dbname={server['environment']['POSTGRES_DB']}" in arguments
    assert server["volumes"] == ["database:/var/lib/postgresql/data"]
    assert "--encoding=UTF8" in server["environment"]["POSTGRES_INITDB_ARGS"].split()


def test_servers_and_proxies_read_the_same_secrets(compose: dict[str, Any]) -> None:
    readers = {
        secret: [name for name, service in compose["services"].items() if secret in service.get("secrets", ())]
        for secret in PASSWORDS
    }
    assert readers == {"postgres_password": [*PROXIES, "postgres"], "redis_password": [*PROXIES, "redis"]}
    variable = compose["services"]["postgres"]["environment"]["POSTGRES_PASSWORD_FILE"]
    assert variable == "/run/secrets/postgres_password"


def test_only_the_proxies_reach_the_storage(compose: dict[str, Any]) -> None:
    assert compose["networks"]["storage"] == {"internal": True}
    members = {name for name, service in compose["services"].items() if "storage" in service.get("networks", ())}
    assert members == {*PROXIES, "postgres", "redis"}
    for name in ("postgres", "redis"):
        assert compose["services"][name]["networks"] == ["storage"]
        assert "ports" not in compose["services"][name]


@pytest.mark.process
@pytest.mark.skipif(PROGRAM is None, reason=MISSING)
async def test_redis_demands_the_password_and_is_healthy_with_it(compose: dict[str, Any], secrets: Path) -> None:
    service, port = compose["services"]["redis"], free_port()
    programs = f"{Path(str(PROGRAM)).parent}:{os.environ['PATH']}"
    environment = {"PATH": programs, "LD_LIBRARY_PATH": os.pathsep.join(LIBRARIES), "SECRETS": str(secrets)}
    environment["TMPDIR"] = str(secrets)
    shell, script = service["entrypoint"]
    command = [shell, str(SCRIPTS / Path(script).name), "--port", str(port), "--bind", "127.0.0.1"]
    health = service["healthcheck"]["test"]
    check = [word.replace("/run/secrets", str(secrets)).replace("$$", "$") for word in health[1:]]
    check[-1] = check[-1].replace("redis-cli", f"redis-cli -p {port}")
    server = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(PATIENCE_S):
            await ready(server)
        assert (secrets / "redis.conf").stat().st_mode & 0o777 == 0o600
        async with Redis(host="127.0.0.1", port=port) as stranger:
            with pytest.raises(AuthenticationError):
                await stranger.ping()
        async with Redis(host="127.0.0.1", port=port, password=PASSWORDS["redis_password"]) as client:
            assert await client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert await client.config_get("save") == {"save": ""}
        assert await exit_code(check, environment) == 0
        (secrets / "redis_password").write_text("wrong")
        assert await exit_code(check, environment) != 0
    finally:
        server.terminate()
        await server.communicate()


async def ready(server: asyncio.subprocess.Process) -> None:
    assert server.stdout is not None
    while b"Ready to accept connections" not in (line := await server.stdout.readline()):
        assert line, "redis-server ended"


async def exit_code(command: Sequence[str], environment: Mapping[str, str]) -> int:
    process = await asyncio.create_subprocess_exec(*command, env=environment)
    return await process.wait()
