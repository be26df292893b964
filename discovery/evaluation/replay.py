"""Replay of a recorded question: an environment that runs recorded branches again without a model.

This module can be compiled (`controllers/core/compiled.py`). Loops copy what they read from other modules into local
names, which is faster.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from controllers import TO_END, Action, Advanced, Fact, Probed, Signal
from controllers.actions import BRANCH, CONTINUE, PROBE
from controllers.signals import NO_SIGNALS, combine
from discovery.data.recordings import UNKNOWN, BranchRow, Recording
from discovery.errors import BranchCensored
from discovery.evaluation.traced_rounds import SHORT, probe_number, step_number

NO_LABEL: Final = -1
"""In place of the label of an unreadable answer."""
UNSEEN: Final = -2
"""In place of the label of an answer that has not been revealed yet."""


@lru_cache(maxsize=1024)
def shuffled_order(branches: int, seed: int, greedy_first: bool = False) -> Sequence[int]:
    """Return the order in which branches are opened under a shuffle seed; the same object for every controller.

    A greedy first branch stays the first: live, no other branch can take its place.
    """
    order = list(range(branches))
    kept = [order.pop(0)] if greedy_first and order else []
    random.Random(seed).shuffle(order)
    return (*kept, *order)


def branch_order(recording: Recording, seed: int) -> Sequence[int]:
    """Return the order in which a recording's branches are opened under a shuffle seed."""
    return shuffled_order(recording.branches, seed, recording.greedy_first)


class ReplayEnvironment:
    """Implements `controllers.Environment` over a Recording. It never suspends.

    `order` lists recorded branches in the order in which they are opened. An interval costs Δ tokens while probes
    remain. The one after the last probe finishes the branch at the cost of the rest of the chain, never less than 0. A
    branch opened to its end costs its length. A probe costs what was recorded, or `probe_tokens` if given. Facts carry
    those of the `signals` that were recorded. Raises BranchCensored if no recorded branch is left to open.
    """

    def __init__(
        self,
        recording: Recording,
        order: Sequence[int],
        probe_tokens: int | None = None,
        signals: frozenset[Signal] = NO_SIGNALS,
    ) -> None:
        self.recording = recording
        self.order = order
        self.revealed: list[int] = []  # by label: the recording's answer number
        self.critical_path = 0  # sequential tokens: sum over rounds of the tokens of the branch that ran longest
        self._labels = [UNSEEN] * len(recording.answers) + [NO_LABEL]  # by answer number; last: no answer
        self._rows = recording.rows
        self._opened: list[BranchRow] = []
        self._probes: list[Sequence[int]] = []  # probe answers of each opened branch
        self._left: list[int] = []  # whole intervals each branch can still run; -1 once it has finished
        self._probe_tokens = probe_tokens or 0
        self._has_probe_costs = probe_tokens is None and recording.has_probe_costs
        self._charged = self._has_probe_costs or self._probe_tokens > 0
        self._delta = recording.interval
        self._steps = _steps(recording.interval, len(order))
        self._probe_facts = _probe_facts(self._probe_tokens, len(order))
        self._signals = _SignalAdder(recording, order, signals) if signals & recording.signals else None

    async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
        return self.carry_out(actions)

    def carry_out(self, actions: Sequence[Action]) -> Sequence[Fact]:
        """Carry out one round at once, as a `SynchronousEnvironment` does."""
        facts: list[Fact] = []
        left, steps, probes, labels = self._left, self._steps, self._probes, self._labels
        probe_facts, charged = self._probe_facts, self._charged
        has_costs, most, longest = self._has_probe_costs, 0, 0  # intervals, tokens
        before, repeated = -1, False  # tokens of a branch that advances twice or pays for probes must be summed
        advances, asks = CONTINUE, PROBE
        for action in actions:
            verb, index = action.verb, action.branch
            if verb is advances:
                intervals = action.intervals
                rest = left[index] - intervals
                if index <= before:
                    repeated = True
                before = index
                if rest < 0:
                    fact = self._finish(index)
                    facts.append(fact)
                    if fact.tokens > longest:
                        longest = fact.tokens
                else:
                    left[index] = rest
                    if intervals > most:
                        most = intervals
                    try:
                        facts.append(steps[index][intervals])
                    except IndexError:
                        facts.append(self._step(index, intervals))
            elif verb is asks:
                rest = left[index]
                if charged:
                    repeated = True
                if has_costs or (rest < 0 and charged):
                    facts.append(self._probe(index))
                    continue
                answer = probes[index][rest] if rest >= 0 else self._opened[index].final
                label = labels[answer]
                if label == UNSEEN:
                    label = self._reveal(answer)
                try:
                    facts.append(probe_facts[index][label + 1])
                except IndexError:
                    facts.append(self._probe_fact(index, label))
            elif verb is BRANCH:
                fact = self._open(action.intervals)
                facts.append(fact)
                before = fact.branch
                if fact.tokens > longest:
                    longest = fact.tokens
        self.critical_path += _longest(facts) if repeated else max(longest, most * self._delta)
        return facts if self._signals is None else self._signals.add(facts)

    def is_right(self, label: int | None) -> bool:
        """Return whether `label` is the reference answer."""
        return label is not None and self.revealed[label] == self.recording.reference

    def _open(self, intervals: int) -> Advanced:
        left = self._left
        index = len(left)
        if index >= len(self.order):
            raise BranchCensored(
                f"only {len(self.order)} branches were recorded; set Limits.max_branches to at most that"
            )
        row = self._rows[self.order[index]]
        probes = row.probes
        self._opened.append(row)
        self._probes.append(probes)
        rest = len(probes) - intervals
        if rest < 0:
            left.append(len(probes))
            return self._finish(index, row.tokens if intervals == TO_END else None)
        left.append(rest)
        return self._steps[index][intervals] if intervals < SHORT else self._step(index, intervals)

    def _step(self, index: int, intervals: int) -> Advanced:
        return Advanced(index, intervals, intervals * self._delta, False)

    def _finish(self, index: int, tokens: int | None = None) -> Advanced:
        """Run the rest of branch `index`, at the cost of `tokens` if given; no tokens if it has finished."""
        row, left = self._opened[index], self._left[index]
        if not row.complete:
            raise BranchCensored(
                f"branch {self.order[index]} was recorded for {len(row.probes)} intervals and not to its end"
            )
        intervals, delta = len(row.probes), self._delta
        label = self._label(row.final)
        if left < 0:
            return Advanced(index, 0, 0, True, label)
        self._left[index] = -1
        if tokens is None:
            tokens = left * delta + max(0, row.tokens - intervals * delta)
        return Advanced(index, left + 1, tokens, True, label)

    def _probe(self, index: int) -> Probed:
        """Return a probe at its recorded cost; for a finished branch, its final label at no cost."""
        row, left = self._opened[index], self._left[index]
        if left < 0:
            return Probed(index, self._label(row.final), 0)
        return Probed(index, self._label(row.probes[left]), row.probe_tokens[left])

    def _label(self, answer: int) -> int | None:
        label = self._labels[answer]
        if label == UNSEEN:
            label = self._reveal(answer)
        return None if label == NO_LABEL else label

    def _reveal(self, answer: int) -> int:
        """Give an answer the next label and return it."""
        label = self._labels[answer] = len(self.revealed)
        self.revealed.append(answer)
        return label

    def _probe_fact(self, index: int, label: int) -> Probed:
        """Return the fact of a probe that shows a label for the first time. Those of smaller labels are created too."""
        known = self._probe_facts[index]
        for number in range(len(known) - 1, label + 1):
            revealed = None if number == NO_LABEL else number
            known.append(Probed(index, revealed, self._probe_tokens, number=probe_number(index, number)))
        return known[label + 1]


def _longest(facts: Sequence[Fact]) -> int:
    """Return the tokens of the branch that a round advanced most."""
    spent: dict[int, int] = {}
    for fact in facts:
        spent[fact.branch] = spent.get(fact.branch, 0) + fact.tokens
    return max(spent.values(), default=0)


@lru_cache(maxsize=8)
def _steps(delta: int, width: int) -> list[list[Advanced]]:
    """Return, by branch and intervals, the fact of an advance that did not finish the branch."""
    return [
        [
            Advanced(i, intervals, intervals * delta, False, number=step_number(i, intervals))
            for intervals in range(SHORT)
        ]
        for i in range(width)
    ]


@lru_cache(maxsize=8)
def _probe_facts(tokens: int, width: int) -> list[list[Probed]]:
    """Return, by branch, the facts of probes that cost `tokens`: NO_LABEL's, then by label. Filled in as they occur."""
    return [[] for _ in range(width)]


# Signals


class _SignalAdder:
    """Adds signals to the facts of one episode. It must get every fact, in order."""

    def __init__(self, recording: Recording, order: Sequence[int], signals: frozenset[Signal]) -> None:
        self._recording = recording
        self._rows = recording.rows
        self._order = order
        self._delta = recording.interval
        self._has_intervals = Signal.INTERVALS in signals & recording.signals
        self._has_probes = Signal.PROBES in signals & recording.signals
        self._run: list[int] = []  # intervals that each opened branch has run
        self._steps: list[Sequence[Advanced | None]] = []  # facts of single intervals of each opened branch

    def add(self, facts: Sequence[Fact]) -> list[Fact]:
        """Return the facts with their signals; a fact whose signals are unknown is returned as it is."""
        run, steps, added = self._run, self._steps, list(facts)
        for at, fact in enumerate(facts):
            if isinstance(fact, Probed):
                added[at] = self._probed(fact)
                continue
            index = fact.branch
            if index == len(run):
                run.append(0)
                steps.append(self._steps_of(index))
            if fact.finished or fact.intervals != 1:
                added[at] = self._advanced(fact)
                continue
            start = run[index]
            run[index] = start + 1
            added[at] = steps[index][start] or fact
        return added

    def _steps_of(self, index: int) -> Sequence[Advanced | None]:
        """Return the facts of the whole intervals of a branch; None where signals are unknown. They are made once."""
        row = self._rows[self._order[index]]
        if not self._has_intervals:
            return [None] * len(row.probes)
        cache, place = self._recording.signalled_steps, (self._order[index], index)
        if place not in cache:
            known = [span_signals(row, self._delta, start, start + 1) for start in range(len(row.probes))]
            cache[place] = [
                None if confidence is None else Advanced(index, 1, self._delta, False, None, confidence, lowest)
                for confidence, lowest in known
            ]
        return cache[place]

    def _advanced(self, fact: Advanced) -> Advanced:
        index, run = fact.branch, self._run
        start = run[index]
        run[index] = end = start + fact.intervals
        if not self._has_intervals:
            return fact
        confidence, lowest = span_signals(self._rows[self._order[index]], self._delta, start, end)
        if confidence is None:
            return fact
        if fact.finished:
            return Advanced(index, fact.intervals, fact.tokens, True, fact.label, confidence, lowest)
        return _signalled_advance(index, fact.intervals, fact.tokens, confidence, lowest)

    def _probed(self, fact: Probed) -> Probed:
        if not self._has_probes:
            return fact
        run = self._run[fact.branch]
        values = self._rows[self._order[fact.branch]].probe_confidences
        if run > len(values) or values[run - 1] == UNKNOWN:  # a finished branch shows its label without a probe
            return fact
        return _signalled_probe(fact.branch, fact.label, fact.tokens, values[run - 1])


def span_signals(row: BranchRow, delta: int, start: int, end: int) -> tuple[int | None, int | None]:
    """Return the signals of a branch's intervals from `start` to `end`. It must have signals of intervals."""
    if end == start + 1 < len(row.confidences):  # combining a single whole interval would not change its signals
        confidence, lowest = row.confidences[start], row.lowests[start]
        return (None, None) if confidence == UNKNOWN or lowest == UNKNOWN else (confidence, lowest)
    lengths = [delta] * (end - start)
    if end == len(row.confidences) and lengths:
        lengths[-1] = max(0, row.tokens - (end - 1) * delta)
    known = zip(lengths, row.confidences[start:end], row.lowests[start:end], strict=True)
    return combine((length, _value(confidence), _value(lowest)) for length, confidence, lowest in known)


def _value(number: int) -> int | None:
    return None if number == UNKNOWN else number


@lru_cache(maxsize=1 << 16)
def _signalled_advance(index: int, intervals: int, tokens: int, confidence: int, lowest: int | None) -> Advanced:
    """Return the fact of an advance that did not finish the branch. Equal facts are one object, as traces expect."""
    return Advanced(index, intervals, tokens, False, None, confidence, lowest)


@lru_cache(maxsize=1 << 16)
def _signalled_probe(index: int, label: int | None, tokens: int, confidence: int) -> Probed:
    return Probed(index, label, tokens, confidence)
