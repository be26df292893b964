"""Every part of the benchmarks runs to its end at its smallest size. The figures are not checked."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.replay import FILE
from tests.bench.rows import Row, Size, median_ratio

ROOT = Path(__file__).parents[1]
NEEDS_RECORDINGS = {"replay", "cascade"}
PARTS = ("answers", "replay", "sealed", "cascade", "recorder", "edge", "live")


@pytest.mark.vllm
def test_a_quick_run_measures_every_part() -> None:
    command = [sys.executable, "-m", "tests.bench", "--quick"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    rows = {part: int(count) for part, count in re.findall(r"^(\w+): (\d+) rows in", ran.stderr, re.MULTILINE)}
    assert tuple(rows) == PARTS
    expected_empty = set() if FILE.exists() else NEEDS_RECORDINGS
    assert {part for part, count in rows.items() if not count} == expected_empty


@pytest.mark.process
def test_an_unknown_part_is_refused_and_the_error_lists_all_parts() -> None:
    command = [sys.executable, "-m", "tests.bench", "nonsense"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    assert "unknown part nonsense; use answers, replay" in ran.stderr


def test_a_ratio_is_the_median_of_paired_ratios_with_its_spread() -> None:
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == ("2.00", "1.00 to 3.00")
    assert Row("a", "b", "c", "d").spread == ""
    assert (Size().pick(9, 1), Size(is_quick=True).pick(9, 1)) == (9, 1)
