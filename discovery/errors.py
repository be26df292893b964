"""What can go wrong on the offline side.

DiscoveryError
├── BadRecording    a file that is not what it should be; the message names the record and the reason
├── RecordingsNotFound     what was asked for is not among the recordings there are
├── EngineError     jobs cannot be run the way that was asked for
├── FileWriteError      a file cannot be written where it was asked for
├── StoreError      the store cannot be opened, read or written
│   ├── CorruptRow  a row of it is not what was written, or cannot be read
│   └── UnstorableValue  a value is none that a row can hold
├── TraceError      a file of traces cannot be written or read
├── Censored        a replay asked for more of a branch than was recorded
├── ExplorerError   who writes controllers cannot: no answer, no key, no money left, no file
│   └── BudgetExhausted  the budget allows no further call
├── DamagedLog      a hash-chained log cannot be read, or is not as it was written
├── HistoryError    the record of a run is not what was written, or of another run
├── GateError       a controller cannot be judged as asked; one that is judged is never an error
├── PromotionError  what is installed cannot be changed as asked; it is as it was
└── CollectError    the proxy does not record as asked, or the file is of other recordings; what is in it is sound
"""

from collections.abc import Iterable
from difflib import get_close_matches


class DiscoveryError(Exception):
    """Base of every error raised in this package."""


class BadRecording(DiscoveryError):
    """A recording is malformed. Nothing of its file is taken."""


class RecordingsNotFound(DiscoveryError):
    """No recordings are where they were said to be, or none of what was asked for."""


class EngineError(DiscoveryError):
    """Jobs cannot be run the way that was asked for."""


class FileWriteError(DiscoveryError):
    """A file cannot be written where it was asked for."""


class StoreError(DiscoveryError):
    """The store cannot be opened, read or written; the message names its file."""


class CorruptRow(StoreError):
    """A row of the store is not what was written, or cannot be read."""


class UnstorableValue(StoreError):
    """A value is none that a row can hold. Nothing is wrong with the store."""


class TraceError(DiscoveryError):
    """A file of traces cannot be written, or is none."""


class BranchCensored(DiscoveryError):
    """A branch was recorded only so far, and the replay went past it."""


class UnknownAnswerKind(DiscoveryError):
    """There is no such kind of answers."""


class ExplorerError(DiscoveryError):
    """An explorer gives no candidate; the message says what to do."""


class BudgetExhausted(ExplorerError):
    """The budget allows no further call."""


class DamagedLog(DiscoveryError):
    """A hash-chained log cannot be read, or a line of it is not what was written; the message names file and line."""


class HistoryError(DiscoveryError):
    """A run's record is broken, or was begun with other settings."""


class GateError(DiscoveryError):
    """There is nothing to judge by: no recordings, or not the ones a verdict needs."""


class PromotionError(DiscoveryError):
    """The registry refuses; nothing has changed."""


class CollectError(DiscoveryError):
    """Nothing more can be collected as asked; the message says what to do. What is in the file is sound."""


def unknown_field(name: str, known: Iterable[str]) -> str:
    """The message about a field that does not exist: the nearest known one, and all of them."""
    names = list(known)
    near = get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"there is no such field; {hint}there are {', '.join(names)}"
