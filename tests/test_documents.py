"""What is written about the project is held to the project."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from proxy.settings import EMBEDDED, SERVED, Settings

ROOT = Path(__file__).parent.parent
PACKAGES = ("controllers", "discovery", "proxy", "deploy")


def text(name: str) -> str:
    return (ROOT / name).read_text()


FOLDERS = sorted(
    path.parent.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")
)


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_every_folder_says_what_it_holds_and_stands_in_the_architecture(folder: Path) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    assert docstring
    first = " ".join(docstring.split("\n\n")[0].split())
    assert f"| `{folder}/` | {first} |" in text("ARCHITECTURE.md")


def test_every_setting_is_in_the_readme() -> None:
    missing = [name for name in Settings.model_fields if f"`AUTOTTS_{name.upper()}`" not in text("README.md")]
    assert missing == []


@pytest.mark.parametrize("name", Settings.model_fields)
def test_defaults_in_the_readme_are_the_models(name: str) -> None:
    row = next(line for line in text("README.md").splitlines() if line.startswith(f"| `AUTOTTS_{name.upper()}` |"))
    *_, cell, _ = row.split("|")
    said = re.findall(r"`([^`]*)`", cell)
    field = Settings.model_fields[name]
    default = SERVED.get(name, field.default)
    expected = [] if default is None else [default]
    expected += [EMBEDDED[name]] if name in EMBEDDED else []
    read = TypeAdapter[object](field.annotation or object).validate_python
    assert [read(one) for one in said] == [read(one) for one in expected], row


def test_files_the_readme_names_are_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", text("README.md"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_top_level_holds_what_was_agreed() -> None:
    agreed = {"proxy", "discovery", "controllers", "tests", "deploy", "docs", "README.md", "pyproject.toml"}
    usual = {"ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt"}
    shown = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and "egg-info" not in path.name}
    assert agreed <= shown
    made = {"build", "dist", "frontier.png", "autotts.db", "autotts.db-wal", "autotts.db-shm", "autotts.db.spill"}
    assert shown <= agreed | usual | made


def test_the_version_stands_once() -> None:
    version = tomllib.loads(text("pyproject.toml"))["project"]["version"]
    assert version not in text("README.md")
