"""Unreadable or unstorable records are dropped and counted, and do not block other records."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import pytest

from discovery.data.importers import format_recording_line, read_jsonl, read_release
from discovery.data.recordings import LabelSource, Origin, RecordedBranch, RecordedQuestion, question_id
from discovery.data.safe_json import parse_json
from discovery.errors import BadRecording, CorruptRow, HistoryError, StoreError
from discovery.evaluation.reference_answers import update_labels
from discovery.search.explorers.transcript import Transcript
from discovery.search.history import History
from discovery.store import Feedback, Label, SearchRun, ServedEpisode, Store, TriedCandidate, item_lines
from discovery.store.checksums import checksum
from discovery.store.item_lines import encode_item
from discovery.store.schema import COLUMNS
from proxy.commands.forget import forget
from proxy.recording import spill_file as spilling
from proxy.recording.spill_file import SpillFiles
from proxy.recording.store_writer import StoreWriter
from proxy.settings import load
from proxy.telemetry.metrics import Metrics
from tests.faults.processes import until

DEEP: Final = "[" * 100_000


def episode(name: str, **about: Any) -> ServedEpisode:
    return ServedEpisode(name, name, "m", "cmc", "d", 0.5, 3, 4, {"winner": 5}, "answered", answer="7", **about)


def recording(name: str, **changes: Any) -> RecordedQuestion:
    branches = [
        RecordedBranch(["7"], 900, "7", [3], True, [900, 800], [700, 600], [950]),
        RecordedBranch(["8"], 800, None, [3]),
    ]
    made = RecordedQuestion(
        question_id(name), "m", "live", 500, branches, "7", origin=Origin.LIVE, chat_template="t", request=name
    )
    return replace(made, **changes)


def changed(item: ServedEpisode | Feedback | RecordedQuestion, **members: Any) -> bytes:
    """Return the line of an item with members replaced by raw JSON texts, valid or not."""
    kind, content = json.loads(encode_item(item))
    marks = {f"{name}-mark": text for name, text in members.items()}
    for name in members:
        content[name] = f"{name}-mark"
    text = json.dumps([kind, content])
    for mark, replacement in marks.items():
        text = text.replace(json.dumps(mark), replacement)
    return text.encode()


E, F, R = episode("bad"), Feedback("bad", "good", "correct", "true"), recording("good")
ABOUT: Final = '{"usage":' + "[" * 960 + "]" * 960 + "}"

POISON: Final = {
    "deep": DEEP.encode(),
    "deep episode": b'["episode",' + DEEP.encode(),
    "deep about": changed(E, about='{"usage":' + DEEP),
    "deep to the limit": changed(E, about=ABOUT),
    "beta nan": changed(E, beta="NaN"),
    "beta infinite": changed(E, beta="Infinity"),
    "beta too large": changed(E, beta="1e999"),
    "beta text": changed(E, beta='"x"'),
    "beta null": changed(E, beta="null"),
    "usage nan": changed(E, about='{"usage":{"x":NaN}}'),
    "branches large": changed(E, branches=str(2**70)),
    "branches huge": changed(E, branches="9" * 5000),
    "branches fraction": changed(E, branches="1.5"),
    "tenant surrogate": changed(E, tenant='"\\ud800"'),
    "id surrogate": changed(E, id='"\\udcff"'),
    "id null": changed(E, id="null"),
    "id number": changed(E, id="5"),
    "ledger list": changed(E, ledger="[]"),
    "ledger of texts": changed(E, ledger='{"a":"b"}'),
    "about text": changed(E, about='"x"'),
    "sandbox unknown": changed(E, sandbox='"bagged"'),
    "created number": changed(E, created="7"),
    "value number": changed(F, value="7"),
    "value deep": changed(F, value=json.dumps(DEEP)),
    "value of many digits": changed(F, value=json.dumps("9" * 5000)),
    "value not json": changed(F, value='"yes"'),
    "interval zero": changed(R, interval="0"),
    "interval negative": changed(R, interval="-5"),
    "interval large": changed(R, interval=str(2**40)),
    "tokens large": changed(R, branches=f'[[["7"],{2**40},"7",[3],true]]'),
    "tokens negative": changed(R, branches='[[["7"],-1,"7",[3],true]]'),
    "costs too few": changed(R, branches='[[["7","7"],900,"7",[3],true]]'),
    "branches text": changed(R, branches='"x"'),
    "split unknown": changed(R, split='"mine"'),
    "confidence nan": changed(R, confidence="NaN"),
    "confidence above one": changed(R, confidence="2"),
    "sampling deep": changed(R, sampling='{"a":' + DEEP),
    "sampling infinite": changed(R, sampling='{"a":1e999}'),
    "nothing": b"",
    "null": b"null",
    "number": b"7",
    "object": b"{}",
    "list": b"[]",
    "text of two": b'"ab"',
    "kind alone": b'["episode"]',
    "three": b'["episode",{},1]',
    "kind list": b"[[],{}]",
    "kind object": b"[{},{}]",
    "kind unknown": b'["nobody",{}]',
    "not utf-8": b'["episode",{"id":"\xff"}]',
    "cut": encode_item(E)[:-5],
}


def waiting(path: Path, *lines: bytes) -> None:
    spill = SpillFiles(path, 1 << 30)
    assert spill.append(lines) == len(lines)
    spill.close()


def ids(path: Path, table: str = "episodes") -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        return {row_id for (row_id,) in connection.execute(f"SELECT id FROM {table}")}


async def read_back(path: Path) -> StoreWriter:
    recorder = StoreWriter(load(upstream="http://127.0.0.1:1", store=path), Metrics())
    await recorder.open()
    try:
        await until(lambda: not path.with_name(f"{path.name}.spill").exists())
    finally:
        await recorder.close()
    return recorder


@pytest.mark.parametrize("name", POISON)
async def test_an_unreadable_spilled_line_is_dropped_and_counted(tmp_path: Path, name: str) -> None:
    path = tmp_path / "s.db"
    waiting(tmp_path / "s.db.spill", encode_item(episode("good")), POISON[name], encode_item(episode("later")))
    recorder = await read_back(path)
    assert ids(path) == {"good", "later"}
    assert recorder.lost == 1
    assert os.listdir(tmp_path) == ["s.db"]


async def test_a_group_of_unreadable_lines_does_not_block_the_next_record(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    waiting(tmp_path / "s.db.spill", *(list(POISON.values()) * 12), encode_item(episode("good")))
    recorder = await read_back(path)
    assert (ids(path), recorder.lost) == ({"good"}, 12 * len(POISON))
    async with Store.open(path) as store:
        assert (await store.verify()).bad == []
        await store.forget(request="good")


def test_forget_drops_unreadable_spilled_lines_and_reports_their_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.db"

    async def make() -> None:
        async with Store.open(path, create=True) as store:
            await store.add_all([episode("mine")])

    asyncio.run(make())
    waiting(tmp_path / "s.db.spill", encode_item(episode("good")), *POISON.values(), encode_item(episode("other")))
    forget(request="good", place=path)
    assert f"{len(POISON)} records in spill files cannot be read" in capsys.readouterr().out
    assert ids(path) == {"mine", "other"}
    assert [file.name for file in tmp_path.iterdir()] == ["s.db"]


async def test_unusual_values_that_rows_can_hold_break_no_store_command(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    odd = [
        changed(episode("nul"), tenant='"a\\u0000b"'),
        changed(replace(F, id="list", request_id="a"), value='"[7]"'),
        changed(replace(F, id="infinite", request_id="b"), kind='"score"', value='"1e999"'),
        changed(replace(F, id="nan"), kind='"score"', value='"NaN"'),
        changed(episode("negative"), branches="-4", rounds=str(-(2**62))),
    ]
    served = [encode_item(replace(episode(name), question=question_id(name))) for name in ("good", "a", "b")]
    waiting(tmp_path / "s.db.spill", *served, *odd, encode_item(R))
    recorder = await read_back(path)
    assert recorder.lost == 0
    async with Store.open(path) as store:
        assert (await store.verify()).bad == []
        assert (await update_labels(store, [], 0.2, 2)).unheard == 3
        assert len(await store.episodes()) == 5
        assert [len(await store.load(summary.cell)) for summary in await store.summaries()] == [1]


def test_an_overlong_spilled_line_is_skipped_and_chunks_are_limited_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spilling, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(spilling, "CHUNK_BYTES", 2000)
    path = tmp_path / "spill"
    content = b"x" * 10_000
    path.write_bytes(b"".join(b"%08x %b\n" % (crc32(line), line) for line in (b"first", content, b"last")))
    spill = SpillFiles(path, 0)
    spill.adopt()
    lines, bad = list[bytes](), 0
    while spill.size:
        chunk = spill.read(256)
        lines, bad = [*lines, *chunk.lines], bad + chunk.damaged
        spill.drop(chunk)
    assert (lines, bad) == ([b"first", b"last"], 1)
    assert spill.append([b"y" * 900] * 8) == 0  # no room
    roomy = SpillFiles(tmp_path / "other", 1 << 20)
    assert roomy.append([b"y" * 900] * 8) == 8
    assert len(roomy.read(256).lines) == 3  # of 8, because a chunk is also limited in bytes
    roomy.close()


def test_a_foreign_file_among_spill_files_does_not_block_the_others(tmp_path: Path) -> None:
    (tmp_path / "spill").write_text("my thesis")
    (tmp_path / "spill.1").symlink_to("spill")
    waiting(tmp_path / "left", encode_item(episode("good")))
    (tmp_path / "left").rename(tmp_path / "spill.2")
    spill = SpillFiles(tmp_path / "spill", 0)
    with pytest.raises(OSError, match="not a spill file"):
        spill.adopt()
    assert [len(spill.read(9).lines), spill.size > 0] == [1, True]
    spill.close()


# Rows of the store


def template(folder: Path) -> Path:
    """A store with a row in every table."""
    path = folder / "template.db"

    async def make() -> None:
        async with Store.open(path, create=True) as store:
            await store.add_all([replace(episode(name), question=question_id(name)) for name in ("good", "other")])
            await store.add_all([recording("good"), recording("other"), Feedback("f", "good", "correct", "true")])
            await store.set_labels([Label(question_id("good"), LabelSource.FEEDBACK, "7", 0.9)])
            tried = TriedCandidate("d1", "one", "llm", None, 53.2, "", 0.01, "class One: ...")
            await store.add_search(SearchRun("hash", "llm", 7, {"shuffles": 4}, [tried]))
            await store.add_all([episode("gone")])
            await store.forget(request="gone")

    asyncio.run(make())
    return path


def with_bad_values(path: Path, table: str) -> Iterator[str]:
    """Replace one value after another in a table's first row, each in a fresh copy, and yield a description."""
    values: list[Any] = ["[" * 50_000, "NaN", '{"a":NaN}', "a\x00b", 2**62, None]
    expressions = ["X'FF'", "CAST(X'FF' AS TEXT)"]
    source = path.read_bytes()
    for column in COLUMNS[table]:
        for value in [*values, *expressions]:
            path.write_bytes(source)
            raw = isinstance(value, str) and value in expressions
            with closing(sqlite3.connect(path, isolation_level=None)) as connection, suppress(sqlite3.IntegrityError):
                row = list(connection.execute(f"SELECT {', '.join(COLUMNS[table])} FROM {table}").fetchone())
                first = f"rowid = (SELECT MIN(rowid) FROM {table})"
                if raw:
                    connection.execute(f"UPDATE {table} SET {column} = {value} WHERE {first}")
                else:
                    connection.execute(f"UPDATE {table} SET {column} = ? WHERE {first}", (value,))
                    sealed = f"SELECT {', '.join(COLUMNS[table])} FROM {table} WHERE {first}"
                    row = list(connection.execute(sealed).fetchone())
                    connection.execute(f"UPDATE {table} SET checksum = ? WHERE {first}", (checksum(row),))
                yield f"{table}.{column} = {str(value)[:20]!r}"


async def use(store: Store) -> None:
    """Read everything in a store, as commands do."""
    for summary in await store.summaries():
        for recorded in await store.load(summary.cell):
            format_recording_line(recorded).encode()
    json.dumps(await store.served())
    await store.episodes()
    await store.latest(10)
    await store.feedback()
    await store.labels()
    await store.questions()
    await store.versions("m")
    await update_labels(store, [], 0.2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("table", COLUMNS)
def test_a_row_with_a_bad_value_breaks_no_store_command(tmp_path: Path, table: str) -> None:
    """Reading may raise CorruptRow; verifying, forgetting and pruning work, and then the store is sound."""
    path = tmp_path / "s.db"
    shutil.copy(template(tmp_path), path)

    async def go(description: str) -> None:
        async with Store.open(path) as store:
            with suppress(CorruptRow):
                await use(store)
            await store.verify()
            await store.forget(request="other")
            await store.prune(corrupt=True)
            assert (await store.verify()).bad == [], description
            await use(store)
            await store.add([recording("new", request="")])

    for description in with_bad_values(path, table):
        asyncio.run(go(description))


# Files of JSON lines


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        '{"a":' * 100_000,
        format_recording_line(recording("q")).replace('"7"', '"\\ud800"'),
        format_recording_line(recording("q", sampling={"t": 1})).replace('{"t":1}', '{"t":NaN}'),
        format_recording_line(recording("q", sampling={"t": 1})).replace('{"t":1}', '{"t":1e999}'),
        format_recording_line(recording("q", sampling={"t": 1})).replace('{"t":1}', '{"t":' + DEEP + "}"),
        format_recording_line(recording("q")).replace("900", "9" * 5000),
        format_recording_line(recording("q")).replace("900", "1e999"),
    ],
)
def test_a_malformed_recording_line_raises_bad_recording(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(BadRecording, match=r"x\.jsonl"):
        read_jsonl(tmp_path / "x.jsonl")


@pytest.mark.parametrize("text", [DEEP, "[NaN]", "[1e999]", "9" * 5000, '[{"question": "\\ud800"}]'])
def test_a_malformed_release_file_raises_bad_recording(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BadRecording, match=r"x\.json"):
        read_release(tmp_path / "x.json")


def test_a_deeply_nested_line_of_history_or_transcript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text(DEEP + "\n")
    with pytest.raises(HistoryError, match="line 1"):
        History.read(path)
    with pytest.raises(HistoryError, match="line 1"):
        Transcript(path)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)


def test_nan_and_infinity_are_stored_as_null(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    odd = episode("odd", about={"sampling": {"x": float("inf"), "y": [float("nan"), 1.5]}, "usage": {}})

    async def go() -> ServedEpisode | None:
        async with Store.open(path, create=True) as store:
            await store.add_all([odd])
            with pytest.raises(ValueError, match="beta is nan"):
                await store.add_all([replace(episode("bad"), beta=float("nan"))])
            return await store.episode("odd")

    stored = asyncio.run(go())
    assert stored is not None
    assert stored.about["sampling"] == {"x": None, "y": [None, 1.5]}
    assert item_lines.decode_item(encode_item(odd)) == stored


async def test_an_item_no_row_can_hold_raises_unstorable_value(tmp_path: Path) -> None:
    async with Store.open(tmp_path / "s.db", create=True) as store:
        for item in (episode("a", tenant=None), episode("b", trace="\ud800"), replace(episode("c"), rounds=2**70)):
            with pytest.raises(StoreError) as caught:
                await store.add_all([item])
            assert type(caught.value).__name__ == "UnstorableValue"
