"""Rules of the Dockerfile and of its build context."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.docker import container_health
from proxy.settings import Settings
from proxy.upstream.embedded import free_port
from tests.deploy.build_context import context, is_in_context
from tests.deploy.dockerfile import DOCKERFILE, TARGETS, image, lineage, stages
from tests.readability import ROOT

NOBODY = "65534:65534"
HADOLINT = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.mark.process
@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not here; its wheel is for Linux and macOS only")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([str(HADOLINT), DOCKERFILE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_as_nobody_from_a_slim_base(target: str) -> None:
    made = image(target)
    assert made.base == "python:3.11-slim-bookworm"
    assert made.user == NOBODY
    assert [stage.instructions[-1].name for stage in lineage(target)][-1] == "USER"  # nothing after it needs root
    assert made.volumes == [made.folder] == ["/data"]
    assert made.env["HOME"] == "/tmp"
    assert {"org.opencontainers.image.title", "org.opencontainers.image.licenses"} <= made.labels.keys()


@pytest.mark.parametrize("target", TARGETS)
def test_the_proxy_is_process_1_and_gets_sigterm(target: str) -> None:
    made = image(target)
    assert (made.entrypoint, made.command, made.stop_signal) == (["autotts"], ["serve"], "SIGTERM")
    assert made.health_check == ["python", "-m", "deploy.docker.container_health"]


def test_proxy_is_the_default_target() -> None:
    assert list(stages())[-1] == "proxy"


def test_build_stages_do_not_reach_the_images() -> None:
    """Compilers, sources and pip's cache stay in the stages of the wheels, which are only mounted."""
    for target in TARGETS:
        for stage in lineage(target):
            assert "COPY" not in [instruction.name for instruction in stage.instructions]
            runs = [instruction.value for instruction in stage.instructions if instruction.name == "RUN"]
            pips = [run for run in runs if "pip install" in run]
            assert all("--no-cache-dir --no-index /wheels/*.whl" in run for run in pips)


def test_the_port_of_the_image_is_the_port_of_its_health_check() -> None:
    made = image("proxy")
    assert made.env["AUTOTTS_PORT"] == str(container_health.DEFAULT_PORT) == str(Settings.model_fields["port"].default)
    exposed = [i.value for stage in lineage("proxy") for i in stage.instructions if i.name == "EXPOSE"]
    assert exposed == ["8400"]


def test_torch_is_the_one_of_the_makefile() -> None:
    arguments = [i.value for i in stages()["embedded-wheels"].instructions if i.name == "ARG"]
    makefile = (ROOT / "Makefile").read_text()
    for name in ("TORCH", "TORCH_INDEX"):
        (in_make,) = re.findall(rf"^{name} \??:?= (\S+)$", makefile, re.MULTILINE)
        assert f"{name}={in_make}" in arguments


SECRETS = (
    *(".git/config", ".venv/bin/python", "keys.toml", "autotts.db", "proxy/autotts.db-wal"),
    *("deploy/docker/keys.toml", "deploy/secrets/keys.toml", "deploy/embedded/autotts.db.spill"),
)


def test_secrets_and_stores_stay_outside_the_build_context() -> None:
    assert [path for path in SECRETS if is_in_context(path)] == []
    assert {path.partition("/")[0] for path in context()} == {
        *("controllers", "discovery", "proxy", "deploy"),
        *("pyproject.toml", "constraints.txt", "README.md", "LICENSE"),
    }
    assert not any(path.startswith("deploy/secrets") for path in context())


def test_the_build_context_has_everything_that_is_copied() -> None:
    sources = [i.value.split()[:-1] for i in stages()["wheels"].instructions if i.name == "COPY"]
    copied = {path for group in sources for path in group}
    assert copied == {path.partition("/")[0] for path in context()}
    for package in ("controllers", "discovery", "proxy", "deploy"):
        modules = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert modules - set(context()) == set()


def test_the_health_check_fails_if_nothing_listens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTOTTS_PORT", str(port := free_port()))
    assert container_health.main() == 1
    assert f"the proxy does not answer on port {port}: " in capsys.readouterr().err
