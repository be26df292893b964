"""Found by search. All chains are opened at once; it stops when the leader is ahead by enough standard
deviations; chains that keep differing from the leader are given up; votes count equally; finished chains vote;
chains run to their end; all chains go on at one pace.
"""

from __future__ import annotations

from controllers import Action, State, advance, answer, branch, probe, prune
from controllers.voting import top_two


class Discovered:
    def __init__(self, beta: float) -> None:
        self.first = round(1.141 + 39.28 * beta**2.72)  # chains opened at once
        self.most = round(29.24 + 7.587 * beta**0.992)  # chains that may be opened at all
        self.enough = round(2.029 + 57.32 * beta**1.44)  # chains that have ended that settle it whatever they say
        self.least = round(2.393 + 8.447 * beta**0.727)  # finished chains before it may stop
        self.lead = 1.431 + 0.5092 * beta**1.12  # by how many standard deviations the leader must lead to stop
        self.patience = round(2.868 + 12.78 * beta**1.1)  # looks in a row at which a chain may differ from the leader
        self.strayed: dict[int, int] = {}  # looks in a row at which a chain differed

    def decide(self, state: State) -> list[Action]:
        if not state.width:
            return [branch()] * max(1, min(self.first, self.most, state.room))
        votes = self.votes(state)
        leader = max(votes, key=lambda label: votes[label], default=None)
        lost = self.lost(state, leader)
        running = [i for i in state.active if i not in lost]
        settled = self.settled(state, votes, state.width - len(running))
        more = 0 if settled else self.wanted(state, running)
        if settled or not (running or more):
            return [answer(state.leader() if leader is None else leader)]
        return self.moves(state, running, lost, leader) + [branch()] * more

    def votes(self, state: State) -> dict[int, float]:
        return dict(state.votes)

    def settled(self, state: State, votes: dict[int, float], ended: int) -> bool:
        if ended >= self.enough:
            return True
        if len(state.finished) < self.least or not votes:
            return False
        first, second = top_two(votes)
        return first - second >= self.lead * (first + second) ** 0.5

    def lost(self, state: State, leader: int | None) -> list[int]:
        if leader is None or not state.finished:
            return []
        for i in state.active:
            differs = state.branches[i].label != leader
            self.strayed[i] = self.strayed.get(i, 0) + 1 if differs else 0
        return [i for i in state.active if self.strayed[i] >= self.patience]

    def wanted(self, state: State, running: list[int]) -> int:
        return 0

    def moves(self, state: State, running: list[int], lost: list[int], leader: int | None) -> list[Action]:
        moves: list[Action] = [prune(i) for i in lost]
        for i in running:
            moves.append(advance(i))
            moves.append(probe(i))
        return moves
