"""The store: atomic and idempotent writes, unchanged reads, migrations, and errors for files that are not stores."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controllers.sandbox.proof import SandboxLevel
from discovery.data.recordings import Cell, LabelSource, Origin, RecordedBranch, RecordedQuestion, Split, question_id
from discovery.errors import CorruptRow, StoreError
from discovery.store import (
    AddedCounts,
    Feedback,
    Label,
    SearchRun,
    ServedEpisode,
    Store,
    StorePlace,
    TriedCandidate,
    child_environment,
)
from discovery.store.checksums import with_checksum
from discovery.store.databases.connection import DatabaseConnection
from discovery.store.schema import FIRST, MIGRATIONS, SIGNALS
from discovery.store.write_queue import MAX_WRITES_PER_TRANSACTION, WriteQueue
from tests.discovery.data.test_importers import recordings
from tests.discovery.store.outside import run_sql


def some(text: str = "q", **changes: object) -> RecordedQuestion:
    branches = [RecordedBranch(["1", None, "7"], 1700, "7", [9, 9, 9]), RecordedBranch([], 20, None, [])]
    made = RecordedQuestion(question_id(text), "m", "b", 500, branches, "7", text=text, sampling={"temperature": 0.6})
    return replace(made, **changes)  # type: ignore[arg-type]


CELL = Cell("m", "b", Split.SEARCH)
LATEST = len(MIGRATIONS)
"""The version of stores that this program writes."""


async def test_added_recordings_are_loaded_unchanged_and_in_order(place: StorePlace) -> None:
    given = [some(str(i)) for i in (5, 3, 9, 1)]
    async with Store.open(place, create=True) as store:
        assert await store.add(given) == AddedCounts(4, 4, 8)
        assert await store.load(CELL) == given
    async with Store.open(place) as store:
        assert await store.load(CELL) == given
        assert [tuple(one) for one in await store.summaries()] == [(CELL, 4, 4, 4, 8)]
        assert (await store.verify()).bad == []


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(given=st.lists(recordings, min_size=1, max_size=3, unique_by=lambda one: one.question))
def test_any_recording_is_loaded_unchanged(place: StorePlace, given: list[RecordedQuestion]) -> None:
    async def go() -> None:
        async with Store.open(place, create=True) as store:
            await store.prune(lambda model, benchmark, origin: True)  # what the example before has left
            await store.add(given)
            for recording in given:
                assert recording in await store.load(Cell(recording.model, recording.benchmark, recording.split))

    asyncio.run(go())


async def test_importing_a_recording_twice_adds_nothing(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await store.add([some()])
        assert await store.add([some(), some("p")]) == AddedCounts(1, 1, 2)
        assert await store.add([some(split=Split.HELD_OUT)]) == AddedCounts(0, 0, 0)
        assert await store.add([some(model="n", split=Split.HELD_OUT)]) == AddedCounts(0, 1, 2)
        assert [one.split for one in await store.load(Cell("n", "b", Split.SEARCH))] == [Split.SEARCH]


def collected(branches: Sequence[int], **changes: Any) -> RecordedQuestion:
    """Return a collected recording with one branch per number; equal numbers give equal branches."""
    made = [RecordedBranch(["7"], 500 + number, "7", [9]) for number in branches]
    return some(branches=made, **({"origin": Origin.COLLECTED, "chat_template": "t"} | changes))


async def test_a_continued_collection_replaces_the_earlier_recording(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await store.add([collected(range(5)), collected([1], text="p", question=question_id("p"))])
        assert await store.add([collected(range(8))]) == AddedCounts(0, 0, 3)
        assert [one for one in await store.load(CELL) if one.text == "q"] == [collected(range(8))]
        for known in (range(8), range(5), [7, 0]):  # in any order
            assert await store.add([collected(known)]) == AddedCounts(0, 0, 0)
        assert await store.add([collected([0, 0])]) == AddedCounts(0, 1, 2)  # two equal branches count twice
        assert await store.add([collected([*range(8), 0, 9])]) == AddedCounts(0, 0, 0)  # all of them are known already
        assert [len(one.branches) for one in await store.load(CELL)] == [1, 10]
        assert (await store.verify()).bad == []


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"benchmark": "c"},
        {"origin": Origin.IMPORTED},
        {"chat_template": ""},
        {"chat_template": "u"},
        {"interval": 501},
        {"probe_template": "p"},
        {"sampling": {"temperature": 0.7}},
        {"request": "r"},
    ],
)
async def test_recordings_of_other_settings_are_not_replaced(place: StorePlace, change: dict[str, object]) -> None:
    async with Store.open(place, create=True) as store:
        await store.add_all([ASKED, collected(range(3))])
        assert await store.add([collected(range(5), **change)]) == AddedCounts(0, 1, 5)
        assert await store.add([collected(range(2), **change)]) == AddedCounts(
            0, *((1, 2) if "request" in change else (0, 0))
        )
        assert await store.add([collected([7, 8])]) == AddedCounts(0, 1, 2)  # other branches of the same settings


async def test_duplicate_branches_in_a_store_are_merged_when_added_again(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await store.add([collected(range(5)), collected(range(4, 9), chat_template="u")])
    run_sql(place, "UPDATE provenance SET chat_template = 't'")  # the state an earlier version may have left
    async with Store.open(place) as store:
        await store.add([collected(range(9))])
        assert (await store.verify()).rows["recordings"] == 1


@pytest.mark.parametrize("source", LabelSource)
async def test_imported_labels_keep_their_source_and_references_are_stored_with_the_question(
    place: StorePlace, source: LabelSource
) -> None:
    async with Store.open(place, create=True) as store:
        await store.add([some(label_source=source)])
        assert [one.source for one in await store.labels()] == ([] if source is LabelSource.REFERENCE else [source])
        assert await store.load(CELL) == [some(label_source=source)]


async def test_labels_of_forgotten_questions_are_not_added(place: StorePlace) -> None:
    served = [ServedEpisode(one, one, "m", "cmc", "d", 0.5, 3, 4, {}, "answered", question=one) for one in "ab"]
    async with Store.open(place, create=True) as store:
        await store.add([some()])
        await store.add_all(served)
        labels = [Label(one, LabelSource.FEEDBACK, "7", 0.5, 1.0) for one in (question_id("q"), "a", "b")]
        await store.set_labels(labels)
        await store.forget(request="a")
        await store.set_labels(labels)
        assert {one.question for one in await store.labels()} == {question_id("q"), "b"}


async def test_a_failed_write_changes_nothing(place: StorePlace) -> None:
    broken = some("p", sampling={"temperature": object()})
    async with Store.open(place, create=True) as store:
        with pytest.raises(TypeError, match="not JSON serializable"):
            await store.add([some(), broken])
        assert await store.load(CELL) == []
        assert await store.add([some()]) == AddedCounts(1, 1, 2)


ASKED = ServedEpisode("e", "r", "m", "cmc", "d", 0.5, 3, 4, {}, "answered")
"""The episode that feedback refers to."""


async def test_concurrent_writes_share_transactions_and_a_failing_one_affects_no_other(place: StorePlace) -> None:
    async def fail(connection: DatabaseConnection) -> None:
        await connection.execute("DELETE FROM feedback")
        raise RuntimeError("mine alone")

    async with Store.open(place, create=True) as store:
        await store.add_all([ASKED])
        before = store.transactions
        writes = [store.add_all([Feedback(str(i), "r", "correct", "1")]) for i in range(200)]
        outcomes = await asyncio.gather(*writes[:100], store.write(fail), *writes[100:], return_exceptions=True)
        assert [str(one) for one in outcomes if one] == ["mine alone"]
        assert store.transactions - before <= 3
        assert (await store.verify()).rows["feedback"] == 200


async def test_a_cancelled_writer_leaves_no_open_transaction(place: StorePlace) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(connection: DatabaseConnection) -> None:
        begun.set()
        await go_on.wait()
        await connection.execute("UPDATE feedback SET value = value")

    async with Store.open(place, create=True) as store:
        task = asyncio.create_task(store.write(slow))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        await store.add([some()])
        async with Store.open(place) as other:
            assert await other.add([some("p")]) == AddedCounts(1, 1, 2)


async def test_feedback_without_an_episode_is_not_kept(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await store.add_all([ASKED, Feedback("1", "r", "correct", "1"), Feedback("2", "s", "correct", "1")])
        assert [one.id for one in await store.feedback()] == ["1"]


async def test_closing_completes_queued_writes(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await store.add_all([ASKED])
        waiting = [asyncio.ensure_future(store.add_all([Feedback(str(i), "r", "score", "1")])) for i in range(600)]
        await asyncio.sleep(0)  # the writes are queued
    await asyncio.gather(*waiting)
    async with Store.open(place) as store:
        assert (await store.verify()).rows["feedback"] == 600


async def test_a_write_to_a_closed_store_fails(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await store.add_all([ASKED])
    with pytest.raises(StoreError, match="the store is closed; nothing was written"):
        await store.add_all([Feedback("1", "r", "correct", "1")])


async def test_a_write_that_comes_while_the_store_closes_fails_and_earlier_ones_are_done(place: StorePlace) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(connection: DatabaseConnection) -> None:
        begun.set()
        await go_on.wait()

    async def write_late() -> None:
        await begun.wait()
        await asyncio.sleep(0)  # the context is being left
        late = asyncio.ensure_future(store.add_all([Feedback("2", "r", "correct", "1")]))
        go_on.set()
        with pytest.raises(StoreError, match="the store is closed"):
            await late

    async with Store.open(place, create=True) as store:
        writing = [asyncio.ensure_future(store.write(slow)), asyncio.ensure_future(store.add_all([ASKED]))]
        await asyncio.sleep(0)  # they are queued
        writing.append(asyncio.ensure_future(write_late()))
    await asyncio.gather(*writing)
    async with Store.open(place) as store:
        assert (await store.verify()).rows["episodes"] == 1


async def test_a_writer_that_fails_leaves_no_write_waiting() -> None:
    class Broken:
        """Connection whose transactions fail in a way that the store does not know."""

        place = "broken"

        async def begin(self) -> None:
            raise RuntimeError("unknown")

        async def roll_back(self) -> None: ...

    queue = WriteQueue(Broken())  # type: ignore[arg-type]

    async def nothing(_: DatabaseConnection) -> None: ...

    waiting = [asyncio.ensure_future(queue.write(nothing)) for _ in range(MAX_WRITES_PER_TRANSACTION + 1)]
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="unknown"):
        await queue.run()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {StoreError}
    with pytest.raises(StoreError, match="broken: the store is closed"):
        await queue.write(nothing)


async def test_episodes_and_their_feedback_are_loaded_unchanged(place: StorePlace) -> None:
    episode = ServedEpisode("e", "r", "m", "cmc", "d", 0.5, 3, 4, {"winner": 5}, "answered", answer="7")
    async with Store.open(place, create=True) as store:
        await store.add_all([episode])
        await store.add_all([replace(episode, stop="deadline")])
        assert await store.episodes() == [episode]
        assert await store.episode("r") == episode
        assert await store.episode("s") is None


WRITER = """
import asyncio, sys
from discovery.store import ServedEpisode, Feedback, Store, parse_place

async def main():
    async with Store.open(parse_place(sys.argv[1]), create=True) as store:
        await store.add_all([ServedEpisode("e", "r", "m", "cmc", "d", 0.5, 3, 4, {}, "answered")])
        async def one(name):
            for i in range(10**6):
                await store.add_all([Feedback(f"{name}-{i}", "r", "correct", "1")])
                print(f"{name}-{i}", flush=True)
        await asyncio.gather(*(one(f"{sys.argv[2]}{k}") for k in range(8)))

asyncio.run(main())
"""


def writer(place: StorePlace, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(place), name],
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(place),
    )


@pytest.mark.process
async def test_two_killed_writers_lose_no_acknowledged_write(place: StorePlace) -> None:
    acknowledged: set[str] = set()
    processes = [writer(place, name) for name in "ab"]
    try:
        for process in processes:
            assert process.stdout is not None
            acknowledged |= {process.stdout.readline().strip() for _ in range(150)}
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            rest, _ = process.communicate()
            acknowledged |= {line for line in rest.splitlines(keepends=True) if line.endswith("\n")}
    acknowledged = {line.strip() for line in acknowledged}
    async with Store.open(place) as store:
        assert (await store.verify()).bad == []
    kept = {row[0] for row in run_sql(place, "SELECT id FROM feedback")}
    assert len(acknowledged) >= 300
    assert acknowledged <= kept


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE branches SET tokens = tokens + 1 WHERE number = 1", "/1 of branches has a wrong checksum"),
        ("UPDATE questions SET reference = '8' WHERE body = 'q'", "of questions has a wrong checksum"),
        ("UPDATE recordings SET checksum = 'x'", "of recordings has a wrong checksum"),
        ("DELETE FROM branches WHERE number = 0", "has 1 of its 2 branches"),
    ],
)
async def test_a_changed_row_is_refused_and_can_be_pruned(place: StorePlace, statement: str, message: str) -> None:
    async with Store.open(place, create=True) as store:
        await store.add([some(), some("sound", benchmark="other")])
    run_sql(place, statement)
    async with Store.open(place) as store:
        with pytest.raises(CorruptRow, match=message) as caught:
            await store.load(CELL)
        assert str(place) in str(caught.value)
        assert "autotts store prune --corrupt" in str(caught.value)
        assert len((await store.verify()).bad) >= 1
        removed = await store.prune(corrupt=True)
        assert removed.recordings >= 1
        assert (await store.verify()).bad == []
        await store.add([some()])
        assert await store.load(CELL) == [some()]


async def test_a_large_table_is_verified_in_parts(place: StorePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    for database in ("sqlite", "postgres"):
        monkeypatch.setattr(f"discovery.store.databases.{database}.PAGE", 3)
    async with Store.open(place, create=True) as store:
        await store.add([some(str(number)) for number in range(10)])
    run_sql(place, "UPDATE branches SET tokens = tokens + 1 WHERE number = 1")
    async with Store.open(place) as store:
        report = await store.verify()
        assert (len(report.bad), report.rows["branches"]) == (10, 20)
        assert await store.prune(corrupt=True) == AddedCounts(10, 10, 20)
        assert (await store.verify()).bad == []


async def test_prune_removes_only_the_selected_recordings(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await store.add([some(), some("p"), some(model="n"), some("l", origin=Origin.LIVE)])
        assert await store.prune(lambda model, benchmark, origin: model == "n") == AddedCounts(0, 1, 2)
        assert await store.prune(lambda model, benchmark, origin: origin is Origin.LIVE) == AddedCounts(1, 1, 2)
        assert await store.load(CELL) == [some(), some("p")]


async def test_a_store_of_a_newer_version_is_refused_and_left_unchanged(place: StorePlace) -> None:
    async with Store.open(place, create=True, migrations=[*MIGRATIONS, ["CREATE TABLE later (x INTEGER)"]]):
        pass
    before = content_of(place)
    refusal = f"has version {LATEST + 1}, but this program supports up to {LATEST}; upgrade autotts"
    with pytest.raises(StoreError, match=refusal):
        async with Store.open(place):
            pass
    assert content_of(place) == before


def content_of(place: StorePlace) -> object:
    """Return the bytes of a file, or what PostgreSQL says of tables, and their version."""
    if isinstance(place, Path):
        return place.read_bytes()
    about = "SELECT relname, relnatts, xmin::text FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
    return run_sql(place, about), run_sql(place, "SELECT version, xmin::text FROM autotts_store")


async def test_an_older_store_is_migrated_completely_or_not_at_all(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await store.add([some()])
    with pytest.raises(StoreError, match="syntax error"):
        async with Store.open(
            place, migrations=[*MIGRATIONS, ["ALTER TABLE feedback ADD COLUMN weight INTEGER", "NONSENSE"]]
        ):
            pass
    async with Store.open(place) as store:
        assert await store.load(CELL) == [some()]
    async with Store.open(place, migrations=[*MIGRATIONS, ["ALTER TABLE feedback ADD COLUMN weight INTEGER"]]) as store:
        assert await store.load(CELL) == [some()]
    with pytest.raises(StoreError, match=f"has version {LATEST + 1}"):
        async with Store.open(place):
            pass


async def test_a_store_of_the_first_version_gets_the_sandbox_column(place: StorePlace) -> None:
    async with Store.open(place, create=True, migrations=[FIRST]) as store:
        await store.add([some()])
    async with Store.open(place) as store:
        await store.add_all(
            [ServedEpisode("e", "r", "m", "mine", "d", 0.5, 3, 4, {}, "answered", sandbox=SandboxLevel.SEALED)]
        )
        (row,) = await store._read("SELECT sandbox FROM episodes")
        assert row[0] == "sealed"
        assert (await store.verify()).bad == []


def signalled(recorded: RecordedQuestion, *numbers: int) -> RecordedQuestion:
    """Return a recording with signals in the branches of these numbers."""

    def changed(branch: RecordedBranch) -> RecordedBranch:
        probes = len(branch.probes)
        confidences, lowests = [800] * (probes + 1), [90] * (probes + 1)
        return branch._replace(confidences=confidences, lowests=lowests, probe_confidences=[431] * probes or ())

    branches = [changed(branch) if at in numbers else branch for at, branch in enumerate(recorded.branches)]
    return replace(recorded, branches=branches)


async def test_signals_are_loaded_unchanged(place: StorePlace) -> None:
    unknown = some().branches[0]._replace(confidences=[None] * 4, lowests=[None] * 4, probe_confidences=[None] * 3)
    given = [signalled(some("p"), 0), signalled(some("q"), 0, 1), some("plain"), some("u", branches=[unknown])]
    async with Store.open(place, create=True) as store:
        await store.add(given)
        assert await store.load(CELL) == given
        report = await store.verify()
        assert (report.bad, report.rows["branch_signals"]) == ([], 4)


async def test_a_store_from_before_signals_is_upgraded_with_valid_checksums(place: StorePlace) -> None:
    async with Store.open(place, create=True, migrations=MIGRATIONS[: MIGRATIONS.index(SIGNALS)]) as store:
        await store.add([some()])
    before = run_sql(place, "SELECT * FROM branches")
    async with Store.open(place) as store:
        assert await store.load(CELL) == [some()]
        assert (await store.verify()).bad == []
        await store.add([signalled(some("later"), 0)])
        assert await store.load(CELL) == [some(), signalled(some("later"), 0)]
    assert run_sql(place, "SELECT * FROM branches")[: len(before)] == before


async def test_changed_signals_are_refused_and_can_be_pruned(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await store.add([signalled(some(), 0), some("sound", benchmark="other")])
    run_sql(place, "UPDATE branch_signals SET lowests = '[1,2,3,4]'")
    async with Store.open(place) as store:
        with pytest.raises(CorruptRow, match="/0 of branch_signals has a wrong checksum"):
            await store.load(CELL)
        assert len((await store.verify()).bad) == 1
        assert (await store.prune(corrupt=True)).recordings == 1
        assert (await store.verify()).bad == []
        await store.add([signalled(some(), 0)])
        assert await store.load(CELL) == [signalled(some(), 0)]


async def test_signals_that_do_not_fit_their_branch_are_refused(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await store.add([signalled(some(), 0)])
    ((recording,),) = run_sql(place, "SELECT recording_id FROM branch_signals")
    checksum = with_checksum((recording, 0, "[9,9]", "[9,9]", "[]"))[-1]
    values = "confidences = '[9,9]', lowests = '[9,9]', probe_confidences = '[]'"
    run_sql(place, f"UPDATE branch_signals SET {values}, checksum = '{checksum}'")
    async with Store.open(place) as store:
        with pytest.raises(CorruptRow, match=r"recording [0-9a-f]{16}: 2 confidences for 3 probes"):
            await store.load(CELL)


async def test_a_recording_with_signals_replaces_one_without_and_not_the_reverse(place: StorePlace) -> None:
    plain, rich = collected(range(3)), signalled(collected(range(3)), 0, 1, 2)
    partly, longer = signalled(collected(range(3)), 1), signalled(collected(range(5)), 0, 1, 2)
    async with Store.open(place, create=True) as store:
        assert await store.add([plain]) == AddedCounts(1, 1, 3)
        for better, branches in ((partly, 0), (rich, 0), (longer, 2)):
            assert await store.add([better]) == AddedCounts(0, 0, branches)
            assert await store.load(CELL) == [better]
        for known in (plain, partly, rich, collected(range(5))):
            assert await store.add([known]) == AddedCounts(0, 0, 0)
        assert await store.load(CELL) == [longer]
        other = replace(rich, branches=[rich.branches[0]._replace(probe_confidences=[1])])
        assert await store.add([other]) == AddedCounts(0, 1, 1)  # other signals are another branch


async def test_a_search_is_stored_once_with_all_its_candidates(place: StorePlace) -> None:
    tried = [
        TriedCandidate("d1", "one", "llm", None, 53.2, "", 0.01, "class One: ..."),
        TriedCandidate("d2", "two", "llm", "d1", None, "it raised", 0.02, "class Two: ..."),
    ]
    async with Store.open(place, create=True) as store:
        for _ in range(2):
            await store.add_search(SearchRun("hash", "llm", 7, {"shuffles": 4}, tried))
        assert (await store._read("SELECT explorer, seed, settings, candidates FROM runs")) == [
            ("llm", 7, '{"shuffles":4}', 2)
        ]
        candidates = await store._read(
            "SELECT name, score, failure, usd FROM candidates WHERE run_id = 'hash' ORDER BY id"
        )
        assert candidates == [("one", 53.2, "", 0.01), ("two", None, "it raised", 0.02)]
        verified = await store.verify()
        assert (verified.rows["runs"], verified.rows["candidates"], verified.bad) == (1, 2, [])
    run_sql(place, "UPDATE candidates SET score = 99 WHERE name = 'one'")
    async with Store.open(place) as store:
        assert len((await store.verify()).bad) == 1
        await store.prune(corrupt=True)
        assert (await store.verify()).rows["candidates"] == 1


async def test_files_that_are_not_stores_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello, I am a text")
    run_sql(tmp_path / "other.db", "CREATE TABLE mine (x INTEGER)")
    for name, message in (
        ("none.db", "there is no store"),
        ("text", "not a store"),
        ("other.db", "not a store of this program"),
        (".", "is a folder"),
    ):
        with pytest.raises(StoreError, match=message):
            async with Store.open(tmp_path / name):
                pass
    with pytest.raises(StoreError, match="there is no folder"):
        async with Store.open(tmp_path / "no" / "s.db", create=True):
            pass
    assert sorted(os.listdir(tmp_path)) == ["other.db", "text"]  # no file was created


async def test_a_read_cannot_change_the_store(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        with pytest.raises(StoreError, match=r"read-?only"):
            await store._read("DELETE FROM feedback")


async def test_a_clients_request_id_is_found_in_its_own_case(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        for second, name in enumerate(("job-A", "job-a", "job_a")):
            made = ServedEpisode(name, name, "m", "cmc", "d", 0.5, 3, 4, {"winner": 5}, "answered", "7", "q")
            created = f"2026-12-01T00:00:0{second}.000000+00:00"
            await store.add_all([replace(made, about={"client_request_id": name}, created=created)])
        for name in ("job-A", "job-a", "job_a"):
            assert [one.id for one in await store.latest(9, client_id=name)] == [name]
