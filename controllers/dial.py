"""β, the one dial, and how a controller's numbers follow it."""

from __future__ import annotations

import math
import re
from typing import Final

from controllers.errors import BetaError

# A plain decimal in ASCII: float() would also take nan, 1e400, 1_000 and full-width digits.
_DECIMAL: Final = re.compile(r"(?:[0-9]{1,3}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})", re.ASCII)


def parse_beta(text: str, name: str) -> float:
    """β from a user's text. Raises BetaError, which says that `name` is wrong."""
    if not _DECIMAL.fullmatch(text) or not 0 <= float(text) <= 1:
        raise BetaError(f"{name} must be a decimal number from 0 to 1 such as 0.5, not {text[:40]!r}")
    return float(text)


def check_beta(beta: float) -> float:
    """`beta` as a float. Raises BetaError unless it is a number in [0, 1]."""
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
        raise BetaError(f"beta must be a number from 0 to 1, not {beta!r}")
    return float(beta)


def linear(low: float, high: float, beta: float) -> float:
    """From `low` at β = 0 to `high` at β = 1, in a straight line."""
    return low + (high - low) * beta


MOST_CHAINS: Final = 64


def chains(beta: float, pinned: int | None) -> int:
    """How many chains a policy may sample: `pinned` if it is, else doubling from 1 at β = 0 to 64 at β = 1."""
    beta = check_beta(beta)
    return doubling(MOST_CHAINS, beta) if pinned is None else pinned


def doubling(high: int, beta: float) -> int:
    """From 1 at β = 0 to `high` at β = 1, by equal factors: each step of β costs as many times the one before."""
    return round(math.pow(high, beta))
