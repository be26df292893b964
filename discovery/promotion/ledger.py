"""Ledger of a sealed split: one line for every finalist ever judged on it, in the order they were judged.

Each judgement spends a part of the error rate that a split allows over its lifetime, so no line is ever removed. The
lines form a hash chain, and a modified file is refused. A judgement that the machine disturbed has a line as well. It
spends nothing unless there were too many of them.
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

from discovery.data.atomic_files import open_lock
from discovery.data.hash_chained_log import ChainFormat, HashChainedLog, hash_line
from discovery.errors import DamagedLog, FileWriteError, GateError

ORIGIN: Final = ""
"""The `after` of the first line."""
DISTURBED: Final = "disturbed"
"""Stands for the verdict if the machine disturbed the judgement; no result was reported."""
FREE_DISTURBANCES: Final = 3
"""Disturbed judgements on a split that do not count. All later ones count, so that there is no gain in causing them."""
ID_DIGITS: Final = 16
"""Digits of a question's id that are kept."""


class Judgement(BaseModel):
    """One line of the ledger."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    split: str = Field(description="fingerprint of the questions and models")
    questions: list[str] = Field(description="first digits of the questions' ids")
    digest: str = Field(description="digest of the finalist")
    champion: str = Field(description="digest of the controller it was compared with")
    k: int = Field(ge=1, description="position among the judgements on any of these questions, from 1")
    p: float = Field(ge=0, le=1)
    verdict: str = Field(description="a verdict, or `disturbed` if none was reached")
    created: str
    who: str
    report: dict[str, Any] = Field(description="the report as JSON")
    after: str = Field(description="SHA-256 of the line before")


def fingerprint(questions: Iterable[str], models: Iterable[str]) -> str:
    """Return the hash that identifies a split: its questions and models."""
    parts = [sorted(set(questions)), sorted(set(models))]
    return sha256(json.dumps(parts).encode()).hexdigest()


def shorten_ids(questions: Iterable[str]) -> list[str]:
    """Return the question ids as a line keeps them: shortened, sorted, each once."""
    return sorted({question[:ID_DIGITS] for question in questions})


class Ledger:
    """A ledger in a file; a file that does not exist has no lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log = HashChainedLog(path, _CHAIN)

    def judgements(self) -> list[Judgement]:
        """Return all judgements. Raises GateError, which names file and line, if the file was modified."""
        try:
            return self._log.verify(self._lines())
        except DamagedLog as error:
            raise GateError(f"{error}; restore the ledger from a copy") from None

    def find(self, split: str, digest: str, champion: str) -> Judgement | None:
        """Return the judgement of a finalist against a champion on a split, if there is one."""
        wanted = (split, digest, champion)
        judged = (line for line in self.judgements() if line.verdict != DISTURBED)
        return next((line for line in judged if (line.split, line.digest, line.champion) == wanted), None)

    def next_k(self, questions: Sequence[str]) -> int:
        """Return the position of the next judgement among those on any of these questions, from 1.

        An extended split shares questions with the old one, so its count continues.
        """
        lines = self._on_questions(questions)
        return 1 + len(lines) - min(FREE_DISTURBANCES, sum(line.verdict == DISTURBED for line in lines))

    def disturbances(self, questions: Sequence[str]) -> int:
        """Count the judgements on any of these questions that the machine has disturbed."""
        return sum(line.verdict == DISTURBED for line in self._on_questions(questions))

    def _on_questions(self, questions: Sequence[str]) -> list[Judgement]:
        shortened = set(shorten_ids(questions))
        return [line for line in self.judgements() if not shortened.isdisjoint(line.questions)]

    def append(self, **fields: Any) -> None:
        """Add a judgement; it is on the disk when this returns. Raises FileWriteError; nothing has been added then."""
        try:
            lines = self._lines()
        except DamagedLog as error:
            raise GateError(f"{error}; restore the ledger from a copy") from None
        judgement = Judgement(**fields, after=hash_line(lines[-1]) if lines else ORIGIN)
        self._log.rewrite([*lines, judgement.model_dump_json().encode()])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the ledger, so that only one process judges at a time. Waits for the lock. Raises FileWriteError."""
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

    def _lines(self) -> list[bytes]:
        """Return the lines, not verified. Raises DamagedLog."""
        content = self._log.load()
        if content.torn:
            raise DamagedLog(f"{self._path}: the last line is incomplete")
        return content.lines


def _parse(line: bytes) -> Judgement:
    try:
        return Judgement.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"{field}: {first['msg']}" if field else first["msg"]) from None


_CHAIN: Final[ChainFormat[Judgement]] = ChainFormat(ORIGIN, _parse, previous_hash=lambda line: line.after)
