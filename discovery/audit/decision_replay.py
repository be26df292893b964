"""Controllers of served episodes, asked again: shown the same facts, they must decide what they decided then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import ExitStack
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
from controllers.builtin import BASELINE, find
from controllers.episode import RemoteController
from controllers.loading import Spec, discovered, make, parse_spec
from controllers.sandbox.controller import run_together
from controllers.sandbox.deadline import Clock
from controllers.sandbox.handle import SandboxHandle
from controllers.sandbox.spawner import spawner
from discovery.audit.served_episodes import controller_rounds, replay_states, stop_of
from discovery.data.packed_rounds import unpack_rounds
from discovery.errors import TraceError
from discovery.evaluation.replay_jobs import SANDBOXES_PER_JOB, retry_disturbed
from discovery.store import ServedEpisode

T = TypeVar("T")
Decider = Controller | RemoteController
EpisodeRun = Callable[[Decider], Coroutine[Any, Any, T]]
"""Runs an episode under the controller it is given; suspends only where a sealed one decides."""

BASELINE_SPEC: Final = Spec(BASELINE)
NO_FITTING_ACTION: Final = "nothing that fits under the cap"
"""What is asked for where nothing can be."""


class Disagreement(NamedTuple):
    """A round that would have been another."""

    request: str
    round: int  # from 0
    asked: str  # for now
    played: str  # then


class UncheckedController(NamedTuple):
    """A controller that cannot be asked again."""

    controller: str
    digest: str
    why: str
    episodes: int


@dataclass(frozen=True)
class DecisionReport:
    """What came of asking again."""

    episodes: int
    rounds: int  # that were asked for again; an end under the cap counts as one
    agreed: int
    unreached: int  # after a disagreement: what another round would have brought nobody knows
    disagreements: Sequence[Disagreement]
    unchecked: Sequence[UncheckedController]


# Who decided


ControllerKey = tuple[str, str]
"""Name and digest of a controller."""


class KnownControllers(NamedTuple):
    """The controllers of some episodes: those that can be asked, and why others cannot."""

    known: Mapping[ControllerKey, Spec]
    missing: Mapping[ControllerKey, str]


def find_controllers(episodes: Iterable[ServedEpisode], given: Sequence[Spec]) -> KnownControllers:
    """Who decided in some episodes: built-in and discovered controllers, and those `given` from files."""
    known: dict[ControllerKey, Spec] = {}
    missing: dict[ControllerKey, str] = {}
    for name, digest in dict.fromkeys(controller_key(one) for one in episodes):
        spec = next((one for one in (*_built_in(name), *given) if one.digest == digest), None)
        if spec is None:
            other = "the file that was given is another" if name in {one.name for one in given} else "no file was given"
            missing[name, digest] = f"{other}; --controllers takes {name}.py as it was"
        elif spec.is_foreign and (lacking := _lacking()):
            missing[name, digest] = f"controllers cannot be sealed here: {lacking}"
        else:
            known[name, digest] = spec
    return KnownControllers(known, missing)


def controller_key(episode: ServedEpisode) -> ControllerKey:
    """What its controller is known by."""
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
    """Run episodes under one controller, a foreign one sealed; none may have wider limits than `limits`.

    Where the machine disturbs them they are begun anew. Raises ControllerError if it does not load,
    SandboxUnavailable and MachineDisturbed.
    """
    if not spec.is_foreign:
        return [run_sync(episode(make(spec, beta))) for episode in episodes]
    return retry_disturbed(lambda: _run_sealed(spec, beta, limits, episodes))


def _run_sealed(spec: Spec, beta: float, limits: Limits, episodes: Sequence[EpisodeRun[T]]) -> list[T]:
    with ExitStack() as stack:
        workers: list[SandboxHandle] = []
        for _ in range(min(SANDBOXES_PER_JOB, len(episodes))):
            worker = spawner().spawn(clock=Clock.CPU)
            stack.callback(worker.close)
            worker.load(spec)
            workers.append(worker)
        return run_together(workers, beta, limits, episodes)


# What they decide now


def replay_decisions(episodes: Iterable[ServedEpisode], who: KnownControllers) -> DecisionReport:
    """Ask for every round of episodes again: its controller for those it decided, the baseline for the rest.

    Each episode has its controller to itself, as it had then. Raises TraceError, ControllerError, SandboxUnavailable.
    """
    count = rounds = agreed = unreached = 0
    unchecked: Counter[tuple[str, str, str]] = Counter()
    found: list[Disagreement] = []
    for episode in episodes:
        if lacking := _unknown(episode):
            unchecked[*controller_key(episode), lacking] += 1
            continue
        count += 1
        for part in _parts(episode):
            spec = BASELINE_SPEC if part.by_baseline else who.known.get(controller_key(episode))
            if spec is None:
                unchecked[*controller_key(episode), who.missing[controller_key(episode)]] += 1
                continue
            right, parted = part.ask(spec)
            agreed += right
            rounds += right + (parted is not None)
            if parted is not None:
                found.append(parted)
                unreached += part.decisions - right - 1
    told = [UncheckedController(*one, episodes=number) for one, number in unchecked.items()]
    return DecisionReport(count, rounds, agreed, unreached, found, told)


def _unknown(episode: ServedEpisode) -> str | None:
    """What is not known of an episode that would have to be."""
    if "limits" not in episode.about:
        return "the limits of its episodes are not known"
    return "the rounds of its episodes are not known" if episode.rounds and not episode.trace else None


def _parts(episode: ServedEpisode) -> list[_DecisionSegment]:
    """The decisions its controller took, and those the baseline took."""
    rounds = unpack_rounds(episode.trace)
    own = min(controller_rounds(episode), len(rounds))
    replaced = episode.about.get("fallback") is not None
    # Under the cap it is a decision for which nothing was left; a round that was refused is not known, and where all
    # branches were cut the answer is among the rounds.
    ended = stop_of(episode) is Stop.MAX_TOKENS and episode.about.get("refused") is None
    parts = [
        _DecisionSegment(episode, rounds, 0, own, ended and not replaced, False),
        _DecisionSegment(episode, rounds, own, len(rounds), ended and replaced, True),
    ]
    return [part for part in parts if part.decisions]


class _DecisionDiffersError(Exception):
    """What was asked for is not what was played."""


class _ReplayCompleteError(Exception):
    """All that was to be asked for has been."""


class _DecisionSegment:
    """Rounds of an episode that one controller decided; an environment that tells what they brought."""

    def __init__(
        self, episode: ServedEpisode, rounds: Sequence[Round], start: int, until: int, ends: bool, by_baseline: bool
    ) -> None:
        self.by_baseline = by_baseline
        self._episode = episode
        self._rounds = rounds
        self._start = self._at = start
        self._until = until
        self._ends = ends  # the episode ended under the cap, when this controller was asked once more

    @property
    def decisions(self) -> int:
        """How many there are."""
        return self._until - self._start + self._ends

    def ask(self, spec: Spec) -> tuple[int, Disagreement | None]:
        """How many `spec` takes as they were taken, and the first it does not."""
        episode = self._episode
        limits = self._beginning().limits
        try:
            (asked,) = run_under_controller(spec, episode.beta, limits, [self._follow])
        except BadFact as error:
            raise TraceError(f"{episode.request_id}: round {self._at} cannot have been: {error}") from None
        right = self._at - self._start
        if asked is None:
            return right + self._ends, None
        return right, Disagreement(episode.request_id, self._at, asked, self._played)

    async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
        """What the next round brought. Raises _Parted if `actions` are not its."""
        if self._at == self._until or list(actions) != list(self._rounds[self._at].actions):
            raise _DecisionDiffersError(format_actions(actions))
        self._at += 1
        return self._rounds[self._at - 1].facts

    def _beginning(self) -> State:
        """The state before its first round."""
        return next(islice(replay_states(self._episode), self._start, None))[0]

    async def _follow(self, decider: Decider) -> str | None:
        """Run the episode from its beginning under `decider`; what it asks for that was not played, if anything."""
        self._at = self._start
        try:
            await run_episode(decider, self, self._beginning(), self._look)
        except _ReplayCompleteError:
            return None
        except (_DecisionDiffersError, ControllerError) as error:
            return str(error)
        return None if self._ends and self._at == self._until else NO_FITTING_ACTION

    def _look(self, state: State, played: Round) -> None:
        if self._at == self._until and not self._ends:
            raise _ReplayCompleteError

    @property
    def _played(self) -> str:
        return NO_FITTING_ACTION if self._at == self._until else format_actions(self._rounds[self._at].actions)


def format_actions(actions: Sequence[Action]) -> str:
    """`3 × branch(), advance(2, TO_END), probe(2)`."""
    words = [(word, len(list(group))) for word, group in groupby(map(_word, actions))]
    return ", ".join(word if count == 1 else f"{count} × {word}" for word, count in words)


def _word(action: Action) -> str:
    verb = "advance" if action.verb is Verb.CONTINUE else action.verb.name.lower()
    intervals = "TO_END" if action.intervals == TO_END else str(action.intervals)
    said = [] if action.verb in (Verb.BRANCH, Verb.ANSWER) else [str(action.branch)]
    if action.verb is Verb.ANSWER:
        said.append(str(action.label))
    elif action.intervals > 1:
        said.append(intervals)
    return f"{verb}({', '.join(said)})"
