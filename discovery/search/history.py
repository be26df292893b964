"""The record of a run: an append-only file of events, each sealed to all before it by a hash.

A line is {"kind", "body", "before", "hash"}; the hash is of the hash before, the kind and the body, so a straight run
and one that was killed and resumed end in the same hash. Times are no part of it. A line that was cut is dropped, for
it was never acknowledged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

from discovery.data.safe_json import parse_json
from discovery.errors import HistoryError

ORIGIN: Final = "0" * 64


class Event(NamedTuple):
    """Something that happened."""

    kind: str
    body: Mapping[str, Any]
    hash: str


class History:
    """A run's events, on disk and in memory."""

    def __init__(self, path: Path, events: list[Event]) -> None:
        self.path = path
        self.events = events

    @classmethod
    def begin(cls, path: Path, settings: Mapping[str, Any]) -> History:
        """A new run's, which there must not be yet. Raises HistoryError."""
        if path.exists() and path.stat().st_size:
            raise HistoryError(f"{path}: a run is recorded there; --resume goes on with it, or name another folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HistoryError(f"{path.parent}: {error.strerror}") from None
        history = cls(path, [])
        history.append("begun", settings)
        return history

    @classmethod
    def resume(cls, path: Path, settings: Mapping[str, Any]) -> History:
        """An earlier run's; it must have begun with the same settings. Raises HistoryError."""
        begun = cls.read(path).events[:1]
        theirs, ours = begun[0].body if begun else _plain(settings), _plain(settings)
        for name in sorted({*theirs, *ours}):
            if theirs.get(name) != ours.get(name):
                raise HistoryError(f"{path}: the run began with {name} = {theirs.get(name)}, not {ours.get(name)}")
        history = cls.read(path, mend=True)  # not before: who is refused changes nothing
        return history if begun else cls.begin(path, settings)

    @classmethod
    def read(cls, path: Path, mend: bool = False) -> History:
        """What was recorded, every hash checked; `mend` cuts off a last line that is not whole. Raises HistoryError."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise HistoryError(f"{path}: {error.strerror}; name a folder a run was recorded in") from None
        whole, newline, cut = data.rpartition(b"\n")
        if cut and mend:
            with path.open("r+b") as file:
                file.truncate(len(whole) + len(newline))
        return cls(path, list(_events(path, whole)))

    @property
    def head(self) -> str:
        """The hash that stands for all of it."""
        return self.events[-1].hash if self.events else ORIGIN

    def append(self, kind: str, body: Mapping[str, Any]) -> Event:
        """Add an event; when this returns it will survive. Raises HistoryError."""
        plain = _plain(body)
        event = Event(kind, plain, _hash(self.head, kind, plain))
        line = json.dumps({"kind": kind, "body": plain, "before": self.head, "hash": event.hash}, ensure_ascii=False)
        try:
            with self.path.open("ab") as file:
                file.write(line.encode(errors="backslashreplace") + b"\n")  # which JSON reads as what it was
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise HistoryError(f"{self.path}: {error.strerror}") from None
        self.events.append(event)
        return event

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        """The bodies of one kind of events, in their order."""
        return [event.body for event in self.events if event.kind == kind]


def _events(path: Path, whole: bytes) -> Iterator[Event]:
    before = ORIGIN
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            read = parse_json(line)
            kind, body, said, mark = read["kind"], read["body"], read["before"], read["hash"]
        except (ValueError, KeyError, TypeError):
            raise HistoryError(f"{path}: line {number} is no event") from None
        if said != before or mark != _hash(before, kind, body):
            raise HistoryError(f"{path}: line {number} is not what was written, or not where")
        yield Event(kind, body, mark)
        before = mark


def _hash(before: str, kind: str, body: Mapping[str, Any]) -> str:
    return sha256(f"{before} {kind} {json.dumps(body, sort_keys=True)}".encode()).hexdigest()


def _plain(body: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read again."""
    plain: dict[str, Any] = json.loads(json.dumps(body))
    return plain
