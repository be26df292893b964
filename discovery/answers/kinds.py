"""The kinds of answers, as a client names them: `auto`, `boxed`, `choice`, `number`, `json`, `regex:…`, `code`,
`text`."""

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

Comparator = Callable[[str], str | None]
"""What a text comes down to: texts that come down to the same are the same answer; None is no answer."""


class ExtractionMethod(StrEnum):
    """How an answer is found in a text."""

    AUTO = "auto"  # boxed, else stated: a choice, a number, yes or no, a formula; else the whole text, if it is one
    BOXED = "boxed"
    CHOICE = "choice"
    NUMBER = "number"
    JSON = "json"  # the last object or array
    CODE = "code"  # the last fenced block, or the whole text; votable with a comparator
    TEXT = "text"  # the whole text; votable with a comparator
    REGEX = "regex"  # the last match of a pattern, or of its first group


@dataclass(frozen=True)
class AnswerKind:
    """A way of finding answers, with what it needs to know."""

    method: ExtractionMethod
    argument: str = ""  # REGEX: the pattern; CODE, TEXT: the comparator's name

    def __str__(self) -> str:
        return f"{self.method}:{self.argument}" if self.argument else str(self.method)

    @property
    def votable(self) -> bool:
        """Whether two answers of this kind can be found to be the same."""
        return self.method not in (ExtractionMethod.CODE, ExtractionMethod.TEXT) or bool(self.argument)

    @property
    def is_declared_votable(self) -> bool:
        """Whether a client that names it says there will be such an answer."""
        return self.method is not ExtractionMethod.AUTO and self.votable

    @property
    def is_probeable(self) -> bool:
        """Whether a running branch can be asked for such an answer in a few words."""
        return self.method not in (ExtractionMethod.JSON, ExtractionMethod.CODE, ExtractionMethod.TEXT)

    @property
    def comparator(self) -> Comparator:
        """CODE, TEXT: what tells which texts are the same. Without a name no two are: nothing is."""
        return COMPARATORS[self.method].get(self.argument, _nothing) if self.method in COMPARATORS else _nothing

    @cached_property
    def pattern(self) -> Any:
        """REGEX: compiled by RE2, which takes time in proportion to the text whatever the pattern."""
        return _compile(self.argument)


def parse_kind(spec: str) -> AnswerKind:
    """A kind as a client names it. Raises UnknownAnswerKind."""
    name, colon, argument = spec.partition(":")
    try:
        way = ExtractionMethod(name)
    except ValueError:
        raise UnknownAnswerKind(
            f"answers are read as {', '.join(map(str, ExtractionMethod))} (regex:PATTERN), not {spec!r}"
        ) from None
    kind = AnswerKind(way, argument)
    if way is ExtractionMethod.REGEX:
        if not 0 < len(argument) <= LONGEST_PATTERN:
            raise UnknownAnswerKind(f"regex: takes a pattern of 1 to {LONGEST_PATTERN} characters: regex:v(\\d+)")
        _compile(argument)
    elif colon and argument not in COMPARATORS.get(way, {}):
        known = [f"{way}:{one}" for one in COMPARATORS.get(way, {})]
        raise UnknownAnswerKind(f"there is no {spec!r}; there is {', '.join([str(way), *known])}")
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
        raise UnknownAnswerKind(f"regex:{pattern}: {reason} (patterns are RE2's)") from None


def _words(text: str) -> str | None:
    """The words of a text, whatever their case and the marks between them."""
    words = "".join(char if char.isalnum() else " " for char in text.casefold()).split()
    return " ".join(words) or None


def _lines(code: str) -> str | None:
    """The lines of a program, whatever the spaces at their ends and the empty lines between."""
    return "\n".join(line.rstrip() for line in code.splitlines() if line.strip()) or None


def _nothing(_: str) -> str | None:
    return None


COMPARATORS: Final[Mapping[ExtractionMethod, Mapping[str, Comparator]]] = MappingProxyType(
    {ExtractionMethod.TEXT: {"words": _words}, ExtractionMethod.CODE: {"lines": _lines}}
)

AUTO: Final = AnswerKind(ExtractionMethod.AUTO)
