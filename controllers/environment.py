"""The interface between the episode runner and what carries out its rounds: live, replayed or scripted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from controllers.actions import Action, Fact


class Environment(Protocol):
    """Carries out rounds for one episode. Implementations may suspend (live) or never do (replay)."""

    async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
        """Carry out one round and return when all of it is done.

        `actions` has passed `State.check`. The facts come in the order of the actions: one `Advanced` for each BRANCH
        and CONTINUE, one `Probed` for each PROBE, none for PRUNE and ANSWER. Different branches may run at
        once; the actions of one branch run in list order. A PROBE or CONTINUE whose branch has been finished by an
        earlier action of the round costs nothing: it repeats the final label (zero intervals and tokens).

        Labels are numbered from 0 by their first reveal in the episode, in the order of the facts.
        Exceptions of the implementation are propagated; the state is then as it was before the round.
        """
        ...


class SynchronousEnvironment(Environment, Protocol):
    """An environment that can also carry out a round at once, which saves a coroutine per round."""

    def carry_out(self, actions: Sequence[Action]) -> Sequence[Fact]:
        """Carry out one round, as `execute` does."""
        ...
