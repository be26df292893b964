"""The meaning of a genome, written once for all components and without regard to speed.

Emitted files must decide like this policy. It recomputes everything from the state at each decision; only what a state
does not show (earlier probes, and the first chains to finish) is remembered.
"""

from __future__ import annotations

from itertools import pairwise
from math import exp, log, sqrt
from typing import Any

from controllers import Action, Branch, State, advance, answer, branch, probe, prune
from controllers.baselines.adaptive_consistency import gain
from controllers.signals import LOG_CONFIDENCE
from controllers.stopping import bayes_factor, is_certified
from controllers.voting import STEEPEST, confidence
from discovery.search.explorers.genome import Genome, knobs, probes_running


class PlainPolicy:
    """Policy of a genome at one β."""

    def __init__(self, genome: Genome, beta: float) -> None:
        self.genome = genome
        self.value: dict[str, Any] = {}
        for knob in knobs(genome):
            start, end, g = knob.span(genome)
            start, end = float(f"{start:.4g}"), float(f"{end:.4g}")
            change = float(f"{abs(end - start):.4g}") * beta ** float(f"{g:.3g}")
            value = start - change if end < start else start + change
            self.value[knob.name] = round(value) if knob.is_integer else value
        self.answers: dict[int, list[int | None]] = {}  # labels of each chain at each decision while it ran
        self.differed: dict[int, list[bool]] = {}  # whether it differed from the leader
        self.limit = -1

    def decide(self, state: State) -> list[Action]:
        value, genome = self.value, self.genome
        if not state.width:
            return [branch()] * max(1, min(value["first"], value["most"], state.room))
        finished = [state.branches[i] for i in state.finished]
        self._remember_limit(finished)
        finished_votes = self._votes(finished)
        votes = dict(finished_votes)
        if genome["pool"] == "all":
            for label in [state.branches[i].label for i in state.active]:
                if label is not None:
                    votes[label] = votes.get(label, 0) + value["voice"]
        leader = _leader(votes)
        lost = self._pruned(state, leader, finished, _leader(finished_votes))
        running = [i for i in state.active if i not in lost and not self._stands(state.branches[i])]
        more = self._more(state, len(running))
        if self._settled(state, votes, leader, len(running)) or (not running and not more):
            unprobed = [i for i in state.active if state.branches[i].probed < state.branches[i].intervals]
            if genome["depth"] == "horizon" and leader is None and unprobed:
                return [probe(i) for i in unprobed]
            return [answer(state.leader() if leader is None else leader)]
        moves = [prune(i) for i in lost]
        for i in running:
            agrees = leader is not None and state.branches[i].label == leader
            moves.append(advance(i, 2 if genome["pace"] == "lead" and agrees else 1))
            moves += [probe(i)] if probes_running(genome) else []
        return moves + [branch()] * more

    def _stands(self, chain: Branch) -> bool:
        return bool(self.genome["depth"] == "horizon" and chain.intervals >= self.value["horizon"])

    def _more(self, state: State, running: int) -> int:
        wanted = 0
        match self.genome["widen"]:
            case "refill" if running < state.width:
                wanted = self.value["running"] - running
            case "wave" if not running:
                wanted = self.value["wave"]
            case "growing" if not running:
                wanted = max(1, round(self.value["growth"] * state.width))
        return int(max(0, min(wanted, self.value["most"] - state.width, state.room)))

    # Votes

    def _votes(self, finished: list[Branch]) -> dict[int, float]:
        if self.genome["filter"] == "confident":
            known = sorted(rate for chain in finished if (rate := _rate(chain)) is not None)
            if known:
                least = known[-max(1, round(self.value["kept"] * len(known)))]
                finished = [chain for chain in finished if (rate := _rate(chain)) is None or rate >= least]
        votes: dict[int, float] = {}
        weights: list[float] = []
        anchor: float | None = None
        for chain in finished:
            if chain.label is None:
                continue
            score = self._score(chain)
            average = sum(weights) / len(weights) if weights else 1.0
            if score is None or anchor is None:
                weight = average
                anchor = anchor if score is None else score
            else:
                weight = exp(max(-STEEPEST, min(STEEPEST, score - anchor)))
            weights.append(weight)
            votes[chain.label] = votes.get(chain.label, 0.0) + weight
        scale = sum(weights) / sum(weight * weight for weight in weights) if weights else 1.0
        return {label: weight * scale for label, weight in votes.items()}

    def _score(self, chain: Branch) -> float | None:
        value, total, rate = self.value, chain.log_probability, _rate(chain)
        match self.genome["weight"]:
            case "length":
                return float(value["power"] * log(max(1, chain.tokens)))
            case "likelihood":
                return None if total is None else float(total / value["scale"])
            case "confidence":
                return None if rate is None else float(value["strength"] * (total or 0.0) / chain.tokens)
            case "length and confidence":
                known = None if rate is None else value["power"] * log(chain.tokens)
                return None if known is None else float(known + value["strength"] * (total or 0.0) / chain.tokens)
            case "probe":
                probed = chain.probe_confidence
                return None if probed is None else float(value["belief"] * LOG_CONFIDENCE[probed])
        return 0.0

    # Stopping

    def _settled(self, state: State, votes: dict[int, float], leader: int | None, running: int) -> bool:
        value, stop, widen = self.value, self.genome["stop"], self.genome["widen"]
        ended = state.width - running
        if ended >= value["enough"]:
            return True
        if leader is None or len(state.finished) < value["least"]:
            return False
        left = 0 if widen == "none" else max(0, min(value["most"] - state.width, state.room))
        if widen == "growing" and running:
            rivals = [label for label in votes if label != leader]
            second = max(rivals, key=lambda label: votes[label]) if rivals else -1
            votes[second] = votes.get(second, 0) + running
            if votes[second] >= votes[leader]:
                return False
            if not left:
                return True
        ranked = [*sorted(votes.values(), reverse=True), 0]
        first, second_most, total = ranked[0], ranked[1], sum(votes.values())
        counts = [round(count) for count in votes.values()]
        still = left / state.width if widen == "growing" else (running + left) / max(1, ended)
        match stop:
            case "confidence":
                return bool(confidence(round(first), round(second_most)) >= value["sure"])
            case "share":
                return bool(first >= value["share"] * total)
            case "lead":
                return bool(first - second_most >= value["lead"] * sqrt(first + second_most))
            case "margin":
                return bool(first - second_most >= value["margin"] * total)
            case "bayes":
                return bool(bayes_factor(counts) >= value["factor"])
            case "certified":
                return is_certified(counts, value["error"])
        return bool(gain(first, second_most, total, total * still) < value["worth"])

    # Pruning

    def _remember_limit(self, finished: list[Branch]) -> None:
        if self.genome["prune"] == "weak" and self.limit < 0 and len(finished) >= self.value["least"]:
            known = sorted(chain.lowest for chain in finished if chain.lowest is not None)
            self.limit = known[int(self.value["floor"] * len(known))] if known else -1

    def _pruned(self, state: State, leader: int | None, finished: list[Branch], elected: int | None) -> list[int]:
        prunes, value = self.genome["prune"], self.value
        if prunes == "long" and len(finished) >= value["least"]:
            lengths = sorted(chain.intervals for chain in finished)
            longest = value["stretch"] * lengths[len(lengths) // 2]
            return [i for i in state.active if state.branches[i].intervals > longest]
        if prunes == "doubtful" and len(finished) >= value["least"]:
            rates = [rate for chain in finished if chain.label == elected and (rate := _rate(chain)) is not None]
            level = sum(rates) / len(rates) + log(value["trust"]) if rates else float("-inf")
            chains = [(i, state.branches[i]) for i in state.active]
            return [i for i, c in chains if c.log_probability is not None and c.log_probability < level * c.tokens]
        if prunes == "weak":
            windows = [(i, state.branches[i].lowest) for i in state.active]
            return [i for i, lowest in windows if lowest is not None and lowest < self.limit]
        for i in state.active:
            self.answers.setdefault(i, []).append(state.branches[i].label)
        if leader is None or not finished:
            return []
        for i in state.active:
            self.differed.setdefault(i, []).append(state.branches[i].label != leader)
        if prunes == "deviant":
            patience = value["patience"]
            return [i for i in state.active if len(self.differed[i]) >= patience and all(self.differed[i][-patience:])]
        if prunes == "unstable":
            return [i for i in state.active if _unrest(self.answers[i]) >= value["flips"]]
        return []


def _leader(votes: dict[int, float]) -> int | None:
    """Return the label with most votes, the first of equals; None without votes above 0."""
    best = max(votes, key=lambda label: votes[label], default=None)
    return best if best is not None and votes[best] > 0 else None


def _rate(chain: Branch) -> float | None:
    """Return the mean log-probability of a chain's tokens."""
    return None if chain.log_probability is None else chain.log_probability / chain.tokens


def _unrest(labels: list[int | None]) -> int:
    """Return the changes of an answer less its repetitions, never below 0 on the way."""
    known, unrest = [label for label in labels if label is not None], 0
    for before, after in pairwise(known):
        unrest = max(0, unrest + (1 if before != after else -1))
    return unrest
