"""The hash-chained log finds every change to its lines and survives being cut short."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from discovery.data.hash_chained_log import ChainFormat, HashChainedLog, append_line, hash_line
from discovery.errors import DamagedLog


def parse(line: bytes) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict) or "previous" not in value:
        raise ValueError("it has no field previous")
    return value


CHAIN: ChainFormat[dict[str, Any]] = ChainFormat("none", parse, previous_hash=lambda record: str(record["previous"]))
OPEN_CHAIN = ChainFormat(CHAIN.origin, parse, CHAIN.previous_hash, starts_at_origin=False)


def line_after(lines: list[bytes], value: int) -> bytes:
    previous = hash_line(lines[-1]) if lines else CHAIN.origin
    return json.dumps({"value": value, "previous": previous}).encode()


@pytest.fixture
def log(tmp_path: Path) -> HashChainedLog[dict[str, Any]]:
    """A log of four lines."""
    log = HashChainedLog(tmp_path / "log.jsonl", CHAIN)
    for value in range(4):
        log.append(line_after(log.load().lines, value))
    return log


def values(log: HashChainedLog[dict[str, Any]]) -> list[int]:
    return [record["value"] for record in log.verify(log.load().lines)]


def test_appended_lines_are_read_back_in_order(log: HashChainedLog[dict[str, Any]]) -> None:
    assert values(log) == [0, 1, 2, 3]
    content = log.load()
    assert content.torn == b""
    assert content.size == log.path.stat().st_size


def test_a_missing_file_is_an_empty_log(tmp_path: Path) -> None:
    log = HashChainedLog(tmp_path / "none.jsonl", CHAIN)
    assert log.load() == ([], b"")
    assert log.verify([]) == []
    log.remove_torn_line()
    assert not log.path.exists()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedLog, match=rf"{tmp_path}: Is a directory"):
        HashChainedLog(tmp_path, CHAIN).load()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda lines: [lines[0].replace(b"0", b"9", 1), *lines[1:]], "line 2 does not follow line 1"),
        (lambda lines: [*lines[:2], lines[2].replace(b"2", b"9", 1), lines[3]], "line 4 does not follow line 3"),
        (lambda lines: lines[1:], "line 1 is not the first line of the log"),
        (lambda lines: [lines[0], *lines[2:]], "line 2 does not follow line 1"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "line 1 is not the first line of the log"),
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], "line 2 does not follow line 1"),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], "line 3 does not follow line 2"),
        (lambda lines: [lines[0], b"", *lines[1:]], "line 2 is not a valid record: Expecting value"),
        (lambda lines: [lines[0], b"{}", *lines[1:]], "line 2 is not a valid record: it has no field previous"),
        (lambda lines: [lines[0], b"\xff", *lines[1:]], "line 2 is not a valid record: 'utf-8' codec"),
    ],
)
def test_the_first_line_that_breaks_the_chain_is_named(
    log: HashChainedLog[dict[str, Any]], harm: Callable[[list[bytes]], list[bytes]], message: str
) -> None:
    lines = harm(log.load().lines)
    with pytest.raises(DamagedLog, match=f"{log.path}: {message}"):
        log.verify(lines)


def test_any_changed_digit_of_any_line_but_the_last_is_found(log: HashChainedLog[dict[str, Any]]) -> None:
    lines = log.load().lines
    for number, line in enumerate(lines[:-1]):
        for at in range(len(line)):
            changed = line[:at] + bytes([line[at] ^ 1]) + line[at + 1 :]
            with pytest.raises(DamagedLog):
                log.verify([*lines[:number], changed, *lines[number + 1 :]])


def test_removing_the_last_lines_leaves_a_valid_log(log: HashChainedLog[dict[str, Any]]) -> None:
    """A chain cannot tell that lines are missing at its end; owners that need that keep the latest hash elsewhere."""
    assert len(log.verify(log.load().lines[:-2])) == 2


def test_the_first_lines_may_be_missing_only_where_the_format_allows_it(log: HashChainedLog[dict[str, Any]]) -> None:
    lines = log.load().lines[2:]
    assert len(HashChainedLog(log.path, OPEN_CHAIN).verify(lines)) == 2
    with pytest.raises(DamagedLog, match="line 1 is not the first line"):
        log.verify(lines)
    with pytest.raises(DamagedLog, match="line 2 does not follow line 1"):
        HashChainedLog(log.path, OPEN_CHAIN).verify([lines[0], lines[0]])


def test_records_may_carry_a_hash_of_their_own(tmp_path: Path) -> None:
    chain = ChainFormat("0", parse, CHAIN.previous_hash, own_hash=lambda _, record: str(record["own"]))
    log = HashChainedLog(tmp_path / "log.jsonl", chain)
    lines = [b'{"previous": "0", "own": "a"}', b'{"previous": "a", "own": "b"}']
    assert len(log.verify(lines)) == 2
    with pytest.raises(DamagedLog, match="line 2 does not follow line 1"):
        log.verify([lines[0], lines[1].replace(b'"a"', b'"b"')])


def test_a_torn_line_is_left_out_and_removed_on_request(log: HashChainedLog[dict[str, Any]]) -> None:
    complete = log.path.read_bytes()
    begin = complete.rindex(b"\n", 0, -1) + 1
    for end in range(begin, len(complete)):
        log.path.write_bytes(complete[:end])
        assert log.load().torn == complete[begin:end]
        assert values(log) == [0, 1, 2]
        assert log.path.read_bytes() == complete[:end]  # reading changes nothing
        log.remove_torn_line()
        assert log.path.read_bytes() == complete[:begin]
    log.append(line_after(log.load().lines, 3))
    assert log.path.read_bytes() == complete


def test_rewriting_replaces_the_file_at_once(log: HashChainedLog[dict[str, Any]], tmp_path: Path) -> None:
    inode = log.path.stat().st_ino
    lines = log.load().lines
    log.rewrite([*lines, line_after(lines, 4)])
    assert values(log) == [0, 1, 2, 3, 4]
    assert log.path.stat().st_ino != inode
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_appending_where_nothing_can_be_written_raises_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        append_line(tmp_path, b"{}")
    with pytest.raises(FileNotFoundError):
        append_line(tmp_path / "none" / "log.jsonl", b"{}")
