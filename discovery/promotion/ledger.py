"""The ledger of a sealed split: every finalist ever judged on it, a line each, in the order they were judged.

Each judgement spends of what may be spent on a split over its lifetime, so none is ever taken back: a line holds the
hash of the one before it, and a file whose lines do not follow from each other is refused. A judgement the machine
disturbed has a line as well, and spends nothing unless there have been too many.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from discovery.data.atomic_files import atomic_write, open_lock, sync_folder
from discovery.errors import FileWriteError, GateError

FIRST: Final = ""
"""What stands for the line before the first."""
DISTURBED: Final = "disturbed"
"""In place of a verdict: the machine kept the finalist from being judged, and nobody was told anything."""
FREE_DISTURBANCES: Final = 3
"""Disturbances on a split that are no looks at it. All after them count, so that nobody gains by causing them."""
SHORT: Final = 16
"""Digits of a question's id that are kept."""


class Judgement(BaseModel):
    """One line."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    split: str = Field(description="fingerprint of the questions and models judged on")
    questions: list[str] = Field(description="the questions, by the first digits of their ids")
    digest: str = Field(description="of the finalist")
    champion: str = Field(description="digest of the controller it was judged against")
    k: int = Field(ge=1, description="it was the k-th judged on any of these questions, or would have been")
    p: float = Field(ge=0, le=1)
    verdict: str = Field(description="or `disturbed`: nothing was judged")
    created: str
    who: str
    report: dict[str, Any] = Field(description="what was told")
    after: str = Field(description="SHA-256 of the line before")


def fingerprint(questions: Iterable[str], models: Iterable[str]) -> str:
    """What a split is known by."""
    about = [sorted(set(questions)), sorted(set(models))]
    return sha256(json.dumps(about).encode()).hexdigest()


def shorten_ids(questions: Iterable[str]) -> list[str]:
    """The questions as a line keeps them."""
    return sorted({question[:SHORT] for question in questions})


class Ledger:
    """A ledger in a file; a file that is not there yet has no lines."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def judgements(self) -> list[Judgement]:
        """All lines. Raises GateError, naming the file and the line, if it is not as it was written."""
        found, before = [], FIRST
        for number, line in enumerate(self._lines(), start=1):
            try:
                one = Judgement.model_validate_json(line)
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False, include_context=False)[0]
                raise GateError(f"{self._path}:{number}: no judgement: {first['msg']}") from None
            if one.after != before:
                raise GateError(f"{self._path}:{number}: it does not follow the line before; restore the ledger")
            found.append(one)
            before = _hash(line)
        return found

    def find(self, split: str, digest: str, champion: str) -> Judgement | None:
        """What was judged already of a finalist against a champion on a split."""
        wanted = (split, digest, champion)
        judged = (one for one in self.judgements() if one.verdict != DISTURBED)
        return next((one for one in judged if (one.split, one.digest, one.champion) == wanted), None)

    def next_k(self, questions: Sequence[str]) -> int:
        """Which judgement on any of these questions the next is, from 1. A split that has grown is no new split."""
        lines = self._about(questions)
        return 1 + len(lines) - min(FREE_DISTURBANCES, sum(one.verdict == DISTURBED for one in lines))

    def disturbances(self, questions: Sequence[str]) -> int:
        """How many judgements on any of these questions the machine has disturbed."""
        return sum(one.verdict == DISTURBED for one in self._about(questions))

    def _about(self, questions: Sequence[str]) -> list[Judgement]:
        mine = set(shorten_ids(questions))
        return [one for one in self.judgements() if not mine.isdisjoint(one.questions)]

    def append(self, **fields: Any) -> None:
        """Add a judgement; it is on the disk when this returns. Raises FileWriteError, then nothing has been added."""
        lines = self._lines()
        line = Judgement(**fields, after=_hash(lines[-1]) if lines else FIRST).model_dump_json()
        with atomic_write(self._path) as file:
            file.write("".join(f"{one}\n" for one in [*lines, line]).encode())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self._path.resolve().parent)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else judges meanwhile; waits for whoever does. Raises FileWriteError."""
        lock = self._path.with_name(f"{self._path.name}.lock")
        try:
            descriptor = open_lock(lock)
        except OSError as error:
            raise FileWriteError(f"{lock}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _lines(self) -> list[str]:
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise GateError(f"{self._path}: {error}") from None
        if text and not text.endswith("\n"):
            raise GateError(f"{self._path}: its last line is cut off; restore the ledger")
        return text.split("\n")[:-1]


def _hash(line: str) -> str:
    return sha256(line.encode()).hexdigest()
