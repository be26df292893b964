"""What is legal, what each fact changes, and what has been spent. It knows not whether it is live or replayed.

    a branch:  BRANCH ──▶ running ──CONTINUE──▶ running … ──▶ finished (its label is free)
                            │  ▲
                            │  └─PROBE: shows a label, once per advance
                            └─PRUNE──▶ pruned

Every legal round makes progress (opens, advances, probes what moved, or prunes), so every episode ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from controllers.actions import TO_END, Action, Advanced, Fact, Probed, Verb
from controllers.errors import BadFact, IllegalAction
from controllers.voting import plurality, tally


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

    __slots__ = ("answer", "branches", "finished", "labels", "limits", "rounds", "spent", "stop", "votes")

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.branches: list[Branch] = []
        self.finished: list[int] = []  # ids of finished branches, in the order they finished
        self.votes: dict[int, int] = {}  # finished branches by label, in the order first seen
        self.labels = 0  # labels revealed so far; they are 0 … labels - 1
        self.rounds = 0  # rounds carried out
        self.spent = 0  # tokens, probes included
        self.answer: int | None = None  # the label answered with
        self.stop: Stop | None = None  # why the episode ended; None while it runs

    @property
    def width(self) -> int:
        """How many branches have been opened; the id the next one gets."""
        return len(self.branches)

    @property
    def active(self) -> list[int]:
        """Ids of the branches neither finished nor pruned."""
        return [i for i, branch in enumerate(self.branches) if not (branch.finished or branch.pruned)]

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

    # What is legal

    def check(self, actions: Sequence[Action]) -> None:
        """Raise IllegalAction unless `actions` is a legal round; the state is not changed."""
        if self.stop is not None:
            raise IllegalAction(f"the episode has ended ({self.stop})")
        if not actions:
            raise IllegalAction("an empty round makes no progress; answer(state.leader()) ends the episode")
        if any(action.verb is Verb.ANSWER for action in actions):
            self._check_answer(actions)
            return
        width = len(self.branches)
        moved: dict[int, bool] = {}  # branches of this round: moved since last probed? Pruned ones are popped
        gone: set[int] = set()  # branches pruned in this round
        for action in actions:
            verb, index = action.verb, action.branch
            if verb is Verb.BRANCH:
                if width >= self.limits.max_branches:
                    raise IllegalAction(f"branch(): {self.limits.max_branches} branches are the most")
                self._check_intervals(action)
                moved[width] = True
                width += 1
                continue
            if not isinstance(index, int) or not 0 <= index < width:
                raise IllegalAction(f"{verb.name}: there is no branch {index}; {width} are open")
            if index in gone or (index < len(self.branches) and not self.branches[index].active):
                fate = "pruned" if index in gone or self.branches[index].pruned else "finished"
                raise IllegalAction(f"{verb.name}: branch {index} is {fate}")
            if verb is Verb.CONTINUE:
                self._check_intervals(action)
                moved[index] = True
            elif verb is Verb.PROBE:
                fresh = moved.get(index)
                if fresh is None:
                    fresh = self.branches[index].probed < self.branches[index].intervals
                if not fresh:
                    raise IllegalAction(f"PROBE: branch {index} has not moved since it was probed")
                moved[index] = False
            else:
                gone.add(index)

    def _check_answer(self, actions: Sequence[Action]) -> None:
        if len(actions) > 1:
            raise IllegalAction("answer() stands alone in its round")
        label = actions[0].label
        if label is None:
            if self.leader() is not None:
                raise IllegalAction(f"answer(None): label {self.leader()} leads; None is for when nothing does")
        elif not isinstance(label, int) or not 0 <= label < self.labels:
            raise IllegalAction(f"answer({label}): no such label; {self.labels} have appeared")

    def _check_intervals(self, action: Action) -> None:
        if not isinstance(action.intervals, int) or not 1 <= action.intervals <= TO_END:
            raise IllegalAction(f"{action.verb.name}: intervals must be from 1 to TO_END, not {action.intervals}")

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
            if action.verb is Verb.PROBE:
                cost = self.limits.probe_tokens
                if cost > remaining:
                    break
            elif action.verb in (Verb.BRANCH, Verb.CONTINUE):
                index = width if action.verb is Verb.BRANCH else action.branch
                width += action.verb is Verb.BRANCH
                tokens = grown.get(index, self.branches[index].tokens if index < len(self.branches) else 0)
                cost = self.worst_case(tokens, action.intervals)
                if cost > remaining:
                    if remaining >= interval:
                        fitting.append(action._replace(intervals=remaining // interval))
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
        """Take a round's facts in. Raises BadFact, having changed nothing, if they do not answer `actions`."""
        self._verify(actions, facts)
        pending = iter(facts)
        for action in actions:
            verb = action.verb
            if verb is Verb.PRUNE:
                self.branches[action.branch].pruned = True
            elif verb is Verb.ANSWER:
                self.answer, self.stop = action.label, Stop.ANSWERED
            else:
                if verb is Verb.BRANCH:
                    self.branches.append(Branch())
                self._take(next(pending))
        self.rounds += 1

    def end(self, stop: Stop) -> None:
        """End the episode from outside with the best answer so far; the first reason stays."""
        if self.stop is None:
            self.answer, self.stop = self.leader(), stop

    def _take(self, fact: Fact) -> None:
        branch = self.branches[fact.branch]
        self.spent += fact.tokens
        if fact.label is not None and fact.label >= self.labels:
            self.labels = fact.label + 1
        if isinstance(fact, Probed):
            branch.probe_tokens += fact.tokens
            branch.label = fact.label
            branch.probed = branch.intervals
            return
        branch.intervals += fact.intervals
        branch.tokens += fact.tokens
        if fact.finished and not branch.finished:
            branch.finished, branch.label = True, fact.label
            self.finished.append(fact.branch)
            if fact.label is not None:
                self.votes[fact.label] = self.votes.get(fact.label, 0) + 1

    def _verify(self, actions: Sequence[Action], facts: Sequence[Fact]) -> None:
        width, labels = len(self.branches), self.labels
        pending = iter(facts)
        for action in actions:
            verb = action.verb
            if verb is Verb.PRUNE or verb is Verb.ANSWER:
                continue
            index = action.branch
            if verb is Verb.BRANCH:
                index = width
                width += 1
            fact = next(pending, None)
            if fact is None or type(fact) is not (Probed if verb is Verb.PROBE else Advanced):
                raise BadFact(f"{verb.name} of branch {index} is answered by {fact}")
            if fact.branch != index or fact.tokens < 0:
                raise BadFact(f"{verb.name} of branch {index} is answered by {fact}")
            if fact.label is not None:
                if not 0 <= fact.label <= labels:
                    raise BadFact(f"{fact}: labels are numbered by first reveal, the next new one is {labels}")
                labels = max(labels, fact.label + 1)
        extra = next(pending, None)
        if extra is not None:
            raise BadFact(f"{extra} answers no action")
