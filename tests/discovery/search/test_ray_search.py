"""Searches on Ray: a real cluster of two workers gives the record that worker processes give, also if one is killed."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from discovery.commands.discover import RECORD, SearchEngine, SearchWorkers, make_cascade
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.search.cascade import CascadePlan
from discovery.search.explorers.grammar import Grammar
from discovery.search.history import History
from discovery.search.loop import SearchLimits, SearchLoop
from tests.discovery.search.test_loop import CELLS, SETTINGS
from tests.ray_cluster import worker_processes

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.xdist_group("ray")]


def searched(path: Path, workers: SearchWorkers, plan: CascadePlan, compiled: bool, killed: list[int]) -> bytes:
    """Search for two rounds and return the record. After the first, kill a worker of Ray if there is one."""

    def kill_one(run: SearchLoop) -> None:
        for process in worker_processes()[:1] if run.steps == 1 and workers.engine is SearchEngine.RAY else ():
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    path.parent.mkdir()
    with ExitStack() as stack:
        cascade, _ = make_cascade(stack, CELLS, ReplayRules(), plan, workers, compiled)
        run = SearchLoop(Grammar(batch=2), cascade, History.begin(path, SETTINGS), 0)
        run.search(SearchLimits(2), kill_one)
        run.choose_finalist(shuffles=1)
    return path.read_bytes()


@pytest.mark.parametrize("compiled", [False, True], ids=["files", "kernel"])
def test_a_cluster_gives_the_record_of_worker_processes(ray_cluster: str, tmp_path: Path, compiled: bool) -> None:
    if compiled:
        pytest.importorskip("numba", reason="numba is not installed")
    plan = CascadePlan(betas=(0.0, 1.0), shuffles=3, rungs=(2,) if compiled else ())
    killed: list[int] = []
    here = searched(tmp_path / "here" / RECORD, SearchWorkers(SearchEngine.PROCESS, 1), plan, compiled, killed)
    assert killed == []
    on_ray = SearchWorkers(SearchEngine.RAY, None, ray_cluster)
    assert searched(tmp_path / "there" / RECORD, on_ray, plan, compiled, killed) == here
    assert len(killed) == 1
    assert len(History.read(tmp_path / "there" / RECORD).bodies("judged")) == 3  # the baselines, and two rounds
