"""The owner's side of an episode that a sandbox process decides: its turns, and its rounds in replay.

This module can be compiled (`controllers/core/compiled.py`). `EpisodeRounds` is
`run_episode` without coroutines, which took a third of the owner's time for a round.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Self

from controllers.actions import Action, Fact
from controllers.environment import SynchronousEnvironment
from controllers.errors import ControllerError
from controllers.sandbox.frames import Decision, FactCodes, encode_begin, encode_turn, printable
from controllers.state import Round, State, Stop


class EpisodeTurns:
    """Encodes the turns of one episode for its process, and checks its decisions."""

    def __init__(self, seat: int, beta: float, codes: FactCodes) -> None:
        self._seat = seat
        self._beta = beta
        self._codes = codes
        self._rounds = 0  # rounds that the process knows
        self._asked: Sequence[Action] = ()
        self._facts: Sequence[Fact] = ()  # of the latest round that the process knows

    def turn(self, state: State) -> list[int]:
        """Return the turn that precedes a decision on `state`."""
        last = state.last
        if last is None:
            return encode_begin(self._seat, self._beta, state.limits)
        self._rounds += 1
        if state.rounds != self._rounds:
            raise ControllerError("a sandboxed controller must see every round of its episode")
        before, self._facts = self._facts, last.facts
        return encode_turn(self._seat, self._asked, last, self._codes, before)

    def take(self, decision: Decision) -> Sequence[Action]:
        """Return the actions of a decision; None stands for those before. Raises ControllerError for a complaint."""
        if decision is None:
            return self._asked
        if isinstance(decision, str):
            raise ControllerError(printable(decision))
        self._asked = decision
        return decision


class EpisodeRounds:
    """Runs an episode to its end when it is awaited. It suspends with each turn, and is sent the decision on it.

    Awaiting it raises what `run_episode` raises.
    """

    def __init__(
        self,
        turns: EpisodeTurns,
        environment: SynchronousEnvironment,
        state: State,
        on_round: Callable[[State, Round], None] | None,
    ) -> None:
        self._turns = turns
        self._carry_out = environment.carry_out
        self._state = state
        self._on_round = on_round
        self._started = False

    def __await__(self) -> Generator[list[int], Decision, None]:
        return self  # type: ignore[return-value]  # it has the methods of a generator that are used

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[int]:
        """Return the first turn. Later, Python sends None by calling this."""
        if self._started:
            return self.send(None)
        self._started = True
        if self._state.stop is not None:
            raise StopIteration
        return self._turns.turn(self._state)

    def send(self, decision: Decision) -> list[int]:
        """Play the round that was decided and return the next turn. Raises StopIteration once the episode has ended."""
        state = self._state
        decided = self._turns.take(decision)
        state.check(decided)
        actions = state.affordable(decided)
        if not actions:
            state.end(Stop.MAX_TOKENS)
            raise StopIteration
        state.apply(actions, self._carry_out(actions))
        if self._on_round is not None and state.last is not None:
            self._on_round(state, state.last)
        if state.stop is not None:
            raise StopIteration
        return self._turns.turn(state)
