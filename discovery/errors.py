"""The errors of this package.

DiscoveryError
├── BadRecording         a file is malformed; the message names the record and the reason
├── RecordingsNotFound   there are no recordings, or none that match the request
├── EngineError          jobs cannot be run with the selected engine
│   └── WorkerDied       a process of the engine's pool has ended
├── FileWriteError       a file cannot be written
├── StoreError           the store cannot be opened, read or written
│   ├── CorruptRow       a row was changed or cannot be read
│   ├── StoreNotCreated  the database holds no store yet
│   ├── StoreDamaged     the database finds its own file damaged
│   ├── UncertainCommit  the connection was lost while a transaction was committed
│   └── UnstorableValue  no column can hold a value
├── TraceError           a file of traces cannot be written or read
├── BranchCensored       a replay needed more of a branch than was recorded
├── UnknownAnswerKind    an answer kind does not exist
├── ExplorerError        an explorer cannot propose a candidate
│   └── BudgetExhausted  the budget allows no further call
├── DamagedLog           a hash-chained log is unreadable or was changed
├── HistoryError         the record of a run is damaged, or belongs to another run
├── GateError            a finalist cannot be judged; a rejected finalist is not an error
├── PromotionError       the registry refuses a change and stays as it was
│   └── RegistryAway     the database of the registry cannot be reached now
└── CollectError         collecting cannot continue; the file stays valid
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails


class DiscoveryError(Exception):
    """Base of every error raised in this package."""


class BadRecording(DiscoveryError):
    """A recording is malformed. Nothing of its file is used."""


class RecordingsNotFound(DiscoveryError):
    """There are no recordings at a path, or none that match the request."""


class EngineError(DiscoveryError):
    """Jobs cannot be run with the selected engine."""


class WorkerDied(EngineError):
    """A worker process of a pool has died."""


class FileWriteError(DiscoveryError):
    """A file cannot be written."""


class StoreError(DiscoveryError):
    """The store cannot be opened, read or written; the message names its file."""


class CorruptRow(StoreError):
    """A row of the store was changed or cannot be read."""


class StoreNotCreated(StoreError):
    """The database holds no store yet."""


class StoreDamaged(StoreError):
    """The database finds its own file damaged."""


class UncertainCommit(StoreError):
    """The connection was lost while a transaction was committed. Repeating it is safe: known rows are skipped."""


class UnstorableValue(StoreError):
    """No column can hold a value. The store itself is fine."""


class TraceError(DiscoveryError):
    """A file of traces cannot be written, or is not one."""


class BranchCensored(DiscoveryError):
    """A replay needed more of a branch than was recorded."""


class UnknownAnswerKind(DiscoveryError):
    """An answer kind does not exist."""


class ExplorerError(DiscoveryError):
    """An explorer cannot propose a candidate; the message says what to do."""


class BudgetExhausted(ExplorerError):
    """The budget allows no further call."""


class DamagedLog(DiscoveryError):
    """A hash-chained log is unreadable or was changed; the message names the file and line."""


class HistoryError(DiscoveryError):
    """The record of a run is damaged, or was begun with other settings."""


class GateError(DiscoveryError):
    """A finalist cannot be judged: recordings are missing or unsuitable for a verdict."""


class PromotionError(DiscoveryError):
    """The registry refuses a change; nothing has changed."""


class RegistryAway(PromotionError):
    """The database of the registry cannot be read or written now; the same may be tried again later."""


class CollectError(DiscoveryError):
    """Collecting cannot continue; the message says what to do. The file stays valid."""


def install_hint(extra: str) -> str:
    """Return how to install an extra of this package."""
    return f"pip install '.[{extra}]' in a checkout"


def unknown_field(name: str, known: Iterable[str]) -> str:
    """Return the message about a field that does not exist, with the nearest known field and all of them."""
    names = list(known)
    near = get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"there is no such field; {hint}known fields: {', '.join(names)}"


def problem_text(details: ErrorDetails) -> str:
    """Return the problem that pydantic found, in the words of the other messages."""
    problem = details["msg"].removeprefix("Value error, ").replace("Input should", "it must")
    return problem.removesuffix(".")


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first problem of an object that `model` read: the field, and what is wrong with it."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place, problem = first["loc"], first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden" and len(place) == 1:
        problem = unknown_field(str(place[0]), model.model_fields)
    return "".join(f"{part}: " for part in place) + problem
