"""JSON Lines files that several processes append to, and work claims that end with their process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from discovery.data.atomic_files import BLOCK
from discovery.data.shared_jsonl import SharedLines, WorkClaims
from discovery.errors import FileWriteError

WRITER = """
import json, sys
from pathlib import Path
from discovery.data.shared_jsonl import SharedLines
file, name, count = SharedLines(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
for number in range(count):
    file.append(json.dumps({"who": name, "number": number, "filling": "x" * 5000}) + "\\n")
    if number == 20:
        print("ready", flush=True)
"""
CLAIMER = """
import sys
from pathlib import Path
from discovery.data.shared_jsonl import WorkClaims
claims = WorkClaims(Path(sys.argv[1]))
print([claims.take(name) for name in sys.argv[2:]], flush=True)
sys.stdin.read()
"""


@contextmanager
def running(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_output_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for _, line in SharedLines(path).read_new()]


def test_each_new_line_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    reader, writer = SharedLines(path), SharedLines(path)
    assert reader.read_new() == []
    writer.append('{"a": 1}\n')
    writer.append('{"a": "é"}\n')
    assert reader.read_new() == [(1, b'{"a": 1}'), (2, '{"a": "é"}'.encode())]
    assert reader.read_new() == []
    writer.append('{"a": 3}\n')
    assert reader.read_new() == [(3, b'{"a": 3}')]
    assert len(writer.read_new()) == 3


@pytest.mark.parametrize("before", ["", '{"a": 1}\n', '{"a": "' + "x" * 3 * BLOCK + '"}\n'])
def test_appending_removes_a_torn_last_line(tmp_path: Path, before: str) -> None:
    path = tmp_path / "x.jsonl"
    torn = '{"a": "é", "b": [1, 2]}'.encode()
    for length in range(len(torn) + 1):
        path.write_bytes(before.encode() + torn[:length])
        reader = SharedLines(path)
        known = len(reader.read_new())
        assert known == before.count("\n")
        SharedLines(path).append('{"a": 2}\n')
        assert [json.loads(line)["a"] for _, line in reader.read_new()] == (["é", 2] if length == len(torn) else [2])
        assert len(read(path)) == known + 1 + (length == len(torn))


def test_repair_removes_a_torn_last_line_longer_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": "' + "x" * 3 * BLOCK)
    SharedLines(path).repair()
    assert path.read_text() == '{"a": 1}\n'
    SharedLines(tmp_path / "none.jsonl").repair()
    assert not (tmp_path / "none.jsonl").exists()


def test_a_line_that_does_not_fit_on_disk_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    file = SharedLines(path)
    file.append('{"a": 1}\n')

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(FileWriteError, match=r"x.jsonl: No space left"):
            file.append('{"a": 2}\n')
    assert path.read_text() == '{"a": 1}\n'


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "x.jsonl"
    folder.mkdir()
    for work in (
        SharedLines(folder).read_new,
        SharedLines(folder).repair,
        lambda: SharedLines(folder).append("{}\n"),
        lambda: WorkClaims(folder),
    ):
        with pytest.raises(FileWriteError, match=r"x.jsonl: Is a directory"):
            work()


@pytest.mark.process
def test_concurrent_writers_that_are_killed_leave_only_complete_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with running(WRITER, path, "a", 10**6) as first, running(WRITER, path, "b", 60) as second:
        assert read_output_line(first) == read_output_line(second) == "ready"
        first.kill()
        assert second.wait() == 0
        first.wait()
    SharedLines(path).append('{"who": "c", "number": 0}\n')
    records = read(path)
    for name, least in (("a", 21), ("b", 60), ("c", 1)):
        numbers = [line["number"] for line in records if line["who"] == name]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) >= least


@pytest.mark.process
def test_a_claim_belongs_to_one_process_and_is_released_when_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    claims = WorkClaims(path)
    assert claims.take("a")
    assert not claims.take("a")
    with running(CLAIMER, path, "a", "b", "c") as other:
        assert read_output_line(other) == "[False, True, True]"
        assert not claims.take("b")
        assert claims.elsewhere(["a", "b", "c", "d"]) == 2
        claims.give_back("a")
        claims.give_back("b")  # another process holds it
        assert not claims.take("b")
        other.kill()
        other.wait()
        assert claims.take("b")
        assert claims.take("a")
    with running(CLAIMER, path, "a") as other:
        assert read_output_line(other) == "[False]"
        claims.close()
    with running(CLAIMER, path, "a") as other:
        assert read_output_line(other) == "[True]"
