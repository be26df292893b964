"""Every part of the benchmarks runs to its end at its smallest size. The figures are not checked."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.__main__ import usual_parts
from tests.bench.its_hub_client import boxed
from tests.bench.peers import PeerEnvironment, PeerMissing
from tests.bench.replay import FILE
from tests.bench.rivals import RivalPoint, accuracy_at
from tests.bench.rows import Row, Size, median_ratio, percentile

ROOT = Path(__file__).parents[1]
NEEDS_RECORDINGS = {"replay", "default", "cascade", "ray"}
WITHOUT_MODEL = (
    "answers",
    "replay",
    "sealed",
    "default",
    "cascade",
    "ray",
    "dashboard",
    "growth",
    "recorder",
    "edge",
    "own",
)
WITH_MODEL = ("busy", "live", "collect", "signals")
TIMEOUT_S = 900
"""Only a part that hangs takes this long."""
early = pytest.mark.xdist_group("bench")
"""pytest-xdist starts groups before single tests, so that no worker waits at the end for these."""


def rows_of_a_quick_run(*arguments: str) -> dict[str, int]:
    """Run parts at their smallest size and return the number of rows of each."""
    command = [sys.executable, "-m", "tests.bench", "--quick", *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return {part: int(count) for part, count in re.findall(r"^(\w+): (\d+) rows in", ran.stderr, re.MULTILINE)}


def test_a_run_without_names_of_parts_has_all_but_the_rivals() -> None:
    assert tuple(usual_parts(with_peers=False)) == WITHOUT_MODEL + WITH_MODEL
    assert tuple(usual_parts(with_peers=True)) == (*WITHOUT_MODEL, *WITH_MODEL, "rivals")


@early
@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(2 * TIMEOUT_S)
def test_a_quick_run_measures_every_part_that_needs_no_model() -> None:
    rows = rows_of_a_quick_run(*WITHOUT_MODEL)
    assert tuple(rows) == WITHOUT_MODEL
    expected_empty = set() if FILE.exists() else NEEDS_RECORDINGS
    assert {part for part, count in rows.items() if not count} == expected_empty


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_a_quick_run_measures_every_part_that_needs_the_model(vllm: str) -> None:
    rows = rows_of_a_quick_run("--upstream", vllm, *WITH_MODEL)
    assert tuple(rows) == WITH_MODEL
    assert all(rows.values())


@early
@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("kind", ["forwarded", "controlled"])
def test_the_profile_of_a_request_has_a_share_for_each_part(kind: str) -> None:
    command = [sys.executable, "-m", "tests.bench.request_profile", kind]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert re.search(rf"{kind} request: [\d,]+ function calls", ran.stdout)
    shares = [int(share) for share in re.findall(r"(\d+)%", ran.stdout)]
    assert 90 <= sum(shares) <= 110
    assert shares == sorted(shares, reverse=True)


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


def test_a_percentile_is_one_of_the_figures() -> None:
    assert [percentile([9.0, 1.0, 5.0], percent) for percent in (0, 50, 99, 100)] == [1.0, 5.0, 5.0, 9.0]
    assert percentile([], 95) == 0.0


def test_the_accuracy_for_some_tokens_is_read_from_the_frontier() -> None:
    points = [RivalPoint("b", 80.0, 1.0, 1_000.0, 1.0), RivalPoint("a", 40.0, 1.0, 10.0, 1.0)]
    assert [accuracy_at(points, tokens) for tokens in (1.0, 10.0, 100.0, 1_000.0, 9_999.0)] == [40, 40, 60, 80, 80]


def test_its_hub_compares_the_last_boxed_answers() -> None:
    assert boxed("first \\boxed{1}, then \\boxed{12}") == "12"
    assert boxed("no answer") == "no answer"


@pytest.mark.process
async def test_a_rival_that_cannot_be_installed_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = PeerEnvironment("its_hub", (("no-such-package-anywhere==1",),))
    monkeypatch.setattr(PeerEnvironment, "folder", property(lambda _: Path("/dev/null/nowhere")))
    with pytest.raises(PeerMissing, match="not installed"):
        await missing.install()
