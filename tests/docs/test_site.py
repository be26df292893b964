"""The manual as a site: every link and anchor resolves, and every page is built."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.process
CONFIG = ROOT / "docs" / "site" / "mkdocs.yml"


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed; the extras `docs` and `dev` have it")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(site),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_manual_builds_without_warnings_and_with_every_page(tmp_path: Path) -> None:
    done = build(CONFIG, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {page.with_suffix("").name for page in (ROOT / "docs").glob("*.md")}
    assert pages <= {page.with_suffix("").name for page in (tmp_path / "site").glob("*.html")}
    assert not (tmp_path / "site" / "site").exists(), "the configuration is published"


def test_built_pages_load_nothing_from_other_servers(tmp_path: Path) -> None:
    assert build(CONFIG, tmp_path / "site").returncode == 0
    for page in (tmp_path / "site").glob("*.html"):
        loaded = re.findall(r'<(?:script|img)[^>]* src="([^"]*)"|<link[^>]* href="([^"]*)"', page.read_text())
        assert [url for pair in loaded for url in pair if "://" in url] == []


@pytest.mark.parametrize(
    ("text", "expected_text"),
    [
        ("[gone](gone.md)", "gone.md"),
        ("[no such part](index.md#nowhere)", "nowhere"),
        ("[outside](../README.md)", "README.md"),
    ],
)
def test_a_broken_link_fails_the_build(tmp_path: Path, text: str, expected_text: str) -> None:
    (tmp_path / "docs" / "site").mkdir(parents=True)
    (tmp_path / "docs" / "index.md").write_text(f"# Home\n\n{text}\n")
    config = CONFIG.read_text()
    (tmp_path / "docs" / "site" / "mkdocs.yml").write_text(config[: config.index("nav:")] + "nav: [index.md]\n")
    done = build(tmp_path / "docs" / "site" / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert expected_text in done.stderr
