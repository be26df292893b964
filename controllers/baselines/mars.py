"""MARS (Chen et al., arXiv 2606.12935): stop once no switch of running chains is likely to change the majority.

All chains are probed after each interval. For each running chain the rule estimates the probability q that its final
answer differs from the present one. Then it takes the worst case: all chains that switch vote for one challenger. The
leader L is safe if, for each challenger k, also one without a vote,

    Σ_L (1 - q) - Σ_k (1 - q)  >  Σ q - Σ_k q + correction.

From the paper: this rule, and the five features of q: position, confidence, flips, agreement streak and trend of the
confidence. The paper fits a logistic model and its calibration to warm-up chains. Here the model is fixed (ours), and
only its level is calibrated, by the switches of the question's chains that have finished. Confidence and its trend are
those of the probes; while they are unknown, they do not count. The correction is the paper's normal one, for a number
of standard deviations that grows with β.
"""

from __future__ import annotations

from math import exp, log, sqrt

from controllers.actions import Action, advance, answer, branch, probe
from controllers.core.branch_facts import Branch
from controllers.dial import chains, check_beta, linear
from controllers.state import State

LEVEL, STREAK, FLIPS, CONFIDENCE, TREND = 0.5, -1.0, 0.25, -2.0, -2.0
"""Weights of the switch model: of a constant, the logarithm of the streak, the flips, the confidence and its trend."""
EVEN = 0.5
"""Confidence that neither raises nor lowers the probability of a switch."""
PRIOR = 4.0
"""Switches that the fixed model counts for in the calibration."""


class MarginAdversarial:
    """N chains at once, N from 1 at β = 0 to 64 at β = 1."""

    signals = ("probes",)
    needs_probes = True

    def __init__(self, beta: float, samples: int | None = None) -> None:
        self.samples = chains(beta, samples)
        self.deviations = linear(1, 3, check_beta(beta))  # standard deviations of the correction
        self.warm_up = max(1, self.samples // 8)  # chains that must have finished
        self._histories: list[ProbeHistory] = []
        self._finished = 0  # chains whose switches are counted
        self._expected = self._switched = 0.0  # switches of finished chains, by the model and in fact

    def decide(self, state: State) -> list[Action]:
        missing = min(self.samples - state.width, state.room)
        if not state.width:
            return [action for i in range(missing) for action in (branch(), probe(i))]
        self._observe(state)
        if len(state.finished) >= self.warm_up and (leader := self._safe(state)) is not None:
            return [answer(leader)]
        return [action for i in state.active for action in (advance(i), probe(i))] or [answer(state.leader())]

    def _observe(self, state: State) -> None:
        """Add new probes to the histories, and calibrate by the chains that have finished."""
        self._histories += [ProbeHistory() for _ in range(len(self._histories), state.width)]
        for i in state.active:
            if state.branches[i].probed == state.branches[i].intervals:  # else the token limit refused the probe
                self._histories[i].add(state.branches[i])
        for i in state.finished[self._finished :]:
            for label, switch in self._histories[i].predictions:
                self._expected += switch
                self._switched += label != state.branches[i].label
        self._finished = len(state.finished)

    def _safe(self, state: State) -> int | None:
        """Return the leader if it is safe in the worst case."""
        level = (self._switched + PRIOR) / (self._expected + PRIOR)
        stay: dict[int | None, float] = {}  # by answer: expected votes that stay
        leave: dict[int | None, float] = {}  # by answer: expected votes that switch
        variance: dict[int | None, float] = {}
        for i, chain in enumerate(state.branches):
            if chain.label is None and chain.finished:
                continue
            switch = 0.0 if chain.finished else min(1.0, level * self._histories[i].switch)
            if chain.label is None:  # no answer yet, so it will surely get one
                switch = 1.0
            stay[chain.label] = stay.get(chain.label, 0.0) + 1 - switch
            leave[chain.label] = leave.get(chain.label, 0.0) + switch
            variance[chain.label] = variance.get(chain.label, 0.0) + switch * (1 - switch)
        answers = [label for label in stay if label is not None]
        if not answers:
            return None
        leader = max(answers, key=lambda label: stay[label] + leave[label])
        switching = sum(leave.values())
        correction = self.deviations * sqrt(sum(variance.values()) + 3 * variance[leader])  # a leader's switch counts 2
        for challenger in (*answers, None):
            if challenger == leader:
                continue
            rival = 0.0 if challenger is None else stay[challenger]
            harmless = 0.0 if challenger is None else leave[challenger]
            if stay[leader] - rival <= switching - harmless + correction:
                return None
        return leader


class ProbeHistory:
    """The probes of one chain, and the probability that its final answer differs from the latest one."""

    def __init__(self) -> None:
        self.switch = 1.0
        self.predictions: list[tuple[int, float]] = []  # each answer with its probability to be left
        self._label: int | None = None
        self._streak = 0  # latest probes with the same answer
        self._flips = 0  # times that the answer changed
        self._confidence: float | None = None

    def add(self, chain: Branch) -> None:
        """Add the latest probe of the chain."""
        if chain.label is None:
            return
        if self._label is not None and chain.label != self._label:
            self._flips += 1
        self._streak = self._streak + 1 if chain.label == self._label else 1
        self._label = chain.label
        score = LEVEL + STREAK * log(self._streak) + FLIPS * self._flips
        if chain.probe_confidence is not None:
            now, before = chain.probe_confidence / 1000, self._confidence
            score += CONFIDENCE * (now - EVEN) + (0.0 if before is None else TREND * (now - before))
            self._confidence = now
        self.switch = 1 / (1 + exp(-score))
        self.predictions.append((chain.label, self.switch))
