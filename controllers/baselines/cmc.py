"""CMC, the controller the AutoTTS paper's explorer discovered (arXiv 2605.08083), re-implemented from its description.

It votes among finished chains only, smooths the vote's confidence, runs chains that agree with the winner faster,
abandons persistent deviants, widens while confidence stalls, and stops when it is high and not falling.
"""

from __future__ import annotations

from collections import deque

from controllers.actions import Action, advance, answer, branch, probe, prune
from controllers.dial import check_beta
from controllers.state import State
from controllers.voting import confidence, plurality, top_two

MOST_ROUNDS = 500


class CMC:
    """Every number follows β, as published."""

    def __init__(self, beta: float) -> None:
        b = check_beta(beta)
        self.first_branches = max(2, round(2 + 6 * b))
        self.most_branches = min(64, round(4 + 60 * b))
        self.warm_up = max(2, round(2 + 8 * b))  # rounds before pruning, bursts and stopping
        self.patience = max(3, round(3 + 9 * b))  # consecutive disagreements before a chain is abandoned
        self.alpha = 0.70 - 0.40 * b  # weight of the newest confidence in its moving average
        self.threshold = 0.85 + 0.12 * b  # average confidence to stop at
        self.slack = 0.04 - 0.03 * b  # fall of the average over the window that still lets it stop
        self.burst = max(1, round(1 + 2 * b))  # intervals for a chain that agrees with the winner
        self.widen = max(1, round(1 + 3 * b))  # chains opened at a time
        self.trend = 0.04 - 0.03 * b  # rise of the average over the window that forbids widening
        self.min_finished = max(2, round(2 + 3 * b))
        self.average = 0.0
        self.window: deque[float] = deque(maxlen=max(2, round(2 + 6 * b)))
        self.disagreements: dict[int, int] = {}
        self.round = 0
        self.stepped = False  # this round's step is out and its outcome not yet weighed

    def decide(self, state: State) -> list[Action]:
        if not state.width:
            return self._open(state, self.first_branches)
        while True:
            if self.stepped:
                self.stepped = False
                self._observe(state)
                self.window[-1] = self.average
                if self._done(state):
                    return [answer(state.leader())]
                self.round += 1
                if self._stalled(state, self.round - 1):
                    return self._open(state, self.widen)
            self._observe(state)
            self.window.append(self.average)
            self.stepped = True
            actions = self._step(state)
            if actions:
                return actions

    def _observe(self, state: State) -> None:
        """Move the average towards the confidence of the vote among finished chains."""
        self.average = (1 - self.alpha) * self.average + self.alpha * confidence(*top_two(state.votes))

    def _done(self, state: State) -> bool:
        if not state.active or self.round + 1 >= MOST_ROUNDS:
            return True
        settled = self.average >= self.threshold and self._rise() >= -self.slack
        return self.round >= self.warm_up and len(state.finished) >= self.min_finished and settled

    def _stalled(self, state: State, round_: int) -> bool:
        open_more = state.width < self.most_branches and round_ >= max(1, self.warm_up // 2)
        return open_more and bool(state.room) and self._rise() <= self.trend and self.average < self.threshold

    def _rise(self) -> float:
        return self.window[-1] - self.window[0]

    def _open(self, state: State, count: int) -> list[Action]:
        count = min(count, self.most_branches - state.width, state.room)
        return [action for i in range(count) for action in (branch(), probe(state.width + i))]

    def _step(self, state: State) -> list[Action]:
        winner = plurality(state.votes)
        warm = self.round >= self.warm_up and winner is not None
        abandoned = self._abandon(state, winner) if warm else []
        actions = [prune(i) for i in abandoned]
        for i in state.active:
            if i not in abandoned:
                agrees = warm and state.branches[i].label == winner
                actions += (advance(i, self.burst if agrees else 1), probe(i))
        return actions

    def _abandon(self, state: State, winner: int | None) -> list[int]:
        """Chains that disagreed for too long, worst first, as long as two stay."""
        active = state.active
        for i in active:
            agrees = state.branches[i].label == winner
            self.disagreements[i] = 0 if agrees else self.disagreements.get(i, 0) + 1
        strays = [i for i in active if self.disagreements[i] >= self.patience]
        strays.sort(key=lambda i: -self.disagreements[i])
        return strays[: max(0, len(active) - 2)]
