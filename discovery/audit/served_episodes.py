"""Served episodes gone through again: what rows of the store say, as the states their controllers saw."""

from __future__ import annotations

from collections.abc import Iterator

from controllers import BadFact, Limits, Round, State, Stop
from discovery.data.packed_rounds import unpack_rounds
from discovery.errors import TraceError
from discovery.store.records import ServedEpisode


def limits_of(episode: ServedEpisode) -> Limits:
    """What an episode could use; of one whose limits are not known, no more than that nothing of it was illegal.

    Raises TraceError.
    """
    known = episode.about.get("limits") or {"interval": 1, "max_branches": max(1, episode.branches)}
    try:
        return Limits(**known)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TraceError(f"{episode.request_id}: its limits cannot be read: {error}") from None


def replay_states(episode: ServedEpisode) -> Iterator[tuple[State, Round | None]]:
    """The state before the first round, with None, and after each, with the round. It is one object that goes on
    changing. Raises TraceError."""
    state = State(limits_of(episode))
    yield state, None
    for played in unpack_rounds(episode.trace):
        try:
            state.apply(played.actions, played.facts)
        except (BadFact, IndexError) as error:
            raise TraceError(f"{episode.request_id}: round {state.rounds} cannot have been: {error}") from None
        yield state, played


def stop_of(episode: ServedEpisode) -> Stop | None:
    """Why an episode ended; None if for no reason a state knows, such as that its client left."""
    return Stop(episode.stop) if episode.stop in list(Stop) else None


def controller_rounds(episode: ServedEpisode) -> int:
    """How many rounds its controller decided; the baseline decided those that followed."""
    return episode.about.get("decided", episode.rounds)
