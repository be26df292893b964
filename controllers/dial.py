"""β, the parameter of every controller, and how other parameters follow from it."""

from __future__ import annotations

import math
import re
from typing import Final

from controllers.errors import BetaError

MOST_CHAINS: Final = 64
"""Chains at β = 1, unless a number is pinned."""

# A plain decimal in ASCII: float() would also take nan, 1e400, 1_000 and full-width digits.
_DECIMAL: Final = re.compile(r"(?:[0-9]{1,3}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})", re.ASCII)


def parse_beta(text: str, name: str) -> float:
    """Parse β from a user's text. Raises BetaError, which names `name` as the field."""
    if not _DECIMAL.fullmatch(text) or not 0 <= float(text) <= 1:
        raise BetaError(f"{name} must be a decimal number from 0 to 1 such as 0.5, not {text[:40]!r}")
    return float(text)


def check_beta(beta: float) -> float:
    """Return `beta` as a float. Raises BetaError unless it is a number in [0, 1]."""
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
        raise BetaError(f"beta must be a number from 0 to 1, not {beta!r}")
    return float(beta)


def linear(low: float, high: float, beta: float) -> float:
    """Interpolate linearly from `low` at β = 0 to `high` at β = 1."""
    return low + (high - low) * beta


def chains(beta: float, pinned: int | None) -> int:
    """Return the number of chains: `pinned` if it is given, else from 1 at β = 0 to 64 at β = 1, exponentially."""
    beta = check_beta(beta)
    return doubling(MOST_CHAINS, beta) if pinned is None else pinned


def doubling(high: int, beta: float) -> int:
    """Interpolate exponentially from 1 at β = 0 to `high` at β = 1: equal steps of β multiply the cost equally."""
    return round(math.pow(high, beta))
