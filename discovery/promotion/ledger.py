"""Ledger of a sealed split: one line for every finalist ever judged on it, in the order they were judged.

Each judgement spends a part of the error rate that a split allows over its lifetime, so no line is ever removed. The
lines form a hash chain, and a modified file is refused. A judgement that the machine disturbed has a line as well. It
spends nothing unless there were too many of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from discovery.data.atomic_files import check_writable_path
from discovery.data.hash_chained_log import ChainFormat, hash_line
from discovery.errors import DamagedLog, GateError, problem_text
from discovery.promotion.storage.ledger_storage import LedgerDatabase, LedgerFile, LedgerStorage
from discovery.store import StorePlace

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
    model: str = Field("", description="the one model that it was judged for; empty and not written: all models")
    sequence: str = Field(
        "", description="id of the sequential judgement of which it is a look; empty and not written: none"
    )
    after: str = Field(description="SHA-256 of the line before")


def fingerprint(questions: Iterable[str], models: Iterable[str]) -> str:
    """Return the hash that identifies a split: its questions and models."""
    parts = [sorted(set(questions)), sorted(set(models))]
    return sha256(json.dumps(parts).encode()).hexdigest()


def shorten_ids(questions: Iterable[str]) -> list[str]:
    """Return the question ids as a line keeps them: shortened, sorted, each once."""
    return sorted({question[:ID_DIGITS] for question in questions})


def check_ledger(place: StorePlace) -> None:
    """Raise FileWriteError, before costly work, if a ledger in a file could not be written."""
    if isinstance(place, Path):
        check_writable_path(place, "--ledger")


class Ledger:
    """A ledger in a file or a database; one that does not exist has no lines."""

    def __init__(self, place: StorePlace) -> None:
        self.place = place
        self._storage: LedgerStorage = LedgerFile(place) if isinstance(place, Path) else LedgerDatabase(place)

    def judgements(self) -> list[Judgement]:
        """Return all judgements. Raises GateError, which names the place and the line, if a line was modified."""
        return self._verified(self.lines())

    def lines(self) -> list[bytes]:
        """Return the lines, not verified. Raises GateError."""
        try:
            return self._storage.lines()
        except DamagedLog as error:
            raise GateError(f"{error}; {_RESTORE}") from None

    def _verified(self, lines: Sequence[bytes]) -> list[Judgement]:
        try:
            return _CHAIN.verify(lines, self._storage.name)
        except DamagedLog as error:
            raise GateError(f"{error}; {_RESTORE}") from None

    def find(self, split: str, digest: str, champion: str) -> Judgement | None:
        """Return the judgement of a finalist against a champion on a split, if there is one."""
        wanted = (split, digest, champion)
        judged = (line for line in self.judgements() if line.verdict != DISTURBED and not line.sequence)
        return next((line for line in judged if (line.split, line.digest, line.champion) == wanted), None)

    def next_k(self, questions: Sequence[str]) -> int:
        """Return the position of the next judgement among those on any of these questions, from 1.

        An extended split shares questions with the old one, so its count continues. All looks of a sequential judgement
        count as one.
        """
        return _next_k(self._on_questions(questions))

    def next_k_beyond(self, questions: Sequence[str]) -> int:
        """Return the position of the next judgement among all those that include any question but these, from 1."""
        known = set(shorten_ids(questions))
        return _next_k([line for line in self.judgements() if not known.issuperset(line.questions)])

    def latest_look(self, sequence: str) -> Judgement | None:
        """Return the latest look of a sequential judgement, if there is one."""
        looks = (line for line in reversed(self.judgements()) if line.verdict != DISTURBED)
        return next((line for line in looks if line.sequence == sequence), None)

    def questions_at_level(self, k: int, sequence: str) -> set[str]:
        """Return the shortened ids of the questions on which a judgement other than this sequence was the k-th."""
        others = (line for line in self.judgements() if line.verdict != DISTURBED and line.sequence != sequence)
        return {question for line in others if line.k == k for question in line.questions}

    def disturbances(self, questions: Sequence[str]) -> int:
        """Count the judgements on any of these questions that the machine has disturbed."""
        return sum(line.verdict == DISTURBED for line in self._on_questions(questions))

    def _on_questions(self, questions: Sequence[str]) -> list[Judgement]:
        shortened = set(shorten_ids(questions))
        return [line for line in self.judgements() if not shortened.isdisjoint(line.questions)]

    def append(self, **fields: Any) -> None:
        """Add a judgement. It is on the disk when this returns, or at the end of the context `locked`.

        Raises FileWriteError or StoreError; nothing has been added then.
        """
        lines = self.lines()
        judgement = Judgement(**fields, after=hash_line(lines[-1]) if lines else ORIGIN)
        unset = {name for name in ("model", "sequence") if not getattr(judgement, name)}
        content = judgement.model_dump_json(exclude=unset)
        self._storage.add(lines, [content.encode()])

    def extend(self, lines: Sequence[bytes]) -> None:
        """Add lines of another ledger, which must follow those of this one. Raises the errors of `append`."""
        known = self.lines()
        self._verified([*known, *lines])
        self._storage.add(known, lines)

    def locked(self) -> AbstractContextManager[None]:
        """Lock the ledger, so that only one process judges at a time. Waits for the lock.

        The context raises FileWriteError or StoreError.
        """
        return self._storage.locked()


_RESTORE: Final = "restore the ledger from a copy"


def _next_k(lines: Sequence[Judgement]) -> int:
    judged = {line.sequence or line.after for line in lines if line.verdict != DISTURBED}
    disturbed = sum(line.verdict == DISTURBED for line in lines)
    return 1 + len(judged) + max(0, disturbed - FREE_DISTURBANCES)


def _parse(line: bytes) -> Judgement:
    try:
        return Judgement.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"{field}: {problem_text(first)}" if field else problem_text(first)) from None


_CHAIN: Final[ChainFormat[Judgement]] = ChainFormat(ORIGIN, _parse, previous_hash=lambda line: line.after)
