"""Scripted environment that reports signals: each chain has its own confidences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from controllers import Action, Advanced, Fact
from tests.fakes import Chain, ScriptedEnvironment


class SignalledEnvironment(ScriptedEnvironment):
    """Reports for chain i the confidences `confidences[i]` in turn, an interval or a probe each; the last one repeats.

    A confidence of None means that the signal is absent. A probe of a finished chain has none, as live and in replay.
    """

    def __init__(
        self, chains: Sequence[Chain], interval: int, confidences: Sequence[Sequence[int | None]], probe_cost: int = 0
    ) -> None:
        super().__init__(chains, interval, lambda _: probe_cost)
        self.confidences = confidences
        self.reported = [0] * len(chains)
        self.finished: set[int] = set()

    async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
        return [self._with_signal(fact) for fact in await super().execute(actions)]

    def _with_signal(self, fact: Fact) -> Fact:
        series, at = self.confidences[fact.branch], self.reported[fact.branch]
        value = series[min(at, len(series) - 1)]
        if isinstance(fact, Advanced):
            self.reported[fact.branch] += 1
            self.finished |= {fact.branch} if fact.finished else set()
            return replace(fact, confidence=value, lowest=value) if fact.tokens else fact
        return fact if fact.branch in self.finished else replace(fact, confidence=value)
