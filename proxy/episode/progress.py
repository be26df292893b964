"""Report of an episode after each round, as a line of text or as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from controllers import Advanced, State, Verb
from proxy.environment.episode_environment import EpisodeEnvironment
from proxy.errors import clipped

LINE_VOTES: Final = 5
"""Maximum number of answers in a line."""
ANSWER_CHARS: Final = 40
"""Maximum number of characters of each answer in a report."""
_ACTIONS: Final[Mapping[Verb, str]] = MappingProxyType(
    {Verb.BRANCH: "open", Verb.CONTINUE: "advance", Verb.PROBE: "probe", Verb.PRUNE: "prune"}
)
"""Names of actions in a report."""


class RoundReport(NamedTuple):
    """The episode at the end of a round. Read it before the next round: it refers to the running episode."""

    environment: EpisodeEnvironment
    state: State

    @property
    def line(self) -> str:
        """A line on the episode so far: round, branches, votes and tokens."""
        state = self.state
        counts = [f"{self._written(label)}: {count}" for label, count in self._ranked[:LINE_VOTES]]
        parts = [f"{state.width} branches", *([f"votes {', '.join(counts)}"] if counts else [])]
        return f"round {state.rounds}: {', '.join(parts)}, {self.environment.meter.billed:,} tokens\n"

    def as_json(self) -> dict[str, Any]:
        """Return the round for clients that draw it: what happened to each branch, and votes and tokens so far."""
        state = self.state
        return {
            "round": state.rounds,
            "branches": state.width,
            "running": len(state.active),
            "tokens": self.environment.meter.billed,
            "votes": [{"answer": self._written(label), "count": count} for label, count in self._ranked],
            "changes": self._changes(),
        }

    def _changes(self) -> list[dict[str, Any]]:
        """Return what the latest round did to its branches, in the order of its actions."""
        played = self.state.last
        if played is None:
            return []
        facts = iter(played.facts)
        changes: list[dict[str, Any]] = []
        for action in played.actions:
            if action.verb is Verb.ANSWER:
                continue
            change: dict[str, Any] = {"branch": action.branch, "action": _ACTIONS[action.verb]}
            if action.verb is not Verb.PRUNE:
                fact = next(facts)
                answer = None if fact.label is None else self._written(fact.label)
                change |= {"branch": fact.branch, "tokens": fact.tokens, "answer": answer}
                if isinstance(fact, Advanced):
                    change |= {"intervals": fact.intervals, "finished": fact.finished}
            changes.append(change)
        return changes

    @property
    def _ranked(self) -> list[tuple[int, int]]:
        """Labels and their votes of finished branches, most votes first."""
        return sorted(self.state.votes.items(), key=lambda vote: -vote[1])

    def _written(self, label: int) -> str:
        return clipped(" ".join(self.environment.labels.written(label).split()), ANSWER_CHARS)
