"""Parallel-Probe (arXiv 2602.03845): probe all chains every interval, prune deviants, stop on a stable consensus.

What the paper leaves open is as in the runs behind the AutoTTS paper's table (arXiv 2605.08083): voting begins with the
second interval; warm-up and stability count the votes before the present one; of equals the answer of the chain opened
first leads. A vote before pruning is one after it: those pruned did not vote for the consensus. Chains that say nothing
readable are of one mind too: while they outnumber those of every answer, there is nothing to stop on.

A chain is asked only if what it says can matter. Until deviations count, only the consensus does: as many are asked as
should settle it, and the others if they do not. Once the finished chains alone settle it for good, the vote at which
all ends is known, and a chain that cannot be pruned by then is left in peace. No decision changes.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from controllers.actions import Action, advance, answer, branch, probe, prune
from controllers.dial import check_beta, linear
from controllers.state import State
from controllers.voting import top_two


class ParallelProbe:
    """Width, stability, patience and warm-up grow with β; β = 1 is the published 64 chains, 40, 7 and 15 votes."""

    def __init__(self, beta: float, samples: int | None = None) -> None:
        check_beta(beta)
        self.width = round(linear(4, 64, beta)) if samples is None else samples
        self.stable = round(linear(2, 40, beta))  # votes that must confirm a consensus to stop
        self.patience = round(linear(2, 7, beta))  # deviations in a row for which a chain is pruned
        self.warm_up = round(linear(0, 15, beta))  # votes before deviations count
        self.votes = 0  # held so far
        self.confirmed = 0
        self.consensus: int | None = None
        self.deviations: dict[int, int] = {}
        self.lead = 0.0  # by how much of the votes the consensus led when last all were counted
        self.silent: list[int] = []  # running chains not asked for the present vote

    def decide(self, state: State) -> list[Action]:
        if not state.width:
            return [action for i in range(min(self.width, state.room)) for action in (branch(2), probe(i))]
        self.silent = [i for i in self.silent if state.branches[i].active]
        if self.silent and not self._settled(state):
            asked = [i for i in self.silent if state.branches[i].probed < state.branches[i].intervals]
            self.silent = []
            if asked:  # else the cap had left them where they were
                return [probe(i) for i in asked]
        self._vote(state)
        strays = self._strays(state)
        running = [i for i in state.active if i not in strays]
        if not running or (self.consensus is not None and self.confirmed >= self.stable):
            return [answer(state.leader() if self.consensus is None else self.consensus)]
        asked = self._to_ask(state, running)
        self.silent = [i for i in running if i not in asked]
        steps = _steps(state.width)
        moves = [action for i in running for action in (steps[i] if i in asked else steps[i][:1])]
        return [prune(i) for i in strays] + moves

    def _counts(self, state: State) -> Counter[int | None]:
        """What all chains but those pruned and those not asked say, None being one of the things they may say."""
        silent = set(self.silent)
        chains = enumerate(state.branches)
        return Counter(chain.label for i, chain in chains if not chain.pruned and i not in silent)

    def _settled(self, state: State) -> bool:
        """Whether the consensus is what it is, whatever those not asked would say."""
        first, second = top_two(self._counts(state))
        return first > second + len(self.silent)

    def _vote(self, state: State) -> None:
        counts = self._counts(state)
        consensus = max(counts, key=counts.__getitem__)  # of equals the first
        self.votes += 1
        self.confirmed = self.confirmed + 1 if consensus == self.consensus else 0
        self.consensus = consensus
        first, second = top_two(counts)
        self.lead = (first - second) / sum(counts.values())

    def _strays(self, state: State) -> list[int]:
        """The running chains that have deviated from the consensus for as long as patience allows."""
        if self.votes <= self.warm_up:
            return []
        asked = [i for i in state.active if i not in self.silent]
        for i in asked:
            deviates = state.branches[i].label != self.consensus
            self.deviations[i] = self.deviations.get(i, 0) + 1 if deviates else 0
        return [i for i in asked if self.deviations[i] >= self.patience]

    def _to_ask(self, state: State, running: list[int]) -> list[int]:
        """The running chains to ask for the next vote."""
        voting = len(running) + len(state.finished)
        if self.votes < self.warm_up:
            enough = int(voting / (1 + self.lead)) + 1 - len(state.finished)
            return running[: max(0, enough)]
        mine = 0 if self.consensus is None else state.votes.get(self.consensus, 0)
        if mine <= voting - mine:
            return running
        left = self.stable - self.confirmed - 1  # votes before the last one, at each of which a chain may be pruned
        return [i for i in running if self.deviations.get(i, 0) + left >= self.patience]


@lru_cache(maxsize=8)
def _steps(width: int) -> list[tuple[Action, Action]]:
    """For every chain, the actions that run it on and ask it."""
    return [(advance(i), probe(i)) for i in range(width)]
