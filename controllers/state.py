"""The rules of an episode: which actions are legal, what facts change, and what has been spent, live or in replay.

    a branch:  BRANCH ──▶ running ──CONTINUE──▶ running … ──▶ finished (its label costs nothing)
                            │  ▲
                            │  └─PROBE: reveals a label, once per advance
                            └─PRUNE──▶ pruned

Every legal round makes progress (opens, advances, probes what moved, or prunes), so every episode ends.

This module can be compiled (`controllers/core/compiled.py`). Loops copy what they read from other modules into local
names, which is faster. What is checked here is declared as `object`, because compiled code would refuse arguments of
other types before the check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from itertools import compress, count
from typing import Final, NamedTuple

from controllers.core.action_types import (
    ANSWER,
    BRANCH,
    CONTINUE,
    PROBE,
    PRUNE,
    Action,
    Advanced,
    Fact,
    Probed,
    call_name,
)
from controllers.core.branch_facts import Branch, rebuild
from controllers.errors import BadFact, IllegalAction
from controllers.limits import Limits, Reservations
from controllers.voting import plurality, tally

GONE: Final = 0
UNTOUCHED: Final = 1
MOVED: Final = 2
ASKED: Final = 3
"""Last effect of a round on a branch. GONE: finished or pruned. ASKED: probed."""


class Stop(StrEnum):
    """Why an episode ended."""

    ANSWERED = "answered"  # the controller answered
    MAX_TOKENS = "max_tokens"  # no requested action fits under the cap
    DEADLINE = "deadline"  # the deadline has passed
    CONTROLLER_ERROR = "controller_error"  # the controller raised, or made an illegal move
    UPSTREAM_ERROR = "upstream_error"  # the backend failed midway
    NOT_VOTABLE = "not_votable"  # the task has no answers that can be compared


class Round(NamedTuple):
    """One round as it was carried out. Traces consist of rounds."""

    actions: Sequence[Action]
    facts: Sequence[Fact]


_FIELDS: Final = (
    *("_fresh", "_gone", "_legal", "_legal_since", "_reservations", "active", "answer", "branches", "finished"),
    *("labels", "last", "limits", "rounds", "spent", "stop", "votes"),
)


class State:
    """Everything a controller sees of its episode. Only this class decides which actions are legal and what they cost.

    It holds no text, no question and no reference answer. Labels are ints, numbered from 0 by first reveal.
    The caller owns it: after a failure, `leader()` is the best answer so far.
    """

    __slots__ = _FIELDS

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.branches: list[Branch] = []
        self.active: tuple[int, ...] = ()  # ids of branches neither finished nor pruned, in order
        self.finished: list[int] = []  # ids of finished branches, in the order they finished
        self.votes: dict[int, int] = {}  # finished branches by label, in the order first seen
        self.labels = 0  # labels revealed so far; they are 0 … labels - 1
        self.rounds = 0  # rounds carried out
        self.last: Round | None = None  # the latest of them
        self.spent = 0  # tokens, probes included
        self.answer: int | None = None  # the label answered with
        self.stop: Stop | None = None  # why the episode ended; None while it runs
        self._fresh: list[int] = []  # UNTOUCHED or GONE for each branch, at the start of a round
        self._gone = 0  # number of branches that are GONE
        self._legal: list[Action] = []  # the latest round that stays legal until a branch leaves; empty once one has
        self._legal_since: list[int] = []  # its last effects on the branches
        keeps_reserved = limits.max_tokens is not None and not limits.has_pauses
        self._reservations = Reservations(limits) if keeps_reserved else None

    def __reduce__(self) -> tuple[object, ...]:
        return rebuild, (State, (self.limits,), {name: getattr(self, name) for name in _FIELDS})

    @property
    def width(self) -> int:
        """Number of branches opened so far. It is the id of the next branch."""
        return len(self.branches)

    @property
    def room(self) -> int:
        """Number of branches that may still be opened."""
        return self.limits.max_branches - len(self.branches)

    @property
    def remaining(self) -> int | None:
        """Tokens left under the cap; None without a cap."""
        cap = self.limits.max_tokens
        return None if cap is None else cap - self.spent

    def deciding_votes(self) -> dict[int, int]:
        """Return the votes of finished branches; if none has an answer, the latest labels of unpruned ones."""
        return self.votes or tally(branch.label for branch in self.branches if not branch.pruned)

    def leader(self) -> int | None:
        """Return the best answer so far: the plurality of `deciding_votes`."""
        return plurality(self.deciding_votes())

    def ledger(self, winner: int | None = None) -> dict[str, int]:
        """Return tokens by purpose; they add up to `spent`. `winner` is the branch whose text is the reply."""
        answer = self.answer
        won = agreeing = losing = pruned = probes = 0
        for index, branch in enumerate(self.branches):
            tokens = branch.tokens
            probes += branch.probe_tokens
            if index == winner:
                won += tokens
            elif branch.pruned:
                pruned += tokens
            elif answer is not None and branch.label == answer:
                agreeing += tokens
            else:
                losing += tokens
        return {"winner": won, "agreeing": agreeing, "losing": losing, "pruned": pruned, "probe": probes}

    # Legality

    def check(self, actions: object) -> None:
        """Raise IllegalAction unless `actions` is a legal round. The state is not changed."""
        if self.stop is not None:
            raise IllegalAction(f"the episode has ended ({self.stop})")
        if not isinstance(actions, (list, tuple)):
            raise IllegalAction(f"a round is a list of actions, not {type(actions).__name__}")
        if not actions:
            raise IllegalAction("an empty round makes no progress; answer(state.leader()) ends the episode")
        legal, rest = self._legal, actions
        if legal and actions == legal:  # comparing lists takes a tenth of the time of the loop
            return
        since = self._fresh.copy()
        if legal and actions[: len(legal)] == legal:
            rest = actions[len(legal) :]
            since[: len(self._legal_since)] = self._legal_since
        has_probes = self.limits.has_probes
        lasts = True  # whether it has only advances, and probes after them
        advances, probes = CONTINUE, PROBE
        for action in rest:
            if type(action) is not Action:
                raise IllegalAction(f"{action!r} is not an action; make one with branch(), advance(), …")
            verb, index = action.verb, action.branch
            try:
                if verb is advances:
                    if since[index] == GONE:
                        raise self._no_branch(action, since)
                    since[index] = MOVED
                elif verb is probes:
                    if since[index] != MOVED or not has_probes:
                        self._check_probe(action, since)
                        lasts = False
                    since[index] = ASKED
                else:
                    lasts = False
                    if verb is BRANCH:
                        if len(since) >= self.limits.max_branches:
                            raise IllegalAction(f"branch(): at most {self.limits.max_branches} branches may be opened")
                        since.append(MOVED)
                    elif verb is PRUNE:
                        if since[index] == GONE:
                            raise self._no_branch(action, since)
                        since[index] = GONE
                    else:
                        self._check_answer(actions, action.label)
            except IndexError:
                raise self._no_branch(action, since) from None
        if lasts:
            self._legal, self._legal_since = list(actions), since

    def _check_probe(self, action: Action, since: Sequence[int]) -> None:
        """Raise IllegalAction unless branches can be probed and this one has advanced since its latest probe."""
        last, index = since[action.branch], action.branch
        if not self.limits.has_probes:
            raise IllegalAction("probe(): this episode has no probes (state.limits.has_probes is false)")
        if last == GONE:
            raise self._no_branch(action, since)
        if last == ASKED or self.branches[index].probed == self.branches[index].intervals:
            raise IllegalAction(f"probe(): branch {index} has not advanced since it was probed")

    def _no_branch(self, action: Action, since: Sequence[int]) -> IllegalAction:
        """Return why the branch of `action` is not active. `since` includes branches that the round opens before it."""
        call, index = call_name(action.verb), action.branch
        if index >= len(since):
            return IllegalAction(f"{call}: there is no branch {index}; {len(since)} are open")
        finished = index < len(self.branches) and self.branches[index].finished
        return IllegalAction(f"{call}: branch {index} is {'finished' if finished else 'pruned'}")

    def _check_answer(self, actions: Sequence[object], label: int | None) -> None:
        if len(actions) > 1:
            raise IllegalAction("answer() must be the only action of its round")
        if label is None:
            if self.leader() is not None:
                raise IllegalAction(f"answer(None): label {self.leader()} leads; None is allowed only without a label")
        elif not 0 <= label < self.labels:
            raise IllegalAction(f"answer({label}): there is no label {label}; {self.labels} have been revealed")

    # Cost

    def affordable(self, actions: Sequence[Action]) -> Sequence[Action]:
        """Return the longest prefix of `actions` whose worst case fits under the cap; all of them without a cap.

        The first advance that does not fit is shortened to the intervals that fit. Prunes are free. If branches do not
        pause, BRANCH reserves a whole branch, and advances are free.
        """
        if self.limits.max_tokens is None:
            return actions
        if self._reservations is not None:
            return self._reservations.affordable(actions, self.branches)
        interval, remaining = self.limits.interval, self.limits.max_tokens - self.spent
        grown: dict[int, int] = {}  # worst-case tokens of branches this round advances
        width = len(self.branches)
        fitting: list[Action] = []
        for action in actions:
            if action.verb is PROBE:
                cost = self.limits.probe_tokens
                if cost > remaining:
                    break
            elif action.verb in (BRANCH, CONTINUE):
                index = width if action.verb is BRANCH else action.branch
                width += action.verb is BRANCH
                tokens = grown.get(index, self.branches[index].tokens if index < len(self.branches) else 0)
                cost = self.worst_case(tokens, action.intervals)
                if cost > remaining:
                    if remaining >= interval:
                        fitting.append(replace(action, intervals=remaining // interval))
                    break
                grown[index] = tokens + cost
            else:
                cost = 0
            remaining -= cost
            fitting.append(action)
        return fitting

    def worst_case(self, tokens: int, intervals: int) -> int:
        """Return the most tokens that `intervals` more can cost a branch of `tokens` tokens."""
        most = intervals * self.limits.interval
        if self.limits.branch_tokens is not None:
            most = min(most, max(0, self.limits.branch_tokens - tokens))
        return most

    # Facts

    def apply(self, actions: Sequence[Action], facts: Sequence[Fact]) -> None:
        """Update the state with the facts of a legal round.

        Raises BadFact at the first fact that does not match its action. Facts before it stay applied, because their
        tokens were spent. The round does not count, and its prunes and answer are not applied.
        """
        asking = [action for action in actions if action.verb < PRUNE] if len(facts) != len(actions) else actions
        if len(facts) != len(asking):
            raise BadFact(f"{len(facts)} facts answer {len(asking)} actions")
        branches, width, gone, spent = self.branches, len(self.branches), self._gone, 0
        reserved = self._reservations
        limit = 0 if reserved is None else reserved.limit(actions, branches)
        advances, probes = CONTINUE, PROBE
        try:
            for action, fact in zip(asking, facts):  # noqa: B905  # of equal lengths, and compiled only without `strict`
                verb, index = action.verb, action.branch
                if verb is advances:
                    branch = branches[index]
                    if fact is not branch.known_step:
                        if type(fact) is not Advanced or fact.branch != index:
                            raise _bad(action, fact)
                        if fact.finished:
                            self._finish(fact)
                        if fact.confidence is not None:
                            branch.add_signals(fact)
                        elif not fact.finished:
                            branch.known_step = fact
                    tokens = fact.tokens
                    branch.intervals += fact.intervals
                    branch.tokens += tokens
                    spent += tokens
                elif verb is probes:
                    branch = branches[index]
                    if fact is not branch.known_probe:
                        if type(fact) is not Probed or fact.branch != index:
                            raise _bad(action, fact)
                        label = fact.label
                        if label is not None and label >= self.labels:
                            self._reveal(fact, label)
                        if not branch.finished:  # a finished one shows its answer without being asked
                            branch.probe_confidence = fact.confidence
                            branch.label = label
                            branch.known_probe = fact
                    branch.probed = branch.intervals
                    tokens = fact.tokens
                    if tokens:
                        branch.probe_tokens += tokens
                        spent += tokens
                else:
                    if verb is not BRANCH or type(fact) is not Advanced or fact.branch != len(branches):
                        raise _bad(action, fact)
                    self._open(fact)
                    spent += fact.tokens
            if asking is not actions:
                self._close_round(actions)
        finally:
            self.spent += spent
            if reserved is not None:
                reserved.add(limit, len(branches) - width)
            if self._gone != gone:
                self.active = tuple(compress(count(), self._fresh))  # GONE is 0
            elif len(branches) != width:
                self.active += tuple(range(width, len(branches)))
        self.rounds += 1
        self.last = tuple.__new__(Round, (actions, facts))  # takes half as long as calling Round

    def _reveal(self, fact: Fact, label: int) -> None:
        """Register the label of `fact`."""
        if label > self.labels:
            raise BadFact(f"{fact}: labels are numbered by first reveal; the next new label is {self.labels}")
        self.labels = max(self.labels, label + 1)

    def _open(self, fact: Advanced) -> None:
        if fact.label is not None:
            self._reveal(fact, fact.label)
        branch = Branch()
        if fact.confidence is not None:
            branch.add_signals(fact)
        branch.intervals, branch.tokens = fact.intervals, fact.tokens
        self.branches.append(branch)
        self._fresh.append(UNTOUCHED)
        if fact.finished:
            self._finish(fact)

    def _finish(self, fact: Advanced) -> None:
        branch, label = self.branches[fact.branch], fact.label
        if branch.finished:
            return
        if label is not None:
            self._reveal(fact, label)
            self.votes[label] = self.votes.get(label, 0) + 1
        branch.finished, branch.label = True, label
        self.finished.append(fact.branch)
        self._leave(fact.branch)

    def _leave(self, index: int) -> None:
        """Mark branch `index` as no longer active."""
        self._fresh[index] = GONE
        self._gone += 1
        self._legal = []

    def _close_round(self, actions: Sequence[Action]) -> None:
        """Apply the actions without facts: prunes and the answer."""
        for action in actions:
            if action.verb is PRUNE:
                if self._fresh[action.branch] != GONE:  # otherwise this round has finished it, and its vote counts
                    self.branches[action.branch].pruned = True
                    self._leave(action.branch)
            elif action.verb is ANSWER:
                self.answer, self.stop = action.label, Stop.ANSWERED

    def end(self, stop: Stop) -> None:
        """End the episode from outside with the best answer so far, if there is one. The first reason is kept."""
        if self.stop is None:
            self.answer, self.stop = None if stop is Stop.NOT_VOTABLE else self.leader(), stop


def _bad(action: Action, fact: Fact) -> BadFact:
    return BadFact(f"{fact} does not match {action}")
