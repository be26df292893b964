"""CMC, the controller the AutoTTS paper's explorer discovered (arXiv 2605.08083), re-implemented from its description.

It votes among finished chains only and smooths the confidence of the vote. It runs chains that agree with the winner
faster and prunes persistent deviants. It opens more chains while confidence stalls, and stops when it is high and not
falling.

Answers of running chains matter only after the warm-up and once there is a winner. Until then nothing is probed, which
saves most probes and changes no decision.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cache
from itertools import chain

from controllers.actions import Action, advance, answer, branch, probe, prune
from controllers.dial import check_beta
from controllers.state import State
from controllers.voting import confidence, plurality, top_two

MOST_ROUNDS = 500
MOST_BRANCHES = 64


class CMC:
    """All parameters follow β, as published."""

    needs_probes = True

    def __init__(self, beta: float) -> None:
        b = check_beta(beta)
        self.first_branches = max(2, round(2 + 6 * b))
        self.most_branches = min(MOST_BRANCHES, round(4 + 60 * b))
        self.warm_up = max(2, round(2 + 8 * b))  # rounds before pruning, bursts and stopping
        self.patience = max(3, round(3 + 9 * b))  # consecutive disagreements before a chain is pruned
        self.alpha = 0.70 - 0.40 * b  # weight of the newest confidence in its moving average
        self.threshold = 0.85 + 0.12 * b  # average confidence at which it may stop
        self.slack = 0.04 - 0.03 * b  # largest fall of the average over the window at which it may stop
        self.burst = max(1, round(1 + 2 * b))  # intervals per round for a chain that agrees with the winner
        self.steps, self.bursts = _steps(1), _steps(self.burst)
        self.widen = max(1, round(1 + 3 * b))  # chains opened at a time
        self.trend = 0.04 - 0.03 * b  # rise of the average over the window above which no chains are opened
        self.settling = max(1, self.warm_up // 2)  # rounds before more chains are opened
        self.min_finished = max(2, round(2 + 3 * b))
        self.round = 0
        self.stepped = False  # this round's step is done and not yet evaluated
        self.blind = False  # running chains may have advanced since their latest probe
        self.average = 0.0
        self.window: deque[float] = deque(maxlen=max(2, round(2 + 6 * b)))
        self.disagreements = [0] * self.most_branches
        self.counted = 0  # finished chains behind `winner` and `confidence`
        self.winner: int | None = None
        self.confidence = 0.0

    def decide(self, state: State) -> Sequence[Action]:
        if not state.branches:
            return self._open(state, self.first_branches)
        if len(state.finished) > self.counted:
            self._count(state)
        while True:
            if self.stepped:
                self._observe()
                self.window[-1] = self.average
                if self._done(state):
                    return [answer(state.leader())] if self.winner is not None else self._fall_back(state)
                self.stepped = False
                self.round += 1
                if self._stalled(state):
                    return self._open(state, self.widen)
            warm = self.round >= self.warm_up and self.winner is not None
            if warm and self.blind:
                self.blind = False
                if unprobed := _unprobed(state):
                    return unprobed
            self._observe()
            self.window.append(self.average)
            self.stepped = True
            actions = self._prune_and_step(state) if warm else self._step(state)
            if actions:
                return actions

    def _count(self, state: State) -> None:
        """Count the votes of the chains that have finished."""
        self.counted = len(state.finished)
        self.winner = plurality(state.votes)
        self.confidence = confidence(*top_two(state.votes))

    def _observe(self) -> None:
        """Move the average towards the confidence of the vote among finished chains."""
        self.average = (1 - self.alpha) * self.average + self.alpha * self.confidence

    def _done(self, state: State) -> bool:
        if not state.active or self.round + 1 >= MOST_ROUNDS:
            return True
        if self.average < self.threshold or self.round < self.warm_up or len(state.finished) < self.min_finished:
            return False
        return self._rise() >= -self.slack

    def _fall_back(self, state: State) -> Sequence[Action]:
        """Probe the running chains, then answer with their plurality, because no finished chain has an answer."""
        return _unprobed(state) or [answer(state.leader())]

    def _stalled(self, state: State) -> bool:
        if self.average >= self.threshold or self.round <= self.settling or self._rise() > self.trend:
            return False
        return state.width < self.most_branches and state.room > 0

    def _rise(self) -> float:
        return self.window[-1] - self.window[0]

    def _open(self, state: State, count: int) -> list[Action]:
        self.blind = True
        return [branch()] * min(count, self.most_branches - state.width, state.room)

    def _step(self, state: State) -> Sequence[Action]:
        """Advance every running chain."""
        steps = self.steps
        if self.winner is not None and self.round + 1 >= self.warm_up:  # the next round needs probes
            return list(chain.from_iterable([steps[i] for i in state.active]))
        self.blind = True
        return [steps[i][0] for i in state.active]

    def _prune_and_step(self, state: State) -> Sequence[Action]:
        """Advance every running chain, agreeing ones faster, and prune persistent deviants."""
        branches, winner, disagreements = state.branches, self.winner, self.disagreements
        steps, bursts, patience = self.steps, self.bursts, self.patience
        strays: list[int] = []
        actions: list[Action] = []
        for i in state.active:
            if branches[i].label == winner:
                disagreements[i] = 0
                actions += bursts[i]
            else:
                disagreements[i] = count = disagreements[i] + 1
                if count >= patience:
                    strays.append(i)
                actions += steps[i]
        most = len(state.active) - 2  # two chains always stay
        if not strays or most <= 0:
            return actions
        strays.sort(key=lambda i: -disagreements[i])
        abandoned = strays[:most]  # the worst first
        gone = frozenset(abandoned)
        return [prune(i) for i in abandoned] + [action for action in actions if action.branch not in gone]


def _unprobed(state: State) -> list[Action]:
    return [probe(i) for i in state.active if state.branches[i].probed < state.branches[i].intervals]


@cache
def _steps(intervals: int) -> list[tuple[Action, Action]]:
    """Return the actions that advance and probe each branch."""
    return [(advance(i, intervals), probe(i)) for i in range(MOST_BRANCHES)]
