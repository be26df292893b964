"""Hide signals from controllers that do not declare them.

More signals may be known than a controller declares, because a recording or the shadow needs them. A controller's
decisions must not depend on that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from controllers import Action, Advanced, Environment, Fact, Probed, Signal


class DeclaredSignals:
    """Environment that gives only the declared signals, and keeps the latest facts with all signals."""

    def __init__(self, environment: Environment, declared: frozenset[Signal]) -> None:
        self.measured: Sequence[Fact] = ()  # facts of the latest round, with all signals
        self._environment = environment
        self._declared = declared

    async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
        self.measured = await self._environment.execute(actions)
        return hide_undeclared(self.measured, self._declared)


def hide_undeclared(facts: Sequence[Fact], declared: frozenset[Signal]) -> list[Fact]:
    """Return the facts with the declared signals only."""
    return [_hide_undeclared(fact, declared) for fact in facts]


def _hide_undeclared(fact: Fact, declared: frozenset[Signal]) -> Fact:
    if isinstance(fact, Advanced):
        if Signal.INTERVALS in declared or (fact.confidence is None and fact.lowest is None):
            return fact
        return replace(fact, confidence=None, lowest=None)
    if isinstance(fact, Probed) and Signal.PROBES not in declared and fact.confidence is not None:
        return replace(fact, confidence=None)
    return fact
