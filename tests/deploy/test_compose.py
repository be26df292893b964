"""deploy/compose.yaml: its schema, its hardening, and the settings and files it names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import jsonschema_rs
import pytest
import yaml

from proxy.http.graceful_shutdown import CUT_S
from proxy.recording.store_writer import FLUSH_S
from proxy.server import CLOSE_S
from proxy.settings import Settings, load
from tests.deploy.dockerfile import TARGETS, image
from tests.readability import ROOT

FILE: Final = ROOT / "deploy/compose.yaml"
SCHEMA: Final = Path(__file__).parent / "schemas/compose-spec.json"
"""Schema of the Compose Specification, as check-jsonschema 0.39 has it. LICENSE.compose-spec is its licence."""
COMPOSE: Final = shutil.which("docker-compose")
PROFILES: Final = ("cpu", "gpu", "remote")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return content


def services(compose: dict[str, Any], profile: str) -> dict[str, Any]:
    return {name: service for name, service in compose["services"].items() if profile in service["profiles"]}


def test_it_follows_the_schema_of_the_specification(compose: dict[str, Any]) -> None:
    validator = jsonschema_rs.validator_for(json.loads(SCHEMA.read_text()))
    assert [str(error) for error in validator.iter_errors(compose)] == []
    wrong = {**compose, "services": {"proxy": {"imag": "autotts-proxy"}}}
    assert not validator.is_valid(wrong)


@pytest.mark.process
@pytest.mark.skipif(COMPOSE is None, reason="docker-compose is not here; its schema is checked all the same")
@pytest.mark.parametrize("profile", PROFILES)
def test_docker_compose_accepts_it(profile: str) -> None:
    command = [str(COMPOSE), "--file", str(FILE), "--profile", profile, "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_each_profile_has_one_proxy_with_its_store_its_limits_and_monitoring(compose: dict[str, Any]) -> None:
    beside = {"postgres", "redis", "prometheus", "grafana"}
    assert set(services(compose, "cpu")) == {"proxy-cpu", *beside}
    assert set(services(compose, "gpu")) == {"proxy-gpu", "vllm", *beside}
    assert set(services(compose, "remote")) == {"proxy-remote", *beside}
    for profile in PROFILES:
        proxies = [service for name, service in services(compose, profile).items() if name.startswith("proxy")]
        (proxy,) = proxies
        assert proxy["networks"]["default"]["aliases"] == ["proxy"]
        assert "deploy" not in proxy  # no replicas


def test_every_service_is_hardened_and_has_a_health_check(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service, name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert re.fullmatch(r"autotts-proxy(:embedded)?|\S+:v?\d+(\.\d+)+", service["image"]), name
        writable = [volume for volume in service.get("volumes", ()) if volume.startswith(".")]
        assert all(volume.endswith(":ro") for volume in writable), name


def test_services_wait_for_those_they_need(compose: dict[str, Any]) -> None:
    needed = {name: list(service.get("depends_on", ())) for name, service in compose["services"].items()}
    assert needed == {
        "proxy-cpu": ["postgres", "redis"],
        "proxy-gpu": ["postgres", "redis", "vllm"],
        "proxy-remote": ["postgres", "redis"],
        "vllm": [],
        "postgres": [],
        "redis": [],
        "prometheus": [],
        "grafana": ["prometheus"],
    }
    for service in compose["services"].values():
        for condition in service.get("depends_on", {}).values():
            assert condition == {"condition": "service_healthy"}


def test_the_proxies_are_the_images_of_the_dockerfile(compose: dict[str, Any]) -> None:
    for name in ("proxy-cpu", "proxy-gpu", "proxy-remote"):
        service = compose["services"][name]
        target = service["build"]["target"]
        assert target in TARGETS
        assert (FILE.parent / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        assert service["user"] == image(target).user
        assert service["healthcheck"]["test"] == ["CMD", *image(target).health_check]
        named = [volume for volume in service["volumes"] if not volume.startswith(".")]
        assert [volume.partition(":")[2] for volume in named] == image(target).volumes
        assert service["entrypoint"][0] == "/bin/sh"
        assert service["command"] == image(target).command


def test_the_settings_exist_and_the_container_outlives_a_shutdown(
    compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("proxy-cpu", "proxy-gpu", "proxy-remote"):
        service = compose["services"][name]
        known = {f"AUTOTTS_{field.upper()}" for field in Settings.model_fields} | {"AUTOTTS_CONFIG"}
        variables = {**image(service["build"]["target"]).env, **service["environment"]}
        given = {variable: value for variable, value in variables.items() if variable.startswith("AUTOTTS_")}
        assert given.keys() <= known
        for variable, value in given.items():
            monkeypatch.setenv(variable, value.replace("${UPSTREAM:-}", "http://gpu-machine:8000"))
        settings = load()
        assert int(service["stop_grace_period"].removesuffix("s")) > settings.drain_s + CUT_S + CLOSE_S + FLUSH_S
        assert service["ports"] == [f"127.0.0.1:{settings.port}:{settings.port}"]
        assert str(settings.keys) == "/run/secrets/keys"
        assert str(settings.store) == "postgresql://autotts@postgres:5432/autotts"
        assert image(service["build"]["target"]).folder in image(service["build"]["target"]).volumes  # the spill file's


def test_secrets_are_files_outside_git_and_outside_the_images(compose: dict[str, Any]) -> None:
    for secret in compose["secrets"].values():
        assert secret["file"].startswith("./secrets/")
    assert "/deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    for service in compose["services"].values():
        assert set(service.get("secrets", ())) <= compose["secrets"].keys()
        passwords = [v for v in service.get("environment", {}) if re.search("PASSWORD|SECRET|KEY|TOKEN", v)]
        assert all(service["environment"][name].startswith("/run/secrets/") for name in passwords)
    assert not re.search(r"://[^/\s]*:[^/\s@]*@", FILE.read_text())  # no URL with a password


def test_mounted_folders_exist_and_prometheus_scrapes_the_proxy(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert (FILE.parent / source).is_dir() if source.startswith(".") else source in compose["volumes"]
    config = yaml.safe_load((ROOT / "deploy/prometheus/compose.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "autotts"  # the alerts name it
    assert job["static_configs"] == [{"targets": ["proxy:8400"]}]
    key = job["authorization"]["credentials_file"]
    assert os.path.basename(key) in compose["services"]["prometheus"]["secrets"]
    assert config["rule_files"] == ["rules.yml"]
