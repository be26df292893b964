"""Parse JSON from untrusted sources, so that every error is a ValueError, and write compact JSON."""

from __future__ import annotations

import json
import math
from typing import Any, Final

_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
"""Made once, because making one takes longer than encoding a small object."""


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """Return the value of a JSON text; with `finite`, refuse NaN, infinities and numbers too large for a float.

    Raises ValueError, also for text that is nested too deeply or has a number of too many digits.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite) if finite else json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def compact_json(value: Any) -> str:
    """Return compact JSON with sorted keys, in which NaN and infinities are null."""
    try:
        return _ENCODER.encode(value)
    except ValueError:
        return _ENCODER.encode(_without_infinities(value))


def _without_infinities(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_infinities(member) for key, member in value.items()}
    return [_without_infinities(member) for member in value] if isinstance(value, (list, tuple)) else value


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number
