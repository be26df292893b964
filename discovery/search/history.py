"""History of a search run: an append-only, hash-chained file of events.

A line is {"kind", "body", "before", "hash"}. `hash` is computed from the previous hash, the kind and the body, so an
uninterrupted run and one that was killed and resumed end in the same hash. Times are therefore not recorded. A torn
last line is dropped, because it was never acknowledged.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from errno import ENOENT
from hashlib import sha256
from os import strerror
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from discovery.data.atomic_files import open_lock
from discovery.data.hash_chained_log import ChainFormat, HashChainedLog, begins_as
from discovery.data.safe_json import parse_json
from discovery.errors import DamagedLog, HistoryError

log = logging.getLogger(__name__)

ORIGIN: Final = "0" * 64
"""The `before` of the first event."""
_LINE_START: Final = b'{"kind": "'
ADDED: Final = MappingProxyType({"data": "whether its recordings are the same is unknown"})
"""Settings that earlier releases did not record, and what is unknown without them."""


class Event(NamedTuple):
    """Something that happened in a run."""

    kind: str  # begun, proposed, judged or chosen
    body: Mapping[str, Any]
    before: str  # hash of the event before
    hash: str


class RunLock:
    """Lock of a run, held by one history at a time: of two writers, each would break the chain of the other."""

    def __init__(self, record: Path) -> None:
        """Take the lock, a file beside the record. Raises HistoryError if another process holds it."""
        path = record.with_name(f"{record.name}.lock")
        self._descriptor: int | None = None
        try:
            self._descriptor = open_lock(path)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise HistoryError(f"{record}: another process is continuing this run; wait until it ends") from None
        except OSError as error:
            self.release()
            raise HistoryError(f"{path}: {error.strerror}") from None

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


class History:
    """The events of a run, on disk and in memory.

    A history that was begun or resumed is locked against other processes until it is closed.
    """

    def __init__(self, log: HashChainedLog[Event], events: list[Event], lock: RunLock | None = None) -> None:
        self.path = log.path
        self.events = events
        self._log = log
        self._lock = lock

    def close(self) -> None:
        """Let other processes continue the run."""
        if self._lock is not None:
            self._lock.release()

    @staticmethod
    def check_unused(path: Path) -> None:
        """Raise HistoryError if a run is recorded at `path` already."""
        if path.exists() and path.stat().st_size:
            raise HistoryError(f"{path}: a run is recorded there; continue it with --resume, or name another folder")

    @classmethod
    def begin(cls, path: Path, settings: Mapping[str, Any]) -> History:
        """Begin the history of a new run. Raises HistoryError if a run is recorded at `path` already, or begins now."""
        cls.check_unused(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HistoryError(f"{path.parent}: {error.strerror}") from None
        return cls._begin(path, settings, RunLock(path))

    @classmethod
    def _begin(cls, path: Path, settings: Mapping[str, Any], lock: RunLock) -> History:
        history = cls(HashChainedLog(path, _CHAIN), [], lock)
        try:
            cls.check_unused(path)  # again, because another process may have begun it before it was locked
            history.append("begun", settings)
        except BaseException:
            lock.release()
            raise
        return history

    @classmethod
    def resume(cls, path: Path, settings: Mapping[str, Any]) -> History:
        """Continue a recorded run, which must have begun with the same settings and be continued by no other process.

        Runs of earlier releases did not record `ADDED`; it is not compared then, and a warning says so. Raises
        HistoryError.
        """
        if not path.exists():
            raise HistoryError(
                f"{path}: no run is recorded there, perhaps because it was stopped before it began; begin it without "
                "--resume, or name the folder of a recorded run"
            )
        begun = cls.read(path).events[:1]
        if not begun and not begins_as(path.read_bytes(), _LINE_START):
            raise HistoryError(f"{path}: not the record of a run; move it away, or name another folder")
        recorded, current = begun[0].body if begun else _as_json(settings), _as_json(settings)
        missing = {name for name in ADDED if name in current and name not in recorded}
        for name in sorted({*recorded, *current} - missing):
            if recorded.get(name) != current.get(name):
                raise HistoryError(f"{path}: the run began with {name} = {recorded.get(name)}, not {current.get(name)}")
        for name in missing:
            log.warning(
                "%s: the run was begun by an earlier release, which did not record %s: %s", path, name, ADDED[name]
            )
        lock = RunLock(path)
        try:
            history = cls.read(path, mend=True)  # only now: a refused resume must change nothing
        except BaseException:
            lock.release()
            raise
        if not begun:
            return cls._begin(path, settings, lock)
        history._lock = lock
        return history

    @classmethod
    def read(cls, path: Path, mend: bool = False) -> History:
        """Read a recorded run and check every hash. With `mend`, a torn last line is removed from the file.

        Raises HistoryError.
        """
        log = HashChainedLog(path, _CHAIN)
        try:
            if not path.exists():
                raise HistoryError(f"{path}: {strerror(ENOENT)}; name the folder of a recorded run")
            if mend:
                log.remove_torn_line()
            return cls(log, log.verify(log.load().lines))
        except DamagedLog as error:
            raise HistoryError(str(error)) from None
        except OSError as error:
            raise HistoryError(f"{path}: {error.strerror}") from None

    @property
    def head(self) -> str:
        """The hash of the latest event, which identifies the whole history."""
        return self.events[-1].hash if self.events else ORIGIN

    def append(self, kind: str, body: Mapping[str, Any]) -> Event:
        """Add an event; it is on the disk when this returns. Raises HistoryError."""
        plain, before = _as_json(body), self.head
        event = Event(kind, plain, before, _hash(before, kind, plain))
        line = json.dumps({"kind": kind, "body": plain, "before": before, "hash": event.hash}, ensure_ascii=False)
        try:
            self._log.append(line.encode(errors="backslashreplace"))  # JSON reads \udXXX escapes back as they were
        except OSError as error:
            raise HistoryError(f"{self.path}: {error.strerror}") from None
        self.events.append(event)
        return event

    def bodies(self, kind: str) -> list[Mapping[str, Any]]:
        """Return the bodies of all events of one kind, in order."""
        return [event.body for event in self.events if event.kind == kind]


def _parse(line: bytes) -> Event:
    try:
        value = parse_json(line)
        event = Event(value["kind"], value["body"], value["before"], value["hash"])
    except (KeyError, TypeError):
        raise ValueError("it is not an event with kind, body, before and hash") from None
    if event.hash != _hash(event.before, event.kind, event.body):
        raise ValueError("its hash does not match its content")
    return event


def _hash(before: str, kind: str, body: Mapping[str, Any]) -> str:
    return sha256(f"{before} {kind} {json.dumps(body, sort_keys=True)}".encode()).hexdigest()


_CHAIN: Final[ChainFormat[Event]] = ChainFormat(
    ORIGIN, _parse, previous_hash=lambda event: event.before, own_hash=lambda _, event: event.hash
)


def _as_json(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return `body` with the types that it will have when it is read from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(body))
    return plain
