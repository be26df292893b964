"""Run by `judge.py` in a process of its own: says of two answers whether math-verify holds them to be equal.

A line of JSON in, a list of two texts; a line of JSON out, true or false. It may take for ever or eat all memory on
what models write, which is why it runs here: limited, without the caller's environment, and to be killed.

Only math-verify's LaTeX reader is used: its reader of plain expressions evaluates them as Python.
"""

import json
import resource
import signal
import sys

import sympy
from math_verify import LatexExtractionConfig, parse, verify

MEMORY = 1 << 30  # bytes
LAST_RESORT_S = 30  # should the caller have died
DIGITS = 30
TINY = 1e-6  # math-verify rounds to twelve places, which leaves little of numbers below
TOLERANCE = 1e-12  # of the larger


def read(text: str) -> list[object]:
    """What math-verify makes of an answer; an empty list if nothing."""
    found: list[object] = parse(
        f"\\boxed{{{text}}}",
        extraction_config=[LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return found


def same(one: str, other: str) -> bool:
    """Whether two answers are equal, to twelve digits where they are numbers."""
    left, right = read(one), read(other)
    if not left or not right:
        return False
    if not verify(left, right, float_rounding=12, numeric_precision=20, timeout_seconds=None):
        return False
    return not _differ(left[0], right[0])


def _differ(left: object, right: object) -> bool:
    """Whether two things that are equal to twelve places are not: 1/2004! and 1/2006!."""
    if isinstance(left, sympy.MatrixBase) and isinstance(right, sympy.MatrixBase):
        return any(map(_differ, left, right))
    if isinstance(left, sympy.Tuple | sympy.Interval) and isinstance(right, sympy.Tuple | sympy.Interval):
        return any(map(_differ, left.args, right.args))
    if isinstance(left, sympy.FiniteSet) and isinstance(right, sympy.FiniteSet):
        pairs = zip(sorted(left, key=_size), sorted(right, key=_size), strict=False)
        return any(_differ(one, other) for one, other in pairs)
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
        return False
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    at = {symbol: sympy.Rational(997 + 89 * number, 1009) for number, symbol in enumerate(symbols)}
    one, other = (sympy.N(side.subs(at), DIGITS, maxn=1000) for side in (left, right))
    if not (one.is_number and other.is_number) or max(abs(one), abs(other)) > TINY:
        return False
    difference = sympy.N((left - right).subs(at), DIGITS, maxn=1000)
    return bool(abs(difference) > TOLERANCE * max(abs(one), abs(other)))


def _size(value: sympy.Basic) -> float:
    try:
        return float(sympy.N(value).as_real_imag()[0])
    except (TypeError, ValueError):
        return 0.0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Answer until there are no more questions."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    read("1")  # what is loaded late is loaded now
    _say("ready")
    for line in sys.stdin:
        signal.alarm(LAST_RESORT_S)
        try:
            equal = same(*json.loads(line))
        except Exception:  # whatever it stumbles over: then it has not found them equal
            equal = False
        signal.alarm(0)
        _say(json.dumps(equal))


main()
