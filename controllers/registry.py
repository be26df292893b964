"""Which controllers there are."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from controllers.baselines import CMC, AdaptiveConsistency, ParallelProbe, SelfConsistency, Single
from controllers.episode import Controller
from controllers.errors import UnknownController

BUILT_IN: Final = MappingProxyType[str, type[Controller]](
    {
        "single": Single,
        "self_consistency": SelfConsistency,
        "asc": AdaptiveConsistency,
        "parallel_probe": ParallelProbe,
        "cmc": CMC,
    }
)


def create(name: str, beta: float) -> Controller:
    """A fresh controller for one episode. Raises UnknownController or BetaError."""
    return find(name)(beta)


def find(name: str) -> type[Controller]:
    """The controller called `name`. Raises UnknownController, naming those there are."""
    try:
        return BUILT_IN[name]
    except KeyError:
        raise UnknownController(f"there is no controller {name!r}; there are {', '.join(BUILT_IN)}") from None
