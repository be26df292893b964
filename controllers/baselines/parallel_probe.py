"""Parallel-Probe (arXiv 2602.03845): probe all chains every interval, prune deviants, stop on a stable consensus.

Details that the paper leaves open follow the runs behind the AutoTTS paper's table (arXiv 2605.08083). Voting begins
with the second interval. Warm-up and stability count the votes before the present one. Ties go to the answer of the
chain opened first. Voting before or after pruning is the same, because pruned chains did not vote for the consensus.
Chains without a readable answer vote for "none": while "none" leads, the episode does not stop.

A chain is probed only if its answer can matter; no decision changes. Until deviations count, only the consensus
matters: first as many chains are probed as should decide it, then the others if needed. Once the finished chains alone
decide the consensus for good, the final vote is known, and chains that cannot be pruned before it are not probed.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from controllers.actions import Action, advance, answer, branch, probe, prune
from controllers.dial import check_beta, linear
from controllers.state import State
from controllers.voting import top_two


class ParallelProbe:
    """Width, stability, patience and warm-up grow with β; β = 1 has the published values 64, 40, 7 and 15."""

    needs_probes = True

    def __init__(self, beta: float, samples: int | None = None) -> None:
        check_beta(beta)
        self.width = round(linear(4, 64, beta)) if samples is None else samples
        self.stable = round(linear(2, 40, beta))  # confirmations of the consensus needed to stop
        self.patience = round(linear(2, 7, beta))  # consecutive deviations after which a chain is pruned
        self.warm_up = round(linear(0, 15, beta))  # votes before deviations count
        self.votes = 0  # held so far
        self.confirmed = 0
        self.consensus: int | None = None
        self.deviations: dict[int, int] = {}
        self.lead = 0.0  # lead of the consensus at the latest vote, as a share of all votes
        self.silent: list[int] = []  # running chains not probed for the present vote

    def decide(self, state: State) -> list[Action]:
        if not state.width:
            return [action for i in range(min(self.width, state.room)) for action in (branch(2), probe(i))]
        self.silent = [i for i in self.silent if state.branches[i].active]
        if self.silent and not self._settled(state):
            unprobed = [i for i in self.silent if state.branches[i].probed < state.branches[i].intervals]
            self.silent = []
            if unprobed:  # otherwise the token limit kept them from advancing
                return [probe(i) for i in unprobed]
        self._vote(state)
        strays = self._strays(state)
        running = [i for i in state.active if i not in strays]
        if not running or (self.consensus is not None and self.confirmed >= self.stable):
            return [answer(state.leader() if self.consensus is None else self.consensus)]
        probed = self._to_probe(state, running)
        self.silent = [i for i in running if i not in probed]
        steps = _steps(state.width)
        moves = [action for i in running for action in (steps[i] if i in probed else steps[i][:1])]
        return [prune(i) for i in strays] + moves

    def _counts(self, state: State) -> Counter[int | None]:
        """Count the answers of chains that are neither pruned nor unprobed. None counts as an answer."""
        silent = set(self.silent)
        chains = enumerate(state.branches)
        return Counter(chain.label for i, chain in chains if not chain.pruned and i not in silent)

    def _settled(self, state: State) -> bool:
        """Return whether the consensus stays the same whatever the unprobed chains would answer."""
        first, second = top_two(self._counts(state))
        return first > second + len(self.silent)

    def _vote(self, state: State) -> None:
        counts = self._counts(state)
        consensus = max(counts, key=counts.__getitem__)  # ties: the first
        self.votes += 1
        self.confirmed = self.confirmed + 1 if consensus == self.consensus else 0
        self.consensus = consensus
        first, second = top_two(counts)
        self.lead = (first - second) / sum(counts.values())

    def _strays(self, state: State) -> list[int]:
        """Return the running chains that have used up their patience."""
        if self.votes <= self.warm_up:
            return []
        probed = [i for i in state.active if i not in self.silent]
        for i in probed:
            deviates = state.branches[i].label != self.consensus
            self.deviations[i] = self.deviations.get(i, 0) + 1 if deviates else 0
        return [i for i in probed if self.deviations[i] >= self.patience]

    def _to_probe(self, state: State, running: list[int]) -> list[int]:
        """Return the running chains to probe for the next vote."""
        voting = len(running) + len(state.finished)
        if self.votes < self.warm_up:
            enough = int(voting / (1 + self.lead)) + 1 - len(state.finished)
            return running[: max(0, enough)]
        mine = 0 if self.consensus is None else state.votes.get(self.consensus, 0)
        if mine <= voting - mine:
            return running
        left = self.stable - self.confirmed - 1  # votes before the last one; a chain may be pruned at each
        return [i for i in running if self.deviations.get(i, 0) + left >= self.patience]


@lru_cache(maxsize=8)
def _steps(width: int) -> list[tuple[Action, Action]]:
    """Return the actions that advance and probe each chain."""
    return [(advance(i), probe(i)) for i in range(width)]
