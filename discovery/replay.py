"""The environment of a recorded question: branches run again, interval by interval, without a model."""

from __future__ import annotations

import random
from collections.abc import Sequence

from controllers import TO_END, Action, Advanced, Fact, Probed, Verb
from discovery.errors import Censored
from discovery.recordings import NO_ANSWER, Recording


def shuffled(branches: int, seed: int) -> list[int]:
    """The order in which branches are opened under a shuffle seed."""
    order = list(range(branches))
    random.Random(seed).shuffle(order)
    return order


class ReplayEnvironment:
    """Implements `controllers.Environment` over a Recording. It never suspends.

    `order` says which recorded branch is opened when. An interval costs Δ while probes remain; the one after the last
    probe finishes the branch at the cost of what is left of the chain, never less than 0. A branch opened to its end
    costs its length. A probe costs what was recorded, or `probe_tokens` if that is given. Raises Censored when no
    recorded branch is left to open.
    """

    def __init__(self, recording: Recording, order: Sequence[int], probe_tokens: int | None = None) -> None:
        self.recording = recording
        self.order = order
        self.probe_tokens = probe_tokens
        self.revealed: list[int] = []  # the recording's number of each label
        self._labels = [-1] * len(recording.answers)
        self._intervals: list[int] = []  # run so far, of each opened branch
        self._finals: list[int | None] = []  # label of each finished branch
        self._finished: list[bool] = []

    async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
        facts: list[Fact] = []
        for verb, index, intervals, _ in actions:
            if verb is Verb.CONTINUE:
                facts.append(self._advance(index, intervals))
            elif verb is Verb.PROBE:
                facts.append(self._probe(index))
            elif verb is Verb.BRANCH:
                facts.append(self._open(intervals))
        return facts

    def is_right(self, label: int | None) -> bool:
        """Whether `label` is the reference answer."""
        return label is not None and self.revealed[label] == self.recording.reference

    def _open(self, intervals: int) -> Advanced:
        index = len(self._intervals)
        if index >= len(self.order):
            raise Censored(f"only {len(self.order)} branches were recorded; Limits.max_branches must not exceed that")
        self._intervals.append(0)
        self._finals.append(None)
        self._finished.append(False)
        fact = self._advance(index, intervals)
        if intervals == TO_END:
            fact = fact._replace(tokens=int(self.recording.tokens[self.order[index]]))
        return fact

    def _advance(self, index: int, intervals: int) -> Advanced:
        if self._finished[index]:
            return Advanced(index, 0, 0, True, self._finals[index])
        recording, recorded, done = self.recording, self.order[index], self._intervals[index]
        probes = int(recording.starts[recorded + 1] - recording.starts[recorded])
        if done + intervals <= probes:
            self._intervals[index] = done + intervals
            return Advanced(index, intervals, intervals * recording.interval, False)
        rest = max(0, int(recording.tokens[recorded]) - recording.interval * probes)
        self._intervals[index] = probes + 1
        self._finished[index] = True
        final = self._finals[index] = self._label(int(recording.finals[recorded]))
        return Advanced(index, probes + 1 - done, (probes - done) * recording.interval + rest, True, final)

    def _probe(self, index: int) -> Probed:
        if self._finished[index]:
            return Probed(index, self._finals[index], 0)
        at = int(self.recording.starts[self.order[index]]) + self._intervals[index] - 1
        cost = int(self.recording.probe_tokens[at]) if self.probe_tokens is None else self.probe_tokens
        return Probed(index, self._label(int(self.recording.probes[at])), cost)

    def _label(self, answer: int) -> int | None:
        if answer == NO_ANSWER:
            return None
        label = self._labels[answer]
        if label < 0:
            label = self._labels[answer] = len(self.revealed)
            self.revealed.append(answer)
        return label
