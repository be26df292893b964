"""What is legal, what each fact changes, and what has been spent. It knows not whether it is live or replayed.

    a branch:  BRANCH ──▶ running ──CONTINUE──▶ running … ──▶ finished (its label is free)
                            │  ▲
                            │  └─PROBE: shows a label, once per advance
                            └─PRUNE──▶ pruned

Every legal round makes progress (opens, advances, probes what moved, or prunes), so every episode ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import compress, count
from typing import NamedTuple

from controllers.actions import ANSWER, BRANCH, CONTINUE, PROBE, PRUNE, Action, Advanced, Fact, Probed
from controllers.errors import BadFact, IllegalAction
from controllers.voting import plurality, tally

GONE, UNTOUCHED, MOVED, ASKED = range(4)
"""What a round did last to a branch; GONE for one that is finished or pruned."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an episode may use. Token figures are worst cases the state reserves by; None sets no bound."""

    interval: int  # tokens of one interval, Δ
    max_branches: int = 64  # branches that may ever be opened
    branch_tokens: int | None = None  # tokens one branch may grow to
    probe_tokens: int = 0  # the most one probe can cost
    max_tokens: int | None = None  # tokens the whole episode may spend; a hard cap

    def __post_init__(self) -> None:
        for name in ("interval", "max_branches"):
            if getattr(self, name) < 1:
                raise ValueError(f"Limits.{name} must be at least 1, not {getattr(self, name)}")
        if self.max_tokens is not None and self.branch_tokens is None:
            raise ValueError("Limits.max_tokens needs branch_tokens: without it TO_END has no worst case to reserve")


class Stop(StrEnum):
    """Why an episode ended."""

    ANSWERED = "answered"  # the controller answered
    MAX_TOKENS = "max_tokens"  # nothing it asked for fits under the cap any more
    DEADLINE = "deadline"  # time was up
    CONTROLLER_ERROR = "controller_error"  # it raised, or moved illegally
    UPSTREAM_ERROR = "upstream_error"  # the backend failed midway
    NOT_VOTABLE = "not_votable"  # the task has no answers that could be compared


class Round(NamedTuple):
    """One round as it was carried out: what a trace is made of."""

    actions: Sequence[Action]
    facts: Sequence[Fact]


class Branch:
    """One line of reasoning, as far as it is known."""

    __slots__ = ("finished", "intervals", "label", "probe_tokens", "probed", "pruned", "tokens")

    def __init__(self) -> None:
        self.intervals = 0  # intervals run
        self.tokens = 0  # tokens generated, probes not counted
        self.probe_tokens = 0  # tokens its probes cost
        self.label: int | None = None  # its final label if finished, else its latest probe's
        self.probed = 0  # intervals it had run when it was last probed
        self.finished = False
        self.pruned = False

    @property
    def active(self) -> bool:
        """Neither finished nor pruned."""
        return not (self.finished or self.pruned)

    def __repr__(self) -> str:
        fate = "finished" if self.finished else "pruned" if self.pruned else "running"
        return f"<Branch {fate} intervals={self.intervals} tokens={self.tokens} label={self.label}>"


class State:
    """All a controller sees of its episode, and the only judge of legality and cost.

    It holds no text, no question and no reference answer: labels are ints, numbered from 0 by first reveal.
    The caller owns it: after a failure the best answer so far is `leader()`.
    """

    __slots__ = (
        "_fresh",
        "_gone",
        "active",
        "answer",
        "branches",
        "finished",
        "labels",
        "last",
        "limits",
        "rounds",
        "spent",
        "stop",
        "votes",
    )

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.branches: list[Branch] = []
        self.active: tuple[int, ...] = ()  # ids of the branches neither finished nor pruned, in order
        self.finished: list[int] = []  # ids of finished branches, in the order they finished
        self.votes: dict[int, int] = {}  # finished branches by label, in the order first seen
        self.labels = 0  # labels revealed so far; they are 0 … labels - 1
        self.rounds = 0  # rounds carried out
        self.last: Round | None = None  # the latest of them
        self.spent = 0  # tokens, probes included
        self.answer: int | None = None  # the label answered with
        self.stop: Stop | None = None  # why the episode ended; None while it runs
        self._fresh: list[int] = []  # for each branch UNTOUCHED, or GONE: where a round begins
        self._gone = 0  # how many of them are GONE

    @property
    def width(self) -> int:
        """How many branches have been opened; the id the next one gets."""
        return len(self.branches)

    @property
    def room(self) -> int:
        """How many branches may still be opened."""
        return self.limits.max_branches - len(self.branches)

    @property
    def remaining(self) -> int | None:
        """Tokens left under the cap; None without one."""
        cap = self.limits.max_tokens
        return None if cap is None else cap - self.spent

    def leader(self) -> int | None:
        """The best answer so far: plurality of the finished, else of the latest labels of those not pruned."""
        winner = plurality(self.votes)
        if winner is None:
            winner = plurality(tally(branch.label for branch in self.branches if not branch.pruned))
        return winner

    def ledger(self, winner: int | None = None) -> dict[str, int]:
        """Tokens by what they were spent on; they add up to `spent`. `winner` is the branch whose text is read."""
        tokens = dict.fromkeys(("winner", "agreeing", "losing", "pruned", "probe"), 0)
        for index, branch in enumerate(self.branches):
            tokens["probe"] += branch.probe_tokens
            if index == winner:
                kind = "winner"
            elif branch.pruned:
                kind = "pruned"
            else:
                agrees = branch.label is not None and branch.label == self.answer
                kind = "agreeing" if agrees else "losing"
            tokens[kind] += branch.tokens
        return tokens

    # What is legal

    def check(self, actions: Sequence[Action]) -> None:
        """Raise IllegalAction unless `actions` is a legal round; the state is not changed."""
        if self.stop is not None:
            raise IllegalAction(f"the episode has ended ({self.stop})")
        if not isinstance(actions, (list, tuple)):
            raise IllegalAction(f"a round is a list of actions, not {type(actions).__name__}")
        if not actions:
            raise IllegalAction("an empty round makes no progress; answer(state.leader()) ends the episode")
        since = self._fresh.copy()
        try:
            for action in actions:
                if type(action) is not Action:
                    raise IllegalAction(f"{action!r} is no action; branch(), advance(), … make them")
                verb, index = action.verb, action.branch
                if verb is CONTINUE:
                    if since[index] == GONE:
                        raise self._no_branch(action, since)
                    since[index] = MOVED
                elif verb is PROBE:
                    if since[index] != MOVED:
                        self._check_probe(action, since)
                    since[index] = ASKED
                elif verb is BRANCH:
                    if len(since) >= self.limits.max_branches:
                        raise IllegalAction(f"branch(): {self.limits.max_branches} branches are the most")
                    since.append(MOVED)
                elif verb is PRUNE:
                    if since[index] == GONE:
                        raise self._no_branch(action, since)
                    since[index] = GONE
                else:
                    self._check_answer(actions, action.label)
        except IndexError:
            raise self._no_branch(action, since) from None

    def _check_probe(self, action: Action, since: Sequence[int]) -> None:
        """A branch that this round has not moved may be asked if an earlier round has."""
        last, index = since[action.branch], action.branch
        if last == GONE:
            raise self._no_branch(action, since)
        if last == ASKED or self.branches[index].probed == self.branches[index].intervals:
            raise IllegalAction(f"PROBE: branch {index} has not moved since it was probed")

    def _no_branch(self, action: Action, since: Sequence[int]) -> IllegalAction:
        """Why `action` is about no active branch; `since` counts those its round opens before it."""
        verb, index = action.verb.name, action.branch
        if index >= len(since):
            return IllegalAction(f"{verb}: there is no branch {index}; {len(since)} are open")
        finished = index < len(self.branches) and self.branches[index].finished
        return IllegalAction(f"{verb}: branch {index} is {'finished' if finished else 'pruned'}")

    def _check_answer(self, actions: Sequence[Action], label: int | None) -> None:
        if len(actions) > 1:
            raise IllegalAction("answer() stands alone in its round")
        if label is None:
            if self.leader() is not None:
                raise IllegalAction(f"answer(None): label {self.leader()} leads; None is for when nothing does")
        elif not 0 <= label < self.labels:
            raise IllegalAction(f"answer({label}): no such label; {self.labels} have appeared")

    # What it costs

    def affordable(self, actions: Sequence[Action]) -> Sequence[Action]:
        """The longest beginning of `actions` whose worst case fits under the cap; all of it without a cap.

        The first advance that does not fit as a whole is cut to the intervals that do. Prunes are free.
        """
        remaining = self.remaining
        if remaining is None:
            return actions
        interval = self.limits.interval
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
        """The most that `intervals` more can cost a branch that has `tokens`."""
        most = intervals * self.limits.interval
        if self.limits.branch_tokens is not None:
            most = min(most, max(0, self.limits.branch_tokens - tokens))
        return most

    # What happened

    def apply(self, actions: Sequence[Action], facts: Sequence[Fact]) -> None:
        """Take a legal round's facts in.

        Raises BadFact at the first fact that does not answer its action. Those before it stand, for they tell of
        tokens that were spent; the round does not count, and nothing is pruned or answered by it.
        """
        asking = [action for action in actions if action.verb < PRUNE] if len(facts) != len(actions) else actions
        if len(facts) != len(asking):
            raise BadFact(f"{len(facts)} facts answer {len(asking)} actions")
        branches, width, gone, spent = self.branches, len(self.branches), self._gone, 0
        try:
            for action, fact in zip(asking, facts, strict=True):
                verb, index = action.verb, action.branch
                if verb is CONTINUE:
                    if type(fact) is not Advanced or fact.branch != index:
                        raise _bad(action, fact)
                    if fact.finished:
                        self._finish(fact)
                    branch, tokens = branches[index], fact.tokens
                    branch.intervals += fact.intervals
                    branch.tokens += tokens
                    spent += tokens
                elif verb is PROBE:
                    if type(fact) is not Probed or fact.branch != index:
                        raise _bad(action, fact)
                    label, tokens = fact.label, fact.tokens
                    if label is not None and label >= self.labels:
                        self._reveal(fact, label)
                    branch = branches[index]
                    branch.label = label
                    branch.probed = branch.intervals
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
            if len(branches) != width or self._gone != gone:
                self.active = tuple(compress(count(), self._fresh))  # GONE is 0
        self.rounds += 1
        self.last = Round(actions, facts)

    def _reveal(self, fact: Fact, label: int) -> None:
        """Take notice of the label of `fact`."""
        if label > self.labels:
            raise BadFact(f"{fact}: labels are numbered by first reveal, the next new one is {self.labels}")
        self.labels = max(self.labels, label + 1)

    def _open(self, fact: Advanced) -> None:
        if fact.label is not None:
            self._reveal(fact, fact.label)
        branch = Branch()
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
        """Branch `index` is active no more."""
        self._fresh[index] = GONE
        self._gone += 1

    def _close_round(self, actions: Sequence[Action]) -> None:
        """What brings no fact: prunes, and the answer."""
        for action in actions:
            if action.verb is PRUNE:
                if self._fresh[action.branch] != GONE:  # else this round has finished it, and its vote stands
                    self.branches[action.branch].pruned = True
                    self._leave(action.branch)
            elif action.verb is ANSWER:
                self.answer, self.stop = action.label, Stop.ANSWERED

    def end(self, stop: Stop) -> None:
        """End the episode from outside with the best answer so far, if it has answers; the first reason stays."""
        if self.stop is None:
            self.answer, self.stop = None if stop is Stop.NOT_VOTABLE else self.leader(), stop


def _bad(action: Action, fact: Fact) -> BadFact:
    return BadFact(f"{action} is answered by {fact}")
