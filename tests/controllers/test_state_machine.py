"""Stateful test of State against a simple model, over arbitrary rounds and facts."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from controllers import (
    TO_END,
    Action,
    Advanced,
    Fact,
    IllegalAction,
    Limits,
    Probed,
    State,
    Stop,
    Verb,
    advance,
    answer,
    branch,
    probe,
    prune,
)

INTERVAL, CAP, BRANCH, PROBE = 8, 400, 60, 3

indices = st.integers(0, 9)
intervals = st.sampled_from([1, 2, TO_END])
actions = st.lists(
    st.one_of(
        st.builds(branch, intervals),
        st.builds(advance, indices, intervals),
        st.builds(probe, indices),
        st.builds(prune, indices),
    ),
    max_size=6,
)


class Episodes(RuleBasedStateMachine):
    """Play arbitrary rounds on a State and on a model that does its own plain accounting."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State(Limits(INTERVAL, 8, branch_tokens=BRANCH, probe_tokens=PROBE, max_tokens=CAP))
        self.tokens: list[int] = []
        self.finished: dict[int, int | None] = {}
        self.pruned: set[int] = set()
        self.fresh: set[int] = set()  # advanced since the last probe
        self.labels = 0
        self.spent = 0
        self.latest: list[Action] = []  # the latest round that was carried out

    def legal(self, actions: list[Action]) -> bool:
        width, gone, fresh = len(self.tokens), set(self.pruned), set(self.fresh)
        for action in actions:
            if action.verb is Verb.BRANCH:
                if width == 8:
                    return False
                fresh.add(width)
                width += 1
                continue
            if not 0 <= action.branch < width or action.branch in gone or action.branch in self.finished:
                return False
            if action.verb is Verb.CONTINUE:
                fresh.add(action.branch)
            elif action.verb is Verb.PROBE:
                if action.branch not in fresh:
                    return False
                fresh.discard(action.branch)
            else:
                gone.add(action.branch)
        return bool(actions)

    @precondition(lambda self: self.state.stop is None)
    @rule(wanted=actions, data=st.data())
    def play(self, wanted: list[Action], data: st.DataObject) -> None:
        if not self.legal(wanted):
            with pytest.raises(IllegalAction):
                self.state.check(wanted)
            return
        self.state.check(wanted)
        fitting = list(self.state.affordable(wanted))
        assert [a.verb for a in fitting] == [a.verb for a in wanted[: len(fitting)]]
        if fitting:
            self.state.check(fitting)
            self.state.apply(fitting, self.carry_out(fitting, data))
            self.latest = fitting

    @precondition(lambda self: self.state.stop is None and self.latest)
    @rule(more=actions, data=st.data())
    def play_again(self, more: list[Action], data: st.DataObject) -> None:
        """The state compares rounds with earlier ones, so play a round again, alone or before other actions."""
        self.play([*self.latest, *more], data)

    def carry_out(self, actions: list[Action], data: st.DataObject) -> list[Fact]:
        facts: list[Fact] = []
        for action in actions:
            if action.verb is Verb.PRUNE:
                self.pruned.add(action.branch)
            elif action.verb is Verb.PROBE:
                facts.append(self.probe(action.branch, data))
            else:
                if action.verb is Verb.BRANCH:
                    self.tokens.append(0)
                index = len(self.tokens) - 1 if action.verb is Verb.BRANCH else action.branch
                facts.append(self.advance(index, action.intervals, data))
        return facts

    def advance(self, index: int, wanted: int, data: st.DataObject) -> Advanced:
        if index in self.finished:
            return Advanced(index, 0, 0, True, self.finished[index])
        most = min(wanted * INTERVAL, BRANCH - self.tokens[index])
        ends = self.tokens[index] + most == BRANCH or data.draw(st.booleans())
        tokens = data.draw(st.integers(1, most)) if ends and most else most
        self.tokens[index] += tokens
        self.spent += tokens
        self.fresh.add(index)
        label = self.label(data) if ends else None
        if ends:
            self.finished[index] = label
        return Advanced(index, -(-tokens // INTERVAL), tokens, ends, label)

    def probe(self, index: int, data: st.DataObject) -> Probed:
        self.fresh.discard(index)
        if index in self.finished:
            return Probed(index, self.finished[index], 0)
        tokens = data.draw(st.integers(0, PROBE))
        self.spent += tokens
        return Probed(index, self.label(data), tokens)

    def label(self, data: st.DataObject) -> int | None:
        label = data.draw(st.none() | st.integers(0, self.labels))
        if label is not None:
            self.labels = max(self.labels, label + 1)
        return label

    @precondition(lambda self: self.state.stop is None)
    @rule(label=st.none() | st.integers(-1, 4))
    def try_to_answer(self, label: int | None) -> None:
        legal = self.state.leader() is None if label is None else 0 <= label < self.labels
        if legal:
            self.state.check([answer(label)])
        else:
            with pytest.raises(IllegalAction):
                self.state.check([answer(label)])

    @precondition(lambda self: self.state.stop is None)
    @rule(reason=st.sampled_from(Stop))
    def end(self, reason: Stop) -> None:
        if self.spent > CAP * 0.8:
            self.state.end(reason)

    @invariant()
    def state_agrees_with_the_facts(self) -> None:
        state = self.state
        assert [b.tokens for b in state.branches] == self.tokens
        assert state.spent == self.spent <= CAP
        assert state.spent == sum(b.tokens + b.probe_tokens for b in state.branches)
        assert dict.fromkeys(state.finished) == dict.fromkeys(self.finished)
        assert [b.label for i, b in enumerate(state.branches) if b.finished] == [
            self.finished[i] for i in sorted(self.finished)
        ]
        assert {i for i, b in enumerate(state.branches) if b.pruned} == self.pruned - set(state.finished)
        assert sum(state.votes.values()) == sum(label is not None for label in self.finished.values())
        assert state.labels == self.labels


Episodes.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestEpisodes = Episodes.TestCase
