"""Run by `judge.py` in a process of its own: says of two answers whether math-verify holds them to be equal.

A line of JSON in, a list of two texts; a line of JSON out, true or false. It may take for ever or eat all memory on
what models write, which is why it runs here: limited, without the caller's environment, and to be killed.

Only math-verify's LaTeX reader is used: its reader of plain expressions evaluates them as Python.
"""

import json
import resource
import signal
import sys

from math_verify import LatexExtractionConfig, parse, verify

MEMORY = 1 << 30  # bytes
LAST_RESORT_S = 30  # should the caller have died


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
    return bool(verify(left, right, float_rounding=12, numeric_precision=20, timeout_seconds=None))


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
