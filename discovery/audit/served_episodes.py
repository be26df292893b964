"""Replay the stored rounds of served episodes into the states that their controllers saw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from controllers import BadFact, Limits, Round, State, Stop
from discovery.data.packed_rounds import unpack_rounds
from discovery.errors import TraceError
from discovery.store.records import ServedEpisode

FIRST_BASELINE: Final = "short_m_at_k"
"""Fallback of episodes that do not name theirs: they were stored before there was another."""


def limits_of(episode: ServedEpisode) -> Limits:
    """Return an episode's limits; if they are unknown, limits under which its rounds are legal. Raises TraceError."""
    known = episode.about.get("limits") or {"interval": 1, "max_branches": max(1, episode.branches)}
    try:
        return Limits(**known)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TraceError(f"{episode.request_id}: its limits are invalid: {error}") from None


def replay_states(episode: ServedEpisode) -> Iterator[tuple[State, Round | None]]:
    """Yield the state before the first round, with None, and after each round, with the round. Raises TraceError.

    The state is one object that keeps changing.
    """
    state = State(limits_of(episode))
    yield state, None
    for played in unpack_rounds(episode.trace):
        try:
            state.apply(played.actions, played.facts)
        except (BadFact, IndexError) as error:
            raise TraceError(f"{episode.request_id}: round {state.rounds} is impossible: {error}") from None
        yield state, played


def stop_of(episode: ServedEpisode) -> Stop | None:
    """Return why an episode ended; None if for a reason that a state does not have, such as a disconnected client."""
    return Stop(episode.stop) if episode.stop in list(Stop) else None


def baseline_of(episode: ServedEpisode) -> str:
    """Return the name of the controller that takes over if the episode's own fails."""
    return episode.about.get("baseline", FIRST_BASELINE)


def controller_rounds(episode: ServedEpisode) -> int:
    """Return how many rounds the controller decided; the baseline decided those that followed."""
    return episode.about.get("decided", episode.rounds)
