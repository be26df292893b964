"""Rounds of traced episodes as columns of numbers, which `discovery/data/traces.py` writes and describes.

This module can be compiled (`controllers/core/compiled.py`).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from controllers import Action, Advanced, Fact, Round, State
from controllers.actions import PRUNE
from controllers.core.action_types import number_code
from controllers.signals import pack_signals
from discovery.data.traces import ADVANCED, NONE, PROBED

SHORT: Final = 8
"""Advances of fewer intervals are looked up by replay instead of constructed, and numbered."""
NUMBERED: Final = 64
"""Branches whose facts are numbered."""
STEPS: Final = SHORT * NUMBERED
NUMBERS: Final = STEPS + (1 << 16)
"""Numbers are smaller: those of advances, and then those of probes."""


def step_number(branch: int, intervals: int) -> int | None:
    """Return the number of a fact that says that a branch advanced by less than SHORT intervals; None if none."""
    return branch * SHORT + intervals if branch < NUMBERED else None


def probe_number(branch: int, label: int) -> int | None:
    """Return the number of a fact that says that a probe showed a label, or NONE; None if it has no number."""
    number = STEPS + (label + 1) * NUMBERED + branch
    return number if branch < NUMBERED and number < NUMBERS else None


class OtherFacts:
    """Facts without a number: those that finish a branch, take many intervals, or have signals or costs of their own.

    They are compared by identity.
    """

    def __init__(self) -> None:
        self.facts: list[Fact] = []  # the reference keeps a fact's id from being reused
        self._places: dict[int, int] = {}  # by id

    def find(self, fact: Fact) -> bytes:
        """Return the code of a fact, whose number is NUMBERS and its place among these facts."""
        finishes = type(fact) is Advanced and fact.finished  # such a fact occurs once
        place = None if finishes else self._places.get(id(fact))
        if place is None:
            place = len(self.facts)
            self.facts.append(fact)
            if not finishes:
                self._places[id(fact)] = place
        return number_code(NUMBERS + place)


class TracedRounds:
    """The rounds of one episode. They are taken apart as they end, because keeping them all would cost more."""

    def __init__(self, others: OtherFacts, uses_numbers: bool = True) -> None:
        self.facts: list[Fact] = []  # without those that are repeated
        self.counts: list[int] = []  # facts of each round
        self.repeated: list[int] = []  # how many of them are those of the round it refers to
        self.asked: list[int] = []  # intervals requested of each branch as it finished
        self.factless: list[int] = []  # actions without facts, five figures each: round, position, verb, branch, label
        self._others, self._uses_numbers = others, uses_numbers
        self._model: Sequence[Fact] = ()  # the last large round; the next one may begin with the same facts
        self._finished = 0  # branches that have finished

    def add(self, state: State, played: Round) -> None:
        """Add the next round, after which the episode is in this state."""
        actions, facts = played
        model = self._model
        count, same = len(facts), len(model)
        if count < same or (same and type(facts[same - 1]) is not type(model[same - 1])) or facts[:same] != model:
            same = 0
        if 2 * count > len(model):
            self._model = facts
        new = facts[same:] if same else facts
        self.facts += new
        if len(actions) != count:
            self._add_factless(len(self.counts), actions)
        if len(state.finished) != self._finished:
            self._finished = len(state.finished)
            asking = actions if len(actions) == count else [action for action in actions if action.verb < PRUNE]
            for action, fact in zip(asking[same:], new):  # noqa: B905  # compiled only without `strict`
                if type(fact) is Advanced and fact.finished:
                    self.asked.append(action.intervals)
        self.counts.append(count)
        self.repeated.append(same)

    def codes(self) -> bytes:
        """Return the codes of the facts."""
        find = self._others.find
        if not self._uses_numbers:
            return b"".join([find(fact) for fact in self.facts])
        return b"".join([fact.code or find(fact) for fact in self.facts])

    def _add_factless(self, number: int, actions: Sequence[Action]) -> None:
        for at, action in enumerate(actions):
            if action.verb >= PRUNE:
                label = NONE if action.label is None else action.label
                self.factless += (number, at, action.verb, action.branch, label)


class RoundColumns:
    """Columns of the rounds of many episodes."""

    def __init__(self, interval: int, probe_tokens: int) -> None:
        self._interval, self._probe_tokens = interval, probe_tokens
        self._others = OtherFacts()
        self._codes: list[bytes] = []  # of the facts of each episode
        self._counts: list[int] = []
        self._repeated: list[int] = []
        self._asked: list[int] = []
        self._factless: list[int] = []
        self._episodes: list[int] = []  # seven figures each: lengths of the columns above, and the result

    def begin(self, interval: int) -> TracedRounds:
        """Return where the rounds of an episode with intervals of so many tokens are added as they end."""
        return TracedRounds(self._others, interval == self._interval)

    def add(self, rounds: TracedRounds, state: State, right: bool) -> None:
        """Add the next episode, which ended as `state`."""
        self._codes.append(rounds.codes())
        self._counts += rounds.counts
        self._repeated += rounds.repeated
        self._asked += rounds.asked
        self._factless += rounds.factless
        lengths = (len(rounds.counts), len(rounds.facts), len(rounds.asked), len(rounds.factless) // 5)
        answer = NONE if state.answer is None else state.answer
        self._episodes += (*lengths, answer, right, state.limits.max_branches)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the columns by name, each of the smallest type that holds its numbers."""
        numbers = np.frombuffer(b"".join(self._codes), np.int32)
        first = np.full(NUMBERS + len(self._others.facts), len(numbers))  # position of each fact's first occurrence
        first[numbers[::-1]] = np.arange(len(numbers))[::-1]
        occurring = np.flatnonzero(first < len(numbers))
        occurring = occurring[np.argsort(first[occurring])]
        ranks = np.zeros(len(first), np.uint32)
        ranks[occurring] = np.arange(len(occurring))
        table = self._table(occurring)
        return {
            "table": _small(table if table[:, 6].any() else table[:, :6].copy()),
            "facts": _small(ranks[numbers]),
            "counts": _small(_array(self._counts)),
            "repeated": _small(_array(self._repeated)),
            "asked": _small(_array(self._asked)),
            "factless": _small(_array(self._factless)).reshape(-1, 5),
            "episodes": _small(_array(self._episodes)).reshape(-1, 7),
        }

    def _table(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of some facts: kind, branch, intervals, tokens, finished, label and signals."""
        table = np.zeros((len(numbers), 7), np.int64)
        steps, probes = numbers < STEPS, (numbers >= STEPS) & (numbers < NUMBERS)
        branches, intervals = np.divmod(numbers[steps], SHORT)
        table[steps, 1], table[steps, 2], table[steps, 3] = branches, intervals, intervals * self._interval
        labels, branches = np.divmod(numbers[probes] - STEPS, NUMBERED)
        table[probes, 0], table[probes, 1], table[probes, 3] = PROBED, branches, self._probe_tokens
        table[:, 5] = NONE
        table[probes, 5] = labels - 1
        others = numbers >= NUMBERS
        table[others] = self._others_table()[numbers[others] - NUMBERS]
        return table

    def _others_table(self) -> NDArray[np.int64]:
        rows: list[int] = []
        for fact in self._others.facts:
            label = NONE if fact.label is None else fact.label
            if type(fact) is Advanced:
                signals = pack_signals(fact.confidence, fact.lowest)
                rows += (ADVANCED, fact.branch, fact.intervals, fact.tokens, fact.finished, label, signals)
            else:
                rows += (PROBED, fact.branch, 0, fact.tokens, False, label, pack_signals(fact.confidence, None))
        return _array(rows).reshape(-1, 7)


def _array(numbers: list[int]) -> NDArray[np.int64]:
    return np.frombuffer(array("q", numbers), np.int64) if numbers else np.zeros(0, np.int64)


def _small(values: NDArray[Any]) -> NDArray[Any]:
    """Return numbers as the smallest type that holds them."""
    least, most = np.min_scalar_type(values.min(initial=0)), np.min_scalar_type(values.max(initial=0))
    return values.astype(np.result_type(least, most))
