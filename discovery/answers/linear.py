"""Linear inequalities as bounds of a variable: `x < 2`, `-2x > 6`, `1 < x + 1 < 3`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from discovery.answers.algebra import ExpressionParser, NotAnExpression, Number, Sum, TooHard
from discovery.answers.algebra.arithmetic import reduced

_LETTER = re.compile(r"\\?[a-zA-Z]")


class Solved(NamedTuple):
    """The value of a variable at which both sides of a relation are equal."""

    variable: str
    is_rising: bool  # left minus right grows with the variable
    value: str


class Bounded(NamedTuple):
    """Bounds of a variable."""

    variable: str
    bounds: tuple[str, str]
    closed: tuple[bool, bool]


def half_line(left: str, right: str, up: bool, loose: bool) -> Bounded | None:
    """Return the bounds of a relation such as `x < 2`, `2 > x` or `-x > -2`; None if it is not linear.

    `up` says that the sign is < or ≤, `loose` that equality is included.
    """
    if _LETTER.fullmatch(left):
        variable, value, is_below = left, right, up
    elif _LETTER.fullmatch(right):
        variable, value, is_below = right, left, not up
    elif (solved := solve(left, right)) is not None:
        variable, value, is_below = solved.variable, solved.value, up == solved.is_rising
    else:
        return None
    if is_below:
        return Bounded(variable, ("-oo", value), (False, loose and value != "oo"))
    return Bounded(variable, (value, "oo"), (loose and value != "-oo", False))


def segment(parts: Sequence[str], up: bool, loose: Sequence[bool]) -> Bounded | None:
    """Return the bounds of a relation such as `1 < x < 2`, `2 > x > 1` or `2 < 2x < 4`; None if it is not linear."""
    first, middle, last = parts
    if _LETTER.fullmatch(middle):
        return _between(middle, (first, last), loose, up)
    lower, upper = solve(middle, first), solve(middle, last)
    if lower is None or upper is None:
        return None
    return _between(lower.variable, (lower.value, upper.value), loose, up == lower.is_rising)


def _between(variable: str, bounds: tuple[str, str], loose: Sequence[bool], in_order: bool) -> Bounded:
    step = 1 if in_order else -1
    (lower, upper), (is_loose_below, is_loose_above) = bounds[::step], loose[::step]
    return Bounded(variable, (lower, upper), (is_loose_below, is_loose_above))


def solve(left: str, right: str) -> Solved | None:
    """Solve `left = right` for its variable; None if it has not exactly one variable or is not linear."""
    parser = ExpressionParser(f"({left})-({right})")
    try:
        difference = parser.parse()
    except (NotAnExpression, TooHard, OverflowError, RecursionError):
        return None
    names = {name for monomial in difference for name, _ in monomial if name.isalpha() and name not in ("pi", "e", "i")}
    if len(names) != 1 or parser.values:
        return None
    (variable,) = names
    monomial = ((variable, 1),)
    slope: Number = difference.get(monomial, 0)
    rest = {other: factor for other, factor in difference.items() if other != monomial}
    if not slope or any(name == variable for other in rest for name, _ in other):
        return None
    value: Sum = {other: reduced(Fraction(-factor) / slope) for other, factor in rest.items()}
    return Solved(variable, slope > 0, parser.to_expression(value).text)
