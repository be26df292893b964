"""The record of a run: changed lines are reported, torn lines dropped, and runs are never mixed."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from discovery.errors import HistoryError
from discovery.search.history import ORIGIN, History, RunLock

SETTINGS: dict[str, Any] = {"explorer": "grammar", "seed": 3, "betas": [0.0, 0.5, 1.0], "latency": None}
BODIES: list[dict[str, Any]] = [
    {"step": 0, "candidates": [{"source": "class Mine: ...\n", "note": "β “quoted” \u2028 \x1b"}]},
    {"step": 0, "verdicts": [{"score": 71.25, "failure": ""}]},
    {"step": 1, "candidates": []},
]


def recorded(path: Path) -> History:
    """Return the history of a run with four events."""
    history = History.begin(path, SETTINGS)
    for kind, body in zip(("proposed", "judged", "proposed"), BODIES, strict=True):
        history.append(kind, body)
    return history


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "history.jsonl"


def test_recorded_events_are_read_back_with_the_same_head(path: Path) -> None:
    history = recorded(path)
    again = History.read(path)
    assert again.events == history.events
    assert again.head == history.head == history.events[-1].hash
    assert [one.kind for one in again.events] == ["begun", "proposed", "judged", "proposed"]
    assert again.bodies("proposed") == [BODIES[0], BODIES[2]]
    assert again.bodies("chosen") == []
    assert path.read_bytes().count(b"\n") == 4


def test_each_line_holds_the_hash_of_the_one_before(path: Path) -> None:
    recorded(path)
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert [line["before"] for line in lines] == [ORIGIN, *(line["hash"] for line in lines[:-1])]
    assert len({line["hash"] for line in lines}) == 4


def test_equal_events_give_equal_heads(path: Path, tmp_path: Path) -> None:
    first, second = recorded(path), recorded(tmp_path / "other.jsonl")
    assert first.head == second.head
    assert path.read_bytes() == second.path.read_bytes()
    third = History.begin(tmp_path / "third.jsonl", dict(reversed(SETTINGS.items())))
    assert third.head == first.events[0].hash  # the order of keys does not matter
    assert third.append("judged", BODIES[0]).hash != first.events[1].hash  # the kind matters


def changed(number: int, change: Callable[[bytes], bytes]) -> Callable[[list[bytes]], None]:
    def do(lines: list[bytes]) -> None:
        before = lines[number - 1]
        lines[number - 1] = change(before)
        assert lines[number - 1] != before

    return do


def removed(number: int) -> Callable[[list[bytes]], None]:
    return lambda lines: lines.__delitem__(number - 1)


def swapped(lines: list[bytes]) -> None:
    lines[1], lines[2] = lines[2], lines[1]


def doubled(lines: list[bytes]) -> None:
    lines.insert(2, lines[1])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            changed(1, lambda line: line.replace(b'"seed": 3', b'"seed": 4')),
            "line 1 is not a valid record: its hash does not match its content",
        ),
        (
            changed(2, lambda line: line.replace(b"Mine", b"Mind")),
            "line 2 is not a valid record: its hash does not match its content",
        ),
        (
            changed(3, lambda line: line.replace(b"71.25", b"71.26")),
            "line 3 is not a valid record: its hash does not match its content",
        ),
        (
            changed(3, lambda line: line.replace(b'"kind": "judged"', b'"kind": "chosen"')),
            "line 3 is not a valid record: its hash does not match its content",
        ),
        (
            changed(4, lambda line: line.replace(b'"before": "', b'"before": "0')),
            "line 4 is not a valid record: its hash does not match its content",
        ),
        (
            changed(4, lambda line: line.replace(b'"hash": "', b'"hash": "0')),
            "line 4 is not a valid record: its hash does not match its content",
        ),
        (changed(2, lambda line: line[:-1]), "line 2 is not a valid record"),
        (changed(2, lambda line: b"[]"), "line 2 is not a valid record"),
        (changed(2, lambda line: b""), "line 2 is not a valid record"),
        (changed(2, lambda line: line.replace(b"Mine", b"\xff")), "line 2 is not a valid record"),
        (removed(1), "line 1 is not the first line of the log"),
        (removed(2), "line 2 does not follow line 1; a line was changed, moved or removed"),
        (removed(3), "line 3 does not follow line 2; a line was changed, moved or removed"),
        (swapped, "line 2 does not follow line 1; a line was changed, moved or removed"),
        (doubled, "line 3 does not follow line 2; a line was changed, moved or removed"),
    ],
)
def test_a_changed_line_is_refused_with_its_number(
    path: Path, harm: Callable[[list[bytes]], None], message: str
) -> None:
    recorded(path)
    lines = path.read_bytes().split(b"\n")
    harm(lines)
    path.write_bytes(b"\n".join(lines))
    harmed = path.read_bytes()
    for read in (History.read, lambda path: History.resume(path, SETTINGS)):
        with pytest.raises(HistoryError, match=message) as raised:
            read(path)
        assert str(path) in str(raised.value)
    assert path.read_bytes() == harmed


def test_any_changed_byte_is_refused_unless_it_is_white_space(path: Path) -> None:
    """Either reading fails, or only JSON white space changed and the events are equal."""
    history = recorded(path)
    complete = path.read_bytes()
    noticed = 0
    for at in range(0, len(complete) - 1, 3):
        path.write_bytes(complete[:at] + bytes([complete[at] ^ 1]) + complete[at + 1 :])
        try:
            assert History.read(path).events == history.events
        except HistoryError:
            noticed += 1
    assert noticed > 0.3 * len(complete)


def test_a_torn_last_line_is_ignored_on_reading_and_removed_on_resume(path: Path) -> None:
    recorded(path)
    complete = path.read_bytes()
    begins = complete.rindex(b"\n", 0, -1) + 1
    for end in range(begins + 1, len(complete)):
        path.write_bytes(complete[:end])
        assert len(History.read(path).events) == 3
        assert path.read_bytes() == complete[:end]  # reading changes nothing
        assert len(History.resume(path, SETTINGS).events) == 3
        assert path.read_bytes() == complete[:begins]
    resumed = History.resume(path, SETTINGS)
    resumed.append("proposed", BODIES[2])
    assert path.read_bytes() == complete


def test_a_torn_line_before_the_last_is_refused(path: Path) -> None:
    recorded(path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:-9], *lines[2:]]))
    with pytest.raises(HistoryError, match="line 2 is not a valid record"):
        History.resume(path, SETTINGS)


def test_a_run_torn_in_its_first_event_starts_again(path: Path) -> None:
    recorded(path)
    first = path.read_bytes().split(b"\n")[0] + b"\n"
    for end in (0, 1, len(first) - 1):
        path.write_bytes(first[:end])
        assert [one.kind for one in History.resume(path, SETTINGS).events] == ["begun"]
        assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "the run began with seed = 3, not 4"),
        ({"explorer": "llm"}, "the run began with explorer = grammar, not llm"),
        ({"betas": [0.0, 1.0]}, r"the run began with betas = \[0.0, 0.5, 1.0\], not \[0.0, 1.0\]"),
        ({"latency": 0.5}, "the run began with latency = None, not 0.5"),
        ({"answers": "exact"}, "the run began with answers = None, not exact"),
    ],
)
def test_resuming_with_other_settings_is_refused_with_the_setting_named(
    path: Path, change: dict[str, Any], message: str
) -> None:
    recorded(path)
    with path.open("ab") as file:
        file.write(b'{"kind": "cut')
    before = path.read_bytes()
    with pytest.raises(HistoryError, match=message):
        History.resume(path, SETTINGS | change)
    assert path.read_bytes() == before  # even the torn line is kept
    fewer = {name: value for name, value in SETTINGS.items() if name != "seed"}
    with pytest.raises(HistoryError, match="the run began with seed = 3, not None"):
        History.resume(path, fewer)


def test_a_run_on_other_recordings_is_refused_unless_an_earlier_release_began_it(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorded(path)
    assert len(History.resume(path, SETTINGS | {"data": "5ca1ab1e"}).events) == 4
    (line,) = caplog.messages
    assert line.endswith("did not record data: whether its recordings are the same is unknown")
    other = tmp_path / "other.jsonl"
    History.begin(other, SETTINGS | {"data": "5ca1ab1e"})
    with pytest.raises(HistoryError, match="the run began with data = 5ca1ab1e, not 0ddba11"):
        History.resume(other, SETTINGS | {"data": "0ddba11"})


def test_settings_are_compared_after_a_round_trip_through_json(path: Path) -> None:
    recorded(path)
    assert History.resume(path, SETTINGS | {"betas": (0.0, 0.5, 1.0)}).head == History.read(path).head


def test_a_new_run_does_not_overwrite_a_recorded_one(path: Path) -> None:
    recorded(path)
    before = path.read_bytes()
    with pytest.raises(HistoryError, match="a run is recorded there; continue it with --resume"):
        History.begin(path, SETTINGS)
    assert path.read_bytes() == before


def test_unreadable_and_unwritable_paths_are_reported(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match="No such file or directory; name the folder of a recorded run"):
        History.read(tmp_path / "none.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(HistoryError, match="Not a directory"):
        History.begin(tmp_path / "file" / "run" / "history.jsonl", SETTINGS)
    history = History.begin(tmp_path / "history.jsonl", SETTINGS)
    (tmp_path / "history.jsonl").unlink()
    (tmp_path / "history.jsonl").mkdir()
    with pytest.raises(HistoryError, match="Is a directory"):
        history.append("judged", {})
    assert len(history.events) == 1  # an event that is not on disk is not in memory


def test_a_lone_surrogate_is_recorded_and_read_back(path: Path) -> None:
    history = History.begin(path, SETTINGS)
    history.append("judged", {"failure": "Mine raised ValueError: \ud800"})
    assert History.read(path).events == history.events


def test_a_run_is_continued_by_one_process_at_a_time(path: Path) -> None:
    with closing(History.begin(path, SETTINGS)) as history:
        before = path.read_bytes()
        for _ in range(2):
            with pytest.raises(HistoryError, match="another process is continuing this run"):
                History.resume(path, SETTINGS)
        assert path.read_bytes() == before
        assert len(History.read(path).events) == 1  # others may read it
        history.append("judged", BODIES[1])
    with closing(History.resume(path, SETTINGS)) as resumed:
        resumed.append("judged", BODIES[1])
    assert len(History.read(path).events) == 3


def test_a_run_that_is_about_to_begin_is_not_begun_twice(path: Path) -> None:
    path.parent.mkdir()
    lock = RunLock(path)
    with pytest.raises(HistoryError, match="another process is continuing this run"):
        History.begin(path, SETTINGS)
    assert not path.exists()
    lock.release()
    History.begin(path, SETTINGS).close()
