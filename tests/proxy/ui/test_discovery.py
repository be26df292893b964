"""Discovery page: runs, candidates with lineage and differences, and searches that admins start and stop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import IO

import pytest

from discovery.commands.discover import RECORD
from discovery.search.cascade import CandidateVerdict
from discovery.search.explorers import Candidate
from discovery.search.history import History
from proxy.errors import BadRequest
from proxy.ui.sources import jobs as jobs_module
from proxy.ui.sources.jobs import LOG_TAIL, CommandJob, CommandJobs, JobState
from proxy.ui.sources.search_runs import BrokenRun, SearchRecord, SearchRuns
from tests.proxy.ui.conftest import ALICE, Browser
from tests.proxy.ui.test_rendering import HOSTILE, Tags

ROOT = Path(__file__).parents[3]
CANDIDATE = "/ui/discovery/candidate?run=good&digest="
HOSTILE_RUN = "<script>alert(1)<"
FIRST = Candidate("cmc", "class A:\n    pass\n", "baseline")
PARENT = Candidate("grammar-1-0", "class A:\n    x = 1\n", "grammar", note="stop gain")
CHILD = Candidate("grammar-2-0", f"class A:\n    x = 2  # {HOSTILE}\n", "grammar", PARENT.digest, HOSTILE)
FAILED = Candidate("grammar-2-1", "class B:\n    pass\n", "grammar", "unknown", "")


def verdict(candidate: Candidate, score: float | None, failure: str = "") -> CandidateVerdict:
    curve = [] if score is None else [(0.0, 200.0, 45.0), (1.0, 3000.0, 80.0)]
    return CandidateVerdict(
        candidate.digest, score, score, 0.5, -1.0, curve=curve, cells={HOSTILE: 70.0} if score else {}, failure=failure
    )


def write_run(folder: Path, *, is_finished: bool = True) -> None:
    """Write the history of a run with two steps."""
    settings = {"explorer": "grammar", "seed": 3, "questions": 400, "cells": ["m b search"]}
    history = History.begin(folder / RECORD, settings)
    steps = [
        [(FIRST, verdict(FIRST, 60.0)), (PARENT, verdict(PARENT, 65.0))],
        [(CHILD, verdict(CHILD, 71.25)), (FAILED, verdict(FAILED, None, f"raised {HOSTILE}"))],
    ]
    for number, step in enumerate(steps):
        history.append("proposed", {"step": number, "candidates": [asdict(candidate) for candidate, _ in step]})
        history.append("judged", {"step": number, "verdicts": [asdict(judged) for _, judged in step]})
    if is_finished:
        history.append("chosen", {"digest": CHILD.digest, "afs": 71.0, "tried": {}, "curve": []})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "runs"
    made.mkdir()
    write_run(made / "good")
    write_run(made / HOSTILE_RUN, is_finished=False)
    write_run(made / "damaged")
    text = (made / "damaged" / RECORD).read_text()
    (made / "damaged" / RECORD).write_text(text.replace("71.25", "99.25"))
    return made


async def test_runs_are_listed_with_their_best_candidate(admin: Browser) -> None:
    page = await admin.get("/ui/discovery")
    assert page.status == 200
    assert '<a href="/ui/discovery/run?run=good">good</a>' in page.text
    assert "71.25" in page.text
    assert "not finished" in page.text
    assert "damaged" in page.text
    assert "hash does not match" in page.text


async def test_a_run_shows_candidates_by_score_with_charts(admin: Browser) -> None:
    page = await admin.get("/ui/discovery/run?run=good")
    assert page.status == 200
    assert page.text.index("grammar-2-0</a>") < page.text.index("grammar-1-0</a>") < page.text.index("cmc</a>")
    assert "The winner is" in page.text
    assert "Best score so far" in page.text
    assert "95 % intervals for 400 questions" in page.text


async def test_a_candidate_shows_its_lineage_source_and_changes(admin: Browser) -> None:
    page = await admin.get(f"{CANDIDATE}{CHILD.digest}")
    assert page.status == 200
    assert (
        f'<a href="/ui/discovery/candidate?run=good&amp;digest={PARENT.digest}">grammar-1-0</a> (65.00) →' in page.text
    )
    assert 'class="py-gd">-    x = 1' in page.text
    assert 'class="py-gi">+    x = 2' in page.text


async def test_hostile_names_notes_sources_and_folders_are_inert(admin: Browser) -> None:
    hostile_path = "/ui/discovery/run?run=%3Cscript%3Ealert(1)%3C"
    for path in ("/ui/discovery", "/ui/discovery/run?run=good", hostile_path, f"{CANDIDATE}{CHILD.digest}"):
        page = await admin.get(path)
        assert page.status == 200, path
        assert "alert(1)" in page.text
        assert "<script>alert" not in page.text
        assert all((script.get("src") or "").startswith("/ui/static/") for script in Tags(page.text).executed)


@pytest.mark.parametrize(
    "path", ["run?run=unknown", "run?run=..", "run?run=../runs/good", "run", f"candidate?run=good&digest={'0' * 64}"]
)
async def test_unknown_runs_and_candidates_are_not_found(admin: Browser, path: str) -> None:
    assert (await admin.get(f"/ui/discovery/{path}")).status == 404


async def test_a_damaged_run_says_what_is_wrong(admin: Browser) -> None:
    page = await admin.get("/ui/discovery/run?run=damaged")
    assert page.status == 400
    assert "hash does not match" in page.text


async def test_clients_see_no_searches_and_start_none(admin: Browser, folder: Path) -> None:
    client = Browser(admin.url)
    await client.sign_in(ALICE)
    for reply in (
        await client.get("/ui/discovery"),
        await client.get("/ui/discovery/run?run=good"),
        await client.get(f"{CANDIDATE}{CHILD.digest}"),
        await client.post("/ui/discovery/start", {"name": "mine", "minutes": "1"}),
        await client.post("/ui/discovery/stop"),
    ):
        assert reply.status == 403
    assert not (folder / "mine").exists()
    await client.close()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"name": "../evil"}, "letters, digits"),
        ({"name": ".hidden"}, "letters, digits"),
        ({"name": ""}, "letters, digits"),
        ({"name": "good"}, "there is a run"),
        ({"name": "new", "minutes": "241"}, "from 0.1 to 240"),
        ({"name": "new", "seed": "x"}, "seed"),
    ],
)
async def test_impossible_searches_are_refused(
    admin: Browser, folder: Path, fields: dict[str, str], problem: str
) -> None:
    before = sorted(os.listdir(folder))
    reply = await admin.post("/ui/discovery/start", fields)
    assert reply.status == 400
    assert problem in reply.text
    assert sorted(os.listdir(folder)) == before


async def test_a_search_that_was_refused_because_another_runs_keeps_no_name(
    admin: Browser, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def busy(*_: object) -> None:
        raise BadRequest("search first is running")

    monkeypatch.setattr(CommandJobs, "start", busy)
    before = sorted(os.listdir(folder))
    for _ in range(2):
        assert "search first is running" in (await admin.post("/ui/discovery/start", {"name": "second"})).text
    assert sorted(os.listdir(folder)) == before


def test_the_end_of_a_long_log_is_shown(tmp_path: Path) -> None:
    job = CommandJob("search", "x", tmp_path / "log", process=None)  # type: ignore[arg-type]
    assert job.tail() == ""
    job.log.write_text("first line\n")
    assert job.tail() == "first line\n"
    job.log.write_bytes(b"a" * 5000 + b"z" * LOG_TAIL)
    assert job.tail() == "z" * LOG_TAIL


async def test_without_a_folder_the_page_says_how_to_get_one(local: Browser) -> None:
    assert "AUTOTTS_UI_RUNS" in (await local.get("/ui/discovery")).text
    assert (await local.post("/ui/discovery/start", {"name": "x"})).status == 400


def test_a_run_is_read_again_only_when_it_has_changed(folder: Path) -> None:
    runs = SearchRuns(folder)
    first = runs.read("good")
    assert isinstance(first, SearchRecord)
    assert runs.read("good") is first
    assert first.best_so_far() == [(2, 65.0), (3, 71.25), (4, 71.25)]
    History.read(folder / "good" / RECORD).append("proposed", {"step": 2, "candidates": []})
    assert runs.read("good") is not first
    assert isinstance(runs.read("damaged"), BrokenRun)
    assert runs.read("../runs/good") is None


def test_the_list_reads_each_history_once_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"run{number}" for number in range(40)]
    for name in names:
        write_run(tmp_path / name)
    runs = SearchRuns(tmp_path)
    reads: list[Path] = []
    read = History.read

    def counted(path: Path) -> History:
        reads.append(path)
        return read(path)

    monkeypatch.setattr(History, "read", counted)
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(lambda _: runs.all(), range(4))
    assert sorted(run.name for run in first) == sorted(names)
    assert all(other == first for other in others)
    known = len(reads)
    assert (runs.all(), len(reads)) == (first, known)
    assert len(runs._known) <= 4, "candidates of all runs would take gigabytes"
    (tmp_path / "run3" / RECORD).unlink()
    assert len(runs.all()) == len(first) - 1


class StubbornProcess:
    """A process that ends when it is killed, and not before."""

    pid = 1

    def __init__(self) -> None:
        self.killed = asyncio.Event()

    async def wait(self) -> int:
        await self.killed.wait()
        return -signal.SIGKILL


async def test_a_job_that_is_being_stopped_still_runs_and_is_killed_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, jobs = StubbornProcess(), CommandJobs()
    job = CommandJob("search", "first", tmp_path / "log", process)  # type: ignore[arg-type]
    monkeypatch.setattr(
        jobs_module, "_signal", lambda _, number: process.killed.set() if number == signal.SIGKILL else None
    )
    jobs.latest, jobs._waiting = job, asyncio.create_task(jobs._wait(job, 600))
    stopping = asyncio.create_task(jobs.stop("search"))
    await asyncio.sleep(0)
    with pytest.raises(BadRequest, match="search first is running"):
        await jobs.start("search", "second", [], tmp_path / "log", 60)
    stopping.cancel()
    async with asyncio.timeout(5):
        await jobs.close()
    assert job.state is JobState.STOPPED


JOB = """
import os, sys, time
from proxy.ui.sources.job_process import end_with_parent
end_with_parent()
with open({fifo!r}, "w") as fifo:  # open until the process ends
    print(*sys.argv[1:], [name for name in os.environ if name.startswith("AUTOTTS_")], file=fifo, flush=True)
    print("output", flush=True)
    time.sleep({seconds})
sys.exit(3)
"""


class FakeJob:
    """A script that jobs run instead of the command line. It writes its arguments into a pipe that it keeps open."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.fifo = folder / "fifo"
        os.mkfifo(self.fifo)
        (folder / "fake_job.py").write_text(JOB.format(fifo=str(self.fifo), seconds=seconds))
        self._file: IO[str] | None = None

    async def started(self) -> str:
        """Return its arguments once it runs."""
        self._file = await asyncio.to_thread(self.fifo.open)
        return await asyncio.to_thread(self._file.readline)

    async def ended(self) -> None:
        """Return when its process has ended."""
        assert self._file is not None
        assert await asyncio.to_thread(self._file.read) == ""
        self._file.close()


def fake_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: float = 600) -> FakeJob:
    monkeypatch.setattr(jobs_module, "ENTRY", "fake_job")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("AUTOTTS_ADMIN_KEY", "secret")
    return FakeJob(tmp_path, seconds)


@pytest.mark.process
async def test_one_job_runs_at_a_time_and_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, jobs = fake_job(monkeypatch, tmp_path), CommandJobs()
    job = await jobs.start("search", "first", ["a", "b"], tmp_path / "log", 60)
    assert await fake.started() == "a b []\n"  # no settings and no keys of the proxy
    with pytest.raises(BadRequest, match="search first is running"):
        await jobs.start("frontier", "second", [], tmp_path / "log2", 60)
    await jobs.stop("search")
    await fake.ended()
    assert job.state is JobState.STOPPED
    await jobs.close()


@pytest.mark.process
async def test_a_job_ends_with_its_dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, jobs = fake_job(monkeypatch, tmp_path), CommandJobs()
    await jobs.start("search", "closed", [], tmp_path / "log", 60)
    await fake.started()
    await jobs.close()
    await fake.ended()


@pytest.mark.process
async def test_a_job_is_killed_after_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_job(monkeypatch, tmp_path)
    jobs = CommandJobs()
    job = await jobs.start("search", "limited", [], tmp_path / "log", 0.01)
    assert await job.process.wait() < 0
    await jobs.close()


@pytest.mark.process
async def test_the_output_and_failure_of_a_job_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, jobs = fake_job(monkeypatch, tmp_path, seconds=0), CommandJobs()
    job = await jobs.start("search", "failing", [], tmp_path / "log", 60)
    await fake.started()
    await fake.ended()
    await job.process.wait()
    await jobs.close()
    assert (job.state, job.tail()) == (JobState.FAILED, "output\n")
    assert job.log.stat().st_mode & 0o077 == 0


@pytest.mark.process
async def test_a_killed_proxy_takes_its_job_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_job(monkeypatch, tmp_path)
    code = (
        "import asyncio, pathlib, sys\n"
        "from proxy.ui.sources import jobs\n"
        "jobs.ENTRY = 'fake_job'\n"
        "async def main():\n"
        "    await jobs.CommandJobs().start('search', 'x', [], pathlib.Path(sys.argv[1]), 60)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(tmp_path / "log"))
    await fake.started()
    parent.kill()
    await parent.wait()
    await fake.ended()


@pytest.mark.process
async def test_an_admin_starts_and_stops_a_search(
    admin: Browser, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_job(monkeypatch, tmp_path)
    reply = await admin.post("/ui/discovery/start", {"name": "new", "minutes": "0.5", "seed": "4"})
    assert (reply.status, reply.headers["location"]) == (303, "/ui/discovery/run?run=new")
    arguments = await fake.started()
    expected = f"--recordings {tmp_path / 's.db'} --explorer grammar --minutes 0.5 --seed 4 --out {folder / 'new'} "
    assert arguments.startswith(f"discover {expected}")
    assert "is reading its recordings" in (await admin.get("/ui/discovery/run?run=new")).text
    assert "Stop it" in (await admin.get("/ui/discovery")).text
    refused = await admin.post("/ui/discovery/start", {"name": "second"})
    assert refused.status == 400
    assert "search new is running" in refused.text
    write_run(folder / "new", is_finished=False)
    page = await admin.get("/ui/discovery/run?run=new", headers={"hx-request": "true"})
    assert "Running since" in page.text
    assert "<html" not in page.text
    assert (await admin.post("/ui/discovery/stop")).status == 303
    await fake.ended()
    assert "Stop it" not in (await admin.get("/ui/discovery")).text
