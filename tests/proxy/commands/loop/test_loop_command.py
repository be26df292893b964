"""The whole loop on the embedded model, as small as it can be: every stage runs, and a second run repeats none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALLEST = (
    *("--search", "12", "--held-out", "12", "--branches", "6", "--minutes", "0.2"),
    *("--shuffles", "2", "--requests", "4", "--force"),
)
TIMEOUT_S = 900
"""Only a loop that hangs takes this long."""


def run_loop(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "proxy.cli", "loop", "--folder", str(folder), *SMALLEST, *options]
    environment = {**os.environ, "COLUMNS": "200", "USER": "tester"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, env=environment)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(2 * TIMEOUT_S)
def test_a_loop_collects_discovers_judges_rolls_out_and_rolls_back(tmp_path: Path) -> None:
    folder = tmp_path / "loop"
    done = run_loop(folder)
    assert done.returncode == 0, done.stderr + (folder / "loop.log").read_text()
    results = json.loads((folder / "loop.json").read_text())["results"]
    assert results["collect"] == {"branches": 6 * 24}
    assert len((folder / "recordings.jsonl").read_text().splitlines()) == 6 * 24
    assert [report["champion"] for report in results["gate"]] == ["adaptive_consistency", "cmc"]
    assert results["rollout"]["promoted"]
    assert results["rollout"]["controllers"] == [results["discover"]["name"]]
    assert results["rollback"] == {"rolled_back": True, "serving": ["adaptive_consistency"]}
    actions = [json.loads(line)["action"] for line in (folder / "registry" / "audit.jsonl").read_text().splitlines()]
    assert actions == ["install as shadow", "promote to canary", "promote to champion", "rollback"]
    page = (folder / "report.html").read_text()
    assert results["discover"]["name"] in page
    assert "<svg" in page
    again = run_loop(folder)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done before") == 8
    other = run_loop(folder, "--seed", "1")
    assert other.returncode == 2
    assert "seed was 0" in other.stderr
