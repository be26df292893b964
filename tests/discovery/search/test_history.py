"""The record of a run: what was changed is named, what was cut is dropped, and no run is mixed with another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from discovery.errors import HistoryError
from discovery.search.history import ORIGIN, History

SETTINGS: dict[str, Any] = {"explorer": "grammar", "seed": 3, "betas": [0.0, 0.5, 1.0], "latency": None}
BODIES: list[dict[str, Any]] = [
    {"step": 0, "candidates": [{"source": "class Mine: ...\n", "note": "β “quoted” \u2028 \x1b"}]},
    {"step": 0, "verdicts": [{"score": 71.25, "failure": ""}]},
    {"step": 1, "candidates": []},
]


def recorded(path: Path) -> History:
    """A run of four events."""
    history = History.begin(path, SETTINGS)
    for kind, body in zip(("proposed", "judged", "proposed"), BODIES, strict=True):
        history.append(kind, body)
    return history


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "history.jsonl"


def test_what_was_recorded_is_read_again(path: Path) -> None:
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


def test_the_same_events_have_the_same_head(path: Path, tmp_path: Path) -> None:
    first, second = recorded(path), recorded(tmp_path / "other.jsonl")
    assert first.head == second.head
    assert path.read_bytes() == second.path.read_bytes()
    third = History.begin(tmp_path / "third.jsonl", dict(reversed(SETTINGS.items())))
    assert third.head == first.events[0].hash  # the order of names says nothing
    assert third.append("judged", BODIES[0]).hash != first.events[1].hash  # the kind does


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
    ("harm", "words"),
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
def test_what_was_changed_is_named_by_its_line(path: Path, harm: Callable[[list[bytes]], None], words: str) -> None:
    recorded(path)
    lines = path.read_bytes().split(b"\n")
    harm(lines)
    path.write_bytes(b"\n".join(lines))
    harmed = path.read_bytes()
    for read in (History.read, lambda path: History.resume(path, SETTINGS)):
        with pytest.raises(HistoryError, match=words) as raised:
            read(path)
        assert str(path) in str(raised.value)
    assert path.read_bytes() == harmed


def test_any_changed_byte_is_noticed(path: Path) -> None:
    """But for the white space of JSON, which says nothing: then what is read is what was written."""
    history = recorded(path)
    whole = path.read_bytes()
    noticed = 0
    for at in range(0, len(whole) - 1, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            assert History.read(path).events == history.events
        except HistoryError:
            noticed += 1
    assert noticed > 0.3 * len(whole)


def test_a_cut_last_line_is_dropped_when_a_run_is_resumed_and_only_then(path: Path) -> None:
    recorded(path)
    whole = path.read_bytes()
    begins = whole.rindex(b"\n", 0, -1) + 1
    for end in range(begins + 1, len(whole)):
        path.write_bytes(whole[:end])
        assert len(History.read(path).events) == 3
        assert path.read_bytes() == whole[:end]  # whoever only looks changes nothing
        assert len(History.resume(path, SETTINGS).events) == 3
        assert path.read_bytes() == whole[:begins]
    resumed = History.resume(path, SETTINGS)
    resumed.append("proposed", BODIES[2])
    assert path.read_bytes() == whole


def test_a_cut_line_that_is_not_the_last_is_no_accident(path: Path) -> None:
    recorded(path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:-9], *lines[2:]]))
    with pytest.raises(HistoryError, match="line 2 is not a valid record"):
        History.resume(path, SETTINGS)


def test_a_run_that_never_got_to_its_first_event_begins(path: Path) -> None:
    recorded(path)
    first = path.read_bytes().split(b"\n")[0] + b"\n"
    for end in (0, 1, len(first) - 1):
        path.write_bytes(first[:end])
        assert [one.kind for one in History.resume(path, SETTINGS).events] == ["begun"]
        assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 4}, "the run began with seed = 3, not 4"),
        ({"explorer": "llm"}, "the run began with explorer = grammar, not llm"),
        ({"betas": [0.0, 1.0]}, r"the run began with betas = \[0.0, 0.5, 1.0\], not \[0.0, 1.0\]"),
        ({"latency": 0.5}, "the run began with latency = None, not 0.5"),
        ({"answers": "exact"}, "the run began with answers = None, not exact"),
    ],
)
def test_other_settings_are_refused_by_name(path: Path, change: dict[str, Any], words: str) -> None:
    recorded(path)
    with path.open("ab") as file:
        file.write(b'{"kind": "cut')
    whole = path.read_bytes()
    with pytest.raises(HistoryError, match=words):
        History.resume(path, SETTINGS | change)
    assert path.read_bytes() == whole  # not even what was cut is dropped
    fewer = {name: value for name, value in SETTINGS.items() if name != "seed"}
    with pytest.raises(HistoryError, match="the run began with seed = 3, not None"):
        History.resume(path, fewer)


def test_settings_are_compared_as_they_are_read(path: Path) -> None:
    recorded(path)
    assert History.resume(path, SETTINGS | {"betas": (0.0, 0.5, 1.0)}).head == History.read(path).head


def test_a_run_is_not_begun_over_another(path: Path) -> None:
    recorded(path)
    whole = path.read_bytes()
    with pytest.raises(HistoryError, match="a run is recorded there; continue it with --resume"):
        History.begin(path, SETTINGS)
    assert path.read_bytes() == whole


def test_where_nothing_can_be_read_or_written_is_said(tmp_path: Path) -> None:
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
    assert len(history.events) == 1  # what is not on disk did not happen


def test_what_utf8_cannot_hold_is_recorded_all_the_same(path: Path) -> None:
    history = History.begin(path, SETTINGS)
    history.append("judged", {"failure": "Mine raised ValueError: \ud800"})
    assert History.read(path).events == history.events
