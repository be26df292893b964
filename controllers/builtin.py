"""The table of built-in controllers."""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import Any, Final

from controllers.baselines import (
    CMC,
    AdaptiveConsistency,
    AdaptiveWaves,
    AnswerConsistency,
    BestOfInfinity,
    CertifiedConsistency,
    ConfidenceInformed,
    ConfidentWaves,
    EarlyStopping,
    MarginAdversarial,
    ParallelProbe,
    SelfConsistency,
    ShortestFirst,
    Single,
)
from controllers.episode import Controller, Factory
from controllers.errors import UnknownController
from controllers.everything import Everything

BUILT_IN: Final = MappingProxyType[str, type[Controller]](
    {
        "single": Single,
        "self_consistency": SelfConsistency,
        "adaptive_consistency": AdaptiveWaves,
        "asc": AdaptiveConsistency,
        "esc": EarlyStopping,
        "best_of_infinity": BestOfInfinity,
        "certified": CertifiedConsistency,
        "cisc": ConfidenceInformed,
        "confident": ConfidentWaves,
        "answer_consistency": AnswerConsistency,
        "parallel_probe": ParallelProbe,
        "mars": MarginAdversarial,
        "short_m_at_k": ShortestFirst,
        "cmc": CMC,
        "everything": Everything,
    }
)
ALIASES: Final = MappingProxyType({"sc": "self_consistency"})
"""Other names of built-in controllers."""
PINNABLE: Final = frozenset(
    {"self_consistency", "asc", "esc", "cisc", "mars", "parallel_probe", "short_m_at_k", "everything"}
)
"""Controllers that accept a number of chains, as in `asc@64`."""
ADMIN_ONLY: Final = frozenset({"everything"})
"""Controllers that spend tokens regardless of the answer. Live, only admins may name them."""
MOST_PINNED_CHAINS: Final = 1024
"""Largest N of `NAME@N`."""
DEFAULT: Final = "adaptive_consistency"
"""Controller where none is named. It needs no probes, and its votes favour neither short chains nor long ones."""
BASELINE: Final = DEFAULT
"""Fallback when a controller fails. It continues from any state and counts the votes of the branches already open."""


def create(name: str, beta: float) -> Controller:
    """Create a controller for one episode. Raises UnknownController or BetaError."""
    return find(name)(beta)


def is_admin_only(name: str) -> bool:
    """Return whether only admins may name the controller `name` or `name@N`."""
    plain = name.partition("@")[0]
    return ALIASES.get(plain, plain) in ADMIN_ONLY


def find(name: str) -> Factory:
    """Return the factory of the controller `name`, or of `name@N`, which opens N chains whatever β is.

    Raises UnknownController, which lists the existing names.
    """
    plain, at, number = name.partition("@")
    plain = ALIASES.get(plain, plain)
    made: Any = BUILT_IN.get(plain)
    if made is None:
        raise UnknownController(f"there is no controller {name!r}; there are {', '.join(BUILT_IN)}")
    if not at:
        return made  # type: ignore[no-any-return]
    if plain not in PINNABLE:
        raise UnknownController(f"{name}: {plain} takes no number of chains; {', '.join(sorted(PINNABLE))} do")
    if not (number.isascii() and number.isdigit() and len(number) <= 4 and 1 <= int(number) <= MOST_PINNED_CHAINS):
        raise UnknownController(f"{name}: the number of chains must be from 1 to {MOST_PINNED_CHAINS}, not {number!r}")
    return partial(made, samples=int(number))
