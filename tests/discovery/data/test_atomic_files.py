"""Creating and replacing files: their modes, and that no file is written through a symbolic link."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from discovery.data.atomic_files import atomic_write, check_writable_path, create_exclusively
from discovery.data.shared_jsonl import SharedLines, WorkClaims
from discovery.errors import FileWriteError
from discovery.promotion.ledger import Ledger
from discovery.promotion.storage.registry_folder import RegistryFolder


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture(params=["precious", "nothing-yet"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return the target of a symbolic link: an existing file of the user, or a path where no file exists."""
    path = tmp_path / str(request.param)
    if path.name == "precious":
        path.write_text("keep")
    return path


def untouched(path: Path) -> bool:
    return path.read_text() == "keep" if path.name == "precious" else not path.exists()


def test_a_file_is_not_created_through_a_link(tmp_path: Path, target: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(FileExistsError):
        create_exclusively(link)
    assert untouched(target)


def test_a_link_in_place_of_the_lock_of_a_ledger_is_refused(tmp_path: Path, target: Path) -> None:
    (tmp_path / "gate.jsonl.lock").symlink_to(target)
    with pytest.raises(FileWriteError, match=r"gate\.jsonl\.lock"), Ledger(tmp_path / "gate.jsonl").locked():
        pass
    assert untouched(target)


def test_a_link_in_place_of_the_claims_or_lost_tokens_file_is_refused(tmp_path: Path, target: Path) -> None:
    (tmp_path / "out.lock").symlink_to(target)
    with pytest.raises(FileWriteError, match=r"out\.lock"):
        WorkClaims(tmp_path / "out.lock")
    (tmp_path / "out.lost").symlink_to(target)
    with pytest.raises(FileWriteError, match=r"out\.lost"):
        SharedLines(tmp_path / "out.lost", may_be_link=False).append("{}\n")
    assert untouched(target)


def test_a_registry_does_not_write_through_a_link(tmp_path: Path, target: Path) -> None:
    registry = RegistryFolder(tmp_path / "registry")
    registry.folder.mkdir()
    (registry.folder / ".autotts-registry.json").symlink_to(target)
    with pytest.raises(FileExistsError):
        registry._write(registry.file, b"{}")
    assert untouched(target)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_an_atomically_written_file_has_the_mode_of_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    path = tmp_path / "report.json"
    with umask(mask), atomic_write(path) as file:
        file.write(b"{}")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_private_file_has_mode_600_under_any_umask(tmp_path: Path) -> None:
    with umask(0), atomic_write(tmp_path / "out.jsonl", private=True) as file:
        file.write(b"{}")
    with umask(0):
        SharedLines(tmp_path / "lines.jsonl").append("{}\n")
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    (tmp_path / "out.jsonl").chmod(0o640)
    with atomic_write(tmp_path / "out.jsonl", private=True) as file:
        file.write(b"{}")
    assert stat.S_IMODE((tmp_path / "out.jsonl").stat().st_mode) == 0o640  # the mode its owner set is kept


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "gate.jsonl"
    path.write_text("old")
    path.chmod(0o600)
    with atomic_write(path) as file:
        file.write(b"new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", 0o600)


def test_an_atomic_write_replaces_a_link_and_not_its_target(tmp_path: Path, target: Path) -> None:
    path = tmp_path / "report.json"
    path.symlink_to(target)
    with atomic_write(path) as file:
        file.write(b"{}")
    assert (path.is_symlink(), path.read_bytes()) == (False, b"{}")
    assert untouched(target)


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "report.json") as file:
        file.write(b"{" * (1 // 0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1, 16, 511, 512, 513])
def test_a_short_file_is_not_taken_for_a_database(tmp_path: Path, size: int) -> None:
    path = tmp_path / "short.json"
    path.write_bytes(b"{" * size)
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_the_smallest_database_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "small.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA page_size = 512")
        database.execute("PRAGMA user_version = 1")
    assert path.stat().st_size == 512
    with pytest.raises(FileWriteError, match="is a database"), atomic_write(path) as file:
        file.write(b"new")


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "out"
    os.mkfifo(pipe)
    with pytest.raises(FileWriteError, match=r"--json .*out: is a device, pipe or socket"):
        check_writable_path(pipe, "--json")
    with pytest.raises(FileWriteError, match="is a device"), atomic_write(pipe) as file:
        file.write(b"{}")
    assert pipe.is_fifo()


def test_a_link_is_replaced_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "other" / "target.json")  # may be on another file system
    with atomic_write(link) as file:
        assert list((tmp_path / "other").iterdir()) == []
        file.write(b"{}")
    assert link.read_bytes() == b"{}"
