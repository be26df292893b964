"""Replay of a recorded question: an environment that runs recorded branches again without a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from controllers import TO_END, Action, Advanced, Fact, Probed
from controllers.actions import BRANCH, CONTINUE, PROBE
from discovery.data.recordings import BranchRow, Recording
from discovery.errors import BranchCensored

SHORT = 8
"""Advances of fewer intervals are looked up instead of constructed."""
UNSEEN = -1
"""Label of an answer that has not been revealed yet."""


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
    branch opened to its end costs its length. A probe costs what was recorded, or `probe_tokens` if given. Raises
    BranchCensored if no recorded branch is left to open.
    """

    def __init__(self, recording: Recording, order: Sequence[int], probe_tokens: int | None = None) -> None:
        self.recording = recording
        self.order = order
        self.revealed: list[int] = []  # by label: the recording's answer number
        self.critical_path = 0  # sequential tokens: sum over rounds of the tokens of the branch that ran longest
        self._labels: list[int | None] = [UNSEEN] * len(recording.answers) + [None]  # by answer number; last: no answer
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

    async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
        facts: list[Fact] = []
        add = facts.append
        left, steps, probes, labels = self._left, self._steps, self._probes, self._labels
        probe_facts = self._probe_facts
        has_costs, most, longest = self._has_probe_costs, 0, 0  # intervals, tokens
        before, repeated = -1, self._charged  # tokens of a branch that advances twice or pays for probes must be summed
        for action in actions:
            verb, index = action.verb, action.branch
            if verb is CONTINUE:
                intervals = action.intervals
                rest = left[index] - intervals
                if index <= before:
                    repeated = True
                before = index
                if rest < 0:
                    fact = self._finish(index)
                    add(fact)
                    if fact.tokens > longest:
                        longest = fact.tokens
                else:
                    left[index] = rest
                    if intervals > most:
                        most = intervals
                    try:
                        add(steps[index][intervals])
                    except IndexError:
                        add(self._step(index, intervals))
            elif verb is PROBE:
                rest = left[index]
                if rest < 0 or has_costs:
                    add(self._probe(index))
                    continue
                answer = probes[index][rest]
                label = labels[answer]
                if label == UNSEEN:
                    label = self._label(answer)
                try:
                    add(probe_facts[index][label])
                except KeyError:
                    probe_facts[index][label] = Probed(index, label, self._probe_tokens)
                    add(probe_facts[index][label])
            elif verb is BRANCH:
                fact = self._open(action.intervals)
                add(fact)
                before = fact.branch
                if fact.tokens > longest:
                    longest = fact.tokens
        self.critical_path += _longest(facts) if repeated else max(longest, most * self._delta)
        return facts

    def is_right(self, label: int | None) -> bool:
        """Return whether `label` is the reference answer."""
        return label is not None and self.revealed[label] == self.recording.reference

    def _open(self, intervals: int) -> Advanced:
        index = len(self._left)
        if index >= len(self.order):
            raise BranchCensored(
                f"only {len(self.order)} branches were recorded; set Limits.max_branches to at most that"
            )
        row = self._rows[self.order[index]]
        self._opened.append(row)
        self._probes.append(row.probes)
        self._left.append(len(row.probes))
        if intervals <= len(row.probes):
            self._left[index] -= intervals
            return self._steps[index][intervals] if intervals < SHORT else self._step(index, intervals)
        fact = self._finish(index)
        return replace(fact, tokens=row.tokens) if intervals == TO_END else fact

    def _step(self, index: int, intervals: int) -> Advanced:
        return Advanced(index, intervals, intervals * self._delta, False)

    def _finish(self, index: int) -> Advanced:
        """Run the rest of branch `index`; no tokens if it has finished."""
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
        rest = max(0, row.tokens - intervals * delta)
        return Advanced(index, left + 1, left * delta + rest, True, label)

    def _probe(self, index: int) -> Probed:
        """Return a probe at its recorded cost; for a finished branch, its final label at no cost."""
        row, left = self._opened[index], self._left[index]
        if left < 0:
            return Probed(index, self._label(row.final), 0)
        return Probed(index, self._label(row.probes[left]), row.probe_tokens[left])

    def _label(self, answer: int) -> int | None:
        label = self._labels[answer]
        if label == UNSEEN:
            label = self._labels[answer] = len(self.revealed)
            self.revealed.append(answer)
        return label


def _longest(facts: Sequence[Fact]) -> int:
    """Return the tokens of the branch that a round advanced most."""
    spent: dict[int, int] = {}
    for fact in facts:
        spent[fact.branch] = spent.get(fact.branch, 0) + fact.tokens
    return max(spent.values(), default=0)


@lru_cache(maxsize=8)
def _steps(delta: int, width: int) -> list[list[Advanced]]:
    """Return, by branch and intervals, the fact of an advance that did not finish the branch."""
    return [[Advanced(i, intervals, intervals * delta, False) for intervals in range(SHORT)] for i in range(width)]


@lru_cache(maxsize=8)
def _probe_facts(tokens: int, width: int) -> list[dict[int | None, Probed]]:
    """Return, by branch and label, the facts of probes that cost `tokens`. Filled in as they occur."""
    return [{} for _ in range(width)]
