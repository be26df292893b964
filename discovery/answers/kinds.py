"""Answer kinds, as clients name them: `auto`, `boxed`, `choice`, `number`, `json`, `tools`, `select`, `regex:…` …"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, Final

import re2

from discovery.errors import UnknownAnswerKind

LONGEST_PATTERN: Final = 500
"""Maximum characters of a client's pattern."""

Comparator = Callable[[str], str | None]
"""Maps a text to a key: texts with equal keys are the same answer; None means no answer."""


class ExtractionMethod(StrEnum):
    """How an answer is extracted from a text."""

    AUTO = "auto"  # boxed, else stated (choice, number, yes/no, formula), else the whole text if it is an answer
    BOXED = "boxed"
    CHOICE = "choice"
    NUMBER = "number"
    JSON = "json"  # the last object or array
    CODE = "code"  # the last fenced block, or the whole text; votable with a comparator. Without one, functions are run
    TEXT = "text"  # the whole text; votable with a comparator
    TOOLS = "tools"  # calls of tools, which the upstream's parser reads; never in a text
    SELECT = "select"  # none: the model chooses the reply that the others support best
    SYNTHESISE = "synthesise"  # none: the model writes one reply from several
    REGEX = "regex"  # the last match of a pattern, or of its first group


@dataclass(frozen=True)
class AnswerKind:
    """An extraction method with its argument."""

    method: ExtractionMethod
    argument: str = ""  # pattern for REGEX; name of the comparator for CODE and TEXT

    def __str__(self) -> str:
        return f"{self.method}:{self.argument}" if self.argument else str(self.method)

    @property
    def votable(self) -> bool:
        """Whether answers of this kind can be compared, so that a vote makes sense."""
        return not self.is_judged and (self.method is not ExtractionMethod.TEXT or bool(self.argument))

    @property
    def runs_code(self) -> bool:
        """Whether whole replies are compared by what their functions return."""
        return self.method is ExtractionMethod.CODE and not self.argument

    @property
    def is_judged(self) -> bool:
        """Whether the model may compare whole replies, because no answer is read in a text."""
        return self.method in (ExtractionMethod.SELECT, ExtractionMethod.SYNTHESISE) or self.runs_code

    @property
    def is_declared_votable(self) -> bool:
        """Whether naming this kind declares that there will be an answer to vote on."""
        return self.method is not ExtractionMethod.AUTO and self.votable

    @property
    def is_probeable(self) -> bool:
        """Whether a running branch can be probed for such an answer in a few tokens."""
        unprobeable = (ExtractionMethod.JSON, ExtractionMethod.CODE, ExtractionMethod.TEXT, ExtractionMethod.TOOLS)
        return self.method not in unprobeable and not self.is_judged

    @property
    def comparator(self) -> Comparator:
        """The comparator of CODE and TEXT. Without a name, texts are never answers."""
        return COMPARATORS[self.method].get(self.argument, _nothing) if self.method in COMPARATORS else _nothing

    @cached_property
    def pattern(self) -> Any:
        """The pattern of REGEX, compiled by RE2, whose run time is linear in the text for every pattern."""
        return _compile(self.argument)


def parse_kind(spec: str) -> AnswerKind:
    """Parse a kind as clients name it. Raises UnknownAnswerKind."""
    name, colon, argument = spec.partition(":")
    try:
        method = ExtractionMethod(name)
    except ValueError:
        raise UnknownAnswerKind(
            f"unknown answer kind {spec!r}; use one of {', '.join(ExtractionMethod)} (regex:PATTERN)"
        ) from None
    kind = AnswerKind(method, argument)
    if method is ExtractionMethod.REGEX:
        if not 0 < len(argument) <= LONGEST_PATTERN:
            raise UnknownAnswerKind(
                f"regex: needs a pattern of 1 to {LONGEST_PATTERN} characters, such as regex:v(\\d+)"
            )
        _compile(argument)
    elif colon and argument not in COMPARATORS.get(method, {}):
        known = [f"{method}:{one}" for one in COMPARATORS.get(method, {})]
        raise UnknownAnswerKind(f"unknown answer kind {spec!r}; use {' or '.join([str(method), *known])}")
    return kind


@lru_cache(maxsize=256)
def _compile(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = 1 << 20
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise UnknownAnswerKind(f"regex:{pattern}: {reason} (patterns use RE2 syntax)") from None


def _words(text: str) -> str | None:
    """Return the words of a text, ignoring case and punctuation."""
    parts = "".join(char if char.isalnum() else " " for char in text.casefold()).split()
    return " ".join(parts) or None


def _lines(code: str) -> str | None:
    """Return the lines of a program, ignoring trailing spaces and empty lines."""
    return "\n".join(line.rstrip() for line in code.splitlines() if line.strip()) or None


def _nothing(_: str) -> str | None:
    return None


COMPARATORS: Final[Mapping[ExtractionMethod, Mapping[str, Comparator]]] = MappingProxyType(
    {ExtractionMethod.TEXT: {"words": _words}, ExtractionMethod.CODE: {"lines": _lines}}
)

AUTO: Final = AnswerKind(ExtractionMethod.AUTO)
