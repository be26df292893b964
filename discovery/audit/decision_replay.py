"""Decision replay: controllers of served episodes, shown the same facts again, must decide the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Final, NamedTuple, TypeVar

from controllers import (
    TO_END,
    Action,
    BadFact,
    Controller,
    ControllerError,
    Fact,
    Limits,
    Round,
    State,
    Stop,
    UnknownController,
    Verb,
    run_episode,
    run_sync,
)
from controllers.builtin import find
from controllers.core.action_types import call_name
from controllers.episode import RemoteController
from controllers.loading import Spec, discovered, make, parse_spec
from controllers.sandbox.controller import run_sandboxed
from controllers.sandbox.spawner import spawner
from discovery.audit.served_episodes import baseline_of, controller_rounds, replay_states, stop_of
from discovery.data.packed_rounds import unpack_rounds
from discovery.errors import TraceError
from discovery.evaluation.replay_jobs import SANDBOXES_PER_JOB, retry_disturbed
from discovery.store import ServedEpisode

T = TypeVar("T")
Decider = Controller | RemoteController
EpisodeRun = Callable[[Decider], Coroutine[Any, Any, T]]
"""Runs an episode under the controller it is given; it suspends only while a sandboxed controller decides."""

NO_FITTING_ACTION: Final = "no action within the token limit"
"""Shown for a decision where no action fits under the token limit."""


class Disagreement(NamedTuple):
    """A round in which the controller now decides differently."""

    request: str
    round: int  # from 0
    asked: str  # the actions decided now
    played: str  # the actions decided then


class UncheckedController(NamedTuple):
    """A controller whose decisions cannot be replayed."""

    controller: str
    digest: str
    why: str
    episodes: int


@dataclass(frozen=True)
class DecisionReport:
    """The result of replaying decisions."""

    episodes: int
    rounds: int  # rounds that were decided again; an end by the token limit counts as one
    agreed: int
    unreached: int  # rounds after a disagreement: the facts of a different round are unknown
    disagreements: Sequence[Disagreement]
    unchecked: Sequence[UncheckedController]


# Controllers


ControllerKey = tuple[str, str]
"""Name and digest of a controller."""


class KnownControllers(NamedTuple):
    """The controllers of some episodes: those that can be replayed, and why others cannot."""

    known: Mapping[ControllerKey, Spec]
    missing: Mapping[ControllerKey, str]


def find_controllers(episodes: Iterable[ServedEpisode], given: Sequence[Spec]) -> KnownControllers:
    """Find the controllers of episodes among the built-in and installed ones and those `given` from files."""
    known: dict[ControllerKey, Spec] = {}
    missing: dict[ControllerKey, str] = {}
    for name, digest in dict.fromkeys(controller_key(episode) for episode in episodes):
        spec = next((known_spec for known_spec in (*_built_in(name), *given) if known_spec.digest == digest), None)
        if spec is None:
            is_given = name in {given_spec.name for given_spec in given}
            problem = "the given file has another digest" if is_given else "no file was given"
            missing[name, digest] = f"{problem}; pass the original {name}.py with --controllers"
        elif spec.is_foreign and (lacking := _lacking()):
            missing[name, digest] = f"controllers cannot be sandboxed here: {lacking}"
        else:
            known[name, digest] = spec
    return KnownControllers(known, missing)


def controller_key(episode: ServedEpisode) -> ControllerKey:
    """Return the key of an episode's controller."""
    return episode.controller, episode.digest


def _built_in(name: str) -> list[Spec]:
    if name in discovered():
        return [parse_spec(name)]
    try:
        find(name)
    except UnknownController:
        return []
    return [Spec(name)]


def _lacking() -> str | None:
    return (spawner().proof or spawner().check()).lacking


def run_under_controller(spec: Spec, beta: float, limits: Limits, episodes: Sequence[EpisodeRun[T]]) -> list[T]:
    """Run episodes under one controller, sandboxed if it is foreign; no episode may have wider limits than `limits`.

    Work that the machine disturbs is repeated. Raises ControllerError if the controller does not load,
    SandboxUnavailable and MachineDisturbed.
    """
    if not spec.is_foreign:
        return [run_sync(episode(make(spec, beta))) for episode in episodes]
    processes = min(SANDBOXES_PER_JOB, len(episodes))
    return retry_disturbed(lambda: run_sandboxed(spec, beta, limits, episodes, processes))


# Decisions


def replay_decisions(episodes: Iterable[ServedEpisode], controllers: KnownControllers) -> DecisionReport:
    """Decide every round of episodes again: by the controller for those it decided, by the baseline for the rest.

    Each episode gets its own controller object, as when it was served. Raises TraceError, ControllerError,
    SandboxUnavailable.
    """
    count = rounds = agreed = unreached = 0
    unchecked: Counter[tuple[str, str, str]] = Counter()
    disagreements: list[Disagreement] = []
    for episode in episodes:
        if lacking := _unknown(episode):
            unchecked[*controller_key(episode), lacking] += 1
            continue
        count += 1
        for part in _parts(episode):
            spec = Spec(baseline_of(episode)) if part.by_baseline else controllers.known.get(controller_key(episode))
            if spec is None:
                unchecked[*controller_key(episode), controllers.missing[controller_key(episode)]] += 1
                continue
            same, disagreement = part.replay(spec)
            agreed += same
            rounds += same + (disagreement is not None)
            if disagreement is not None:
                disagreements.append(disagreement)
                unreached += part.decisions - same - 1
    unchecked_list = [UncheckedController(*key, episodes=number) for key, number in unchecked.items()]
    return DecisionReport(count, rounds, agreed, unreached, disagreements, unchecked_list)


def _unknown(episode: ServedEpisode) -> str | None:
    """Return which data is missing to replay an episode's decisions, or None."""
    if "limits" not in episode.about:
        return "the limits of its episodes are unknown"
    return "the rounds of its episodes are unknown" if episode.rounds and not episode.trace else None


def _parts(episode: ServedEpisode) -> list[_DecisionSegment]:
    """Return the decisions of an episode's controller, those of the baseline, and those after an escalation."""
    rounds, escalated_at = unpack_rounds(episode.trace), episode.about.get("escalated_at")
    last = len(rounds) if escalated_at is None else min(escalated_at, len(rounds))
    own = min(controller_rounds(episode), last)
    replaced = episode.about.get("fallback") is not None
    # Ending by the token limit is a decision: no action fitted. A refused round is unknown, and where all
    # branches were cut the answer is among the rounds.
    ended = stop_of(episode) is Stop.MAX_TOKENS and episode.about.get("refused") is None
    ended_before = ended and escalated_at is None
    parts = [
        _DecisionSegment(episode, rounds, 0, own, ended_before and not replaced, False),
        _DecisionSegment(episode, rounds, own, last, ended_before and replaced, True),
        _DecisionSegment(
            episode,
            rounds,
            last,
            len(rounds),
            ended and not ended_before,
            True,
            episode.about.get("escalated_beta", episode.beta),
        ),
    ]
    return [part for part in parts if part.decisions]


class _DecisionDiffersError(Exception):
    """The controller decided on other actions than the recorded ones."""


class _ReplayCompleteError(Exception):
    """All rounds of the segment have been decided again."""


class _DecisionSegment:
    """Rounds of an episode that one controller decided; an environment that returns their recorded facts."""

    def __init__(
        self,
        episode: ServedEpisode,
        rounds: Sequence[Round],
        start: int,
        until: int,
        ends: bool,
        by_baseline: bool,
        beta: float | None = None,  # None: that of the request
    ) -> None:
        self.by_baseline = by_baseline
        self._beta = episode.beta if beta is None else beta
        self._episode = episode
        self._rounds = rounds
        self._start = self._at = start
        self._until = until
        self._ends = ends  # the episode ended at the token limit, which took one more decision of this controller

    @property
    def decisions(self) -> int:
        """Number of decisions."""
        return self._until - self._start + self._ends

    def replay(self, spec: Spec) -> tuple[int, Disagreement | None]:
        """Return how many recorded decisions `spec` repeats, and the first one that it does not."""
        episode = self._episode
        limits = self._beginning().limits
        try:
            (differing,) = run_under_controller(spec, self._beta, limits, [self._follow])
        except BadFact as error:
            raise TraceError(f"{episode.request_id}: round {self._at} is impossible: {error}") from None
        repeated = self._at - self._start
        if differing is None:
            return repeated + self._ends, None
        return repeated, Disagreement(episode.request_id, self._at, differing, self._played)

    async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
        """Return the facts of the next round. Raises _DecisionDiffersError if `actions` are not the round's."""
        if self._at == self._until or list(actions) != list(self._rounds[self._at].actions):
            raise _DecisionDiffersError(format_actions(actions))
        self._at += 1
        return self._rounds[self._at - 1].facts

    def _beginning(self) -> State:
        """Return the state before the first round."""
        return next(islice(replay_states(self._episode), self._start, None))[0]

    async def _follow(self, decider: Decider) -> str | None:
        """Run the episode from its beginning under `decider`; return the first differing actions as text, or None."""
        self._at = self._start
        try:
            await run_episode(decider, self, self._beginning(), self._stop_at_end)
        except _ReplayCompleteError:
            return None
        except (_DecisionDiffersError, ControllerError) as error:
            return str(error)
        return None if self._ends and self._at == self._until else NO_FITTING_ACTION

    def _stop_at_end(self, state: State, played: Round) -> None:
        if self._at == self._until and not self._ends:
            raise _ReplayCompleteError

    @property
    def _played(self) -> str:
        return NO_FITTING_ACTION if self._at == self._until else format_actions(self._rounds[self._at].actions)


def format_actions(actions: Sequence[Action]) -> str:
    """Return actions as text, such as `3 × branch(), advance(2, TO_END), probe(2)`."""
    calls = [(call, len(list(group))) for call, group in groupby(map(_format_action, actions))]
    return ", ".join(call if count == 1 else f"{count} × {call}" for call, count in calls)


def _format_action(action: Action) -> str:
    intervals = "TO_END" if action.intervals == TO_END else str(action.intervals)
    arguments = [] if action.verb in (Verb.BRANCH, Verb.ANSWER) else [str(action.branch)]
    if action.verb is Verb.ANSWER:
        arguments.append(str(action.label))
    elif action.intervals > 1:
        arguments.append(intervals)
    return f"{call_name(action.verb).removesuffix('()')}({', '.join(arguments)})"
