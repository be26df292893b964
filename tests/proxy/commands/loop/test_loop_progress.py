"""A loop keeps the results of its stages, and refuses to go on with another plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from discovery.errors import DiscoveryError
from proxy.commands.loop.progress import FILE, LoopPlan, LoopProgress


def test_results_are_there_when_the_loop_is_opened_again(tmp_path: Path) -> None:
    progress = LoopProgress.open(tmp_path / "loop", LoopPlan(seed=3))
    assert progress.get("collect") is None
    progress.save("collect", {"branches": 12})
    again = LoopProgress.open(tmp_path / "loop", LoopPlan(seed=3))
    assert again.get("collect") == {"branches": 12}
    assert again.get("discover") is None


def test_a_loop_of_another_size_is_refused(tmp_path: Path) -> None:
    LoopProgress.open(tmp_path, LoopPlan()).save("questions", {})
    with pytest.raises(DiscoveryError, match=r"\(seed was 0, branches was 48\)|\(branches was 48, seed was 0\)"):
        LoopProgress.open(tmp_path, LoopPlan(branches=8, seed=1))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"plan": 1, "results": {}}'])
def test_a_file_that_is_not_a_loop_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(DiscoveryError, match="name another --folder"):
        LoopProgress.open(tmp_path, LoopPlan())


@pytest.mark.parametrize("promoted", [False, True])
def test_a_loop_that_was_not_promoted_is_rolled_out_when_it_is_forced_later(tmp_path: Path, promoted: bool) -> None:
    progress = LoopProgress.open(tmp_path, LoopPlan())
    for stage, result in (
        ("gate", []),
        ("rollout", {"promoted": promoted}),
        ("rollback", {"rolled_back": promoted}),
    ):
        progress.save(stage, result)
    again = LoopProgress.open(tmp_path, LoopPlan(force=True))
    assert again.get("gate") == []
    assert (again.get("rollout") is None) == (again.get("rollback") is None) == (not promoted)
