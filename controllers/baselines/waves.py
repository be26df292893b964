"""Base of the controllers that sample in doubling waves until the majority is safe by a rule of their own."""

from __future__ import annotations

from collections.abc import Mapping

from controllers.actions import Action, advance, answer, branch
from controllers.dial import MOST_CHAINS, check_beta, doubling
from controllers.state import State
from controllers.voting import plurality

LOG_FIRST_WAVE = 3
"""Base-2 logarithm of the first wave at β = 1. With powers of two, waves of all β end at the same sizes."""


class Waves:
    """At most N chains, N from 1 at β = 0 to 64 from β = 0.5 on; a first wave of 1 to 8, then doubling.

    Published rules look at the votes after each chain; waves make them fast. A wave runs to its end, unless the
    majority is safe even if all its unfinished chains vote for the second answer.
    """

    def __init__(self, beta: float) -> None:
        beta = check_beta(beta)
        self.samples = doubling(MOST_CHAINS, min(1.0, 2 * beta))
        self.first_wave = 2 ** round(LOG_FIRST_WAVE * beta)

    def is_safe(self, votes: Mapping[int, int]) -> bool:
        """Return whether to answer with the leader. `votes` are in the order in which the answers were first seen."""
        raise NotImplementedError

    def decide(self, state: State) -> list[Action]:
        running = state.active
        sampled = len(state.finished) + len(running)
        votes = dict(state.votes)
        leader = plurality(votes)
        if leader is not None:
            if running:
                second = plurality({label: count for label, count in votes.items() if label != leader})
                rival = state.labels if second is None else second
                votes[rival] = votes.get(rival, 0) + len(running)
            is_leading = plurality(votes) == leader
            if is_leading and (self.is_safe(votes) or not self._more(state, sampled)):
                return [answer(leader)]
        if running:
            return [advance(i) for i in running]
        wave = min(sampled or self.first_wave, self._more(state, sampled))
        return [branch()] * wave if wave > 0 else [answer(state.leader())]

    def _more(self, state: State, sampled: int) -> int:
        """Return how many chains may still be opened."""
        return max(0, min(self.samples - sampled, state.room))
