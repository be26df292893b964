"""Found by search. Chains are opened in growing waves, and unfinished chains count against the leader; it stops
when more chains are not worth their tokens; no chain is pruned; votes are weighted by length and by mean token
probability; finished chains vote; chains run to their end; all chains advance equally.
"""

from __future__ import annotations

from math import log

from controllers import Action, State, advance, answer, branch
from controllers.baselines.adaptive_consistency import gain
from controllers.voting import WeightedTally, plurality, top_two


class Discovered:
    signals = ("intervals",)

    def __init__(self, beta: float) -> None:
        self.first = round(2.279 + 6.782 * beta**0.975)  # chains opened in the first round
        self.most = round(1.184 + 59.02 * beta**1.66)  # largest number of chains
        self.enough = round(29.66 + 9.67 * beta**1.56)  # ended chains at which it always stops
        self.least = round(1 + 1.125 * beta**1.21)  # finished chains needed before it may stop early
        self.growth = 0.5885 + 2.296 * beta**1.12  # size of the next wave, relative to all chains so far
        self.worth = 0.04636 - 0.02293 * beta**0.785  # expected gain in vote share below which it stops
        self.power = 0.6864 + 1.663 * beta**0.677  # power of a chain's length in its weight
        self.strength = 26.5 + 1.35 * beta**0.527  # power of a chain's mean token probability in its weight
        self.counted = 0  # finished chains behind the votes
        self.votes: dict[int, float] = {}
        self.leader: int | None = None
        self.before: tuple[int, ...] = ()  # chains running in the last round
        self.steps: list[Action] = []  # the last round, without new chains
        self.tally = WeightedTally()

    def decide(self, state: State) -> list[Action]:
        if not state.width:
            return [branch()] * max(1, min(self.first, self.most, state.room))
        if self.counted == len(state.finished) and self.before == state.active:
            return self.steps
        if self.counted < len(state.finished):
            self.count(state)
        votes, leader = self.votes, self.leader
        running = list(state.active)
        wanted = 0 if running else max(1, round(self.growth * state.width))
        more = max(0, min(wanted, self.most - state.width, state.room))
        settled = self.settled(state, votes, leader, len(running))
        if settled or not (running or more):
            return [answer(state.leader() if leader is None else leader)]
        self.before, self.steps = state.active, [advance(i) for i in running]
        return self.steps + [branch()] * more

    def count(self, state: State) -> None:
        for i in state.finished[self.counted :]:
            chain = state.branches[i]
            if chain.label is not None:
                size, known = chain.tokens, chain.log_probability
                score = None if known is None else self.power * log(size) + self.strength * known / size
                self.tally.add(chain.label, score)
        self.votes = self.tally.votes()
        self.counted = len(state.finished)
        self.leader = plurality(self.votes)

    def settled(self, state: State, votes: dict[int, float], leader: int | None, running: int) -> bool:
        if state.width - running >= self.enough:
            return True
        if leader is None or len(state.finished) < self.least:
            return False
        more = min(self.most - state.width, state.room)
        if running:  # worst case: all unfinished chains vote for the second answer
            others = (label for label in votes if label != leader)
            second = max(others, key=lambda label: votes[label], default=-1)
            votes = {**votes, second: votes.get(second, 0) + running}
            if votes[second] >= votes[leader]:
                return False
            if more <= 0:
                return True
        first, second_most = top_two(votes)
        total = sum(votes.values())
        return gain(first, second_most, total, total * max(0, more) / state.width) < self.worth
