"""Vocabulary of expressions: sums of rational multiples of products of powers, and limits on their size."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Final, NamedTuple

MOST_BITS: Final = 4096
"""Maximum bits of a number."""
MOST_TERMS: Final = 64
"""Maximum terms of a sum."""
MOST_DEPTH: Final = 24
"""Maximum nesting of an expression."""
MOST_TOKENS: Final = 400
"""Maximum tokens of an expression."""
MOST_DIVIDED: Final = 10_000
"""Largest divisor tried when a number is factored."""

Number = int | Fraction
Monomial = tuple[tuple[str, Number], ...]  # (atom, exponent) pairs, sorted; () is the constant
Sum = Mapping[Monomial, Number]  # coefficients by monomial, none of them 0

ONE: Final[Monomial] = ()


class NotAnExpression(Exception):
    """The text is not an expression."""


class TooHard(Exception):
    """The expression would take too long, or grow too large, to normalize."""


class Expression(NamedTuple):
    """A normalized expression."""

    text: str
    exact: bool  # no other normalized text has the same value
    value: complex | None  # numerical value with fixed values for variables; None if unknown
