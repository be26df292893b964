"""Adaptive consistency in waves: sample until more chains are not worth their tokens.

A version of Adaptive-Consistency (Aggarwal et al., arXiv 2305.11860) with low latency. Chains run in waves instead of
one after the other; each wave is as large as all earlier ones together. It stops by the value of information
(Raiffa and Schlaifer, Applied Statistical Decision Theory, 1961) instead of a confidence: votes that are scattered over
many answers are not worth more chains, even if nothing is certain.
"""

from __future__ import annotations

from functools import lru_cache
from math import erfc, exp, pi, sqrt
from typing import Literal

from controllers.actions import TO_END, Action, advance, answer, branch
from controllers.dial import MOST_CHAINS, check_beta, doubling
from controllers.state import State
from controllers.voting import plurality, tally, top_two

FIRST_WAVE = 3  # log2 of the first wave at β = 1: with powers of two, waves of all β end at the same sizes
WORTH = (0.05, 0.014)  # least gain in the winner's vote share that is worth the remaining chains, at β = 0 and 1
LEAST = 2  # chains that must agree before it stops early
Follows = Literal["stop", "another wave", "undecided"]
"""Decision after a wave; undecided if it depends on chains that have not finished."""


class AdaptiveWaves:
    """At most N chains, N from 1 at β = 0 to 64 from β = 0.5 on; a first wave of 1, 2, 4 or 8, then doubling.

    Short chains do not count more. A wave is decided by the votes of all its chains, or as soon as its unfinished
    chains cannot change the decision, whatever they will answer: then it stops without them, or the next wave joins
    them.

    It uses no probes and continues from any state, as the fallback must. Chains that are not pruned make up the waves,
    in the order in which they were opened. Those beyond the current wave wait, and their votes do not count yet. If it
    takes over, its first wave has at least as many chains as have finished.
    """

    def __init__(self, beta: float) -> None:
        beta = check_beta(beta)
        self.samples = doubling(MOST_CHAINS, min(1.0, 2 * beta))
        self.first_wave = 2 ** round(FIRST_WAVE * beta)
        self.worth = WORTH[0] * (WORTH[1] / WORTH[0]) ** beta
        self._decided: tuple[int, int] | None = None  # finished and opened chains at the latest decision
        self._actions: list[Action] = []  # the latest decision

    def decide(self, state: State) -> list[Action]:
        if self._decided is None:
            self.first_wave = max(self.first_wave, len(state.finished))
            self.samples = max(self.samples, len(state.finished))
        decided = (len(state.finished), state.width)
        if decided != self._decided or state.remaining is not None:  # otherwise the same chains advance
            self._decided, self._actions = decided, self._next_actions(state)
        return self._actions

    def _next_actions(self, state: State) -> list[Action]:
        chains = [i for i, chain in enumerate(state.branches) if not chain.pruned]
        most = min(self.samples, len(chains) + state.room)
        size = min(self.first_wave, most)
        while True:
            wave = chains[:size]
            votes = tally(state.branches[i].label for i in wave if state.branches[i].finished)
            running = [i for i in wave if not state.branches[i].finished]
            missing = size - len(wave)
            follows = what_follows(top_two(votes), len(running) + missing, size, most - size, self.worth)
            if follows == "stop":
                winner = plurality(votes)  # of equals, the answer of the chain opened first
                return [answer(state.leader() if winner is None else winner)]
            if follows == "undecided":
                return payable(state, running, missing)
            size = min(2 * size, most)


def payable(state: State, running: list[int], missing: int) -> list[Action]:
    """Return actions that advance the `running` branches and open `missing` ones.

    Under a token cap, only as many run at once as it pays to their ends in the worst case, and at least one: chains
    that all stop half-way have no votes.
    """
    actions = [*(advance(i) for i in running), *[branch()] * missing]
    if state.remaining is None:
        return actions
    tokens = [*(state.branches[i].tokens for i in running), *[0] * missing]
    left = state.remaining
    for count, spent in enumerate(tokens):
        left -= state.worst_case(spent, TO_END)
        if left < 0:
            return actions[: max(1, count)]
    return actions


@lru_cache(maxsize=1 << 14)
def what_follows(top: tuple[int, int], unfinished: int, sampled: int, left: int, worth: float) -> Follows:
    """Return what follows a wave that ends at `sampled` chains, of which `unfinished` have not voted yet.

    `top` are its two highest vote counts. At most `left` more chains may be opened after it. The decision counts as
    made if it is the same for all votes of the unfinished chains, and a winner only if it is the same too.
    """
    first, second = top
    if not left:
        is_settled = not unfinished or first > second + unfinished
        return "stop" if is_settled else "undecided"
    decisions = {
        _is_enough(max(first + more, second + others), min(first + more, second + others), sampled, left, worth)
        for more in range(unfinished + 1)
        for others in range(unfinished - more + 1)
    }
    if decisions == {False}:
        return "another wave"
    if decisions == {True} and (not unfinished or first > second + unfinished):
        return "stop"
    return "undecided"


def _is_enough(first: int, second: int, sampled: int, left: int, worth: float) -> bool:
    """Return whether a finished wave is the last one."""
    return first >= LEAST and gain(first, second, sampled, left) < worth


def gain(first: float, second: float, sampled: float, left: float) -> float:
    """Return the expected gain in the winner's share of votes from `left` more chains, in [0, 1].

    `first` and `second` are the two highest vote counts among `sampled` chains, p and q their shares, smoothed by one
    vote each. The difference of the shares has mean d = p - q and variance v = (p + q - d²) / n, n = sampled + 2. After
    `left` more chains its estimate D is normal with mean d and variance s² = v · left / (sampled + left). If the
    runner-up overtakes, choosing it gains -D. The expected gain is E[max(0, -D)] = s·φ(d/s) - d·Φ(-d/s).
    """
    total = sampled + 2
    p, q = (first + 1) / total, (second + 1) / total
    lead = p - q
    deviation = sqrt(max((p + q - lead * lead) / total * left / (sampled + left), 1e-12))
    z = lead / deviation
    return deviation * exp(-z * z / 2) / sqrt(2 * pi) - lead * erfc(z / sqrt(2)) / 2
