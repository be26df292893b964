"""Worker process of `judge.py`: compares two answers with math-verify.

Input is one JSON line per pair, a list of two texts; output is one JSON line, true or false. A comparison of model
output may never end or use all memory. It therefore runs in this process: with limits, without the caller's
environment, and its caller can kill it.

Only math-verify's LaTeX parser is used, because its parser of plain expressions evaluates them as Python.
"""

import json
import resource
import signal
import sys

import sympy
from math_verify import LatexExtractionConfig, parse, verify

MEMORY = 1 << 30  # bytes
LAST_RESORT_S = 30  # ends this process if its parent has died
DIGITS = 30
TINY = 1e-6  # math-verify rounds to twelve decimal places, too few for numbers below this
TOLERANCE = 1e-12  # relative to the larger number


def read(text: str) -> list[object]:
    """Parse an answer with math-verify; an empty list if that fails."""
    parsed: list[object] = parse(
        f"\\boxed{{{text}}}",
        extraction_config=[LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return parsed


def same(first: str, second: str) -> bool:
    """Return whether two answers are equal, to twelve digits where they are numbers."""
    left, right = read(first), read(second)
    if not left or not right:
        return False
    if not verify(left, right, float_rounding=12, numeric_precision=20, timeout_seconds=None):
        return False
    return not _differ(left[0], right[0])


def _differ(left: object, right: object) -> bool:
    """Return whether values that agree to twelve places differ after all, as 1/2004! and 1/2006! do."""
    if isinstance(left, sympy.MatrixBase) and isinstance(right, sympy.MatrixBase):
        return any(map(_differ, left, right))
    if isinstance(left, sympy.Tuple | sympy.Interval) and isinstance(right, sympy.Tuple | sympy.Interval):
        return any(map(_differ, left.args, right.args))
    if isinstance(left, sympy.FiniteSet) and isinstance(right, sympy.FiniteSet):
        pairs = zip(sorted(left, key=_size), sorted(right, key=_size), strict=False)
        return any(_differ(first, second) for first, second in pairs)
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
        return False
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    at = {symbol: sympy.Rational(997 + 89 * number, 1009) for number, symbol in enumerate(symbols)}
    first, second = (sympy.N(side.subs(at), DIGITS, maxn=1000) for side in (left, right))
    if not (first.is_number and second.is_number) or max(abs(first), abs(second)) > TINY:
        return False
    difference = sympy.N((left - right).subs(at), DIGITS, maxn=1000)
    return bool(abs(difference) > TOLERANCE * max(abs(first), abs(second)))


def _size(value: sympy.Basic) -> float:
    try:
        return float(sympy.N(value).as_real_imag()[0])
    except (TypeError, ValueError):
        return 0.0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Compare pairs until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    read("1")  # loads what math-verify imports lazily
    _say("ready")
    for line in sys.stdin:
        signal.alarm(LAST_RESORT_S)
        try:
            equal = same(*json.loads(line))
        except Exception:  # any failure means that equality was not established
            equal = False
        signal.alarm(0)
        _say(json.dumps(equal))


main()
